"""FedDistill: its steps and mean logits against loops written out, Local without distillation, and what travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", participation=1.0, rounds=2, epochs=1, eval_every=2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str = "feddistill", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def logits_of(w: list[Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])


def told(run: Run, classes: tuple[int, ...]) -> Tensor:
    """Give the server logits of some classes, which none of the toy's models thinks of: (6, 6)."""
    known = torch.zeros(6)
    known[list(classes)] = 1.0
    logits = 3 * torch.linspace(0, 20, 36).reshape(6, 6).sin()
    run.progress.server = {"logits": logits * known[:, None], "known": known}
    return logits


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
@ENGINES
def test_without_distillation_it_is_local(engine: str, setting: Any) -> None:
    off, local, on = (done(run_of(name, engine, setting, **fields)) for name, fields in
                      (("feddistill", {"distil": 0.0}), ("local", {}), ("feddistill", {})))  # fmt: skip
    assert largest_difference(private(off), private(local)) == 0.0
    assert largest_difference(private(on), private(local)) > 1e-4


@pytest.mark.equivalence
@ENGINES
def test_the_first_round_is_local_whatever_the_weight(engine: str) -> None:
    once = replace(SETTING, rounds=1)
    runs = run_of("feddistill", engine, once, distil=50.0), run_of("local", engine, once)
    assert largest_difference(*(private(done(run)) for run in runs)) == 0.0


def test_steps_are_those_of_the_papers_loss_and_logits_those_of_the_trained_model() -> None:
    """Cross-entropy + gamma · KL(softmax of what the class gets || softmax of what the example gets), the mean over a
    batch; of the classes that client 0 holds some are known and some are not."""
    run = run_of(setting=replace(SETTING, clip=None, momentum=0.9), distil=3.0)
    data = data_of(run, 0)
    held = torch.nonzero(data.class_counts).flatten().tolist()
    assert len(held) > 1
    logits = told(run, tuple(held[:1]))
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(run.task.init()).values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(run.setting.epochs):
        said = logits_of(list(w), batch.x)
        wanted = torch.where((batch.y == held[0])[:, None], logits[batch.y], said.detach())
        apart = F.kl_div(said.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        (F.cross_entropy(said, batch.y) + 3.0 * apart).backward()
        optimiser.step()
    upload, kept = toy.upload_once(run)
    expected = tree.unflatten(dict(zip(tree.flatten(kept), (p.detach() for p in w), strict=True)))
    assert largest_difference(kept, expected) < 1e-5
    x, y = run.population.images.plain(data.index), data.y
    for c in range(6):
        mine = logits_of([p.detach() for p in w], x[y == c])
        mean = mine.mean(0) if len(mine) else torch.zeros(6)
        assert torch.allclose(upload["logits"][c], mean, atol=1e-4)
    assert upload["known"].tolist() == [float(c in held) for c in range(6)]


def test_logits_of_a_class_are_averaged_over_its_holders_alike_and_stay_where_nobody_holds_it() -> None:
    run = run_of()
    before = told(run, (0, 2, 4))
    before = run.progress.server["logits"].clone()
    sent = [torch.full((6, 6), value) for value in (1.0, 4.0, 100.0)]
    known = [torch.tensor(row) for row in ([1.0, 1, 0, 0, 0, 0], [1.0, 0, 0, 1, 0, 0], [0.0] * 6)]
    uploads = Uploads(
        [{"logits": a * b[:, None], "known": b} for a, b in zip(sent, known, strict=True)], torch.tensor([9.0, 1, 7])
    )
    after = run.algorithm.aggregate(run.task, run.progress.server, uploads)
    wanted = [torch.full((6,), 2.5), sent[0][1], before[2], sent[1][3], before[4], torch.zeros(6)]
    assert torch.equal(after["logits"], torch.stack(wanted))
    assert after["known"].tolist() == [1, 1, 1, 1, 1, 0]


def test_what_others_say_of_a_class_moves_what_a_client_says_of_the_rest() -> None:
    """The logits of an unknown class are of no account, whatever they are."""
    data = data_of(run_of(), 0)
    held, other = int(data.y[0]), next(c for c in range(6) if not data.class_counts[c])
    said = {}
    for name, row in (("one", 5.0), ("another", -5.0), ("unknown", 0.0)):
        run = run_of(setting=replace(toy.SETTING, epochs=10), distil=5.0)
        told(run, () if name == "unknown" else (held,))
        run.progress.server["logits"][held] = 0.0
        run.progress.server["logits"][held, other] = row
        model = toy.upload_once(run)[1]
        x = run.population.images.plain(data.index[data.y == held])
        said[name] = float(run.task.logits(model, x).log_softmax(1)[:, other].mean())
    assert said["one"] > said["unknown"] + 0.5 and said["another"] < said["one"] - 1.0


def test_logits_travel_and_no_weights() -> None:
    run = run_of()
    run.step()
    for what in ("bytes_down", "bytes_up"):
        assert run.progress.cost[what] == len(run.population.cohort(0)) * 4 * (6 * 6 + 6)


@ENGINES
def test_a_client_held_out_is_tuned_with_distillation(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=2, unseen=1)
    runs = [toy.finish(run_of("feddistill", engine, setting, distil=distil)) for distil in (1.0, 0.0)]
    models = [
        run.evaluator.models(run.task_at(1), run.progress.server, run.progress.server, run.store, [7], True)["unseen"]
        for run in runs
    ]
    assert largest_difference(models[0][0]["head"], models[1][0]["head"]) > 1e-4
