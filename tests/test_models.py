"""Networks, weights from elsewhere, and features made once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import DataDamaged, DataMissing, Dataset, Splits, Tree, keys, models, tree
from bench.command.embed import embed_command
from bench.contract import toy
from bench.data import Images
from bench.dataset import Labels
from bench.files import prepared
from bench.files.prepared import Chunk, Plan
from bench.files.unfinished import writing
from bench.models import layers, weights
from bench.models.mobilenets import MobileNetV2
from bench.models.networks import Network
from bench.models.resnets import ResNet50
from bench.models.weights import BadWeights
from bench.plugins.registry import ALGORITHMS, DATASETS, label
from bench.preparing.embedding import CHUNK, Embedding
from bench.protocol.bundles import SETTINGS, named
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from tests.by_hand import short
from tests.trees import odd

# Networks ---------------------------------------------------------------------------------------------------


def fingerprint(model: models.Model) -> str:
    """Hash the initial tree; in steps of 1/4096, as another processor's logarithm may differ in its last bit."""
    steps = tree.map(lambda leaf: (leaf * 4096).round().to(torch.int32), model.init(keys.key(0)))
    return tree.digest([steps])[:16]


@pytest.mark.parametrize(
    ("name", "norm", "expected"),
    [
        ("linear", "group", "f6f80ae6ad0ce5cd"),
        ("mlp", "group", "49b30ea27246622d"),
        ("small_cnn", "group", "fc0d85e33b08ab9d"),
        ("fedavg_cnn", "group", "717daf4e8c3882d4"),
        ("resnet8", "group", "2c3786d059a0f998"),
        ("resnet8", "batch", "b4ae879e038f65c0"),
        ("resnet18", "group", "76a39b0960ffa83e"),
        ("resnet32", "group", "477baa173925c450"),
        ("resnet34", "group", "9a0c7bc7d28c93c0"),
        ("resnet56", "batch", "ffc88961ca9e8200"),
        ("lenet5", "group", "4aa01abb2463f07a"),
        ("resnet20", "batch", "f31f045417494051"),
        ("mobilenet_v2", "group", "37c0e30e4d5bf681"),
        ("adapter", "group", "c5f7349203b12fcb"),
        ("light_cnn", "group", "2cedd4b419ad16ca"),
        ("airbench94", "batch", "900881835a8a8e1e"),
        ("vit_mini", "layer", "a71ec537315f0651"),
    ],
)
def test_initial_weights_are_those_of_the_stored_results(name: str, norm: str, expected: str) -> None:
    assert fingerprint(models.build(name, 10, (3, 32, 32), norm)) == expected


def body_size(model: models.Model) -> int:
    leaves = tree.flatten(tree.parameters(model.init(keys.key(0, "meta"))["body"]))
    return sum(leaf.numel() for leaf in leaves.values())


def operations(name: str, pixels: int) -> float:
    """Count the billions of operations of a forward pass, without doing them."""
    model = models.build(name, 10, (3, pixels, pixels))
    body = model.init(keys.key(0, "meta"))["body"]
    with FlopCounterMode(display=False) as counter:
        z = model.features(body, torch.empty(1, 3, pixels, pixels, device="meta"))
    assert z.shape == (1, model.feature_size)
    return float(counter.get_total_flops()) / 1e9


def test_the_networks_for_photographs_have_the_stated_sizes() -> None:
    small, large, mobile = (models.build(name, 10, (3, 64, 64)) for name in ("resnet18_64", "resnet50", "mobilenet_v2"))
    assert (body_size(small), small.feature_size) == (11_168_832, 512)
    assert (body_size(large), large.feature_size) == (23_508_032, 2048)
    assert (body_size(mobile), mobile.feature_size) == (2_223_872, 1280)
    assert operations("resnet18_64", 64) == operations("resnet18", 32) == pytest.approx(1.11, abs=0.005)
    assert operations("resnet50", 224) == pytest.approx(8.2, abs=0.05)
    assert operations("resnet50", 64) == pytest.approx(0.7, abs=0.05)
    assert operations("mobilenet_v2", 224) == pytest.approx(0.6, abs=0.01)
    assert operations("mobilenet_v2", 32) == pytest.approx(0.18, abs=0.005)


def size(name: str, classes: int, shape: tuple[int, int, int], norm: str = "batch") -> int:
    leaves = tree.flatten(tree.parameters(models.build(name, classes, shape, norm).init(keys.key(0, "meta"))))
    return sum(leaf.numel() for leaf in leaves.values())


