"""A setting: everything that must be equal for all algorithms of a comparison, field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, TypeAlias

from annotated_types import Interval

from bench.attacks import ATTACKS, EPSILON, STEP
from bench.data import AUGMENTATIONS
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


FIELDS = tuple(field.name for field in fields(Setting))
