"""FedCRAC: margins and re-training by automatic differentiation, statistics by numpy, FedAvg when switched off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, momentum=0.9, weight_decay=1e-2)
OFF: dict[str, Any] = {"margin": 0.0, "scale": 1.0, "steps": 0}
CHEAP: dict[str, Any] = {"steps": 8, "features_per_class": 20}


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model_of(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_switched_off_it_is_fedavg(engine: str) -> None:
    off, fedavg, on = (
        toy.finish(run_of(name, engine, **fields))
        for name, fields in (("fedcrac", OFF), ("fedavg", {}), ("fedcrac", {}))
    )
    assert largest_difference(model_of(off), model_of(fedavg)) == 0.0
    assert largest_difference(model_of(on), model_of(fedavg)) > 1e-2


@pytest.mark.parametrize("on", [{"margin": 1.0}, {"scale": 5.0}, {"steps": 8}, {"start": "previous"}])
def test_each_idea_changes_something(on: dict[str, Any]) -> None:
    runs = [toy.finish(run_of("fedcrac", **{**OFF, **fields})) for fields in (on, {})]
    assert largest_difference(*map(model_of, runs)) > 1e-4


def test_the_head_of_the_last_round_loses_what_clients_learnt_in_theirs() -> None:
    run = run_of("fedcrac", steps=0, start="previous")
    first = run.progress.server["head"]
    toy.finish(run)
    assert largest_difference(run.progress.server["head"], first) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_clients_train_with_margins_and_send_statistics_of_the_trained_model(engine: str) -> None:
    run = run_of("fedcrac", engine, replace(SETTING, rounds=2), margin=0.7, scale=3.0, steps=0)
    run.step()
    before = run.progress.server
    assert float((before["margins"] - before["margins"][0, 0]).abs().max()) > 0.01
    models, uploads = [], []
    for k in range(8):
        data = data_of(run, k, 1)
        w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model_of(run)).values()]
        optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
        for batch in data.batches(2):
            z = F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:])
            rows = []
            for row, y in zip(z, batch.y.tolist(), strict=True):
                rows.append(torch.stack([row[c] + (c != y) * before["margins"][y, c] for c in range(6)]))
            optimiser.zero_grad()
            F.cross_entropy(3 * (torch.stack(rows) - z.amin(1, keepdim=True)), batch.y).backward()
            optimiser.step()
        models.append(tree.unflatten(dict(zip(tree.flatten(model_of(run)), [p.detach() for p in w], strict=True))))
        x, of = run.population.images.plain(data.index), data.y.numpy()
        h = torch.relu(F.linear(x.flatten(1), *w[:2])).detach().double().numpy()
        uploads.append({c: (h[of == c].mean(0), h[of == c].var(0), (of == c).sum()) for c in np.unique(of)})
    run.step()
    after = run.progress.server
    assert largest_difference(model_of(run), mean_by_size(run, range(8), models)) < 5e-5
    for c in range(6):
        found = [each[c] for each in uploads if c in each]
        n = sum(each[2] for each in found)
        for name, place in (("means", 0), ("variances", 1)):
            wanted = sum(each[2] * each[place] for each in found) / n  # the spread of means is left out
            assert np.abs(after[name][c].numpy() - wanted).max() < 1e-3
    means = after["means"].double().numpy()
    cosine = (means @ means.T) / np.linalg.norm(means, axis=1) / np.linalg.norm(means, axis=1)[:, None]
    assert np.abs(after["margins"].numpy() - 0.7 * cosine).max() < 1e-5
    assert np.abs(np.diag(after["margins"].numpy()) - 0.7).max() < 1e-6


@pytest.mark.parametrize(("start", "distil"), [("averaged", 0.5), ("previous", 0.5), ("averaged", 0.0)])
def test_re_training_descends_both_losses_on_what_is_drawn(start: Any, distil: float) -> None:
    run = run_of("fedcrac", **CHEAP, start=start, distil=distil, margin=0.4, temperature=0.8)
    run.step()
    before = run.progress.server
    plain = run_of("fedcrac", steps=0, distil=distil, margin=0.4, temperature=0.8)
    plain.progress.server, plain.progress.round = before, 1
    plain.step()
    run.step()
    after = run.progress.server
    rest = ("body", "means", "variances", "margins")
    assert largest_difference(*({key: each[key] for key in rest} for each in (after, plain.progress.server))) == 0.0
    noise = keys.normal(keys.fold(run.task.key, "server", "features", 1), 6, 20, run.task.model.feature_size)
    x = torch.cat([after["means"][c] + after["variances"][c].sqrt() * noise[c] for c in range(6)])
    y = torch.arange(6).repeat_interleave(20)
    counts = sum(torch.bincount(data_of(run, k).y, minlength=6) for k in range(8))
    assert isinstance(counts, torch.Tensor) and counts.unique().numel() > 1
    examples = (counts[y] / counts.sum() / 20).float()
    first = plain.progress.server["head"] if start == "averaged" else before["head"]
    w = [torch.nn.Parameter(first[name].clone()) for name in ("weight", "bias")]
    optimiser = torch.optim.SGD(w, lr=0.05, momentum=0.9, nesterov=True)
    others = after["margins"][y] * (1 - F.one_hot(y, 6))
    teacher = 5 * (F.linear(x, *w).detach() + others)
    for _ in range(8):
        logits = 5 * (F.linear(x, *w) + others)
        apart = F.kl_div((logits / 0.8).log_softmax(1), (teacher / 0.8).softmax(1), reduction="none").sum(1)
        entropy = F.cross_entropy(logits, y, reduction="none")
        loss = (examples * ((1 - distil) * entropy + distil * 0.8**2 * apart)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert largest_difference(after["head"], first) > 2e-3
    wanted = {"weight": w[0].detach(), "bias": w[1].detach()}
    assert largest_difference(after["head"], wanted) < 2e-5


def test_one_clients_statistics_are_what_it_sent_and_a_class_without_examples_keeps_its_own() -> None:
    run = run_of("fedcrac", **CHEAP)
    start, task = run.progress.server, run.task_at(0)
    one = toy.upload_once(run, 1)[0]
    absent = one["counts"] == 0
    assert 0 < int(absent.sum()) < 6
    first = run.algorithm.aggregate(task, start, Uploads([one], torch.tensor([44.0])))
    for key in ("means", "variances"):
        assert torch.allclose(first[key], one[key])
    assert first["known"].tolist() == (~absent).float().tolist()
    unknown = absent[:, None] | absent
    assert bool((first["margins"][unknown] == 1).all()) and not bool((first["margins"][~unknown] == 1).all())
    other = toy.upload_once(run, 5)[0]
    second = run.algorithm.aggregate(task, first, Uploads([other], torch.tensor([3.0])))
    kept = other["counts"] == 0
    assert torch.equal(second["means"][kept], first["means"][kept])
    assert not torch.equal(second["means"][~kept], first["means"][~kept])


def test_all_classes_are_held_apart_alike_at_first() -> None:
    assert run_of("fedcrac", margin=0.3).progress.server["margins"].unique().tolist() == pytest.approx([0.3])


def test_bytes_are_the_model_the_margins_and_statistics() -> None:
    run = run_of("fedcrac", setting=replace(SETTING, rounds=1), **CHEAP)
    c, d, model = 6, run.task.model.feature_size, tree.nbytes(model_of(run))
    toy.finish(run)
    assert run.progress.cost["bytes_down"] == 8 * (model + 4 * c * c)
    assert run.progress.cost["bytes_up"] == 8 * (model + 4 * (2 * c * d + c))


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of("fedcrac", engine, setting, sizes, **CHEAP)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-3


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedcrac", engine, setting)), "unseen") > 0.8


def test_the_defaults_are_the_references() -> None:
    method = ALGORITHMS["fedcrac"]()
    assert (method.margin, method.scale, method.steps, method.distil, method.temperature) == (1.0, 5.0, 300, 0.5, 0.5)
