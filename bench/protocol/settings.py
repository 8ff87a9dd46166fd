"""Settings: named, documented bundles of everything that must be equal for all algorithms of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, TypeAlias

from annotated_types import Interval

from bench.attacks import ATTACKS, EPSILON, STEP
from bench.data import AUGMENTATIONS
from bench.dataset import Dataset
from bench.models import MODELS
from bench.models.balanced import Balanced
from bench.models.layers import NORMS, STATISTICS_POLICIES
from bench.optim import OPTIMISERS
from bench.protocol.refusal import BadConfig as BadConfig
from bench.ranges import Momentum, Positive, Share, SomeShare, Strength, settle

PROFILES = ("exponential", "step", "pareto")
SAMPLINGS = ("fixed", "independent")
CLIENT_TESTS = ("matched", "fedloge", "balanced", "global", "own")
GROUP_RULES = ("thirds", "count", "cumulative")
BEYOND_TRAINING = ("global", "own")
"""Client tests that may have classes which the client never trained on: ruling those out would rule out right answers.
"""
CLIENT_WEIGHTS = ("size", "uniform")
DECAYED = ("all", "weights")
MATCHED = ("rounds", "samples")
SIZES = ("equal", "unequal")
USERS = ("merge", "sample")
SHIFTS = ("none", "colour", "contrast", "blur", "noise")
OF_ADAMW: Mapping[str, object] = {"momentum": 0.0, "lr": 0.001}
"""What a setting that was written for SGD has instead with AdamW, where a person says nothing of it."""
WITHOUT_ALPHA = ("iid", "users", "classes")
"""Partitions that no concentration shapes."""
NAMED = {
    "norm": NORMS,
    "statistics": STATISTICS_POLICIES,
    "augment": AUGMENTATIONS,
    "profile": PROFILES,
    "client_test": CLIENT_TESTS,
    "sampling": SAMPLINGS,
    "groups": GROUP_RULES,
    "client_weights": CLIENT_WEIGHTS,
    "match": MATCHED,
    "decayed": DECAYED,
    "sizes": SIZES,
    "users": USERS,
    "attack": ATTACKS,
    "shift": SHIFTS,
    "optimiser": OPTIMISERS,
}
"""Fields of a setting that take one of some names."""
READ_BY = {"classes_per_client": "classes", "sizes": "classes", "users": "users"}
"""Fields that one partition alone reads."""
OF_BALANCED: Mapping[str, object] = {"kappa": 1.0, "server_momentum": 1.0, "balance": False, "penalty": 0.0}
"""Fields that balanced statistics alone read, at the values with which these are shared ones."""
OF_AN_ATTACK: Mapping[str, object] = {"attack_steps": None, "attack_images": 1000}
"""Fields that nothing reads where no test is attacked; how far a pixel moves is training's too."""
OF_SHIFT: Mapping[str, object] = {"severity": 1.0, "unseen_severity": None}
"""Fields that a shift alone reads."""
OF_OPEN: Mapping[str, object] = {"shots": 5, "ways": None}
"""Fields that an open-set test alone reads."""
LATER: Mapping[str, object] = {
    "classes_per_client": None, "sizes": "equal", "users": "merge", **OF_BALANCED,
    "attack": "none", "attack_epsilon": EPSILON, "attack_step": STEP, **OF_AN_ATTACK, "shift": "none", **OF_SHIFT,
    "open_classes": 0, **OF_OPEN, "optimiser": "sgd",
}  # fmt: skip
"""Fields that came when results were stored already, and what runs did before. With this value they are left out of a
run's identity and of what it stores, so that a run of then and the same of now are one."""
_MANY = 100_000  # rounds, clients, examples of a batch: an end to what would not end
_Many: TypeAlias = Annotated[int, Interval(ge=1, le=_MANY)]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A protocol. Two results may stand in one table if all fields but the name are equal."""

    name: str
    model: str
    """Name in `bench.models.MODELS`."""
    norm: str = "group"
    """"group", "layer" or "batch", of networks that have norm layers; "layer" of those that can have no other, where
    nothing is said."""
    statistics: str = "shared"
    """What happens to batch norm's running statistics: "shared", "personal", "frozen", or "balanced", which is shared
    with the four fields that follow."""
    kappa: Share = 1.0
    """How quickly the momentum of running statistics stops falling, over the steps of a client's visit and over rounds:
    0 is the plain mean, 1 one momentum for all."""
    server_momentum: SomeShare = 1.0
    """How much of the averaged statistics the server takes up in a round, before kappa; 1 is all, unless that is 0."""
    balance: bool = False
    """Whether norm layers weigh the classes of a batch, by weights that are trained, sent and averaged."""
    penalty: Strength = 0.0
    """Times the distance of a batch's statistics from the running ones is added to every loss."""
    clients: _Many | None
    """All clients, held-out ones included; None: as many as the dataset has natural users."""
    unseen: Annotated[int, Interval(ge=0, lt=_MANY)] = 0
    """Clients (the last ones) held out of training, tested after adaptation."""
    unseen_labels: bool = True
    """Whether their training images have labels; without, they can only adapt in ways that need none."""
    shift: str = "none"
    """How each client's pictures are changed, training and test images alike, by a draw of its own: "colour",
    "contrast", "blur", "noise" or "none" (`bench.splits.shift`)."""
    severity: Strength = 1.0
    """How strong the shift is; 0 is none."""
    unseen_severity: Strength | None = None
    """Of clients held out of training; None: the same."""
    open_classes: Annotated[int, Interval(ge=0, lt=_MANY)] = 0
    """Classes, drawn by the split's seed, of which no client has an image. Clients held out of training are asked about
    them in an open-set test (`bench.training.open_set`)."""
    shots: Annotated[int, Interval(ge=1, le=1_000)] = 5
    """Of an open-set test: labelled images of each known class."""
    ways: Annotated[int, Interval(ge=2, lt=_MANY)] | None = None
    """Known classes of a client's open-set test at most, drawn; None: all of which it has so many images."""
    participation: SomeShare = 1.0
    """Share of the training clients drawn in each round, uniformly, without replacement."""
    sampling: str = "fixed"
    """"fixed": cohorts of one size; "independent": each client takes part with the probability `participation`, so that
    cohorts differ in size and may be empty."""
    lost: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Probability that what a client sends in a round does not reach the server."""
    client_weights: str = "size"
    """Whose model counts how much where a server averages: "size", by training examples, or "uniform", all alike that
    have any."""
    rounds: _Many
    match: str = "rounds"
    """What is equal for all algorithms: "rounds", or "samples": each does so many rounds that it processes about the
    samples that plain local training processes in `rounds` rounds, tuning before the test included."""
    final_visit: bool = False
    """Whether after the last round every training client does its local work once more on the final broadcast, keeps
    its private state, and sends nothing: FedRep's last round, for every algorithm alike."""
    epochs: Annotated[int, Interval(ge=1, le=1_000)]
    """Local epochs of a round."""
    batch_size: _Many
    lr: Positive
    lr_decay: SomeShare = 1.0
    """Factor on the learning rate after each round."""
    lr_steps: tuple[tuple[Annotated[float, Interval(gt=0, lt=1)], Positive], ...] = ()
    """Further factors, each from a share of the rounds on (rounded down): ((0.5, 0.1), (0.75, 0.1)) is a tenth from
    half of the rounds on and a hundredth in the last quarter."""
    lr_cosine: bool = False
    """Whether the learning rate falls besides as half a cosine, to zero after the last round."""
    optimiser: str = "sgd"
    """By what clients train: "sgd", or "adamw" (beta 0.9 and 0.999, epsilon 1e-8, decoupled decay), whose moments start
    at zero in each local training. It has no momentum, and the learning rate is 0.001 where nothing is said."""
    momentum: Momentum = 0.0
    """Of SGD."""
    weight_decay: Strength = 0.0
    decayed: str = "all"
    """What weight decay pulls at: "all" parameters, or "weights", which leaves out biases and norm layers."""
    clip: Positive | None = None
    """Largest gradient norm; None for no clipping."""
    augment: str = "none"
    """One of `bench.data.AUGMENTATIONS`."""
    profile: str = "exponential"
    """Shape of the long tail: "exponential", "step" or "pareto"."""
    imbalance: Annotated[float, Interval(ge=1, le=1_000_000)] | None = 1.0
    """Largest class over smallest class; None: every image is kept, the tail is the natural one."""
    partition: str = "dirichlet"
    """Name in `bench.splits.split.PARTITIONS`."""
    alpha: Positive | None = 0.5
    """Dirichlet concentration, or shards of a client for "shards"; None for partitions that have none."""
    classes_per_client: _Many | None = None
    """Of each client, exactly, by "classes" (two where nothing is said); None for other partitions."""
    sizes: str = "equal"
    """How "classes" shares a class among the clients that have it: "equal", or "unequal", by a weight of each client,
    drawn log-normally: the logarithm has standard deviation 1."""
    users: str = "merge"
    """What "users" does with more natural users than clients: "sample", the default then, draws as many as there are
    clients, and the others are in no client; "merge" deals them all."""
    split_seed: Annotated[int, Interval(ge=0, lt=2**32)] | None = None
    """Seed of the partition and the clients' test images; None: the run's, so that both change together."""
    client_test: str = "matched"
    """How client test sets are drawn: "matched" (distributed as the client's training images), "fedloge" (the same,
    rounded down), "balanced" (equally many of each class that the client has), "global" (distributed as all clients'
    training images together), or "own", the users' own test images."""
    groups: str = "thirds"
    """Rule of many / medium / few: "thirds" of the classes by size, "count" (> 100, 20-100, < 20) or "cumulative"
    (75 %, 95 %)."""
    eval_every: _Many = 1
    """Rounds between evaluations; the last round is always evaluated."""
    eval_clients: _Many | None = None
    """Clients whose personal models are tested, drawn once by the seed; None: all."""
    attack: str = "none"
    """Whether models are tested on attacked images besides, after the last round: "none", "pgd", or "apgd", whose steps
    adapt and which takes some 50 times as long: see `bench.attacks` and `bench.training.apgd`."""
    attack_epsilon: Annotated[float, Interval(ge=0, le=1)] = EPSILON
    """Most that an attack moves a pixel of those in [0, 1], in tests and in training against attacks: 8/255."""
    attack_step: Annotated[float, Interval(ge=0, le=1)] = STEP
    """That it moves a pixel in one step: 2/255; the steps of "apgd" are its own."""
    attack_steps: Annotated[int, Interval(ge=1, le=10_000)] | None = None
    """Steps of an attack on a test; None: 20 of "pgd", 100 of "apgd"."""
    attack_images: _Many = 1000
    """Test images that are attacked, drawn once by the seed; a client's own model on those of them that are its own."""
    auxiliary: str | None = None
    """Images at the server: `own:N` (N of each class that the tail cut away) or `DATASET:N`; only for algorithms that
    need some, and told with them, so that the others' results stand in the same table.
    """

    def __post_init__(self) -> None:
        settle(self, BadConfig)
        if self.clients is not None:
            self.training_clients(self.clients)
        if self.model not in MODELS:
            raise BadConfig(f"model = {self.model!r}: must be one of {', '.join(MODELS)}")
        for name, allowed in (*NAMED.items(),):
            value = getattr(self, name)
            _require(value in allowed, name, value, f"must be one of {', '.join(allowed)}")
        has_own = f"optimiser = {self.optimiser} has moments of its own and reads none; leave it out"
        _require(self.optimiser == "sgd" or not self.momentum, "momentum", self.momentum, has_own)

    @property
    def balanced(self) -> Balanced | None:
        """How running statistics move; None: by one momentum."""
        if self.statistics != "balanced":
            return None
        return Balanced(**{field: getattr(self, field) for field in OF_BALANCED})

    @property
    def shifts(self) -> bool:
        """Whether any picture is changed."""
        return self.shift != "none" and (self.severity_of(False) > 0 or self.severity_of(True) > 0)

    def severity_of(self, unseen: bool) -> float:
        """Give how strong a client's shift is."""
        return self.unseen_severity if unseen and self.unseen_severity is not None else self.severity

    def training_clients(self, clients: int) -> int:
        """Give how many of all clients may take part in training.

        Raises:
            BadConfig: More are held out than there are.
        """
        _require(self.unseen < clients, "unseen", self.unseen, f"must be in 0..{clients - 1} (clients - 1)")
        return clients - self.unseen

    def cohort_size(self, clients: int) -> int:
        """Give how many of all clients take part in a round: at least one."""
        exactly = round(self.participation * self.training_clients(clients), 9)  # 0.29 x 100 is 28.999999999999996
        return max(int(exactly), 1)

    def seed_of_split(self, seed: int) -> int:
        """Give the seed of the partition and the clients' test images in a run of this seed."""
        return seed if self.split_seed is None else self.split_seed

    def lr_at(self, round: int) -> float:
        """Give the learning rate of a round, 0..rounds-1."""
        lr = self.lr * self.lr_decay**round
        for share, factor in self.lr_steps:
            lr *= factor if round + 1 > share * self.rounds + 1e-9 else 1.0
        return lr * (1 + math.cos(math.pi * round / self.rounds)) / 2 if self.lr_cosine else lr


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise BadConfig(f"{name} = {value!r}: {rule}")


