"""Layer norm: group norm of one group, of each image alone, in every network, in both engines, and where nothing reads
which kind is asked for.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, models, tree
from bench.command.embed import embed_command
from bench.contract import toy
from bench.models import layers
from bench.models.weights import BadWeights, read
from bench.plugins.registry import ALGORITHMS, MODELS
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms
from bench.sweep.config import Sweep, parse_dataset
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from tests.test_blocks import some_body
from tests.test_command import Bench
from tests.test_command import bench as bench

ENGINES = ("serial", "stacked")
NORMED = [name for name in MODELS if name.startswith(("resnet", "mobilenet", "airbench"))]
SETTING = replace(toy.SETTING, model="resnet8", norm="layer", rounds=1, epochs=1, participation=1.0)
FEW = (20, 13, 0, 0, 0, 0, 0, 0)
"""Examples of clients: batches of 16, 4 and 13, which stacked clients have padded."""


def layer_of(channels: int, device: str = "cpu") -> Any:
    layer = layers.norm_layer("layer", channels, torch.device(device))
    weight, bias = keys.normal(keys.key(5), 2, channels)
    return {**layer, "weight": weight + 1, "bias": bias}


def images(*shape: int) -> Tensor:
    return 3 * keys.normal(keys.key(4), *shape) + 2


@cache
def run_of(call: str, engine: str, **changed: Any) -> Run:
    (algorithm,) = parse_algorithms(call)
    return toy.finish(toy.run(algorithm, engine, setting=replace(SETTING, **changed), sizes=FEW))


# One layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (1, 2, 4)])
def test_the_values_of_an_image_of_two_channels(shape: tuple[int, ...]) -> None:
    """Over both channels together: over each alone, the second, of zeros, would stay at zero."""
    x = torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0]).reshape(shape)
    y = layers.norm("layer", layers.norm_layer("layer", 2, torch.device("cpu")), x)
    wanted = [-0.169030, 0.507091, 1.183213, 1.859335, *[-0.845152] * 4]
    assert y.flatten().tolist() == pytest.approx(wanted, abs=1e-5)
    doubled = {"weight": torch.tensor([2.0, 1.0]), "bias": torch.tensor([0.0, 0.5])}  # of a channel
    again = layers.norm("layer", doubled, x).flatten().tolist()
    assert again == pytest.approx([2 * value for value in wanted[:4]] + [-0.345152] * 4, abs=1e-5)


@pytest.mark.equivalence
@pytest.mark.parametrize("last", ["rows", "channels"])
@pytest.mark.parametrize("shape", [(5, 32, 4, 3), (5, 16, 1, 1), (1, 6, 3, 3), (4, 10)])
def test_it_is_group_norm_of_one_group_and_torchs_layer_norm_of_all_units(shape: tuple[int, ...], last: str) -> None:
    x, layer = images(*shape), layer_of(shape[1])
    x = x.to(memory_format=torch.channels_last) if last == "channels" and len(shape) == 4 else x
    layer, x = tree.map(torch.Tensor.requires_grad_, layer), x.requires_grad_()
    leaves, towards = [x, *layer.values()], images(*shape).cos()
    ours, theirs = layers.norm("layer", layer, x), F.group_norm(x, 1, layer["weight"], layer["bias"], 1e-5)
    slopes = [torch.autograd.grad((y * towards).sum(), leaves) for y in (ours, theirs)]
    assert torch.equal(ours, theirs) and all(map(torch.equal, *slopes))
    of_units = F.layer_norm(x, shape[1:]) * layer["weight"].reshape(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(ours, of_units + layer["bias"].reshape(-1, *[1] * (len(shape) - 2)))


def test_shift_and_scale_of_an_image_count_for_nothing_and_those_of_a_group_do() -> None:
    x, layer = images(4, 32, 5, 5), layer_of(32)
    of_images = torch.tensor([1.0, 8.0, 0.5, 20.0]).reshape(-1, 1, 1, 1)
    y = layers.norm("layer", layer, x)
    torch.testing.assert_close(layers.norm("layer", layer, x * of_images - 3 * of_images), y, rtol=1e-4, atol=1e-4)
    half = torch.arange(32).reshape(-1, 1, 1) < 16
    moved = torch.where(half, x + 10, x)
    torch.testing.assert_close(layers.norm("group", layer, moved), layers.norm("group", layer, x), rtol=1e-4, atol=1e-4)
    assert float((layers.norm("layer", layer, moved) - y).abs().max()) > 0.5


@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
def test_an_image_has_the_same_bits_alone_and_among_others_in_training_and_in_tests(last: torch.memory_format) -> None:
    x, layer = images(128, 16, 6, 6).contiguous(memory_format=last), layer_of(16)
    together = layers.norm("layer", layer, x)
    alone = torch.cat([layers.norm("layer", layer, each) for each in x.split(1)])
    with layers.training(layers.Recorder(torch.ones(128), padded=True, frozen=False)) as recorder:
        trained = layers.norm("layer", layer, x)
    assert torch.equal(together, alone) and torch.equal(together, trained) and not recorder.seen
    of_batch = layers.norm_layer("batch", 16, torch.device("cpu"))
    with layers.training(layers.Recorder(torch.ones(128), padded=False, frozen=False)):
        assert not torch.equal(layers.norm("batch", of_batch, x)[:1], layers.norm("batch", of_batch, x[:1]))


def test_an_image_without_contrast_is_its_bias_and_has_a_gradient() -> None:
    x, layer = torch.full((2, 4, 3, 3), 7.0).requires_grad_(), layer_of(4)
    y = layers.norm("layer", layer, x)
    assert torch.allclose(
        y, layer["bias"].reshape(-1, 1, 1).expand_as(y), atol=1e-2
    )  # 7 is not its own mean to the last bit
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    assert bool(slope.isfinite().all())


# Networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].norms == layers.NORMS])
def test_every_network_has_it_in_the_tree_of_group_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side = max(MODELS[name].smallest, 8)
    group, layer = (models.build(name, 5, (3, side, side), norm) for norm in ("group", "layer"))
    leaves = [tree.flatten(model.init(keys.key(1, "meta"))) for model in (group, layer)]
    assert {path: leaf.shape for path, leaf in leaves[0].items()} == {path: x.shape for path, x in leaves[1].items()}
    body, x = some_body(group), images(2, 3, side, side)
    z = layer.features(body, x)
    assert bool(z.isfinite().all())
    assert torch.equal(z, group.features(body, x)) == (name not in NORMED)
    monkeypatch.setattr(layers, "group_norm", partial(layers.group_norm, groups=1))
    assert torch.equal(z, group.features(body, x))


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_that_of_group_norm_with_one_group_and_no_other(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, plain = run_of("fedavg", engine), run_of("fedavg", engine, norm="group")
    monkeypatch.setattr(layers, "group_norm", partial(layers.group_norm, groups=1))
    one = run_of.__wrapped__("fedavg", engine, norm="group")
    assert mine.outcome().digest == one.outcome().digest != plain.outcome().digest


def test_engines_agree_and_padding_counts_for_nothing() -> None:
    for call in ("fedavg", "fedbn"):
        runs = [run_of(call, engine) for engine in ENGINES]
        assert tree.largest_difference(*map(toy.states, runs)) < TOLERANCE
        personal = [run.outcome().metrics["personal"] for run in runs]
        assert personal[0] == personal[1]


def test_what_is_done_to_norm_layers_is_done_to_it() -> None:
    """FedBN keeps its weights and biases at the client; there are no running statistics to have a policy for."""
    run = run_of("fedbn", "serial")
    kept, sent = tree.flatten(run.store[0]), tree.flatten(run.progress.server)
    assert len(kept) == 9 * 2 and all(path.split("/")[-2] == "norm" for path in kept)
    assert not any("norm" in path.split("/") for path in sent) and {*kept, *sent} == {*tree.flatten(run.task.init())}
    other = tree.flatten(run.store[1])
    assert all(not torch.equal(leaf, other[path]) for path, leaf in kept.items())
    shared, personal = run_of("fedavg", "serial"), run_of("fedavg", "serial", statistics="personal")
    assert tree.largest_difference(shared.progress.server, personal.progress.server) == 0.0


# What is said -----------------------------------------------------------------------------------------------


def sweep(model: str, **overrides: Any) -> Sweep:
    return Sweep(
        algorithms=(ALGORITHMS["fedavg"](), ALGORITHMS["fedper"]()),
        datasets=(parse_dataset("digits"),),
        overrides={"model": model, **overrides},
        data_root=Path("."),
    )


def test_three_kinds_are_named_wherever_one_is_chosen() -> None:
    assert layers.NORMS == ("group", "layer", "batch")
    with pytest.raises(BadConfig, match="norm = 'instance': must be one of group, layer, batch"):
        replace(SETTING, norm="instance")
    (option,) = (each for each in embed_command.params if each.name == "norm")
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == layers.NORMS


def test_weights_with_statistics_are_refused_with_its_name(tmp_path: Any) -> None:
    batch, layer = (models.build("resnet8", 10, (3, 32, 32), norm) for norm in ("batch", "layer"))
    torch.save(tree.flatten(batch.init(keys.key(7))), tmp_path / "weights.pth")
    with pytest.raises(BadWeights, match=r"statistics of batch norm, and resnet8 has layer norm here; .*norm=batch"):
        read(tmp_path / "weights.pth", layer)


def test_a_network_without_norm_layers_says_so(bench: Bench) -> None:
    shown = {name: json.loads(bench("show", name, "--json").out)["norm layers"] for name in ("resnet8", "mlp")}
    assert shown["resnet8"] == "9, of the setting's kind: --set norm=group or layer or batch"
    assert shown["mlp"] == "none: --set norm changes nothing here"
    said = "norm = layer: mlp has no norm layers, so this changes no number ('bench show mlp')"
    assert sweep("mlp", norm="layer").unread() == [said]
    assert sweep("mlp").unread() == sweep("resnet8", norm="layer").unread() == []
    asked = ("run", "--algos", "fedavg,local", "--set", "norm=layer", "--dry-run", "--no-probe")
    assert bench(*asked).err.count(said) == 1
