"""The named settings: our own small protocol, those of papers, and what a dataset changes of either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.dataset import Dataset
from bench.protocol.settings import WITHOUT_ALPHA, Setting


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