def quick(dataset: Dataset) -> Setting:
    """Our own small protocol: minutes on two cores, not comparable with any paper.

    20 clients, 40 % a round, SGD 0.05 with momentum 0.5, imbalance 10, Dirichlet 0.5. Images of 8 pixels:
    MLP, 30 rounds of 2 epochs (seconds a run; about 85-90 % generic on digits). 28 pixels: small CNN, 30
    rounds. 32 pixels: ResNet-8, 50 rounds of 1 epoch (about an hour a run on one core). Photographs of 48 pixels
    and more: ResNet-18 with a stride in its stem, of 128 and more: ResNet-50; these want a GPU. A dataset may
    replace fields (`bench show DATASET` has them).
    """
    side = _side(dataset)
    if side <= 8:
        model, rounds, epochs, batch_size, lr = "mlp", 30, 2, 16, 0.05
    elif side <= 28:
        model, rounds, epochs, batch_size, lr = "small_cnn", 30, 1, 32, 0.05
    else:
        model, rounds, epochs, batch_size, lr = _for_photographs("resnet8", dataset), 50, 1, 32, 0.05
    setting = Setting(
        name="quick",
        model=model,
        clients=20,
        participation=0.4,
        rounds=rounds,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=0.5,
        augment="none" if side <= 28 else "crop_flip" if dataset.flip else "crop",
        imbalance=10.0,
        partition="dirichlet",
        alpha=0.5,
        groups=dataset.groups,
        eval_every=1 if side <= 8 else 5,
    )
    return replace(setting, **dataset.quick)  # type: ignore[arg-type]


