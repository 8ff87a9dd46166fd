"""PeFLL: descriptors, written models and gradients in plain operations, against autograd and torch's Adam."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from tests.by_hand import data_of, measured, method

ENGINES = ("serial", "stacked")
ONE_STEP = replace(toy.SETTING, momentum=0.0, epochs=1, batch_size=1000, rounds=2)
"""A client describes all its examples, and takes one step on all of them: what it changes is lr times its gradient."""
PARTS = ("embedding", "hidden", "output")


def start(setting: Any = toy.SETTING, engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS["pefll"](**fields), engine, setting=setting)


def stirred(run: Run) -> Run:
    """Give the output layer weights, as it has them after some rounds: descriptors then matter."""
    weight = tree.map_paths(
        lambda path, leaf: 0.03 * keys.normal(keys.fold(keys.key(5), path), *leaf.shape),
        run.progress.server["output"]["weight"],
    )
    output = {**run.progress.server["output"], "weight": weight}
    run.progress.server = {**run.progress.server, "output": output}
    return run


def leaves_of(run: Run) -> dict[str, Tensor]:
    both = {part: run.progress.server[part] for part in PARTS}
    return {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(both).items()}


def described(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The toy's network on pictures with a plane for each class, the label's of ones: the mean of three outputs."""
    planes = torch.zeros(len(y), 6, 8, 8)
    planes[torch.arange(len(y)), y] = 1
    x = torch.cat([x, planes], 1).flatten(1)
    z = torch.relu(F.linear(x, w["embedding/body/hidden/weight"], w["embedding/body/hidden/bias"]))
    return F.linear(z, w["embedding/head/weight"], w["embedding/head/bias"]).mean(0)


def written(w: dict[str, Tensor], z: Tensor) -> Tree:
    """A linear layer, three of ReLU and linear, and one for each leaf."""
    for k in range(4):
        z = w[f"hidden/{k}/weight"] @ (z if k == 0 else F.relu(z)) + w[f"hidden/{k}/bias"]
    heads = {path.removeprefix("output/bias/"): b for path, b in w.items() if path.startswith("output/bias/")}
    return tree.unflatten(
        {path: b + (z @ w[f"output/weight/{path}"].flatten(1)).reshape(b.shape) for path, b in heads.items()}
    )


def examples(run: Run, client: int) -> tuple[Tensor, Tensor]:
    rows = run.population.index[client]
    return run.population.images.plain(rows), run.population.images.y[rows]


def loss_of(run: Run, w: dict[str, Tensor], client: int) -> Tensor:
    x, y = examples(run, client)
    return F.cross_entropy(run.task.logits(written(w, described(w, x, y)), x), y) if len(y) else torch.zeros(())


# What is written ------------------------------------------------------------------------------------------------------


def test_a_model_is_written_by_the_clients_own_examples() -> None:
    run = stirred(start())
    w, shared = leaves_of(run), toy.received(run, 0)
    models = []
    for client in (0, 1):
        model = run.algorithm.personal_model(run.task, shared, {}, data_of(run, client))
        assert model is not None
        expected = written(w, described(w, *examples(run, client)))
        assert tree.largest_difference(model, tree.map(torch.Tensor.detach, expected)) < 1e-6
        models.append(model)
    assert tree.largest_difference(*models) > 1e-3


def test_the_first_models_are_the_initial_one() -> None:
    run = start()
    model = run.algorithm.personal_model(run.task, toy.received(run, 0), {}, data_of(run, 3))
    assert model is not None and tree.largest_difference(model, run.task.init()) == 0.0


def test_a_descriptor_is_a_mean_over_examples_with_their_labels() -> None:
    """It says nothing of their order, of how they are batched, of padding, or of how often all of them are there."""
    run = start()
    x, y = examples(run, 0)
    embedding, describe = run.progress.server["embedding"], method(run).described

    def of(*batches: Batch) -> Tensor:
        found: Tensor = describe(run.task, embedding, batches)
        return found

    whole = of(Batch(x, y, torch.ones(60)))
    assert whole.shape == (3,) and float(whole.abs().min()) > 1e-4
    for other in (
        of(Batch(x.flip(0), y.flip(0), torch.ones(60))),
        of(Batch(x[:16], y[:16], torch.ones(16)), Batch(x[16:], y[16:], torch.ones(44))),
        of(Batch(torch.cat([x, x]), torch.cat([y, y]), torch.ones(120))),
        of(Batch(torch.cat([x, x[:9] + 1]), torch.cat([y, y[:9]]), torch.cat([torch.ones(60), torch.zeros(9)]))),
    ):
        assert torch.allclose(other, whole, atol=1e-6)
    assert float((of(Batch(x, 5 - y, torch.ones(60))) - whole).abs().max()) > 1e-3
    assert of().tolist() == [0.0, 0.0, 0.0]


# A round --------------------------------------------------------------------------------------------------------------