@pytest.mark.parametrize(
    ("name", "classes", "shape", "published"),
    [
        ("lenet5", 10, (1, 32, 32), 61_706),  # 156 + 2,416 + 48,120 + 10,164 + 850
        ("lenet5", 10, (1, 28, 28), 44_426),
        ("lenet5", 10, (3, 32, 32), 62_006),
        ("resnet20", 10, (3, 32, 32), 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)),  # shortcuts of 1×1 convolutions
        ("mobilenet_v2", 1000, (3, 224, 224), 3_504_872),
        ("mobilenet_v2", 10, (3, 32, 32), 2_236_682),
        ("adapter", 100, (1280, 1, 1), 1280 * 256 + 256 + 256 * 100 + 100),
        ("light_cnn", 10, (1, 28, 28), 14_862),  # 2 × (100 + 1,820 + 5,010) + 672 + 330
        ("light_cnn", 10, (3, 32, 32), 19_622),  # 2 × (280 + 1,820 + 7,210) + 672 + 330: "under 20,000"
        ("light_cnn", 100, (3, 32, 40), 2 * (280 + 1_820 + 100 * (20 * 6 * 8 + 1)) + 32 * 201 + 100 * 33),
    ],
)
def test_networks_have_the_published_sizes(
    name: str, classes: int, shape: tuple[int, int, int], published: int
) -> None:
    assert size(name, classes, shape) == size(name, classes, shape, "group") == published


def test_resnet10_has_the_size_of_torchvisions_with_a_stem_for_small_images() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    assert size("resnet10", 10, (3, 32, 32)) == sum(leaf.numel() for leaf in network.parameters()) == 4_903_242


def test_a_mobilenet_keeps_the_pixels_of_small_images() -> None:
    for pixels, left in ((32, 4), (63, 8), (64, 2), (224, 7)):
        model = models.build("mobilenet_v2", 10, (3, pixels, pixels))
        body, x = model.init(keys.key(0, "meta"))["body"], torch.empty(1, 3, pixels, pixels, device="meta")
        for block in model.blocks[:-1]:
            x = block.run(body, x)
        assert x.shape == (1, 320, left, left)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("resnet18_64", 16),
        ("resnet50", 32),
        ("small_cnn", 8),
        ("lenet5", 16),
        ("resnet10", 8),
        ("light_cnn", 10),
        ("airbench94", 25),
        ("vit_tiny", 8),
    ],
)
def test_images_that_are_too_small_for_a_network_are_refused(name: str, least: int) -> None:
    with pytest.raises(models.BadModel, match=f"{name} needs images of at least {least} pixels"):
        models.build(name, 10, (3, least, least - 1))
    model = models.build(name, 10, (3, least, least))
    z = model.features(model.init(keys.key(0, "meta"))["body"], torch.empty(2, 3, least, least, device="meta"))
    assert z.shape == (2, model.feature_size)


# Branches ---------------------------------------------------------------------------------------------------


def test_a_light_cnn_joins_two_branches_that_score_images_by_themselves() -> None:
    model = models.build("light_cnn", 10, (3, 32, 32))
    params = model.init(keys.key(1))
    body, x = params["body"], keys.normal(keys.key(2), 4, 3, 32, 32)
    scores = []
    for branch in model.branches:
        (name,) = branch.keys
        own, seen = body[name], x
        for layer in ("conv1", "conv2"):
            seen = F.conv2d(seen, own[layer]["weight"], own[layer]["bias"]).relu()
            seen = F.max_pool2d(seen, 2)
        scores.append(F.linear(seen.flatten(1), own["scores"]["weight"], own["scores"]["bias"]))
        assert torch.equal(branch.run({name: own}, x), scores[-1])  # it needs nothing else
    joined = F.linear(torch.cat(scores, 1), body["fusion"]["weight"], body["fusion"]["bias"]).relu()
    assert torch.equal(model.features(body, x), joined)
    assert [branch.name for branch in model.branches] == ["raw", "augmented"]
    assert bool((torch.cat(scores, 1) < 0).any()), "scores are joined as they are"
    assert float((scores[0] - scores[1]).abs().max()) > 0.1, "each is drawn by itself"


def test_with_adams_moments_a_light_cnn_takes_the_published_bytes() -> None:
    params = models.build("light_cnn", 10, (1, 28, 28)).init(keys.key(0, "meta"))
    assert f"{3 * tree.nbytes(params) / 2**20:.2f}" == "0.17"
    assert tree.nbytes(params["head"]) == 330 * 4


@pytest.mark.parametrize("name", [name for name in models.BUILT_IN if name != "light_cnn"])
def test_other_networks_have_no_branches(name: str) -> None:
    assert models.build(name, 10, (3, 32, 32)).branches == ()


TINY: type[Network] = type("Tiny", (ResNet50,), {"depths": (1, 1), "widths": (8, 16)})


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("network", [TINY, MobileNetV2])
def test_bottlenecks_can_be_stacked(network: type[Network], norm: str) -> None:
    model = network("tiny", 4, (3, 32, 32), norm)
    bodies = [model.init(keys.key(seed))["body"] for seed in range(3)]
    x = keys.normal(keys.key(9), 3, 5, 3, 32, 32)
    alone = torch.stack([model.features(body, images) for body, images in zip(bodies, x, strict=True)])
    spread = alone.std((1, 2), keepdim=True)  # small with batch norm, whose statistics are at their first values
    assert spread.min() > 0
    stacked = torch.func.vmap(model.features)(tree.stack(bodies), x)
    torch.testing.assert_close(stacked / spread, alone / spread, rtol=1e-4, atol=1e-4)