def _side(dataset: Dataset) -> int:
    """Give the height of images; 1 for what has none."""
    return dataset.image_shape[1] if len(dataset.image_shape) == 3 else 1


def _for_photographs(model: str, dataset: Dataset) -> str:
    """Give the network for larger images in place of one for 32 pixels."""
    side = _side(dataset)
    return model if side < 48 else "resnet18_64" if side < 128 else "resnet50"


def fedloge(dataset: Dataset) -> Setting:
    """The protocol of FedLoGe's main table: 500 rounds of 5 epochs, batch 8, SGD 0.03 with momentum 0.5, without
    decay, batch norm averaged.

    Up to 10 classes ResNet-18 and 40 clients, above ResNet-34 and 20, ResNet-50 for photographs (of 128 pixels and
    more; below, ResNet-18); full participation; Dirichlet 0.5, imbalance 50. The authors' logs: 15-31 hours a run on
    their GPU; about 79 % (CIFAR-10) and 47 % (CIFAR-100) generic with the SSE-C head. Its groups are cut by training
    images here and by clients' test images there, and models are tested every 10 rounds instead of after each.
    Source: the released code and its logs, github.com/ZackZikaiXiao/FedLoGe.
    """
    few = dataset.num_classes <= 10
    return Setting(
        name="fedloge",
        model=_for_photographs("resnet18" if few else "resnet34", dataset),
        norm="batch",
        clients=40 if few else 20,
        rounds=500,
        epochs=5,
        batch_size=8,
        lr=0.03,
        momentum=0.5,
        augment="crop_flip",
        imbalance=50.0,
        partition="fedloge",
        alpha=0.5,
        client_test="fedloge",
        groups="cumulative",
        eval_every=10,
    )


