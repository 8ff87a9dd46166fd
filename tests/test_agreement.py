"""What the study of agreement hands out is what our own run has: FedAvg by hand ends where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.plugins import declared, ledger
from bench.plugins.registry import ALGORITHMS
from tests.agreement import report
from tests.agreement.__main__ import METHODS, compared
from tests.agreement.foreign import opened
from tests.agreement.problem import Case, Finished, Models, Problem, tree_of
from tests.agreement.report import Row

SETTING = {"rounds": 2, "momentum": 0.5}


def by_hand(problem: Problem, folder: Path, wrong: float = 1.0) -> Models:
    server = problem.network().state_dict()
    for _ in range(problem.setting.rounds):
        cohort, states = problem.cohort(), []
        for k in cohort:
            model: Any = problem.network()
            model.load_state_dict(server)
            optimiser = torch.optim.SGD(model.parameters(), problem.setting.lr * wrong, problem.setting.momentum)
            loader = problem.loader()(problem.examples[k])
            for _ in range(problem.setting.epochs):
                for x, y in loader:
                    optimiser.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimiser.step()
            states.append(model.state_dict())
        total = sum(problem.sizes[k] for k in cohort)
        shares = [problem.sizes[k] / total for k in cohort]
        server = {name: sum(s * w[name] for s, w in zip(shares, states, strict=True)) for name in server}
    return Models(tree_of(server, problem.initial))


@pytest.mark.parametrize(("wrong", "least", "most"), [(1.0, 0.0, 1e-5), (1.1, 1e-2, 1.0)])
def test_fedavg_by_hand_is_ours_and_another_rate_is_not(wrong: float, least: float, most: float) -> None:
    case = Case("by hand", lambda problem, folder: by_hand(problem, folder, wrong), ("generic",), "fedavg", {}, SETTING)
    problem = Problem(case, 0)
    ours, measured = problem.ours()
    theirs = case.theirs(problem, Path())
    assert least <= problem.apart("generic", theirs, ours) <= most
    assert problem.tested(ours)["generic"] == measured["generic"]
    with pytest.raises(Finished):
        problem.cohort()


def test_ledgers_say_how_near_the_study_found_them() -> None:
    rows = json.loads((Path(__file__).parent / "agreement" / "rows.json").read_text())
    for name in ALGORITHMS:
        text = declared.text("algorithms", name)
        assert text is not None
        told = ledger.sections(text.documentation).get("Reproduced")
        found = [row for row in rows if row["method"] == name]
        assert (told is not None) == bool(found), name
        if told is not None:
            row = min(found, key=lambda row: max(row["apart"]))
            assert told.startswith(f"by {row['code']} ({row['case']}): models {max(row['apart']):.0e} apart")


def test_rows_and_their_table(tmp_path: Path) -> None:
    case = Case("by hand", by_hand, ("generic", "personal.balanced"), "fedavg", {}, {**SETTING, "rounds": 1})
    assert {"fedavg", "fedrep", "fedala"} <= set(METHODS)
    rows = compared("fedavg", case, tmp_path, 2, {})
    assert [row.metric for row in rows] == ["generic", "personal.balanced"]
    assert all(row.ours == row.theirs == row.fedavg and max(row.apart) < 1e-5 for row in rows)
    row = Row("fedavg", "c", "a/b@1", "generic", [0.5, None], [0.5, None], [1e-7, 2e-7], [0.25, None])
    assert report.put([row], [Row(**vars(row))]) == [row]
    report.write(tmp_path / "a.md", [row])
    (tmp_path / "a.md").write_text("before" + (tmp_path / "a.md").read_text() + "after")
    report.write(tmp_path / "a.md", [row])
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("before") and text.endswith("after") and text.count("a/b@1") == 1
    assert "50.0 (50.0–50.0)" in text and "2e-07" in text


def test_a_checkout_is_opened_and_closed(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(
        "import wandb\nimport torch\nx = torch.zeros(1).cuda()\nwandb.log(x)\nprint(1)\n"
    )
    (tmp_path / "main.py").write_text("from utils import x\ny = 1\nif __name__ == '__main__':\n    y = 2\n")
    for _ in range(2):
        with opened(tmp_path, 0, ("wandb",)) as code:
            assert code.module("utils").x.shape == (1,)
            assert code.script("main.py")["y"] == 2
        with pytest.raises(ModuleNotFoundError):
            __import__("utils")