# As torchvision has them ------------------------------------------------------------------------------------


def theirs(name: str) -> torch.nn.Module:
    """Build torchvision's network, with seeded weights and statistics that are not at their first values."""
    import torchvision

    generator = torch.Generator().manual_seed(1)
    network: torch.nn.Module = getattr(torchvision.models, name.removesuffix("_64"))(weights=None)
    if name == "mobilenet_v2":
        network.classifier = torch.nn.Identity()
    elif name != "resnet50":  # the stems are ours
        stride = 2 if name == "resnet18_64" else 1
        network.conv1 = torch.nn.Conv2d(3, 64, 3, stride, 1, bias=False)
        network.maxpool = torch.nn.Identity()
    network.fc = torch.nn.Identity()
    for path, leaf in network.state_dict().items():
        if leaf.is_floating_point():
            noise = torch.randn(leaf.shape, generator=generator)
            spread = 0.5 * (2 / leaf[0].numel()) ** 0.5 if leaf.ndim > 1 else 0.1
            leaf.copy_(noise * spread + (0.0 if leaf.ndim > 1 or path.endswith(("bias", "mean")) else 1.0))
            if path == "features.18.1.weight":
                leaf.mul_(9)  # so that features reach the six at which a ReLU6 ends
    return network


def saved(content: object, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "pixels"), [("resnet50", 64), ("resnet18_64", 64), ("resnet18", 32), ("mobilenet_v2", 64)]
)
def test_with_the_same_weights_a_network_is_torchvisions(name: str, pixels: int, tmp_path: Path) -> None:
    network, model = theirs(name), models.build(name, 10, (3, pixels, pixels), "batch")
    body = weights.read(saved(network.state_dict(), tmp_path), model)
    x = keys.normal(keys.key(2), 3, 3, pixels, pixels)
    with torch.no_grad():
        expected = network.eval()(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(model.features(body, x), expected, rtol=1e-4, atol=1e-4)
        expected = network.train()(x)
        recorder = layers.Recorder(torch.ones(3), padded=False, frozen=False)
        with layers.training(recorder):
            torch.testing.assert_close(model.features(body, x), expected, rtol=1e-4, atol=1e-4)
    statistics = tree.split(body, tree.is_statistic)[0]
    following = tree.merge(body, recorder.following(statistics))
    assert tree.largest_difference(following, body) > 0.01
    after = weights.read(saved(network.state_dict(), tmp_path), model)
    assert tree.largest_difference(following, after) < 1e-4


# The head alone ---------------------------------------------------------------------------------------------

HOSTILE = replace(toy.SETTING, model="frozen", rounds=1, momentum=0.9, weight_decay=1e-2, clip=1.0, unseen=1)


def run_of(name: str, engine: str, **changed: Any) -> Run:
    return toy.finish(toy.run(short(name), engine, setting=replace(HOSTILE, **changed)))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_runs_on_features_alike_in_both_engines(name: str) -> None:
    runs = [run_of(name, engine) for engine in ("serial", "stacked")]
    assert tree.largest_difference(*map(toy.states, runs)) < TOLERANCE
    accuracies = [run.outcome().metrics["personal"] for run in runs]
    assert accuracies[0] == accuracies[1] is not None


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_the_linear_model_runs_in_both_engines(name: str, engine: str) -> None:
    states = [toy.states(run_of(name, engine, model=model)) for model in ("linear", "frozen")]
    assert tree.largest_difference(*states) == 0.0


def test_methods_that_differ_in_the_body_only_coincide_on_features() -> None:
    fedper, local = (run_of(name, "serial") for name in ("fedper", "local"))
    assert fedper.store.clients() == local.store.clients()
    for client in local.store.clients():
        assert tree.largest_difference(fedper.store[client]["head"], local.store[client]["head"]) == 0.0


# Weights from elsewhere -------------------------------------------------------------------------------------


def build(name: str = "resnet8", norm: str = "batch") -> models.Model:
    return models.build(name, 10, (3, 32, 32), norm)


def own(model: models.Model) -> dict[str, Tensor]:
    """Draw a model as a flattened tree."""
    return tree.flatten(model.init(keys.key(7)))


def in_their_names(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet-8 as torchvision would."""
    renamed = {}
    for path, leaf in leaves.items():
        for ours_, theirs_ in (
            ("body/stem/conv", "conv1"),
            ("body/stem/norm", "bn1"),
            ("body/stage", "layer"),
            ("_1/", ".0."),
            ("first/conv", "conv1"),
            ("first/norm", "bn1"),
            ("second/conv", "conv2"),
            ("second/norm", "bn2"),
            ("shortcut/conv", "downsample.0"),
            ("shortcut/norm", "downsample.1"),
            ("stats/mean", "running_mean"),
            ("stats/var", "running_var"),
            ("head", "fc"),
            ("/", "."),
        ):
            path = path.replace(ours_, theirs_)
        renamed[path] = leaf
    return renamed


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    "spelt",
    [
        lambda leaves: leaves,
        lambda leaves: {path: leaf for path, leaf in leaves.items() if path.startswith("body/")},
        in_their_names,
        lambda leaves: {"state_dict": {f"module.{name}": leaf for name, leaf in in_their_names(leaves).items()}},
        lambda leaves: {**in_their_names(leaves), "bn1.num_batches_tracked": torch.tensor(3)},
        lambda leaves: {path: torch.nn.Parameter(leaf) for path, leaf in leaves.items()},
    ],
    ids=["ours", "without a head", "torchvision's", "wrapped", "counted", "parameters"],
)
def test_weights_are_read_however_they_are_spelt(spelt: Callable[..., Any], norm: str, tmp_path: Path) -> None:
    model = build(norm=norm)
    leaves = own(model)
    body = weights.read(saved(spelt(leaves), tmp_path), model)
    assert tree.largest_difference(body, tree.unflatten(leaves)["body"]) == 0.0
    assert list(tree.flatten(body)) == list(tree.flatten(model.init(keys.key(0))["body"]))
    assert not any(leaf.requires_grad for leaf in tree.flatten(body).values())


def test_weights_of_half_precision_become_float32(tmp_path: Path) -> None:
    model = build("small_cnn")
    body = weights.read(saved({path: leaf.half() for path, leaf in own(model).items()}, tmp_path), model)
    assert {leaf.dtype for leaf in tree.flatten(body).values()} == {torch.float32}
    assert 0 < tree.largest_difference(body, tree.unflatten(own(model))["body"]) < 1e-3


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (
        lambda w: {name: leaf for name, leaf in w.items() if name != "layer2.0.bn1.running_var"},
        "is not for resnet8: it has no tensor layer2.0.bn1.running_var; choose the --model",
    ),
    "superfluous": (
        lambda w: {**w, "layer1.1.conv1.weight": torch.zeros(1)},
        "is not for resnet8, which has no place for layer1.1.conv1.weight; choose the --model",
    ),
    "misshapen": (
        lambda w: {**w, "conv1.weight": torch.zeros(64, 3, 7, 7)},
        r"conv1.weight is \(64, 3, 7, 7\) torch.float32, and \(64, 3, 3, 3\) torch.float32 is wanted",
    ),
    "whole numbers": (
        lambda w: {**w, "bn1.weight": torch.ones(64, dtype=torch.int64)},
        r"bn1.weight is \(64,\) torch.int64, and \(64,\) torch.float32 is wanted",
    ),
    "not a number": (
        lambda w: {**w, "bn1.bias": torch.full((64,), torch.nan)},
        "bn1.bias is not finite; name another file",
    ),
    "no names": (lambda w: list(w.values()), r"is no file of tensors by name \(list\); save a state_dict"),
    "numbers as names": (lambda w: dict(enumerate(w.values())), "is no file of tensors by name"),
    "no tensors": (lambda w: {"epoch": 3}, "is no file of tensors by name"),
    "nothing": (lambda w: {}, "is no file of tensors by name"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_another_network_are_refused(change: str, tmp_path: Path) -> None:
    made, said = CHANGES[change]
    path = saved(made(in_their_names(own(build()))), tmp_path)
    with pytest.raises(BadWeights, match=said) as caught:
        weights.read(path, build())
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("spelt", [own, lambda model: in_their_names(own(model))], ids=["ours", "torchvision's"])
def test_batch_norm_weights_for_a_group_norm_model_say_how_to_ask_for_batch_norm(
    spelt: Callable[[models.Model], dict[str, Tensor]], tmp_path: Path
) -> None:
    path = saved(spelt(build()), tmp_path)
    with pytest.raises(BadWeights, match=r"holds statistics of batch norm, and resnet8 has .*--set norm=batch"):
        weights.read(path, build(norm="group"))


def test_no_norm_is_advised_where_none_would_help(tmp_path: Path) -> None:
    path = saved(in_their_names(own(build())), tmp_path)
    with pytest.raises(BadWeights, match="it has no tensor body/conv1/weight; choose"):
        weights.read(path, build("small_cnn"))
    with pytest.raises(BadWeights, match=r"is not for resnet18, which has no place for layer1\.0\.conv3\.weight"):
        weights.read(saved(theirs("resnet50").state_dict(), tmp_path), build("resnet18"))
    with pytest.raises(BadWeights, match="frozen has no body that weights could be read into"):
        weights.read(path, build("frozen"))


class Harmful:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04 half a zip", None], ids=["empty", "text", "half", "cut"]
)
def test_a_file_that_is_no_file_of_weights_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = saved(own(build("mlp")), tmp_path)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(BadWeights, match=r"weights\.pth is no file of tensors by name \(\w+\); save a state_dict"):
        weights.read(path, build("mlp"))


def test_no_code_in_a_file_of_weights_is_run(tmp_path: Path) -> None:
    path = saved({"body/hidden/weight": Harmful(tmp_path / "touched")}, tmp_path)
    with pytest.raises(BadWeights, match="is no file of tensors by name"):
        weights.read(path, build("mlp"))
    assert not (tmp_path / "touched").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "touched").exists()


def test_weights_that_are_packed_are_not_unpacked(tmp_path: Path) -> None:
    """A tensor of zeros could be a thousand times as large as its file."""
    path = saved(own(build("mlp")), tmp_path)
    with ZipFile(path) as before, ZipFile(tmp_path / "packed.pth", "w", ZIP_DEFLATED) as after:
        for member in before.namelist():
            after.writestr(member, before.read(member))
    with pytest.raises(BadWeights, match=r"packed\.pth is packed, as torch\.save never does; save a state_dict anew"):
        weights.read(tmp_path / "packed.pth", build("mlp"))


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("bring", [lambda leaf: leaf.to_sparse(), lambda leaf: leaf.to("meta")])
def test_weights_without_plain_values_are_named(bring: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    leaves = own(build("mlp"))
    name = max(leaves, key=lambda key: leaves[key].ndim)
    path = saved({**leaves, name: bring(leaves[name])}, tmp_path)
    with pytest.raises(BadWeights, match=f"{name} is sparse or has no values; save a state_dict of plain tensors"):
        weights.read(path, build("mlp"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_weights_that_are_no_file_are_not_waited_for(ending: str, kind: str, tmp_path: Path) -> None:
    path = odd(tmp_path / f"weights.{ending}", kind)
    for reader in (weights.digest, lambda path: weights.read(path, build("mlp"))):
        with pytest.raises(BadWeights, match=r"cannot be read \(it is a pipe or a device, and no file\)"):
            reader(path)


@pytest.mark.parametrize("reader", [weights.digest, lambda path: weights.read(path, build("mlp"))])
def test_weights_that_cannot_be_opened_are_named(reader: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(
        BadWeights, match=r"absent\.pth cannot be read \(No such file or directory\); a file of weights"
    ):
        reader(tmp_path / "absent.pth")
    with pytest.raises(BadWeights, match=r"cannot be read \(Is a directory\)"):
        reader(tmp_path)


def test_safetensors_are_read_where_the_package_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BadWeights, match="needs the package safetensors, which is not installed"):
        weights.read(path, build("mlp"))
    leaves = own(build("mlp"))
    path.touch()
    there = SimpleNamespace(load_file=lambda file: leaves if file == path else None)
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(torch=there))
    monkeypatch.setitem(sys.modules, "safetensors.torch", there)
    assert tree.largest_difference(weights.read(path, build("mlp")), tree.unflatten(leaves)["body"]) == 0.0


def test_the_digest_of_weights_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's own example
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights.digest(tmp_path / "abc") == expected


# Features made once -----------------------------------------------------------------------------------------


class Watcher:
    """Notes what it is told, and can stop the work."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.began: list[tuple[int, int]] = []
        self.done = 0
        self.stop_after = stop_after

    def say(self, sentence: str) -> None:
        """Nothing to note."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.began.append((total, done))

    def advance(self, images: int) -> None:
        self.done += images
        if self.stop_after is not None and self.done >= self.stop_after:
            raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Users(Dataset):
    """600 pictures of four users; in a file, if asked for."""

    num_classes: ClassVar[int] = 6
    image_shape: ClassVar[tuple[int, int, int]] = (3, 8, 12)
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.4, 0.3)
    std: ClassVar[tuple[float, ...]] = (0.2, 0.3, 0.4)
    tail = "natural"
    own_clients: ClassVar[bool] = True

    part: bool = False

    def load(self, root: Path) -> Splits:
        key, n = keys.key(4), torch.arange(600)
        x = keys.integers(key, 256, 640, *self.image_shape).to(torch.uint8)
        splits = Splits(x[:600], n % 6, x[600:], n[:40] % 6, users=n % 4, test_users=n[:40] % 4)
        if self.part:
            return replace(splits, train_x=x[:9], held=torch.arange(9))
        store = prepared.find(root / "store")
        return splits if store is None else store.splits()


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> Iterator[Users]:
    monkeypatch.setitem(DATASETS._classes, "users", Users)
    yield Users()


def embedding(dataset: Dataset, **changed: Any) -> Embedding:
    return Embedding(**{"dataset": dataset, "model": "small_cnn", "norm": "group", "weights": None, **changed})


def features(path: Path) -> Dataset:
    dataset: Dataset = DATASETS["features"](path=str(path))
    return dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def directly(dataset: Dataset, root: Path, body: Tree, model: models.Model) -> tuple[Tensor, Tensor]:
    """Compute the features of both parts without anything of the suite's files."""
    splits = dataset.load(root)
    made = []
    for x, y in ((splits.train_x, splits.train_y), (splits.test_x, splits.test_y)):
        assert isinstance(x, Tensor)
        images = Images(x, y, dataset.mean, dataset.std, "none", dataset.scale)
        made.append(model.features(body, images.plain(torch.arange(len(y)))).to(torch.float16)[:, :, None, None])
    return made[0], made[1]


def everything(images: Any) -> Tensor:
    read: Tensor = images[torch.arange(len(images))]
    return read


def run(*arguments: str) -> Result:
    return CliRunner().invoke(embed_command, arguments)


def test_the_store_holds_the_features_of_every_image(tmp_path: Path) -> None:
    digits, model = DATASETS["digits"](), models.build("small_cnn", 10, (1, 8, 8))
    path = saved(own(model), tmp_path)
    result = run("digits", "--model", "small_cnn", "--weights", str(path), "--data-root", str(tmp_path / "root"))
    assert result.exit_code == 0, result.output
    (folder,) = (path for path in (tmp_path / "root" / "prepared").iterdir() if path.is_dir())
    assert folder.name.startswith("digits-small_cnn-") and len(folder.name) == len("digits-small_cnn-") + 8
    assert "features of 1,297 training and 500 test images, 64 each, in " in result.stdout
    assert f"""--dataset "features(path='{folder}')" --imbalance 50\n""" in result.stdout
    dataset = features(folder)
    splits, expected = dataset.load(Path("unused")), directly(digits, tmp_path, weights.read(path, model), model)
    for found, wanted in zip((splits.train_x, splits.test_x), expected, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(everything(found), wanted, rtol=2e-3, atol=1e-4)
        assert wanted.std() > 0.01
    original = digits.load(tmp_path)
    assert torch.equal(splits.train_y, original.train_y) and torch.equal(splits.test_y, original.test_y)
    assert (dataset.num_classes, dataset.image_shape) == (10, (64, 1, 1))
    assert (set(dataset.mean), set(dataset.std), dataset.scale) == ({0.0}, {1.0}, 1.0)
    assert len(dataset.mean) == len(dataset.std) == 64
    made_by = prepared.find(folder).plan.made_by  # type: ignore[union-attr]
    assert (made_by["weights"], made_by["torch"]) == (weights.digest(path), torch.__version__)
    images = Images(splits.test_x, splits.test_y, dataset.mean, dataset.std, "none", dataset.scale)
    assert torch.equal(images.plain(torch.arange(500)), everything(splits.test_x).float())


def test_batch_norm_is_used_in_evaluation_mode(users: Users, tmp_path: Path) -> None:
    model = models.build("resnet8", 6, users.image_shape, "batch")
    leaves = {path: leaf + 0.5 if "stats" in path else leaf for path, leaf in own(model).items()}
    made = embedding(users, model="resnet8", norm="batch", weights=saved(leaves, tmp_path))
    store = made.make(tmp_path, Watcher(), batch_size=50)
    expected = directly(users, tmp_path, tree.unflatten(leaves)["body"], model)
    torch.testing.assert_close(everything(store.part("test")), expected[1], rtol=2e-3, atol=1e-3)
    assert "resnet8" in store.folder.name and "users" in store.folder.name


def test_users_and_labels_are_kept(users: Users, tmp_path: Path) -> None:
    store = embedding(users).make(tmp_path, Watcher())
    labels, original = features(store.folder).labels(tmp_path), users.labels(tmp_path)
    for column in ("train", "test", "users", "test_users"):
        assert torch.equal(getattr(labels, column), getattr(original, column))
    result = run("users", "--model", "small_cnn", "--random-weights", "--data-root", str(tmp_path))
    assert result.stdout.endswith('" --partition users\n')


def test_images_in_a_file_give_the_features_of_images_in_memory(users: Users, tmp_path: Path) -> None:
    splits = users.load(tmp_path / "memory")
    assert isinstance(splits.train_x, Tensor) and isinstance(splits.test_x, Tensor)
    plan = Plan(listing="photographs", shape=users.image_shape, train=600, test=40)
    with writing(tmp_path / "file" / "store", plan) as unfinished:
        for chunk in unfinished.todo():
            x = splits.train_x if chunk.part == "train" else splits.test_x
            unfinished.write(chunk, x[chunk.start : chunk.stop].permute(0, 2, 3, 1).contiguous().numpy())
        unfinished.finish(splits.labels)
    assert not isinstance(users.load(tmp_path / "file").train_x, Tensor)
    stores = [embedding(users).make(tmp_path / place, Watcher()) for place in ("memory", "file")]
    for part in ("train", "test"):
        assert torch.equal(*(everything(store.part(part)) for store in stores))
    assert stores[0].listing != stores[1].listing  # a store that is prepared anew is another source
    assert features(stores[0].folder).num_classes == 6


def test_an_embedding_that_was_stopped_goes_on(users: Users, tmp_path: Path) -> None:
    whole = embedding(users).make(tmp_path / "whole", Watcher())
    with pytest.raises(KeyboardInterrupt):
        embedding(users).make(tmp_path / "parts", Watcher(stop_after=CHUNK))
    with pytest.raises(DataMissing):
        features(tmp_path / "parts" / "prepared" / whole.folder.name).load(tmp_path)
    watcher = Watcher()
    store = embedding(users).make(tmp_path / "parts", watcher)
    assert watcher.began == [(640, CHUNK)] and watcher.done == 640 - CHUNK
    assert contents(store.folder) == contents(whole.folder)


def test_a_second_embedding_finds_it_done(users: Users, tmp_path: Path) -> None:
    watcher = Watcher()
    stores = [embedding(users).make(tmp_path, watcher) for _ in range(2)]
    assert watcher.began == [(640, 0)] and stores[0].index == stores[1].index


def test_whatever_changes_the_features_has_a_folder_of_its_own(users: Users, tmp_path: Path) -> None:
    model = models.build("small_cnn", 6, users.image_shape)
    changed = {"body/conv1/bias": torch.full((16,), 0.25)}
    some, others = saved(own(model), tmp_path, "a.pth"), saved(own(model) | changed, tmp_path, "b.pth")
    variants: list[dict[str, Any]] = [{}, {"weights": some}, {"weights": others}, {"norm": "batch"}, {"model": "mlp"}]
    folders = [embedding(users, **variant).make(tmp_path, Watcher()).folder for variant in variants]
    assert len(set(folders)) == len(variants)
    identities = [json.dumps(features(folder).identity()) for folder in folders]
    assert len(set(identities)) == len(variants)
    shutil.copy(some, tmp_path / "elsewhere.pth")
    again = embedding(users, weights=tmp_path / "elsewhere.pth").make(tmp_path, Watcher())
    assert again.folder == folders[1]


def test_features_are_told_by_their_contents_and_not_by_their_place(users: Users, tmp_path: Path) -> None:
    folder = embedding(users).make(tmp_path, Watcher()).folder
    shutil.copytree(folder, tmp_path / "elsewhere")
    one, other = features(folder), features(tmp_path / "elsewhere")
    assert one != other and one.identity() == other.identity()
    assert not any(str(tmp_path) in str(value) for value in one.identity().values())
    packed = pickle.dumps(one)
    assert len(packed) < 2000 and pickle.loads(packed) == one
    plan = replace(prepared.find(folder).plan, listing="same")  # type: ignore[union-attr]
    made = []
    for name, value in (("zeros", 0), ("ones", 1)):
        with writing(tmp_path / name, plan) as unfinished:
            for chunk in unfinished.todo():
                unfinished.write(chunk, torch.full((len(chunk), 1, 1, 64), value, dtype=torch.float16).numpy())
            unfinished.finish(users.labels(tmp_path))
        made.append(features(tmp_path / name).identity())
    assert made[0] != made[1]


def test_features_are_found_by_their_name_where_they_are_made(
    users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = embedding(users).make(tmp_path, Watcher()).folder
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    named = features(Path(folder.name))
    assert named.identity() == features(folder).identity()
    assert label(named) == f"features(path='{folder.name}')"  # no machine's own path
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataMissing, match=r"holds none, or not all; 'bench data embed users --model small_cnn \.\.\.'"):
        features(Path(folder.name)).load(tmp_path)


def test_features_that_float16_cannot_hold_are_refused(users: Users, tmp_path: Path) -> None:
    model = models.build("small_cnn", 6, users.image_shape)
    path = saved({name: leaf * 1e5 for name, leaf in own(model).items()}, tmp_path)
    with pytest.raises(BadWeights, match=r"features of image 0 of the train part are not finite in float16; .* users"):
        embedding(users, weights=path).make(tmp_path, Watcher())


def test_a_part_of_the_images_is_refused(users: Users, tmp_path: Path) -> None:
    with pytest.raises(
        DataMissing, match=r"users\(part=True\): .* a part of the training images only; name a --data-root"
    ):
        embedding(replace(users, part=True)).make(tmp_path, Watcher())


def test_features_that_are_not_there_say_how_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = DATASETS["features"]()
    for use in (dataset.load, dataset.labels, lambda root: dataset.num_classes, lambda root: dataset.identity()):
        with pytest.raises(DataMissing, match=f"{tmp_path / 'features'} holds none, .*'bench data embed NAME"):
            use(tmp_path)
    plan = Plan(listing="photographs", shape=(3, 2, 2), train=1, test=1)
    with writing(tmp_path / "features", plan) as unfinished:
        for chunk in unfinished.todo():
            unfinished.write(chunk, torch.zeros(1, 2, 2, 3, dtype=torch.uint8).numpy())
        unfinished.finish(Labels(torch.zeros(1).long(), torch.zeros(1).long()))
    with pytest.raises(DataDamaged, match="holds images, not features; name a folder of 'bench data embed'"):
        _ = dataset.num_classes


@pytest.mark.parametrize("name", list(SETTINGS))
def test_no_setting_shifts_or_mirrors_features(name: str, users: Users, tmp_path: Path) -> None:
    setting = named(name, features(embedding(users).make(tmp_path, Watcher()).folder))
    assert (setting.model, setting.augment) == ("frozen", "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mlp"], "features of random weights are for tests only: --random-weights"),
        (["--model", "mlp", "--weights", "x.pth", "--random-weights"], "exclude each other"),
        (["--random-weights"], "--model"),
    ],
)
def test_whose_weights_must_be_said(arguments: list[str], said: str) -> None:
    result = run("digits", *arguments)
    assert result.exit_code == 2 and said in result.output