def test_a_client_sends_the_gradient_of_the_embedding_network() -> None:
    run = stirred(start(ONE_STEP))
    w = leaves_of(run)
    upload, kept = toy.upload_once(run)
    paths = [path for path in w if path.startswith("embedding/")]
    gradient = torch.autograd.grad(loss_of(run, w, 0), [w[path] for path in paths])
    for path, expected in zip(paths, gradient, strict=True):
        found = tree.flatten(upload)[path.replace("embedding", "gradient", 1)]
        assert torch.allclose(found, run.setting.lr * expected, rtol=1e-3, atol=1e-8) and float(expected.norm()) > 1e-4
    assert torch.allclose(upload["descriptor"], described(w, *examples(run, 0)).detach(), atol=1e-6)
    assert kept == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_of_single_steps_is_a_step_of_adam_down_the_mean_loss(engine: str) -> None:
    run = stirred(start(ONE_STEP, engine, server_lr=1e-3))
    w, cohort = leaves_of(run), run.population.cohort(0)
    assert len(cohort) == 6
    mean = torch.stack([loss_of(run, w, k) for k in cohort]).mean()
    gradient = torch.autograd.grad(run.setting.lr * mean, list(w.values()))
    run.step()
    first = tree.flatten(run.progress.server["moments"]["first"])
    for (path, leaf), expected in zip(w.items(), gradient, strict=True):
        assert torch.allclose(first[path], 0.1 * expected, rtol=1e-3, atol=1e-8), path
        assert float(expected.norm()) > 1e-5, path
        leaf.grad = first[path] / 0.1  # of a number near zero Adam sees the sign alone
    torch.optim.Adam(w.values(), lr=1e-3).step()
    found = tree.flatten({part: run.progress.server[part] for part in PARTS})
    assert all(torch.allclose(found[path], leaf, atol=1e-6) for path, leaf in w.items())


def test_a_gradient_is_no_longer_than_50() -> None:
    run = stirred(start(replace(ONE_STEP, lr=3000.0)))
    run.exchange(run.task_at(0), run.algorithm.exchanges(run.task_at(0))[0])
    assert float(tree.norm(run.progress.server["moments"]["first"])) == pytest.approx(5.0, rel=1e-4)


def test_a_client_without_examples_moves_nothing() -> None:
    run = stirred(start())
    upload, _ = toy.upload_once(run, 6)
    assert float(tree.norm(upload["gradient"])) == 0.0 == float(upload["descriptor"].norm())
    w = leaves_of(run)
    model = tree.map(torch.Tensor.detach, written(w, torch.zeros(3)))
    assert tree.largest_difference({key: upload[key] for key in ("body", "head")}, model) < 1e-6


def test_right_after_training_a_client_has_what_it_trained() -> None:
    run = start()
    seen, private = run.algorithm.after_training(run.task_at(0), toy.received(run, 0), {}, data_of(run, 0))
    model, (upload, _) = (
        run.algorithm.personal_model(run.task_at(0), seen, private, data_of(run, 0)),
        toy.upload_once(run),
    )
    assert model is not None and tree.largest_difference(model, {key: upload[key] for key in ("body", "head")}) == 0.0


# What comes of it -----------------------------------------------------------------------------------------------------


def test_a_client_held_out_of_training_has_the_model_that_its_examples_write() -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=12, unseen=1, eval_every=12), server_lr=5e-3))
    assert measured(run, "unseen") > 0.6  # of six classes
    assert run.algorithm.newcomer_adaptation(run.task) is None and run.algorithm.adaptation(run.task) is None
    assert start().progress.server["embedding"]["head"]["weight"].shape == (3, 64)  # 1 + N // 4


def test_each_client_gets_a_model_of_its_own() -> None:
    """Clients 0 and 5 have the same classes under exchanged names, which no single model can learn."""

    def right(name: str, **fields: Any) -> float:
        setting = replace(toy.SETTING, participation=1.0, rounds=30, eval_every=30)
        run = toy.run(ALGORITHMS[name](**fields), "stacked", setting=setting, sizes=(24,) * 8)
        images, index = run.population.images, run.population.index
        images.y[index[5]] = 1 - images.y[index[5]]
        task = toy.finish(run).task
        models = {k: run.algorithm.personal_model(task, toy.received(run, k), {}, data_of(run, k)) for k in (0, 5)}
        shares = [
            (task.logits(model, images.plain(index[k])).argmax(1) == images.y[index[k]]).float().mean()
            for k, model in models.items()
            if model is not None
        ]
        return float(min(shares))

    assert right("pefll", server_lr=5e-3) > 0.9 and right("fedavg") < 0.8


def test_what_is_counted_is_what_the_papers_trips_carry() -> None:
    """|e| + P + l either way, whatever the hypernetwork's size."""
    small, large = (
        toy.finish(start(replace(toy.SETTING, rounds=1), hidden_size=h, hidden_layers=k))
        for h, k in ((10, 1), (150, 4))
    )
    embedding = 7 * 64 * 64 + 64 + 3 * 64 + 3
    size = 6 * (4 * (embedding + 3) + tree.nbytes(small.task.init()))
    for run in (small, large):
        assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == size


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_are_averaged_and_not_written(engine: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", epochs=1, lr=0.01, rounds=1, participation=1.0)
    run = toy.run(ALGORITHMS["pefll"](hidden_size=4), engine, setting=setting, sizes=(9, 5, 0))
    first = tree.split(run.task.init(), tree.is_statistic)[0]
    assert not [path for part in PARTS for path in tree.flatten(run.progress.server[part]) if tree.is_statistic(path)]
    sent = [tree.split(toy.upload_once(run, k)[0], tree.is_statistic)[0] for k in (0, 1)]
    run.exchange(run.task_at(0), run.algorithm.exchanges(run.task_at(0))[0])
    mean = tree.map(lambda a, b: (9 * a + 5 * b) / 14, *sent)
    assert tree.largest_difference(run.progress.server["statistics"], mean) < 1e-4
    assert tree.largest_difference(mean, first) > 1e-3
