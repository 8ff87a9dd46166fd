"""Operations of a server: counted where an exchange is made first, and taken to be the same ever after."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bench import Algorithm, Exchange, LocalData, Task, Tree, Uploads
from bench.contract import toy
from bench.contract.toy import finish
from bench.plugins.registry import ALGORITHMS
from bench.results import records
from bench.sweep import driver
from bench.sweep.config import Sweep, parse_algorithms, parse_datasets
from bench.sweep.pool import InProcess
from bench.training.engine import counted
from bench.training.footprint import OF_THE_NETWORK
from bench.training.rounds import WORK, Run
from bench.validation.report import validate
from bench.validation.rerun import candidates, rerun
from tests.test_validation import ROOT, Forger, write_table

SETTING = replace(toy.SETTING, rounds=3)
COHORT, EVERYONE = 6, 8


@dataclass(frozen=True, kw_only=True)
class Multiplies(Algorithm):
    """A server that multiplies a (3, 4) by a (4, K) matrix, and once differentiates through a product."""

    watched: ClassVar[list[tuple[int, str, bool]]] = []
    """Round, verb, and whether somebody looked on."""

    def init_server(self, task: Task) -> Tree:
        return {"w": torch.ones(3, 4), **task.init()}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        usual = Exchange(server="multiply")
        if task.round < task.rounds - 1:
            return usual, usual
        return usual, usual, Exchange(server="multiply", everyone=True), Exchange(server="differentiate")

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return {"x": torch.ones(4)}, private

    def multiply(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        self.note(task, "multiply")
        product = server["w"] @ uploads.tensor("x").T
        return {**server, "w": server["w"] + product.mean()}

    def differentiate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        self.note(task, "differentiate")
        x = uploads.tensor("x").T
        product, pull_back = torch.func.vjp(lambda w: torch.matmul(w, x), server["w"])[:2]
        (slope,) = pull_back(product)
        return {**server, "w": server["w"] - slope}

    def note(self, task: Task, verb: str) -> None:
        self.watched.append((task.round, verb, bool(_get_current_dispatch_mode_stack())))


PRODUCT = 2 * 3 * 4
"""Operations for each column: a multiplication and an addition are two."""
EXPECTED = PRODUCT * (3 * 2 * COHORT + EVERYONE + 2 * COHORT)  # usual twice a round; everyone; forward and back


def run(checkpoint: Path | None = None) -> Run:
    Multiplies.watched.clear()
    return toy.run(Multiplies(), setting=SETTING, checkpoint=checkpoint)


def test_operations_of_the_server_are_those_counted_by_hand() -> None:
    assert finish(run()).outcome().cost["server_flops"] == EXPECTED


def test_products_in_place_are_counted_too() -> None:
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)

    def in_place() -> Tree:
        return {"one": torch.zeros(3, 5).addmm_(a[0], b[0]), "both": torch.zeros(2, 3, 5).baddbmm_(a, b)}

    answer, flops = counted(in_place)
    assert flops == (1 + 2) * 2 * 3 * 4 * 5 and answer["one"].eq(4).all()


def test_an_exchange_is_looked_on_the_first_time_only() -> None:
    finish(run())
    looked_on = [(round, verb) for round, verb, looking in Multiplies.watched if looking]
    assert looked_on == [(0, "multiply"), (2, "multiply"), (2, "differentiate")]  # of round 2 that of everyone
    assert len(Multiplies.watched) == 8


def test_a_resumed_run_counts_the_same(tmp_path: Path) -> None:
    first = run(tmp_path / "checkpoint.pt")
    first.saved = -math.inf
    first.step()
    second = run(tmp_path / "checkpoint.pt")
    assert second.progress.round == 1
    assert finish(second).outcome().cost["server_flops"] == EXPECTED
    assert [round for round, _, looking in Multiplies.watched if looking] == [2, 2]


def test_a_server_that_only_averages_does_no_work() -> None:
    cost = finish(toy.run(ALGORITHMS["fedavg"]())).outcome().cost
    assert cost["server_flops"] == cost["server_samples"] == 0.0
    assert set(cost) == {
        *("bytes_down", "bytes_up", *WORK, "device_seconds", "wall_seconds"),
        *("peak_memory_bytes", "client_state_bytes", "client_rounds", *OF_THE_NETWORK),
    }


def test_creff_computes_at_the_server() -> None:
    setting = replace(toy.SETTING, rounds=2)
    run = finish(toy.run(ALGORITHMS["creff"](match_steps=0, head_epochs=3), setting=setting))
    features, classes, d = 6 * 100, 6, 64
    a_pass = 2 * features * (d + 1) * classes
    assert run.outcome().cost["server_flops"] == 2 * 3 * 2 * a_pass  # rounds, epochs, forward and back


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose server computes."""
    out = tmp_path_factory.mktemp("published")
    asked = Sweep(
        algorithms=tuple(parse_algorithms("creff(match_steps=1, head_epochs=1)")),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 1, "epochs": 1},
        data_root=ROOT,
    )
    (result,) = driver.run(asked.expand(), out, pool=InProcess())
    assert result.status == "done"
    return out


def test_the_published_work_of_a_server_is_compared_by_a_rerun(published: Path, tmp_path: Path) -> None:
    def differs(change: Callable[[dict[str, float | None]], object]) -> tuple[str, str]:
        out = Path(shutil.copytree(published, tmp_path / "changed", dirs_exist_ok=True))
        (found,) = records.read_all(out)[0]
        forger = Forger(found.folder)
        forger.predictions = found.predictions()
        change(forger.document["cost"])
        here = forger.save()
        write_table(out)
        report = validate(out, ROOT)
        again = rerun(records.read(here), candidates(report.inspected, ROOT)[here.name])
        return "; ".join(map(str, report.problems)), "; ".join(again.differs)

    assert differs(lambda cost: cost["server_flops"]) == ("", "")
    problems, others = differs(lambda cost: cost.update(server_flops=1e6))
    assert not problems and others.startswith("cost.server_flops ")
    problems, _ = differs(lambda cost: cost.update(server_flops=None))
    assert "cost.server_flops is absent, and what was not done counts 0" in problems
    problems, _ = differs(lambda cost: cost.update(server_flops=-1.0))
    assert "cost.server_flops is -1.0, and no cost is below 0" in problems
