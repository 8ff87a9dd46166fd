"""What a body is made of, models under any name in a tree, a second network, tables of rows, and packed sizes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, models, tree
from bench.contract import toy
from bench.contract.toy import finish, states
from bench.models import MODELS, BadModel, block_of, is_norm, usual_norm
from bench.models.layers import Recorder, apply_linear, is_norm_statistic, linear, training
from bench.plugins.registry import ALGORITHMS

# Blocks of a body -------------------------------------------------------------------------------------------

SMALLEST = {name: max(MODELS[name].smallest, 4) for name in MODELS}
"""Pixels; below four no stage of a residual network would halve anything."""

HIDDEN, THREE, FOUR = "hidden", "stem stage1 stage2 stage3", "stem stage1 stage2 stage3 stage4"
SEVEN = f"{FOUR} stage5 stage6 stage7 last"
BLOCKS = {
    **{"linear": "flat", "frozen": "flat", "mlp": HIDDEN, "adapter": HIDDEN},
    **{"small_cnn": f"conv1 conv2 {HIDDEN}", "fedavg_cnn": f"conv1 conv2 {HIDDEN}"},
    **{"lenet5": "conv1 conv2 hidden1 hidden2", "mobilenet_v2": SEVEN, "light_cnn": "branches fusion"},
    **{"airbench94": "whiten group1 group2 group3"},
    **{
        f"vit_{size}": " ".join(["embed", *(f"block{n + 1}" for n in range(depth)), "last"])
        for size, depth in (("tiny", 12), ("mini", 6))
    },
    **{"resnet8": THREE, "resnet20": THREE, "resnet32": THREE, "resnet56": THREE},
    **{"resnet10": FOUR, "resnet18": FOUR, "resnet34": FOUR, "resnet18_64": FOUR, "resnet50": FOUR},
}


def build(name: str, norm: str) -> models.Model:
    return models.build(name, 5, (3, SMALLEST[name], SMALLEST[name]), norm)


def shapes(model: models.Model) -> Tree:
    return model.init(keys.key(0, "meta"))


def some_body(model: models.Model) -> Tree:
    """Fill a body; drawing millions of normal numbers would take seconds."""

    def fill(leaf: Tensor) -> Tensor:
        waves = torch.arange(leaf.numel(), dtype=torch.float32).sin().reshape(leaf.shape)
        return waves * (4 / leaf[0].numel()) ** 0.5 if leaf.ndim > 1 else waves.abs() + 0.5

    return tree.map(fill, shapes(model)["body"])


each = pytest.mark.parametrize("name", list(MODELS))
normed = pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in MODELS for norm in MODELS[name].norms])


@normed
def test_features_are_the_blocks_one_after_the_other(name: str, norm: str) -> None:
    model = build(name, norm)
    body = some_body(model)
    x = keys.normal(keys.key(2), 2, *model.shape)
    expected = model.features(body, x)
    passed = x
    for block in model.blocks:
        assert block.keys or not body
        passed = block.run({key: body[key] for key in block.keys}, passed)  # it needs no other keys
    assert torch.equal(passed, expected)
    assert expected.shape == (2, model.feature_size) and expected.std() > 0


def test_the_small_networks_are_written_out() -> None:
    def linear(x: Tensor, layer: dict[str, Tensor]) -> Tensor:
        return (x.flatten(1) @ layer["weight"].T + layer["bias"]).relu()

    def pooled(x: Tensor, layer: dict[str, Tensor], padding: int) -> Tensor:
        y = torch.nn.functional.conv2d(x, layer["weight"], layer["bias"], padding=padding)
        return torch.nn.functional.max_pool2d(y.relu(), 2)

    for name, padding in (("mlp", None), ("small_cnn", 1), ("fedavg_cnn", 0)):
        model = models.build(name, 5, (3, 20, 16))
        body, x = some_body(model), keys.normal(keys.key(2), 2, 3, 20, 16)
        z = x if padding is None else pooled(pooled(x, body["conv1"], padding), body["conv2"], padding)
        torch.testing.assert_close(model.features(body, x), linear(z, body["hidden"]))


@normed
def test_blocks_cover_a_body_in_order_and_once(name: str, norm: str) -> None:
    model = build(name, norm)
    assert [block.name for block in model.blocks] == BLOCKS[name].split()
    covered = [key for block in model.blocks for key in block.keys]
    assert covered == list(shapes(model)["body"]) and len(set(covered)) == len(covered)


@normed
def test_every_leaf_is_in_a_block_or_in_the_head(name: str, norm: str) -> None:
    model = build(name, norm)
    for path in tree.flatten(shapes(model)):
        of, key = block_of(model, path), path.split("/")[1]
        assert of == ("head" if path.startswith("head/") else next(b.name for b in model.blocks if key in b.keys))
        assert block_of(model, f"teacher/{path}") == of


def test_a_block_is_a_stage_and_its_keys_are_residual_units() -> None:
    model = build("resnet18", "batch")
    assert model.blocks[2].keys == ("stage2_1", "stage2_2")
    assert block_of(model, "body/stage2_2/first/conv/weight") == "stage2"
    assert block_of(model, "body/stem/norm/stats/mean") == "stem"
    assert block_of(model, "head/bias") == "head"
    with pytest.raises(LookupError, match=r"stage2_3/first/conv/weight is no leaf of resnet18; .* body/stage2_2, "):
        block_of(model, "body/stage2_3/first/conv/weight")


@pytest.mark.parametrize("path", ["body/conv1/weight", "body", "head", "weight", "stem/conv/weight", "body/stage2"])
def test_a_leaf_of_another_model_is_named(path: str) -> None:
    with pytest.raises(LookupError, match=rf"^{path} is no leaf of mlp; its leaves lie below body/hidden, head$"):
        block_of(build("mlp", "group"), path)
    with pytest.raises(LookupError, match=r"is no leaf of linear; its leaves lie below head$"):
        block_of(build("linear", "group"), path)


@normed
def test_norm_layers_are_found_and_nothing_else(name: str, norm: str) -> None:
    leaves = tree.flatten(shapes(build(name, norm)))
    found = {path for path in leaves if is_norm(path)}
    # by their shapes instead: a vector of channels beside a convolution that has no bias, or before a dense layer
    layers = {path.removesuffix("conv/weight") for path in leaves if path.endswith("conv/weight")}
    if name.startswith("vit"):
        layers = {path.rpartition("norm/")[0] for path in leaves if path.endswith("norm/weight")}
        assert {layer.split("/")[-2] for layer in layers} == {"attention", "dense", "last"}
    kinds = ["weight", "bias", *(["stats/mean", "stats/var"] if norm == "batch" else [])]
    if (name, norm) == ("airbench94", "batch"):
        kinds.remove("weight")
    assert found == {f"{layer}norm/{kind}" for layer in layers for kind in kinds}
    assert all(leaves[path].ndim == 1 for path in found)
    assert bool(found) == name.startswith(("resnet", "mobilenet", "airbench", "vit"))
    fixed = {"body/whiten/stats/weight"} if name == "airbench94" else set()
    assert {path for path in leaves if tree.is_statistic(path)} - fixed == {path for path in found if "/stats/" in path}
    assert {path for path in leaves if is_norm_statistic(path)} == {path for path in found if "/stats/" in path}


@pytest.mark.parametrize(
    ("path", "norm", "statistic"),
    [
        ("norm/weight", True, False),
        ("norm/stats/mean", True, True),
        ("teacher/body/stem/norm/stats/var", True, True),
        ("stats/teacher/body/stem/norm/weight", True, False),  # a model that is carried from step to step
        ("stats/teacher/body/stem/norm/stats/mean", True, True),
        ("stats/norm", False, False),  # a number of that name
        ("stats/mean", False, False),
        ("layernorm/stats/mean", False, False),
        ("body/norms/weight", False, False),
    ],
)
def test_kinds_go_by_the_path(path: str, norm: bool, statistic: bool) -> None:
    assert (is_norm(path), is_norm_statistic(path)) == (norm, statistic)


@each
def test_a_model_pickles_small_whatever_it_was_asked(name: str) -> None:
    model = build(name, usual_norm(name, "batch"))
    before = pickle.dumps(model)
    assert len(model.blocks) == len(BLOCKS[name].split())
    assert pickle.dumps(model) == before and len(before) < 300
    again = pickle.loads(before)
    assert again == model
    blocks = pickle.loads(pickle.dumps(again.blocks))
    x, body = torch.zeros(1, *model.shape, device="meta"), shapes(model)["body"]
    for block in blocks:
        x = block.run(body, x)
    assert x.shape == (1, model.feature_size)


def test_blocks_record_statistics_and_can_be_stacked() -> None:
    model = models.build("resnet8", 5, (3, 8, 8), "batch")
    bodies = [model.init(keys.key(seed))["body"] for seed in range(2)]
    x = keys.normal(keys.key(9), 2, 4, 3, 8, 8)

    def run(body: Tree, x: Tensor) -> Tree:
        statistics = tree.split(body, is_norm_statistic)[0]
        with training(Recorder(torch.ones(4), padded=True, frozen=False)) as recorder:
            for block in model.blocks:
                x = block.run(body, x)
        return {"x": x, "statistics": recorder.following(statistics)}

    alone = [run(body, images) for body, images in zip(bodies, x, strict=True)]
    stacked = torch.func.vmap(run)(tree.stack(bodies), x)
    assert tree.largest_difference(stacked, tree.stack(alone)) < 1e-4
    start = tree.split(bodies[0], is_norm_statistic)[0]
    moved = tree.flatten(tree.sub(alone[0]["statistics"], start))
    assert all(leaf.abs().max() > 0 for leaf in moved.values())


# Models under any name, and where their statistics stay -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Nested(Algorithm):
    """FedAvg of a model below `teacher`, besides a count below `stats` and a model that is sent in round 0 only."""

    def init_server(self, task: Task) -> Tree:
        return {"teacher": task.init(), "first": task.init(), "stats": {"visits": torch.zeros(())}}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        return {key: value for key, value in server.items() if key != "first" or task.round == 0}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        assert ("first" in shared) == (task.round == 0)

        def loss(w: Tree, batch: Batch) -> Tensor:
            return task.loss(w["teacher"], batch)

        trained = task.sgd(loss, {"teacher": shared["teacher"]}, data.batches(task.epochs))
        return {**trained, "stats": {"visits": shared["stats"]["visits"] + 1}}, private

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        model: Tree = server["teacher"]
        return model

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        model: Tree = shared["teacher"]
        return model


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_a_policy_concerns_norm_layers_wherever_a_model_stands(statistics: str, engine: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics=statistics, rounds=2, epochs=1)
    setting = replace(setting, participation=1.0, batch_size=4, lr=0.01)
    sizes = (7, 6, 0, 0, 0, 0, 0, 5)
    plain, nested = (
        finish(toy.run(algorithm, engine, setting=setting, sizes=sizes))
        for algorithm in (ALGORITHMS["fedavg"](), Nested())
    )
    assert tree.largest_difference(plain.progress.server, nested.progress.server["teacher"]) == 0.0
    assert nested.progress.server["stats"]["visits"].item() == 2  # it travels, whatever norm layers do
    start = tree.split(nested.progress.server["first"], tree.is_statistic)[0]
    for client in (0, 1, 2, 7):
        kept = nested.store[client]
        if statistics != "personal":
            assert kept == {}
            continue
        assert set(kept["statistics"]) == {"teacher", "first"}
        assert tree.largest_difference(kept["statistics"]["teacher"], plain.store[client]["statistics"]) == 0.0
        assert tree.largest_difference(kept["statistics"]["first"], start) == 0.0
    moved = tree.largest_difference(start, tree.split(nested.progress.server["teacher"], tree.is_statistic)[0])
    assert (moved > 0) == (statistics == "shared")
    accuracies = [run.outcome().metrics["personal"] for run in (plain, nested)]
    assert accuracies[0] == accuracies[1] is not None
    up = nested.progress.cost["bytes_up"] - plain.progress.cost["bytes_up"]
    assert up == 2 * 8 * 4  # a count from each client in each round, and no statistics besides


@dataclass(frozen=True, kw_only=True)
class Watches(Algorithm):
    """FedAvg whose clients note the statistics that they start a round with."""

    def init_client(self, task: Task) -> Tree:
        return {"seen": torch.zeros(64)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        seen = shared["body"]["stem"]["norm"]["stats"]["mean"]
        return task.sgd(task.loss, shared, data.batches(task.epochs)), {"seen": seen}


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_statistics_that_stay_at_a_client_go_on_from_round_to_round(engine: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics="personal", rounds=2, epochs=1)
    run = toy.run(Watches(), engine, setting=replace(setting, participation=1.0), sizes=(7, 6, 0, 0, 0, 0, 0, 5))
    run.step()
    kept = [run.store[k]["statistics"]["body"]["stem"]["norm"]["stats"]["mean"].clone() for k in (0, 1)]
    assert kept[0].abs().max() > 0 and not torch.equal(*kept)
    run.step()
    assert all(torch.equal(run.store[k]["own"]["seen"], kept[k]) for k in (0, 1))


# A second network -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Students(Algorithm):
    """A small network at the client, taught by a larger one that travels."""

    def init_server(self, task: Task) -> Tree:
        return {"teacher": task.network("small_cnn").init(task.server_key("teacher"))}

    def init_client(self, task: Task) -> Tree:
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        large = task.network("small_cnn")

        def loss(w: Tree, batch: Batch) -> Tensor:
            teacher = large.logits(w["teacher"]["head"], large.features(w["teacher"]["body"], batch.x))
            apart = (task.logits(w["student"], batch.x) - teacher.detach()).square().mean(1)
            entropy = torch.nn.functional.cross_entropy(teacher, batch.y, reduction="none")
            return ((apart + entropy) * batch.weight).sum() / batch.weight.sum().clamp(min=1)

        w = {"teacher": shared["teacher"], "student": private}
        w = task.sgd(loss, w, data.batches(task.epochs))
        return {"teacher": w["teacher"]}, w["student"]

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        return private


def test_a_second_network_is_for_the_same_images_and_classes() -> None:
    task = toy.run(ALGORITHMS["fedavg"]()).task
    assert task.model.name == "mlp"
    model = task.network("resnet8")
    assert (model.num_classes, model.shape, model.norm) == (6, (1, 8, 8), "group")
    count = sum(leaf.numel() for leaf in tree.flatten(model.init(task.key)).values())
    three, ten = 1_227_594, 10 * 257  # of test_parameter_counts: three channels, ten classes
    assert count == three - ten - 2 * 9 * 64 + 6 * 257
    batch = replace(task, model=models.build("mlp", 6, (1, 8, 8), "batch"))
    assert any(map(tree.is_statistic, tree.flatten(batch.network("resnet8").init(task.key))))
    assert task.network("mlp") == task.model


def test_a_network_that_is_not_there_or_too_large_is_a_sentence() -> None:
    task = toy.run(ALGORITHMS["fedavg"]()).task
    with pytest.raises(BadModel, match="no model is called 'resnet9'; did you mean resnet8"):
        task.network("resnet9")
    with pytest.raises(BadModel, match="fedavg_cnn needs images of at least 16 pixels, these have 8×8"):
        task.network("fedavg_cnn")


def test_a_second_network_travels_and_is_counted_as_state() -> None:
    setting = replace(toy.SETTING, rounds=2)
    runs = [finish(toy.run(Students(), engine, setting=setting)) for engine in ("serial", "stacked")]
    assert tree.largest_difference(*map(states, runs)) < 2e-4
    run = runs[0]
    size = tree.nbytes(run.progress.server["teacher"])
    cohort = 6
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 2 * cohort * size
    start = Students().init_server(run.task)["teacher"]
    assert tree.largest_difference(start, run.progress.server["teacher"]) > 1e-3
    assert run.outcome().metrics["generic"] is None and run.outcome().metrics["personal"] is not None


def test_layers_are_enough_for_a_hypernetwork() -> None:
    """An embedding of each client writes a head; a gradient of what was written reaches the embedding."""
    writer = {"first": linear(keys.key(0), 8, 3), "second": linear(keys.key(1), 5 * 4 + 5, 8)}
    embedding = keys.normal(keys.key(2), 2, 3).requires_grad_()
    flat = apply_linear(writer["second"], torch.relu(apply_linear(writer["first"], embedding)))
    head = {"weight": flat[:, :20].unflatten(1, (5, 4)), "bias": flat[:, 20:]}
    x = keys.normal(keys.key(3), 2, 7, 4)
    torch.func.vmap(apply_linear)(head, x).square().sum().backward()
    assert embedding.grad is not None and embedding.grad.abs().min() > 0


# Arithmetic on trees ----------------------------------------------------------------------------------------


def table() -> Tree:
    return {"a": torch.arange(8.0).reshape(4, 2), "b": {"c": torch.arange(4), "stats": torch.zeros(4, 1)}, "none": {}}


def test_rows_are_put_where_their_numbers_say() -> None:
    before, rows = tree.clone(table()), torch.tensor([3, 1])
    values = {"a": torch.tensor([[30.0, 31.0], [10.0, 11.0]]), "b": {"c": torch.tensor([-3, -1])}}
    start = table()
    after = tree.put(start, rows, values)
    assert after["a"].tolist() == [[0, 1], [10, 11], [4, 5], [30, 31]]
    assert after["b"]["c"].tolist() == [0, -1, 2, -3] and after["b"]["c"].dtype == torch.int64
    assert after["b"]["stats"] is start["b"]["stats"] and after["none"] == {}  # not given, not touched
    assert list(tree.flatten(after)) == list(tree.flatten(start))
    assert tree.largest_difference(start, before) == 0.0
    picked = tree.pick(after, rows)
    assert tree.largest_difference({"a": picked["a"], "b": {"c": picked["b"]["c"]}}, values) == 0.0
    assert tree.largest_difference(tree.put(start, rows, tree.pick(start, rows)), start) == 0.0
    assert tree.largest_difference(tree.put(start, rows[:0], tree.pick(start, rows[:0])), start) == 0.0


@pytest.mark.parametrize(
    ("values", "said"),
    [({"d": torch.zeros(1)}, "no d; it has a, b, none"), ({"b": {"e": torch.zeros(1)}}, "no e; it has c, stats")],
)
def test_a_value_without_a_place_is_named(values: Tree, said: str) -> None:
    with pytest.raises(LookupError, match=f"^the table has {said}$"):
        tree.put(table(), torch.tensor([0]), values)


def test_a_condition_chooses_between_trees_for_each_stacked_client() -> None:
    a, b = {"x": {"y": torch.ones(2)}, "n": torch.tensor(1)}, {"x": {"y": torch.zeros(2)}, "n": torch.tensor(0)}
    for true in (True, False):
        chosen = tree.where(torch.tensor(true), a, b)
        assert tree.largest_difference(chosen, a if true else b) == 0.0 and chosen["n"].dtype == torch.int64
    several = torch.func.vmap(partial(tree.where, a=a, b=b))(torch.tensor([True, False]))
    assert several["x"]["y"].tolist() == [[1, 1], [0, 0]] and several["n"].tolist() == [1, 0]


def test_a_function_of_path_and_leaf_keeps_empty_parts() -> None:
    head = {"weight": torch.ones(2), "bias": torch.ones(1)}
    start: Tree = {"body": {}, "teacher": {"head": head}, "n": torch.ones(())}
    seen: list[str] = []

    def double_weights(path: str, leaf: Tensor) -> Tensor:
        seen.append(path)
        return 2 * leaf if path.endswith("weight") else leaf

    after = tree.map_paths(double_weights, start)
    assert seen == list(tree.flatten(start)) == ["teacher/head/weight", "teacher/head/bias", "n"]
    assert list(after) == ["body", "teacher", "n"] and after["body"] == {}
    doubled = after["teacher"]["head"]
    assert doubled["weight"].tolist() == [2, 2] and doubled["bias"].tolist() == [1] and head["weight"].sum() == 2


# Packed sizes -----------------------------------------------------------------------------------------------


def of(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    leaf = torch.zeros(n, dtype=dtype)
    leaf[n - k :] = 3
    return leaf


@pytest.mark.parametrize(
    ("leaf", "bits", "size", "how"),
    [
        (of(1000, 1000), None, 4000, "all"),
        (of(1000, 990), None, 4000, "all"),  # a bit an entry would be 125 + 3960
        (of(1000, 968), None, 125 + 3872, "a bit an entry"),
        (of(1000, 100), None, 525, "a bit an entry, 125 + 400; with places 100 * 42 / 8"),
        (of(1000, 99), None, 520, "places of 10 bits, 99 * 42 / 8 = 519.75; a bit an entry is 521"),
        (of(1024, 10), None, 53, "places of 10 bits, 52.5"),
        (of(1025, 10), None, 54, "places of 11 bits, 53.75"),
        (of(1000, 0), None, 0, "nothing"),
        (of(0, 0), None, 0, "nothing"),
        (of(1, 1), None, 4, "all"),
        (of(1, 0), None, 0, "nothing"),
        (of(2, 1), None, 5, "a place of one bit, 33 bits"),
        (torch.ones(()), None, 4, "one number"),
        (of(1000, 1000), 8, 1000, "all in eight bits"),
        (of(1000, 1000), 1, 125, "signs"),
        (of(9, 9), 1, 2, "nine signs"),
        (of(1000, 100), 8, 125 + 100, "a bit an entry; with places 100 * 18 / 8 = 225 too"),
        (of(1000, 50), 2, 75, "places, 50 * 12 / 8"),
        (of(1000, 1000, torch.int64), None, 8000, "all"),
        (of(1000, 1000, torch.bool), None, 125, "a bit each"),
        (of(1000, 10, torch.bool), None, 14, "places and a bit, 10 * 11 / 8"),
        (of(100, 100, torch.bfloat16), None, 200, "all"),
        (torch.tensor([torch.nan, 0.0, torch.inf, -0.0]), None, 9, "two of four, 68 bits either way"),
    ],
)
def test_a_leaf_is_packed_in_the_shortest_way(leaf: Tensor, bits: int | None, size: int, how: str) -> None:
    assert tree.packed_nbytes({"a": leaf}, bits) == size, how


def test_every_leaf_is_packed_by_itself() -> None:
    payload = {"body": {"w": of(1000, 99).reshape(10, 100), "none": {}}, "head": of(2, 1), "counts": of(6, 6)}
    assert tree.packed_nbytes(payload) == 520 + 5 + 24
    assert tree.packed_nbytes(payload, bits=1) == 125 + 1 + 1  # 999/8 and 99 * 11 / 8 = 136.1; 2/8 or 2/8; 6/8
    assert tree.packed_nbytes({}) == 0
    dense = tree.map(lambda leaf: leaf + 1, payload)
    assert tree.packed_nbytes(dense) == tree.nbytes(dense)