def creff(dataset: Dataset) -> Setting:
    """The protocol of CReFF and of most tables in its line: 20 clients, 8 a round, 200 rounds of 10 epochs,
    batch 32, SGD 0.1 without momentum or decay, constant.

    ResNet-8 with batch norm, `feddf_recut` partition with alpha 0.5 (hence equal client sizes), augmentation
    drawn once a batch. Imbalance 50; the tables have 10, 50 and 100. About 28 times the work of `quick`. Models are
    tested every 10 rounds instead of after each.
    Source: github.com/shangxinyi/CReFF-FL.
    """
    return Setting(
        name="creff",
        model=_for_photographs("resnet8", dataset),
        norm="batch",
        clients=20,
        participation=0.4,
        rounds=200,
        epochs=10,
        batch_size=32,
        lr=0.1,
        augment="batch_crop_flip",
        imbalance=50.0,
        partition="feddf_recut",
        alpha=0.5,
        groups=dataset.groups,
        eval_every=10,
    )


def gbme(dataset: Dataset) -> Setting:
    """A large federation after GBME: 100 clients, 20 a round, Dirichlet 0.1, 2000 rounds of 2 epochs, SGD 0.6
    with momentum 0.9 and decay 5e-4 of all parameters, from four fifths of the rounds on a twentieth of the rate.

    Up to 10 classes 10 clients, 5 a round, Dirichlet 0.5 and SGD 0.1. Imbalance 100. GPU days.

    What it cannot say: the network is a plain ResNet-32 (the paper's has a last stage for each expert); on CIFAR-100
    the code also blanks a square of 16 pixels; its groups on CIFAR-100 are cut at the classes 35 and 70; ImageNet-LT
    has another network and a second step at nine tenths.
    Source: github.com/Spinozaaa/Federated-Long-tailed-Learning.
    """
    few = dataset.num_classes <= 10
    return Setting(
        name="gbme",
        model="resnet32",
        norm="batch",
        clients=10 if few else 100,
        participation=0.5 if few else 0.2,
        rounds=2000,
        epochs=2,
        batch_size=64,
        lr=0.1 if few else 0.6,
        lr_steps=((0.8, 0.05),),
        momentum=0.9,
        weight_decay=5e-4,
        augment="crop_flip",
        imbalance=100.0,
        partition="lda",
        alpha=0.5 if few else 0.1,
        groups=dataset.groups,
        eval_every=50,
    )