def test_an_interrupted_embedding_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Embedding._features

    def interrupted(self: Embedding, splits: Splits, chunk: Chunk, batch_size: int) -> Tensor:
        if chunk.number == 2:
            raise KeyboardInterrupt
        return made(self, splits, chunk, batch_size)

    monkeypatch.setattr(Embedding, "_features", interrupted)
    arguments = ["digits", "--model", "mlp", "--random-weights", "--data-root", str(tmp_path)]
    result = run(*arguments)
    assert result.exit_code == 130
    assert "the features of 512 of 1,797 images are kept; the same command goes on" in result.output
    monkeypatch.undo()
    result = run(*arguments)
    assert result.exit_code == 0 and "512 of 1,797 are done already" in result.output


def test_the_norm_follows_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def make(self: Embedding, *rest: Any) -> None:
        norms.append(self.norm)
        raise KeyboardInterrupt

    monkeypatch.setattr(Embedding, "make", make)
    for more in (["--random-weights"], ["--weights", "x.pth"], ["--weights", "x.pth", "--norm", "group"]):
        assert run("digits", "--model", "resnet8", *more).exit_code == 130
    assert norms == ["group", "batch", "group"]


def test_heads_are_compared_on_features_through_the_command_line(tmp_path: Path) -> None:
    store = embedding(DATASETS["digits"](), model="mlp").make(tmp_path, Watcher())
    command = [sys.executable, "-m", "bench", "run", "--json", "--ray", "off", "--tracking-uri", "off"]
    asked = ["--algos", "fedavg,fedrod,fedloge", "--dataset", f"features(path={str(store.folder)!r})"]
    more = ["--imbalance", "10", "--rounds", "5", "--lr", "0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *asked, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert len(document["runs"]) == 3
    assert all(found["metrics"]["generic"] > 0.4 for found in document["runs"])


def test_pooling_before_relu_gives_the_values_and_gradients_of_pooling_after_it() -> None:
    """Where four values are alike or none is above zero, too."""
    draw = torch.Generator().manual_seed(5)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=draw).float().requires_grad_()

    x, layer = whole(6, 2, 8, 8), {"weight": whole(3, 2, 3, 3), "bias": whole(3)}
    block = models.build("small_cnn", 10, (2, 8, 8), "group").blocks[0]
    mine = block.run({"conv1": layer}, x)
    plain = F.max_pool2d(F.conv2d(x, layer["weight"], layer["bias"], padding=1).relu(), 2)
    assert torch.equal(mine, plain) and bool((mine == 0).any())
    towards = torch.randn(mine.shape, generator=draw)
    leaves = [x, *layer.values()]
    slopes = [torch.autograd.grad((value * towards).sum(), leaves) for value in (mine, plain)]
    assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))


@pytest.mark.parametrize(("outputs", "inputs"), [(2, 2), (6, 6), (6, 64), (100, 128)])
def test_a_simplex_has_equal_angles_and_its_rows_add_up_to_nothing(outputs: int, inputs: int) -> None:
    rows = layers.simplex(keys.key(3), outputs, inputs)
    cosines = torch.full((outputs, outputs), -1 / (outputs - 1), dtype=torch.float64).fill_diagonal_(1.0)
    assert torch.allclose(rows @ rows.T, cosines, atol=1e-12)
    assert float(rows.sum(0).abs().max()) < 1e-12
    assert torch.equal(rows, layers.simplex(keys.key(3), outputs, inputs))
    assert float((rows - layers.simplex(keys.key(4), outputs, inputs)).abs().max()) > 1e-2


def test_with_fewer_inputs_than_outputs_directions_are_random() -> None:
    rows = layers.simplex(keys.key(3), 100, 10)
    assert rows.shape == (100, 10)
    assert torch.allclose(rows.norm(dim=1), torch.ones(100, dtype=torch.float64))
    assert float(rows.mean(0).abs().max()) < 0.15 and torch.linalg.matrix_rank(rows) == 10
