"""Aliases: names of papers that stand for a method with a part, wherever algorithms are typed, and are the same run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
from torch import Tensor

from bench import Batch, Loss, Task
from bench.command import catalogue
from bench.contract import parts, toy
from bench.contract.promises import ContractBroken
from bench.losses import cross_entropy
from bench.plugins.declared import aliases
from bench.plugins.registry import ALGORITHMS, PARTS, UnknownPlugin
from bench.protocol.sets import unfold
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import ask, label, parse_algorithms, respell
from bench.results.entrants import choose
from bench.results.leaderboard import leaderboards
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.test_command import Bench
from tests.test_command import bench as bench
from tests.test_results import record

ALIASES = {
    "fedlc": "fedavg+calibrated",
    "score": "fedavg+facility_location",
    "score(kind='fl')": "fedavg+facility_location",
    "score(kind='gc')": "fedavg+graph_cut",
    "score(kind='logdet')": "fedavg+log_determinant",
    "fedrs": "fedavg+restricted_softmax",
}


def run_of(call: str, engine: str) -> Run:
    (algorithm,) = parse_algorithms(call)
    return toy.finish(toy.run(algorithm, engine, setting=replace(toy.SETTING, rounds=3)))


def test_they_are_read_of_parts_files_without_importing_these(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {alias: row for name in PARTS for alias, row in PARTS[name].aliases.items()}
    monkeypatch.setattr(type(PARTS), "entered", lambda self: {})
    assert aliases() == said == ALIASES


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("alias", ["fedlc", "fedrs", "score(kind='gc')"])
def test_an_alias_is_its_row_bit_for_bit_and_not_fedavg(alias: str, engine: str) -> None:
    run, row, fedavg = (run_of(call, engine) for call in (alias, ALIASES[alias], "fedavg"))
    assert run.outcome().digest == row.outcome().digest
    assert label(run.algorithm) == ALIASES[alias] and run.fingerprint == row.fingerprint
    assert largest_difference(run.progress.server, fedavg.progress.server) > 1e-4


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("off", ["fedlc(tau=0)", "fedrs(alpha=1)", "score(weight=0)", "score(kind='gc', weight=0)"])
def test_switched_off_it_is_fedavg(off: str, engine: str) -> None:
    run, fedavg = (run_of(call, engine) for call in (off, "fedavg"))
    assert run.outcome().digest == fedavg.outcome().digest and label(run.algorithm) == "fedavg"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fedlc", "fedavg+calibrated"),
        ("FedLC", "fedavg+calibrated"),
        ("fedlc(tau=0.5)", "fedavg+calibrated(tau=0.5)"),
        ("fedrs (alpha=0.1)+topk", "fedavg+restricted_softmax(alpha=0.1)+topk"),
        ("fedlc+topk+tau_norm", "fedavg+calibrated+topk+tau_norm"),
        ("score+topk", "fedavg+facility_location+topk"),
        ("score(weight=1, views=2)", "fedavg+facility_location(weight=1.0, views=2)"),
        (
            'SCoRe(weight=1, Kind = "GC", form="information")+topk(share=0.5)',
            "fedavg+graph_cut(weight=1.0, form='information')+topk(share=0.5)",
        ),
        ("score(kind='logdet')", "fedavg+log_determinant"),
        ("score(kind='logdet')+topk", "fedavg+log_determinant+topk"),
        ("score(kind='fl', views=2)", "fedavg+facility_location(views=2)"),
    ],
)
def test_fields_behind_it_are_the_parts_and_further_parts_follow(typed: str, meant: str) -> None:
    (algorithm,) = parse_algorithms(typed)
    assert label(algorithm) == respell(typed) == meant


def test_each_is_read_as_its_row() -> None:
    for alias, row in ALIASES.items():
        assert parse_algorithms(alias) == parse_algorithms(row)


def test_one_that_is_named_twice_is_one_run() -> None:
    asked = ask("fedlc,fedavg+calibrated,fedprox")
    assert asked.algorithms[0] == asked.algorithms[1] and asked.optional == ()


def test_what_cannot_be_is_said_of_the_row() -> None:
    with pytest.raises(BadConfig, match=r"calibrated\(mu=1\): no such parameter; calibrated takes prior"):
        parse_algorithms("fedlc(mu=1)")
    with pytest.raises(BadConfig, match="both of the kind loss"):
        parse_algorithms("fedlc+focal")
    with pytest.raises(UnknownPlugin):
        parse_algorithms("fedlq")
    known = r"score, score\(kind='fl'\), score\(kind='gc'\), score\(kind='logdet'\)"
    with pytest.raises(BadConfig, match=rf"^score\(kind='cut'\)\+topk: there is no such row; there are {known}$"):
        parse_algorithms("score(kind='cut')+topk")
    with pytest.raises(
        BadConfig, match=r"graph_cut\(ridge=1\): no such parameter; graph_cut takes weight, views, form"
    ):
        parse_algorithms("score(kind='gc', ridge=1)")
    with pytest.raises(BadConfig, match=r"^facility_location\(kind='gc'\): no such parameter"):
        parse_algorithms("score(kind='gc', kind='fl')")


def test_an_algorithm_of_that_name_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS._classes, "fedlc", toy.Host)
    assert unfold("fedlc") == ["fedlc"]


def test_stored_rows_are_found_by_it() -> None:
    boards = leaderboards([record("fedavg"), record("fedavg+calibrated"), record("fedavg+restricted_softmax")])
    assert choose(boards, ["fedrs", "fedavg"]) == ["fedavg+restricted_softmax", "fedavg"]


def test_they_are_listed_and_shown(bench: Bench) -> None:
    listed = [line.split() for line in bench("list", "aliases").out.splitlines() if line]
    assert listed == [[*pair] for pair in ALIASES.items()]
    assert json.loads(bench("list", "--json").out)["aliases"] == list(ALIASES)
    assert "fedlc                 fedavg+calibrated" in bench("list").out
    for alias in ("SCoRe", "score(kind='gc')"):
        assert catalogue.find(alias) == ["aliases"]
        assert catalogue.describe("aliases", alias, "digits")["name"] == ALIASES[alias.lower()]
    shown, row = bench("show", "FedLC"), bench("show", "fedavg+calibrated")
    assert shown.out == row.out and "Federated Learning with Label Distribution Skew via Logits Calibration" in row.out


class Plain(Loss):
    """Cross-entropy."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return cross_entropy(logits, batch)


@dataclass(frozen=True, kw_only=True)
class Another(Plain):
    """Says that a row without it has its name."""

    aliases: ClassVar[dict[str, str]] = {"fedfocal": "fedavg+calibrated"}


@dataclass(frozen=True, kw_only=True)
class Taken(Plain):
    """Has the name of a method."""

    aliases: ClassVar[dict[str, str]] = {"fedprox(kind='focal')": "fedavg+focal"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [(Another, "fedavg\\+calibrated is not one row with it"), (Taken, "fedprox is an algorithm")],
)
def test_the_contract_wants_rows_with_the_part_under_names_that_are_free(broken: Any, said: str) -> None:
    with pytest.raises(ContractBroken, match=said):
        parts.PROMISES["its aliases are rows with it"](broken)
