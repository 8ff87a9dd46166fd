"""The network of airbench94, and what a network is told of the training images before the first round."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from bench import Tree, Uploads, keys, tree
from bench.command.show import show_command
from bench.contract import toy
from bench.models import layers
from bench.models.airbench import Airbench94
from bench.plugins.registry import ALGORITHMS
from bench.training import asked
from bench.training.job import surroundings
from bench.training.operations import Operations
from bench.training.rounds import Run
from bench.training.statistics import _put_in
from bench.validation.plausible import _told
from tests.by_hand import data_of
from tests.test_crew import hired

PIXELS = 25
SETTING = replace(
    toy.SETTING, model="airbench94", norm="batch", participation=1.0, rounds=1, epochs=1, lr=0.01, eval_every=9
)
SIZES = (7, 4, 3, 0, 5, 1, 2, 3)
"""Of seven clients that train, one of them without images, and one that is held out."""
FEW = (2, 1, 0, 0, 0, 0, 0, 1)


def build(channels: int = 3, pixels: int = 32, norm: str = "batch") -> Airbench94:
    return Airbench94("airbench94", 10, (channels, pixels, pixels), norm)


def colours(n: int, pixels: int = PIXELS) -> Tensor:
    """Images whose neighbouring pixels and channels hang together."""
    noise = keys.normal(keys.key(4), n, 3, pixels + 2, pixels + 2)
    x = F.avg_pool2d(noise, 3, 1) + 0.5 * noise[:, :1, 1:-1, 1:-1] + torch.tensor([0.3, 0.0, -0.4])[:, None, None]
    return x.contiguous()


def run_of(name: str = "fedavg", setting: Any = SETTING, engine: str = "serial", **how: Any) -> Run:
    pictures = toy.Toy(test=6, enlarged=4)
    return toy.run(ALGORITHMS[name](), engine, setting=setting, sizes=how.pop("sizes", SIZES), dataset=pictures, **how)


# The network ------------------------------------------------------------------------------------------------


def test_it_has_the_published_numbers_of_parameters_and_of_operations() -> None:
    model = build()
    drawn = model.init(keys.key(0))
    leaves = {path: leaf for path, leaf in tree.flatten(drawn).items() if not layers.is_norm_statistic(path)}
    fixed = [path for path in leaves if tree.is_statistic(path)]
    assert fixed == ["body/whiten/stats/weight"] and leaves[fixed[0]].numel() == 288
    assert sum(leaf.numel() for leaf in leaves.values()) == 1_971_640 + 10  # the head's bias
    with Operations() as done:
        logits = model.logits(drawn["head"], model.features(drawn["body"], torch.zeros(1, 3, 32, 32)))
    assert done.total == 2 * 118_147_360 and not drawn["head"]["bias"].any() and logits.any()


def test_sizes_on_the_way_and_the_largest_of_what_is_left() -> None:
    for pixels, sides in ((32, (31, 15, 7)), (25, (24, 12, 6)), (64, (63, 31, 15))):
        model = build(pixels=pixels)
        body, x = model.init(keys.key(0))["body"], torch.zeros(1, 3, pixels, pixels)
        for block, side, channels in zip(model.blocks[:-1], sides, (24, 64, 256), strict=True):
            x = block.run(body, x)
            assert x.shape == (1, channels, side, side)
        assert model.blocks[-1].run(body, x).shape == (1, 256)


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_network_of_its_description(padded: bool) -> None:
    """In training: put together from torch's own modules, with the same weights."""
    model = build(pixels=PIXELS)
    body = model.init(keys.key(3))["body"]
    x = colours(6)
    z = F.gelu(F.conv2d(x, body["whiten"]["stats"]["weight"], body["whiten"]["bias"]))
    norms = []
    for name in ("group1", "group2", "group3"):
        for layer in ("first", "second"):
            weight = body[name][layer]["conv"]["weight"]
            norm = torch.nn.BatchNorm2d(len(weight), eps=1e-12, momentum=0.4)
            norm.weight.requires_grad_(False)
            norms.append(norm)
            z = F.conv2d(z, weight, padding=1)
            z = F.gelu(norm(F.max_pool2d(z, 2) if layer == "first" else z))
    expected = F.max_pool2d(z, 3).flatten(1) / 9
    recorder = layers.Recorder(torch.ones(6), padded, frozen=False)
    with layers.training(recorder):
        found = model.features(body, x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    following = tree.flatten(recorder.following(tree.split(body, tree.is_statistic)[0]))
    means = [leaf for path, leaf in following.items() if path.endswith("mean")]
    variances = [leaf for path, leaf in following.items() if path.endswith("var")]
    for mean, variance, norm in zip(means, variances, norms, strict=True):
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(variance, norm.running_var, rtol=1e-3, atol=1e-5)


@pytest.mark.equivalence
@pytest.mark.parametrize("padded", [False, True])
def test_batch_norm_without_a_weight_is_one_with_ones(padded: bool) -> None:
    x, layer = keys.normal(keys.key(1), 4, 3, 5, 5), layers.norm_layer("batch", 3, torch.device("cpu"))
    layer["bias"] = torch.tensor([0.1, -2.0, 0.3])
    bare = {name: leaf for name, leaf in layer.items() if name != "weight"}
    for frozen in (False, True):
        found = []
        for each in (layer, bare):
            recorder = layers.Recorder(torch.tensor([1.0, 1.0, 1.0, 0.0 if padded else 1.0]), padded, frozen)
            with layers.training(recorder):
                found.append(layers.batch_norm(each, x))
        assert torch.equal(*found)


def test_convolutions_start_by_passing_their_input_on() -> None:
    body = build().init(keys.key(0))["body"]
    for name, inputs in (("group1", 24), ("group2", 64), ("group3", 256)):
        for layer, channels in (("first", inputs), ("second", 64 if name == "group1" else 256)):
            weight = body[name][layer]["conv"]["weight"]
            x = keys.normal(keys.key(1), 2, channels, 6, 6)
            assert torch.equal(F.conv2d(x, weight, padding=1)[:, :channels], x)
            rest, bound = weight[channels:], 1 / math.sqrt(9 * channels)
            assert not rest.numel() or 0.9 * bound < rest.abs().max() <= bound


def test_the_features_are_a_ninth() -> None:
    """An algorithm that sets norms of heads is to see it, so it is no part of the head."""
    model = build(pixels=PIXELS)
    drawn = model.init(keys.key(0))
    z = model.blocks[0].run(drawn["body"], colours(2))
    for block in model.blocks[1:-1]:
        z = block.run(drawn["body"], z)
    third = drawn["body"]["group3"]
    for layer in ("first", "second"):
        z = F.conv2d(z, third[layer]["conv"]["weight"], padding=1)
        z = F.gelu(layers.batch_norm(third[layer]["norm"], F.max_pool2d(z, 2) if layer == "first" else z, eps=1e-12))
    torch.testing.assert_close(model.features(drawn["body"], colours(2)) * 9, z.amax((2, 3)))


# What it is told --------------------------------------------------------------------------------------------


def patches(x: Tensor) -> Tensor:
    """All 2×2 patches of (B, c, h, w), cut out one by one: (n, 4c) float64."""
    _, _, height, width = x.shape
    corners = [x[:, :, i : height - 1 + i, j : width - 1 + j] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners, 2).permute(0, 3, 4, 1, 2).flatten(3).flatten(0, 2).double()


def test_whitened_channels_have_unit_second_moments_and_negatives_beside_them() -> None:
    model, x = build(pixels=PIXELS), colours(9)
    moments = patches(x).T @ patches(x) / len(patches(x))
    weight = model.started(model.summary(x))["whiten"]["stats"]["weight"]
    seen = F.conv2d(x.double(), weight.double()).movedim(1, 3).flatten(0, 2)
    values = torch.linalg.eigvalsh(moments).flip(0)
    assert values[0] > 20 * values[-1] > 0
    found = seen[:, :12].T @ seen[:, :12] / len(seen)
    torch.testing.assert_close(found, torch.diag(values / (values + 5e-4)), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight[12:], -weight[:12]) and weight.shape == (24, 3, 2, 2)
    flat = weight[:12].flatten(1)
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()


def test_without_images_pixels_are_taken_to_be_white() -> None:
    model = build(1)
    total = torch.cat([torch.eye(4, dtype=torch.float64)[tuple(torch.triu_indices(4, 4))] * 50, torch.tensor([50.0])])
    drawn = model.init(keys.key(0))["body"]["whiten"]["stats"]["weight"].flatten(1)
    started = model.started(total)["whiten"]["stats"]["weight"].flatten(1)
    assert {*map(tuple, drawn.tolist())} == {*map(tuple, started.tolist())}  # of equal eigenvalues in another order


def told(run: Run) -> asked.Told:
    assert run.here.told is not None
    return run.here.told


def test_the_sum_over_clients_is_that_over_their_union() -> None:
    run = run_of(setting=replace(SETTING, unseen=1))
    population = run.population
    assert population.training == 7 and [len(index) for index in population.index] == list(SIZES)
    union = torch.cat(population.index[:7])
    model = run.task.model
    whole = model.summary(population.images.plain(union))
    torch.testing.assert_close(told(run).total, whole, rtol=1e-9, atol=0)
    assert told(run).total.dtype == torch.float64 and told(run).total[-1] == len(union) * 31**2
    by_hand = patches(population.images.plain(union))
    upper = (by_hand.T @ by_hand)[tuple(torch.triu_indices(4, 4))]
    torch.testing.assert_close(whole[:-1], upper, rtol=1e-9, atol=0)
    one = run_of(sizes=(sum(SIZES[:7]), *[0] * 7))  # other images, all in one place
    assert one.here.told is not None and not torch.equal(one.here.told.total, told(run).total)


def test_images_are_looked_at_some_at_a_time_to_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = told(run_of()).total
    monkeypatch.setattr(asked, "_AT_ONCE", 2 * 32 * 32)
    torch.testing.assert_close(told(run_of()).total, expected, rtol=1e-12, atol=0)


def test_augmentation_has_no_part_in_it() -> None:
    assert torch.equal(told(run_of()).total, told(run_of(setting=replace(SETTING, augment="crop_flip"))).total)


def test_every_method_starts_from_it_and_training_leaves_the_filters_alone() -> None:
    run = run_of(sizes=FEW)
    start = run.task.model.started(told(run).total)["whiten"]["stats"]["weight"]
    before = run.task.init()["body"]["whiten"]
    assert torch.equal(before["stats"]["weight"], start)
    assert torch.equal(run_of("fedper", sizes=FEW).progress.server["body"]["whiten"]["stats"]["weight"], start)
    batch = next(data_of(run, 0).batches(1))
    _, gradient, _ = run.task.gradient(run.task.loss, run.task.init(), batch)
    assert "stats" not in gradient["body"]["whiten"] and gradient["body"]["whiten"]["bias"].any()
    after = toy.finish(run).progress.server["body"]["whiten"]
    assert torch.equal(after["stats"]["weight"], start) and not torch.equal(after["bias"], before["bias"])


def test_a_mean_of_equal_filters_is_the_filter_to_the_bit() -> None:
    filters: Tree = {"w": keys.normal(keys.key(0), 24, 3, 2, 2)}
    uploads = Uploads([filters] * 7, torch.tensor([3.0, 1.0, 7.0, 11.0, 0.0, 13.0, 1e-3]))
    assert torch.equal(uploads.mean()["w"], filters["w"])


def test_what_is_told_is_sent_once_by_those_that_train(tmp_path: Path) -> None:
    file, setting = tmp_path / "checkpoint.pt", replace(SETTING, unseen=1, rounds=2)
    first = run_of(setting=setting, sizes=FEW, checkpoint=file)
    once = 7 * 11 * 8  # ten different products of four values, and a count
    assert first.progress.cost["bytes_up"] == once and "bytes_down" not in first.progress.cost
    patches_seen = 3 * 31**2
    assert first.progress.cost["train_flops"] == 2 * 16 * patches_seen
    first.saved = -math.inf  # save after this round, however quick it was
    first.step()
    second = toy.finish(run_of(setting=setting, sizes=FEW, checkpoint=file))
    assert second.resumed
    cost = second.outcome().cost
    assert cost["bytes_up"] == (cost["bytes_down"] or 0) + once
    wanted = SimpleNamespace(dataset=toy.Toy(enlarged=4), own_weights=False, setting=setting)
    assert _told(wanted, 8) == once and _told(SimpleNamespace(**{**vars(wanted), "own_weights": True}), 8) == 0  # type: ignore[arg-type]


def test_weights_from_a_file_bring_their_filters_and_nothing_is_asked() -> None:
    job = run_of().job
    body = tree.map(lambda leaf: leaf + 1, run_of().task.init()["body"])
    run = Run(replace(job, weights=body))
    assert run.here.told is None and run.task.start is None and "bytes_up" not in run.progress.cost
    assert tree.largest_difference(run.task.init()["body"], body) == 0


@pytest.mark.equivalence
@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_other_networks_are_asked_and_told_nothing(model: str) -> None:
    run = toy.run(ALGORITHMS["fedavg"](), setting=replace(toy.SETTING, model=model))
    assert run.here.told is None and run.task.start is None and "bytes_up" not in run.progress.cost
    drawn = run.task.model.init(keys.fold(run.task.key, "model"))
    assert tree.largest_difference(run.task.init(), drawn) == 0
    with pytest.raises(NotImplementedError, match=f"{model} asks nothing of images"):
        run.task.model.summary(torch.zeros(1, 1, 8, 8))


@pytest.mark.equivalence
def test_one_client_that_holds_everything_is_centralised() -> None:
    setting = replace(SETTING, clients=1, lr=0.05)
    federated, pooled = (toy.finish(run_of(name, setting, sizes=(5,))) for name in ("fedavg", "centralised"))
    assert tree.largest_difference(federated.progress.server, pooled.progress.server) == 0
    assert "stats" in federated.progress.server["body"]["whiten"]


def test_workers_are_told_the_same() -> None:
    run = run_of(sizes=FEW)
    expected = toy.finish(run_of(sizes=FEW)).outcome()
    crew, ray = hired(partial(surroundings, run.job), 2)
    found = toy.finish(Run(run.job, crew=crew)).outcome()
    assert (found.digest, found.cost["bytes_up"]) == (expected.digest, expected.cost["bytes_up"]) and ray.handed_out


def test_statistics_of_ones_own_are_those_of_norm_layers_and_filters_are_everybodys() -> None:
    run = toy.finish(run_of(setting=replace(SETTING, statistics="personal"), sizes=FEW))
    kept = tree.flatten(run.store[0]["statistics"])
    assert kept and all(map(layers.is_norm_statistic, kept))
    others = tree.flatten(run.store[1]["statistics"])
    changed = [path for path, leaf in kept.items() if not torch.equal(leaf, others[path])]
    assert len(changed) == len(kept)
    own = tree.map(lambda leaf: leaf + 1, run.store[0]["statistics"])
    put = tree.flatten(_put_in(run.progress.server, own))
    assert all(torch.equal(put[path], leaf) for path, leaf in tree.flatten(own).items())
    assert torch.equal(
        run.progress.server["body"]["whiten"]["stats"]["weight"],
        run.task.model.started(told(run).total)["whiten"]["stats"]["weight"],
    )


def test_where_a_device_has_no_float64_it_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = told(run_of()).total
    monkeypatch.setattr(tree, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    assert torch.equal(told(run_of()).total, expected)


def test_what_the_server_learns_is_said() -> None:
    shown = CliRunner().invoke(show_command, ["airbench94"]).output
    assert "server learns  sums over each client's training images" in shown and "288 fixed" in shown
    assert "79 numbers a client, once" in " ".join(shown.split())
    assert asked.size(build()) == 79
    assert "server learns" not in CliRunner().invoke(show_command, ["resnet8"]).output
