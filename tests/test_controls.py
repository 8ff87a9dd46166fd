"""Controls: which rows a method must be compared with, where that is told, and FedLoGe without one idea each."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, keys, tree
from bench.contract import checks, toy
from bench.contract.promises import findings
from bench.plugins import declared
from bench.plugins.registry import ALGORITHMS, PARTS, call, told
from bench.protocol.spelling import parse_algorithms, parse_datasets
from bench.results import comparison, records
from bench.results.compared import terminal
from bench.results.leaderboard import leaderboards
from bench.sweep import driver
from bench.sweep.config import Sweep
from bench.sweep.pool import InProcess
from bench.sweep.run import Run as Cell
from bench.training.rounds import Run
from bench.validation import rebuilding
from tests.by_hand import data_of
from tests.test_command import Bench
from tests.test_command import bench as bench

SETTING = replace(toy.SETTING, participation=0.5, rounds=3)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
module: Any = importlib.import_module("bench.algorithms.fedloge")
PLAIN = "frame='random'", "realign=False", "auxiliary=False"


def made(text: str) -> Algorithm:
    (algorithm,) = parse_algorithms(text)
    return algorithm


def fedloge(engine: str = "serial", **fields: Any) -> Run:
    return toy.finish(toy.run(ALGORITHMS["fedloge"](etf_steps=100, **fields), engine, setting=SETTING))


def metrics(run: Run) -> dict[str, float | None]:
    return run.outcome().metrics


def run_of(text: str) -> Cell:
    asked = Sweep(algorithms=(made(text),), datasets=tuple(parse_datasets("digits")), data_root=Path("data"))
    (run,) = asked.expand()
    return run


# What methods say


def test_the_issues_controls_are_declared() -> None:
    wanted = {
        "fedloge": {
            "fedloge(frame='random')", "fedloge(sparsity=0)", "fedloge(realign=False)", "fedloge(auxiliary=False)",
            "fedavg+tau_norm", "fedavg+class_mask",
        },
        "creff": {"creff(match_steps=0)"},
        "fedrod": {"fedrod+cross_entropy"},
    }  # fmt: skip
    for method, those in wanted.items():
        assert those <= set(declared.controls(method))


def test_what_is_read_of_a_file_is_what_its_class_has() -> None:
    """In a process in which none of them is imported the text alone is read."""
    for name in ALGORITHMS:
        text = declared.source("algorithms", name)
        assert text is not None and ("controls:" in text) == bool(ALGORITHMS[name].controls)
    entered = dict(ALGORITHMS._classes)
    try:
        ALGORITHMS._classes.clear()
        read = {name: (declared.controls(name), declared.declared(ALGORITHMS, name, "family")) for name in entered}
    finally:
        ALGORITHMS._classes.update(entered)
    assert read == {name: (dict(kind.controls), kind.family) for name, kind in entered.items()}
    assert declared.controls("fedloge+focal") == declared.controls("no such method") == {}


def test_controls_are_listed_and_shown(bench: Bench) -> None:
    known = json.loads(bench("list", "controls", "--json").out)
    assert known["creff"] == dict(ALGORITHMS["creff"].controls) and "fedavg" not in known
    listed = bench("list", "controls").out
    assert "fedrod:\n  fedrod+cross_entropy " in listed and "whether the balanced loss matters" in listed
    assert json.loads(bench("show", "fedrod", "--json").out)["controls"] == known["fedrod"]
    assert "\nControls\n  fedrod+cross_entropy  (whether" in bench("show", "fedrod").out
    assert "Controls" not in bench("show", "fedavg").out


@dataclass(frozen=True, kw_only=True)
class NoRow(toy.Host):
    controls: ClassVar[dict[str, str]] = {"fedavg,fedprox": "whether two are one"}


@dataclass(frozen=True, kw_only=True)
class NoAnswer(toy.Host):
    controls: ClassVar[dict[str, str]] = {"fedavg": " "}


@dataclass(frozen=True, kw_only=True)
class NoMethod(toy.Host):
    controls: ClassVar[dict[str, str]] = {"fedavg": "whether it does anything"}


@dataclass(frozen=True, kw_only=True)
class OtherThen(toy.Host):
    later: ClassVar[dict[str, object]] = {"scale": 0.5}


@pytest.mark.parametrize(
    ("broken", "promise", "said"),
    [
        (NoRow, "its controls are rows", "fedavg,fedprox is not one row"),
        (NoAnswer, "its controls are rows", "fedavg says nothing of what it answers"),
        (NoMethod, "its controls are rows", "fedavg gives what it gives at its defaults"),
        (OtherThen, "later fields have their defaults", "later names scale"),
    ],
)
def test_the_contract_catches(broken: type[Algorithm], promise: str, said: str) -> None:
    (finding,) = findings(broken, {promise: checks.ALGORITHM_PROMISES[promise]})
    assert finding.problem is not None and said in finding.problem


# Fields that came later


def test_a_field_that_came_later_leaves_identity_and_call_as_they_were() -> None:
    plain = run_of("fedloge")
    told_then = {
        "sparsity": 0.6, "etf_norm": 0.1, "etf_steps": 10_000, "etf_bias": "zero", "faithful": False, "scale": 1.7,
        "generic_bias": "keep", "personal_rule": "P0",
    }  # fmt: skip
    assert plain.identity()["algorithm"] == {"name": "fedloge", "version": 2, "fields": told_then}
    assert call(plain.algorithm) == f"FedLoGe({', '.join(f'{name}={value!r}' for name, value in told_then.items())})"
    ids = {run_of(f"fedloge({each})").id for each in PLAIN}
    assert len(ids | {plain.id}) == 4
    assert told(run_of("fedloge(realign=False)").algorithm) == {**told_then, "realign": False}
    for text in ("fedavg", "fedrep(head_epochs=2)"):  # of all others the call is Python's
        assert call(made(text)) == repr(made(text))
    assert call(made("fedavg+topk")) == repr(made("fedavg+topk"))


def test_published_runs_of_fedloge_are_still_rebuilt() -> None:
    found = [each for each in records.read_all(Path("results"))[0] if each.algorithm in ("fedloge", "creff", "fedrod")]
    assert found
    for record in found:
        asked = rebuilding.rebuild(record)
        again = asked.run(Path())
        assert again.identity()["algorithm"] == record.identity["algorithm"]
        assert asked.own_images or again.id == record.id  # images of a user's own are not here
        assert rebuilding.description(asked)["call"] == record.call


# What a comparison says


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    rows = "fedavg,fedrod,fedrod+cross_entropy,creff(head_epochs=1,match_steps=1),creff(head_epochs=1,match_steps=0)"
    asked = Sweep(
        algorithms=tuple(parse_algorithms(rows)),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 1, "clients": 3},
        data_root=Path("data"),
    )
    assert {result.status for result in driver.run(asked.expand(), folder, pool=InProcess())} == {"done"}
    return folder


def test_compare_names_the_control_beside_its_method(out: Path, bench: Bench) -> None:
    found = json.loads(bench("compare", str(out), "--json").out)["controls"]
    named = {(each["method"], each["control"]): each["label"] for each in found}
    mine = "creff(match_steps=1, head_epochs=1)"
    assert named == {
        ("fedrod", "fedrod+cross_entropy"): "fedrod+cross_entropy",
        ("fedrod", "fedavg+balanced_softmax"): None,
        (mine, "creff(match_steps=0)"): "creff(match_steps=0, head_epochs=1)",  # its other fields are the same
        (mine, "fedavg+crt"): None,
    }
    said = bench("compare", str(out), "fedrod", "fedavg").out
    assert "fedrod+cross_entropy" in said and "fedavg+balanced_softmax (no results)" in said
    assert "whether the balanced loss matters" in said and "creff" not in said
    assert "Controls" not in bench("compare", str(out), "fedavg", "fedrod+cross_entropy").out


def test_labels_that_are_no_calls_have_no_controls(out: Path) -> None:
    boards = leaderboards(records.read_all(out)[0])
    odd = [replace(boards[0], rows=tuple(replace(row, words="a row (") for row in boards[0].rows))]
    assert list(comparison.controls(odd, [row.label for row in odd[0].rows])) == []
    assert list(terminal(comparison.compare(boards, "generic")))


# FedLoGe without one idea each


def test_a_random_frame_has_the_zeros_and_the_norm_and_not_the_angles() -> None:
    key = keys.key(3)
    ours, theirs = module.sparse_etf(key, 6, 64, 0.6, 0.1, 2000), module.random_frame(key, 6, 64, 0.6, 0.1)
    assert torch.equal(ours == 0, theirs == 0) and int((theirs == 0).sum()) == int(0.6 * 6 * 64)
    assert torch.allclose(theirs.norm(dim=1), torch.full((6,), 0.1)) and theirs.dtype == torch.float32

    def worst(frame: Tensor) -> float:
        unit = F.normalize(frame, dim=1)
        return float((unit @ unit.T).fill_diagonal_(-1).max())

    assert worst(ours) < -0.15 < 0.0 < worst(theirs)
    dense = module.sparse_etf(key, 6, 64, 0, 0.1)
    unit = F.normalize(dense, dim=1)
    assert torch.allclose(unit @ unit.T, 1.2 * torch.eye(6) - 0.2, atol=1e-5)
    assert torch.allclose(dense.norm(dim=1), torch.full((6,), 0.1))


@ENGINES
def test_a_random_frame_teaches_another_body(engine: str) -> None:
    mine, plain = fedloge(engine, frame="random"), fedloge(engine)
    assert torch.allclose(mine.progress.server["etf"]["weight"].norm(dim=1), torch.full((6,), 0.1))
    assert tree.largest_difference({"body": mine.progress.server["body"]}, {"body": plain.progress.server["body"]}) > 0


@pytest.mark.equivalence
@ENGINES
def test_without_realignment_training_is_the_same_and_heads_are_tested_as_they_are(engine: str) -> None:
    mine, plain = fedloge(engine, realign=False), fedloge(engine)
    assert mine.outcome().digest == plain.outcome().digest
    found, usual = metrics(mine), metrics(plain)
    assert found["generic"] == usual["generic:auxiliary"] and found["personal"] == usual["personal:unrealigned"]
    client, server = mine.store.clients()[0], mine.progress.server
    generic = mine.algorithm.global_model(mine.task, server)
    assert generic is not None and tree.largest_difference(generic["head"], server["head"]) == 0.0
    sums = {key: server["head"][key] + mine.store[client]["head"][key] for key in ("weight", "bias")}
    model = mine.algorithm.personal_model(mine.task, server, mine.store[client], data_of(mine, client))
    assert model is not None and tree.largest_difference(model["head"], sums) == 0.0


@pytest.mark.equivalence
@ENGINES
def test_without_the_auxiliary_head_body_and_personal_heads_are_the_same_and_the_frame_predicts(engine: str) -> None:
    """The auxiliary head reads detached features: no other part of training can feel that it is gone."""
    mine, plain = fedloge(engine, auxiliary=False), fedloge(engine)
    server, usual = mine.progress.server, plain.progress.server
    assert set(server) == {"body", "etf"}
    assert tree.largest_difference({"body": server["body"]}, {"body": usual["body"]}) < 1e-6
    for client in mine.store.clients():
        assert tree.largest_difference(mine.store[client], plain.store[client]) < 1e-6
    visits = sum(len(mine.population.cohort(r)) for r in range(3))
    for key in ("bytes_up", "bytes_down"):
        assert plain.progress.cost[key] - mine.progress.cost[key] == visits * 4 * (6 * 64 + 6)
    assert metrics(mine)["generic"] == metrics(plain)["generic:etf"]
    client = mine.store.clients()[0]
    model = mine.algorithm.personal_model(mine.task, server, mine.store[client], data_of(mine, client))
    lengths = mine.store[client]["head"]["weight"].norm(dim=1, keepdim=True)
    assert model is not None and torch.equal(model["head"]["weight"], server["etf"]["weight"] * lengths)


def test_creffs_features_that_are_never_matched_stay_noise() -> None:
    run = toy.run(made("creff(match_steps=0, head_epochs=2)"), setting=SETTING)
    before = run.progress.server["features"].clone()
    toy.finish(run)
    assert torch.equal(run.progress.server["features"], before)
    matched = toy.finish(toy.run(made("creff(head_epochs=2)"), setting=SETTING))
    assert metrics(run)["generic:averaged"] == metrics(matched)["generic:averaged"]


@pytest.mark.parametrize("row", ["fedrod+cross_entropy", "fedavg+tau_norm", "fedavg+crt", "fedavg+balanced_softmax"])
def test_controls_that_are_rows_with_parts_run(row: str) -> None:
    assert PARTS and metrics(toy.finish(toy.run(made(row), setting=SETTING)))["generic"] is not None