def redgrape(dataset: Dataset) -> Setting:
    """Many rounds after RedGrape: 50 clients, 10 a round, Dirichlet 1, 1000 rounds of 5 epochs, ResNet-56.

    Batch 64, SGD 0.1 with momentum 0.9, without decay, gradients clipped at 1; imbalance 100. GPU days.

    What it cannot say: the code deals clients of equal size, each with class shares from a Dirichlet of the global
    shares times alpha, more skewed than `lda` with the same alpha; it also blanks a square of 16 pixels; it tests after
    each round.
    Source: github.com/keven980716/Federated_Learning_Experiments.
    """
    return Setting(
        name="redgrape",
        model="resnet56",
        norm="batch",
        clients=50,
        participation=0.2,
        rounds=1000,
        epochs=5,
        batch_size=64,
        lr=0.1,
        momentum=0.9,
        clip=1.0,
        augment="crop_flip",
        imbalance=100.0,
        partition="lda",
        alpha=1.0,
        groups=dataset.groups,
        eval_every=10,
    )


def airbench(dataset: Dataset) -> Setting:
    """The protocol of airbench94: one client that holds all images, 10 rounds of an epoch, batch 1024, alternating
    flip; not federated, it says how good a trainer this engine is.

    SGD 1.5 with momentum 0.85 and decay 0.0153 / 11.5 of all parameters, constant, which is where the code's rates lie
    for filters and the head: 11.5 / (1 + 1 / 0.15) for the summed loss of 1024 images. Its schedule, the other rate of
    biases, label smoothing and Lookahead are the algorithm `airbench`; `centralised` is plain SGD beside. An hour or
    two a run on two cores. Images of at least 25 pixels.

    What it cannot say: the code drops the last batch of an epoch, which is smaller, and ends at 9.9 epochs. Models are
    tested once, at the end.
    Source: Jordan 2024, https://arxiv.org/abs/2404.00498, and github.com/KellerJordan/cifar10-airbench.
    """
    return Setting(
        name="airbench",
        model="airbench94",
        norm="batch",
        clients=1,
        rounds=10,
        epochs=1,
        batch_size=1024,
        lr=1.5,
        momentum=0.85,
        weight_decay=0.0153 / 11.5,
        augment="altflip" if dataset.flip else "crop",
        imbalance=1.0,
        partition="iid",
        alpha=None,
        groups=dataset.groups,
        eval_every=10,
    )


SETTINGS: dict[str, Callable[[Dataset], Setting]] = {
    "quick": quick,
    "fedloge": fedloge,
    "creff": creff,
    "gbme": gbme,
    "redgrape": redgrape,
    "airbench": airbench,
}
"""Name to the bundle for a balanced dataset; `named` adapts it to others."""


def named(name: str, dataset: Dataset) -> Setting:
    """Give a setting as it is for a dataset: natural tails are left as they are, natural users are the clients.

    Args:
        name: In `SETTINGS`.
        dataset: Its facts are read, not its files.
    """
    setting = SETTINGS[name](dataset)
    if dataset.tail != "made":
        setting = replace(setting, imbalance=None)
    if dataset.own_clients:
        setting = replace(setting, partition="users", clients=None)
        if dataset.own_tests:
            setting = replace(setting, client_test="own")
    if not dataset.pictures:  # there is nothing to shift or mirror
        setting = replace(setting, augment="none")
        if dataset.image_shape[1:] == (1, 1):  # features
            setting = replace(setting, model="frozen")
        elif len(dataset.image_shape) != 3:
            setting = replace(setting, model="mlp")
    return setting if setting.partition not in WITHOUT_ALPHA else replace(setting, alpha=None)


FIELDS = tuple(field.name for field in fields(Setting))
