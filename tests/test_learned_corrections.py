"""Corrections that learn: crt, lws and ccvr against arithmetic by hand, and an epilogue that training does not feel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, LearnedCorrection, LocalData, Tree, Uploads, keys, tree
from bench.contract import toy
from bench.plugins.registry import PARTS
from bench.protocol.composed import Composed
from bench.protocol.spelling import parse_algorithms, parse_datasets
from bench.results import records
from bench.sweep import driver
from bench.sweep.config import Sweep
from bench.sweep.pool import InProcess
from bench.training import engine as engines
from bench.training import rounds
from bench.validation.report import validate
from bench.validation.rerun import candidates, rerun
from tests.by_hand import data_of

SETTING = replace(toy.SETTING, rounds=2, unseen=1)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
THREE = ("crt", "lws", "ccvr")
C, D = 6, 64
MODEL = 4 * (64 * D + D + C * D + C)
"""Bytes of the toy's network."""
SENT = {"crt": 4 * (C * D + C), "lws": 4 * C, "ccvr": 4 * C * (D * (D + 3) // 2 + 1)}
"""Bytes that a client sends in the epilogue."""


def made(text: str) -> Algorithm:
    (algorithm,) = parse_algorithms(text)
    return algorithm


def part(name: str, **fields: Any) -> LearnedCorrection:
    found = PARTS[name](**fields)
    assert isinstance(found, LearnedCorrection)
    return found


def ran(text: str, engine: str = "serial", **setting: Any) -> rounds.Run:
    return toy.finish(toy.run(made(text), engine, setting=replace(SETTING, **setting)))


def features(model: Tree, x: Tensor) -> Tensor:
    return torch.relu(F.linear(x.flatten(1), *tree.flatten(model["body"]).values()))


def trained_model(run: rounds.Run) -> Tree:
    """The generic model as the method has it."""
    assert isinstance(run.algorithm, Composed)
    server = {key: value for key, value in run.progress.server.items() if key != "parts"}
    model = run.algorithm.method.global_model(run.task_at(run.setting.rounds - 1), server)
    assert model is not None
    return model


def head_of(run: rounds.Run, place: int = 0) -> Tree:
    learnt: Tree = run.progress.server["parts"]["learnt"][f"{place}"]
    assert float(learnt["times"]) == 1
    head: Tree = learnt["head"]
    return head


def torchs_sgd(run: rounds.Run, leaves: list[Tensor], scored: Any, data: LocalData, epochs: int, salt: str) -> Any:
    """Cross-entropy descended by torch's own optimiser, on draws of which each class is a like share."""
    w = [torch.nn.Parameter(leaf.clone()) for leaf in leaves]
    rule = torch.optim.SGD(w, run.setting.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    weights = torch.tensor([1 / int(data.class_counts[c]) for c in data.y])
    for batch in data.batches(epochs, salt, weights=weights):
        rule.zero_grad()
        F.cross_entropy(scored(w, batch.x), batch.y).backward()
        rule.step()
    return [leaf.detach() for leaf in w]


# Golden arithmetic


@pytest.mark.equivalence
def test_ccvr_pools_the_moments_of_all_features_wherever_they_lie() -> None:
    """Mean and unbiased covariance of each class as numpy has them of all clients' features in one place."""
    run = toy.run(made("fedavg+ccvr"), sizes=(60, 44, 33, 17, 9, 3, 1, 26))
    model, ccvr = run.task.init(), part("ccvr")
    data = [data_of(run, k) for k in range(8)]
    sent = [ccvr.learn(run.task, model, each) for each in data]
    pooled = ccvr.pool(run.task, Uploads(sent, torch.ones(8)))
    z = np.concatenate([features(model, run.population.images.plain(each.index)).double().numpy() for each in data])
    y = np.concatenate([each.y.numpy() for each in data])
    singles = sum(int(count) == 1 for each in data for count in each.class_counts)
    assert singles and len(set(y)) == C
    rows, columns = np.triu_indices(D)
    for c in range(C):
        mine = z[y == c]
        assert float(pooled["count"][c]) == len(mine)
        assert np.abs(pooled["mean"][c].numpy() - mine.mean(0)).max() < 1e-6
        wanted = np.cov(mine, rowvar=False)[rows, columns]
        assert np.abs(pooled["covariance"][c].numpy() - wanted).max() < 1e-6 < 1e-3 < np.abs(wanted).max()


def test_ccvr_of_two_clients_by_hand() -> None:
    """Features 0, 2 here and 7 there: mean 3, and covariance (9 + 1 + 16) / 2 = 13."""
    here = {"count": [2.0, 0.0], "mean": [[1.0], [0.0]], "covariance": [[2.0], [0.0]]}
    there = {"count": [1.0, 0.0], "mean": [[7.0], [0.0]], "covariance": [[0.0], [0.0]]}
    sent = [{key: torch.tensor(value) for key, value in each.items()} for each in (here, there)]
    pooled = part("ccvr").pool(toy.run(toy.Host()).task, Uploads(sent, torch.tensor([2.0, 1.0])))
    assert {key: leaf.tolist() for key, leaf in pooled.items()} == {
        "count": [3.0, 0.0], "mean": [[3.0], [0.0]], "covariance": [[13.0], [0.0]]
    }  # fmt: skip


def test_ccvr_draws_what_it_was_told_and_classes_that_are_there_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy.run(made("fedavg+ccvr"))
    factor = 0.3 * torch.randn(C, D, D, generator=torch.Generator().manual_seed(1))
    covariance, mean = factor @ factor.mT, torch.randn(C, D, generator=torch.Generator().manual_seed(2))
    rows, columns = torch.triu_indices(D, D)
    count = torch.tensor([9.0, 4.0, 0.0, 1.0, 0.0, 0.0])
    learnt = {"count": count, "mean": mean, "covariance": covariance[:, rows, columns]}
    seen: list[Any] = []

    def noted(self: Any, loss: Any, params: Tree, batches: Any, lr: float) -> Tree:
        seen.extend(batches)
        return params

    monkeypatch.setattr(type(run.task), "sgd", noted)
    part("ccvr", features=4000).correct(run.task, {**run.task.init(), "learnt": learnt}, None)
    x, y, weight = (torch.cat([getattr(batch, name) for batch in seen]) for name in ("x", "y", "weight"))
    assert sorted(set(y.tolist())) == [0, 1, 3]
    totals = [float(weight[y == c].sum()) for c in (0, 1, 3)]
    assert totals == pytest.approx([4000.0] * 3) and float(weight.min()) > 0
    for c in (0, 1, 3):
        drawn = x[y == c].double()
        assert float((drawn.mean(0) - mean[c]).abs().max()) < 0.2
        apart = np.cov(drawn.numpy(), rowvar=False) - covariance[c].numpy()
        assert np.linalg.norm(apart) / np.linalg.norm(covariance[c].numpy()) < 0.2


@ENGINES
@pytest.mark.parametrize("name", ["crt", "lws"])
def test_the_epilogue_is_what_each_client_learns_by_itself_averaged_by_size(name: str, engine: str) -> None:
    """Of the final generic model, which is FedLoGe's realigned one, and by torch's own optimiser."""
    run = ran(f"fedloge(etf_steps=10)+{name}(epochs=2)", engine, participation=0.5, weight_decay=1e-2)
    model = trained_model(run)
    assert torch.allclose(model["head"]["weight"].norm(dim=1), torch.tensor(1.7))
    fresh = run.task.model.init(keys.fold(run.task.key, "crt"))["head"]
    rows = model["head"]["weight"], model["head"]["bias"]

    def by_head(w: list[Tensor], x: Tensor) -> Tensor:
        return F.linear(features(model, x), *w)

    def by_scales(w: list[Tensor], x: Tensor) -> Tensor:
        return w[0] * F.linear(features(model, x), *rows)

    start = [fresh["weight"], fresh["bias"]] if name == "crt" else [torch.ones(C)]
    scored = by_head if name == "crt" else by_scales
    sizes, found = [], []
    for client in range(run.population.training):
        data = data_of(run, client, 1)
        if not len(data.index):
            continue
        sizes.append(len(data.index))
        found.append(torchs_sgd(run, start, scored, data, 2, name))
    share = torch.tensor(sizes) / sum(sizes)
    mean = [sum(s * leaf for s, leaf in zip(share, leaves, strict=True)) for leaves in zip(*found, strict=True)]
    if name == "lws":
        assert float((mean[0] - 1).abs().max()) > 1e-2
        mean = [model["head"]["weight"] * mean[0][:, None], model["head"]["bias"] * mean[0]]
    wanted = {"weight": mean[0], "bias": mean[1]}
    assert tree.largest_difference(head_of(run), wanted) < 2e-5
    changed = run.algorithm.corrected(run.task_at(1), run.progress.server, model, None)
    assert changed is not None and set(changed) == {"head"}
    assert tree.largest_difference(changed["head"], wanted) < 2e-5


@ENGINES
@pytest.mark.parametrize("name", THREE)
def test_a_personal_model_learns_from_its_own_client_alone(name: str, engine: str) -> None:
    run = toy.run(made(f"fedrep+{name}(epochs=3)"), engine, setting=SETTING)
    toy.finish(run)
    corrector, task, shared = part(name, epochs=3), run.task_at(1), toy.received(run, 0, 1)
    visits = [run.population.visit(k, 1, run.store[k]) for k in (0, 2, 6)]
    models, _ = engines.BY_NAME[engine](run.algorithm.personal_model, task, shared, run.population.images, visits)
    seen = [replace(visit, private=model) for visit, model in zip(visits, models, strict=True)]
    changed, _ = engines.BY_NAME[engine](run.algorithm.corrected, task, shared, run.population.images, seen)
    for client, model, change in zip((0, 2), models[:2], changed[:2], strict=True):
        assert set(change) == {"head"} and tree.largest_difference(change["head"], model["head"]) > 1e-3
        learnt = corrector.learn(task, model, data_of(run, client, 1))
        wanted = corrector.correct(task, {**model, "learnt": learnt}, None)
        assert wanted is not None and tree.largest_difference(change, wanted) < engines.TOLERANCE
    assert toy.SIZES[6] == 0 and tree.largest_difference(changed[2]["head"], models[2]["head"]) == 0.0


@pytest.mark.equivalence
def test_scales_of_one_are_no_correction_and_rows_keep_their_directions() -> None:
    run = toy.run(made("fedavg+lws"))
    head = {key: keys.normal(keys.key(3), *leaf.shape) for key, leaf in run.task.init()["head"].items()}
    model = {**run.task.init(), "head": head}
    same = part("lws").correct(run.task, {**model, "learnt": {"scales": torch.ones(C)}}, None)
    assert same is not None and tree.largest_difference(same["head"], head) == 0.0
    scales = torch.arange(1.0, 7.0)
    other = part("lws").correct(run.task, {**model, "learnt": {"scales": scales}}, None)
    assert other is not None
    z = keys.normal(keys.key(4), 5, D)
    wanted = scales * F.linear(z, head["weight"], head["bias"])  # f_c (w_c h + b_c)
    assert torch.allclose(F.linear(z, other["head"]["weight"], other["head"]["bias"]), wanted, atol=1e-4)
    assert made("fedavg+lws(epochs=0)") == made("fedavg+ccvr(epochs=0)") == made("fedavg")


def test_crt_without_epochs_is_a_random_head_and_not_the_old_one() -> None:
    run = ran("fedavg+crt(epochs=0)")
    fresh = run.task.model.init(keys.fold(run.task.key, "crt"))["head"]
    assert tree.largest_difference(head_of(run), fresh) < 1e-7
    assert tree.largest_difference(fresh, run.task.init()["head"]) > 1e-2
    assert made("fedavg+crt(epochs=0)") != made("fedavg")


def test_drawing_classes_alike_moves_a_lopsided_client() -> None:
    """Of 40 examples of one class and few of another the balanced head knows the few."""
    run = ran("fedavg+crt(epochs=30)")
    model, counts = trained_model(run), torch.stack([run.population.class_counts(k) for k in range(7)])
    client = int((counts.max(1).values - counts.float().masked_fill(counts == 0, 99).min(1).values).argmax())
    data = data_of(run, client, 1)
    rare = int(torch.where(data.class_counts > 0, data.class_counts, 99).argmin())
    shares = torch.zeros(C)
    for batch in data.batches(30, "crt", weights=(1 / data.class_counts.clamp(min=1))[data.y]):
        shares += torch.bincount(batch.y, minlength=C)
    assert float(shares[rare] / shares.sum()) == pytest.approx(1 / int((data.class_counts > 0).sum()), abs=0.05)
    assert model["body"] is run.progress.server["body"]


# An epilogue


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "creff(match_steps=1, head_epochs=1)", "fedavg+topk"])
def test_no_effect_flows_back(method: str, name: str, engine: str) -> None:
    mine, plain = ran(f"{method}+{name}", engine, eval_every=2), ran(method, engine, eval_every=2)
    states = [toy.states(run) for run in (mine, plain)]
    for each in states:
        each["server"] = {key: value for key, value in each["server"].items() if key != "parts"}
    assert tree.largest_difference(*states) == 0.0
    found, usual = mine.outcome().metrics, plain.outcome().metrics
    for kind in ("generic", "personal", "unseen"):
        assert found[f"{kind}:uncorrected"] == usual[kind] and found[kind] is not None
    assert found["personal:uncorrected.never"] == usual["personal.never"]
    others = [key for key in usual if key.partition(".")[0].partition("@")[0] not in ("generic", "personal", "unseen")]
    assert others and all(found[key] == usual[key] for key in others)


@ENGINES
@pytest.mark.parametrize("name", THREE)
def test_bytes_and_samples_are_counted(name: str, engine: str) -> None:
    """Down goes the model to all 7 training clients, up what the card says; an epoch is every example once, a pass that
    only looks a third of that.
    """
    mine, plain = (ran(each, engine).outcome().cost for each in (f"fedavg+{name}", "fedavg"))
    spent = {key: (mine[key] or 0.0) - (plain[key] or 0.0) for key in mine}
    assert spent["bytes_down"] == 7 * MODEL and spent["bytes_up"] == 7 * SENT[name]
    epochs = {"crt": 10, "lws": 5, "ccvr": 2 / 3}[name]
    assert spent["train_samples"] == pytest.approx(epochs * sum(toy.SIZES[:7]))
    assert spent["adaptation_samples"] == pytest.approx(epochs * sum(toy.SIZES))
    assert spent["train_flops"] > 0 and spent["adaptation_flops"] > 0
    assert (spent["server_flops"] > 0) == (name == "ccvr")
    assert spent["client_state_bytes"] == 0


def test_nothing_is_corrected_before_the_end_and_both_are_there_then() -> None:
    run = ran("fedavg_ft+crt", rounds=3)
    *before, last = run.outcome().rounds
    for row in before:
        assert row["generic"] is None and row["generic:uncorrected"] is not None
        assert row["personal"] is None and row["personal:0 epochs"] is not None
    for kind in ("generic", "personal", "unseen"):
        assert last[kind] is not None and last[f"{kind}:uncorrected"] is not None
    for exchange, round in (((), 0), ((True,), 2)):
        listed = run.algorithm.exchanges(run.task_at(round))
        assert tuple(each.everyone for each in listed if each.aside) == exchange
    plain = ran("fedavg+crt", rounds=3)
    assert [row["personal"] is None for row in plain.outcome().rounds] == [True, True, False]
    assert plain.outcome().rounds[0]["personal:uncorrected"] is not None


def test_a_finished_run_is_taken_up_with_what_it_has_learnt(tmp_path: Path) -> None:
    algorithm, file = made("fedavg+ccvr+crt"), tmp_path / "checkpoint.pt"
    whole = toy.finish(toy.run(algorithm, setting=SETTING, checkpoint=file)).outcome()
    again = toy.run(algorithm, setting=SETTING, checkpoint=file)
    assert again.resumed and again.progress.round == 2
    assert again.outcome().digest == whole.digest and again.outcome().metrics == whole.metrics


def test_a_client_without_labels_has_nothing_to_learn_from() -> None:
    found = ran("fedavg+lws", unseen_labels=False).outcome().metrics
    assert found["unseen"] is not None and "unseen:uncorrected" not in found
    assert found["personal:uncorrected"] is not None


@pytest.mark.parametrize("name", THREE)
def test_a_method_without_a_generic_model_has_an_empty_epilogue(name: str) -> None:
    mine, plain = ran(f"fedper+{name}"), ran("fedper")
    for key in ("bytes_up", "bytes_down", "train_samples"):
        assert mine.progress.cost[key] == plain.progress.cost[key]
    found = mine.outcome().metrics
    assert found["generic"] is None and found["personal:uncorrected"] == plain.outcome().metrics["personal"]


def test_in_one_place_the_epilogue_is_one_clients() -> None:
    run = ran("centralised+crt", unseen=0)
    found = run.outcome().metrics
    assert found["generic"] is not None and found["generic:uncorrected"] is not None
    assert run.outcome().cost["bytes_up"] is None


def test_corrections_follow_each_other_in_the_epilogue_too() -> None:
    """lws scales the rows that crt gave; tau_norm's unit rows are those that lws scales."""
    run = ran("fedavg+crt+lws")
    ratio = head_of(run, 1)["weight"] / head_of(run, 0)["weight"]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
    changed = run.algorithm.corrected(run.task_at(1), run.progress.server, trained_model(run), None)
    assert changed is not None and tree.largest_difference(changed["head"], head_of(run, 1)) == 0.0
    run = ran("fedavg+tau_norm+lws")
    unit = F.normalize(trained_model(run)["head"]["weight"])
    ratio = head_of(run, 1)["weight"] / unit
    assert torch.allclose(ratio[unit.abs() > 1e-3], ratio[:, :1].expand_as(ratio)[unit.abs() > 1e-3], rtol=1e-3)


def test_where_nothing_arrives_no_generic_model_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy.run(made("fedavg+crt"), setting=replace(SETTING, rounds=1))
    monkeypatch.setattr(run.population, "arrives", lambda client, round: False)
    found = toy.finish(run).outcome().metrics
    assert found["generic"] is None and found["generic:uncorrected"] is not None


def test_the_tier_is_what_the_server_learns() -> None:
    assert [made(f"fedavg+{name}").tier for name in THREE] == ["S", "S", "L"]


def test_stored_runs_are_valid_and_can_be_run_again(tmp_path: Path) -> None:
    asked = Sweep(
        algorithms=(made("fedavg+crt(epochs=1)"), made("fedavg+ccvr(features=20)+tau_norm")),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 2, "eval_every": 1, "unseen": 2, "epochs": 1},
        data_root=Path("no data here"),
    )
    assert {result.status for result in driver.run(asked.expand(), tmp_path, pool=InProcess())} == {"done"}
    report = validate(tmp_path, Path("no data here"))
    assert {problem.file for problem in report.problems} <= {"README.md", "sweeps"}
    runs = candidates(report.inspected, Path("no data here"))
    assert len(runs) == 2
    for run_id, run in runs.items():
        assert not rerun(records.read(tmp_path / run_id), run).differs
