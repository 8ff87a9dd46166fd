"""Accuracy at equal bytes: what a run had sent by each evaluation, and the metrics that are asked for by it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig
from bench.results import budget, chosen, layout
from bench.results.record import Record
from bench.training.rounds import Run
from bench.validation.found import Inspected
from bench.validation.inspection import _sent
from tests.test_results import record

SETTING = replace(toy.SETTING, rounds=5, eval_every=2)
SENT = {"2": 3e6, "4": 5e6, "10": 9e6}


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that is tested three times, once without a personal model."""
    frame = pandas.DataFrame({"round": [2, 4, 10], "generic": [0.25, 0.5, 0.75], "personal": [0.1, math.nan, 0.3]})
    monkeypatch.setattr(Record, "rounds", lambda self: frame)


def a_run(name: str, **more: Any) -> Record:
    return replace(record(name), metrics={"generic": 0.75, "personal": 0.3}, **more)


# What was sent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedtiny"])
def test_what_was_sent_by_an_evaluation_is_all_that_travelled_until_then(name: str) -> None:
    run = toy.run(ALGORITHMS[name](), setting=SETTING)
    by_hand = {}
    for r in range(5):
        run.step()
        by_hand[f"{r + 1}"] = run.progress.cost["bytes_down"] + run.progress.cost["bytes_up"]
    outcome = run.outcome()
    assert outcome.sent == {key: by_hand[key] for key in ("2", "4", "5")}
    assert not any("round" in key and key != "client_rounds" for key in outcome.cost)


def test_where_nothing_is_sent_nothing_is_told() -> None:
    assert toy.finish(toy.run(ALGORITHMS["centralised"](), setting=SETTING)).outcome().sent == {}


def test_a_last_visit_is_counted_and_a_stopped_run_goes_on_counting(tmp_path: Path) -> None:
    setting, file = replace(SETTING, final_visit=True), tmp_path / "checkpoint.pt"
    whole = toy.finish(toy.run(ALGORITHMS["fedavg"](), setting=setting)).outcome()
    assert whole.sent["5"] == (whole.cost["bytes_down"] or 0) + (whole.cost["bytes_up"] or 0) > whole.sent["4"]
    first: Run = toy.run(ALGORITHMS["fedavg"](), setting=setting, checkpoint=file)
    first.saved = -math.inf
    first.step()
    first.saved = -math.inf
    first.step()
    second = toy.run(ALGORITHMS["fedavg"](), setting=setting, checkpoint=file)
    assert second.progress.round == 2 and toy.finish(second).outcome().sent == whole.sent


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"2": 1.0, "4": 2.0, "5": 4.0}, None),
        ({"5": 4.0, "2": 1.0, "4": 2.0}, None),  # a pack may order keys
        ({"2": 1.0, "5": 4.0}, "is of the rounds"),
        ({"2": 3.0, "4": 2.0, "5": 4.0}, "falls from one round to a later one"),
        ({"2": 1.0, "4": 2.0, "5": 3.0}, "ends with 3, and the bytes up and down are 4"),
    ],
)
def test_a_board_holds_it_against_the_rounds_and_the_whole(sent: dict[str, float], said: str | None) -> None:
    found = Inspected(folder=Path("run"))
    _sent(found, a_run("fedavg", sent=sent, cost={"bytes_down": 3.0, "bytes_up": 1.0}), SETTING)
    told = [str(problem) for problem in found.problems]
    assert len(told) == (said is not None) and all(said in each for each in told if said)


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("generic@5MB", ("generic", 5e6)),
        ("personal.balanced@0.5kB", ("personal.balanced", 500.0)),
        ("generic:last@2GB", ("generic:last", 2e9)),
        ("generic@best", None),
        ("generic@5", None),
        ("generic@-5MB", None),
        ("@5MB", None),
    ],
)
def test_a_budget_is_a_number_and_a_unit(key: str, found: tuple[str, float] | None) -> None:
    assert budget.asked(key) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("generic@2.9MB", None),
        ("generic@3MB", 0.25),
        ("generic@4.999MB", 0.25),
        ("generic@5MB", 0.5),
        ("generic@1GB", 0.75),
        ("personal@5MB", None),
        ("personal@9MB", 0.3),
    ],
)
def test_the_last_evaluation_within_it_counts(key: str, value: float | None) -> None:
    (found,) = budget.with_budgets([a_run("fedavg", sent=SENT)], [key])
    assert found.metrics[key] == value and found.metrics["generic"] == 0.75


def test_runs_that_do_not_say_or_failed_have_none() -> None:
    silent, failed = budget.with_budgets(
        [a_run("fedavg"), a_run("fedavg", sent=SENT, status="failed")], ["generic@9MB"]
    )
    assert silent.metrics["generic@9MB"] is None and "generic@9MB" not in failed.metrics


def test_a_table_has_a_column_for_each_budget_and_a_dash_where_there_is_none() -> None:
    runs = [a_run("fedavg", sent=SENT), a_run("fedprox", sent={"2": 6e6, "4": 7e6, "10": 8e6}), a_run("local")]
    (board,) = chosen.boards(runs, "last", "generic@5MB,generic@9MB,generic")
    heading, lines = layout.grid(board, str, str)
    assert heading[3:] == ["generic@5MB", "generic@9MB", "generic"]
    shown = {line[0]: line[3:] for line in lines}
    assert shown == {"fedavg": ["50.0", "75.0", "75.0"], "fedprox": ["–", "75.0", "75.0"], "local": ["–", "–", "75.0"]}
    assert budget.SAYS in layout.remarks(board)
    (plain,) = chosen.boards(runs, "last", "generic")
    assert budget.SAYS not in layout.remarks(plain)


def test_what_there_is_not_has_no_budget() -> None:
    with pytest.raises(BadConfig, match="--metrics genric@5MB: the results have none of this name"):
        chosen.boards([a_run("fedavg", sent=SENT)], "last", "genric@5MB")
