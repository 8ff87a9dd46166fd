"""Every algorithm and dataset keeps every promise of `bench.contract.checks`, and the checks see broken plug-ins for
what they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from bench import Algorithm, LocalData, Task, Tree, tree
from bench.contract import accounts, checks, datasets, toy
from bench.contract.promises import ContractBroken, findings
from bench.plugins.registry import ALGORITHMS, DATASETS
from tests.by_hand import SHORT, short

GOLDEN = Path(__file__).parent / "golden.json"


@pytest.mark.parametrize("promise", checks.ALGORITHM_PROMISES)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_keeps(name: str, promise: str) -> None:
    """What looks at runs and not at fields is shown short ones; to learn takes all that a method has."""
    keeps: Callable[[Any], None] = checks.ALGORITHM_PROMISES[promise]
    of_runs = get_type_hints(keeps)["plugin"] == Callable[[], Algorithm] and promise != "learns the toy problem"
    plugin: type[Algorithm] = ALGORITHMS[name]
    keeps(partial(plugin, **SHORT.get(name, {})) if of_runs else plugin)


@pytest.mark.parametrize("promise", datasets.PROMISES)
@pytest.mark.parametrize("name", list(DATASETS))
def test_a_dataset_keeps(name: str, promise: str) -> None:
    datasets.PROMISES[promise](DATASETS[name])


def golden(name: str) -> dict[str, float | None]:
    """Metrics after two rounds, and the length of all states: accuracies alone would hide small changes."""
    run = toy.finish(toy.run(ALGORITHMS[name](), setting=replace(toy.SETTING, rounds=2, unseen=1)))
    found = {key: value for key, value in run.outcome().metrics.items() if "@" not in key}
    found["length of states"] = math.sqrt(sum(float(tree.dot(s, s)) for s in toy.states(run).values() if s))
    return {key: None if value is None else round(value, 6) for key, value in found.items()}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_numbers_are_those_of_last_time(name: str) -> None:
    """To change them: raise the algorithm's version, run `python -m tests.test_contract`, and say why in the
    commit.
    """
    expected = json.loads(GOLDEN.read_text())[name]
    assert expected["version"] == ALGORITHMS[name].version
    assert golden(name) == pytest.approx(expected["metrics"], abs=1e-4)


AFTERWARDS = {"osuda"}
"""Those that train as FedAvg does: what is their own comes to clients held out of training, as files of theirs test."""


def test_no_algorithm_is_another_at_its_defaults() -> None:
    told = sorted(set(ALGORITHMS) - AFTERWARDS)
    runs = {name: toy.finish(toy.run(short(name), setting=toy.SHORT)).outcome() for name in told}
    marks = {name: (run.digest, run.metrics["personal"], run.metrics["generic"]) for name, run in runs.items()}
    assert len(set(marks.values())) == len(marks)


@dataclass(frozen=True, kw_only=True)
class _FedAvg(Algorithm):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private


class InPlace(_FedAvg):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        upload, private = super().local_update(task, shared, private, data)
        shared["head"]["bias"].add_(1.0)
        return upload, private


class BranchesOnATensor(_FedAvg):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        if data.n > 10:
            return super().local_update(task, shared, private, data)
        return shared, private


class GlobalGenerator(_FedAvg):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        upload, private = super().local_update(task, shared, private, data)
        return tree.map(lambda leaf: leaf + 1e-3 * torch.randn_like(leaf), upload), private


class TakesTheFirst(_FedAvg):
    def aggregate(self, task: Task, server: Tree, uploads: Any) -> Tree:
        first: Tree = uploads.trees[0]
        return first


class GrowsItsState(_FedAvg):
    def aggregate(self, task: Task, server: Tree, uploads: Any) -> Tree:
        return {**super().aggregate(task, server, uploads), "round": torch.tensor(float(task.round))}


class DividesByItsSize(_FedAvg):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        upload, private = super().local_update(task, shared, private, data)
        return tree.map(lambda leaf: leaf * data.n / data.n, upload), private


class Ascends(_FedAvg):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(lambda p, b: -task.loss(p, b).clamp(max=5.0), shared, data.batches(task.epochs)), private


class WrongModel(_FedAvg):
    def global_model(self, task: Task, server: Tree) -> Tree:
        return {"body": server["body"], "head": {"weight": server["head"]["weight"].T}}


class Remembers(_FedAvg):
    seen: dict[int, int] = {}  # noqa: RUF012

    def aggregate(self, task: Task, server: Tree, uploads: Any) -> Tree:
        self.seen[0] = self.seen.get(0, 0) + 1
        return tree.scale(super().aggregate(task, server, uploads), 1 + 1e-3 * self.seen[0])


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (InPlace, "inputs are left alone"),
        (BranchesOnATensor, "engines agree"),
        (GlobalGenerator, "the seed decides, and nothing else"),
        (GlobalGenerator, "engines agree"),
        (TakesTheFirst, "the order of clients is irrelevant"),
        (GrowsItsState, "states keep keys, shapes and dtypes"),
        (DividesByItsSize, "small and empty clients are harmless"),
        (Ascends, "learns the toy problem"),
        (WrongModel, "models fit the architecture"),
        (Remembers, "stop and resume equals one go"),
    ],
)
def test_the_contract_catches(broken: type[Algorithm], promise: str) -> None:
    (finding,) = findings(broken, {promise: checks.ALGORITHM_PROMISES[promise]})
    assert finding.problem is not None


def test_a_false_ledger_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fedrep = ALGORITHMS["fedrep"]
    module = __import__("sys").modules[fedrep.__module__]
    monkeypatch.setattr(
        module, "__doc__", str(module.__doc__).replace("Up             body", "Up             body, head")
    )
    with pytest.raises(ContractBroken, match="the ledger says Up: body, head; found: body"):
        accounts.ledger_is_true(fedrep)


@pytest.mark.parametrize(
    ("name", "told", "wrong", "found"),
    [
        ("fedpac", "counts (C)", "counts (C, d)", "counts (C, d), which is (6, 64) here; found: (6,)"),
        ("fedloge", "etf (fixed)", "etf", "Server keeps: etf, which two rounds leave as it was"),
        ("fedloge", "etf (fixed)", "etf (still)", "etf (still), not fixed or later"),
        ("fedpac", "counts (C)", "counts", "counts without its shape; found: (6,)"),
        (
            "fedpac",
            "counts (C)",
            "counts (K)",
            "the ledger says K,, no formula of C, d, N, later, weights, body, head, model, align",
        ),
        ("scaffold", "control (model)", "control (head)", "control (head), 390 numbers here; found: 4550"),
        ("fedem", "body (components × body)", "body", "body as the model has it, 4160 numbers here; found: 12480"),
        ("fedrep", "E + head_epochs", "E", "of which between 1.00 at 1 epochs; found: 11.00"),
        ("fedbabu", "finetune_epochs", "1", "of which before the test 1.00 at 1 epochs; found: 5.00"),
        ("feddbe", "; first 2 × E", "", "of which first 1.00 at 1 epochs; found: 2.00"),
        ("fednh", "Passes         E + 1/3\n", "", "the ledger says Passes: E, of which"),
    ],
)
def test_a_ledger_with_other_sizes_or_passes_is_caught(
    name: str, told: str, wrong: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("sys").modules[ALGORITHMS[name].__module__]
    assert told in str(module.__doc__)
    monkeypatch.setattr(module, "__doc__", str(module.__doc__).replace(told, wrong))
    with pytest.raises(ContractBroken, match=re.escape(found)):
        accounts.ledger_is_true(ALGORITHMS[name])


@pytest.mark.parametrize("name", ["fedrep", "fedpac", "knnper"])  # it keeps something, is sent it, or tunes its own way
def test_where_clients_differ_the_ledger_says_what_newcomers_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules[ALGORITHMS[name].__module__]
    monkeypatch.setattr(module, "__doc__", str(module.__doc__).replace("Newcomers ", "Strangers "))
    with pytest.raises(ContractBroken, match="the module's docstring has no line Newcomers"):
        accounts.ledger_is_true(ALGORITHMS[name])


def test_a_head_that_leaks_upward_is_caught() -> None:
    fedrep = ALGORITHMS["fedrep"]

    class Leaky(fedrep):  # type: ignore[misc, valid-type]
        def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
            upload, private = super().local_update(task, shared, private, data)
            return {**upload, **private}, private

    Leaky.__module__ = fedrep.__module__
    with pytest.raises(ContractBroken, match="found: body, head"):
        accounts.ledger_is_true(Leaky)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_no_checkpoint(tmp_path: Path, share: float) -> None:
    fedavg, file = ALGORITHMS["fedavg"], tmp_path / "checkpoint.pt"
    first = toy.run(fedavg(), checkpoint=file)
    first.saved = -math.inf  # save after this round, however quick it was
    first.step()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    again = toy.run(fedavg(), checkpoint=file)
    assert again.progress.round == 0
    assert toy.finish(again).outcome().digest == toy.finish(toy.run(fedavg())).outcome().digest


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps(
            {name: {"version": ALGORITHMS[name].version, "metrics": golden(name)} for name in ALGORITHMS},
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {GOLDEN}")
