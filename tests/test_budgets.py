"""What a run costs: everything that a method computes is counted, and rounds can be such that samples are equal."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from optuna.distributions import IntDistribution

from bench import Algorithm, LocalData, Task, Tree, tree
from bench.algorithm import Exchange
from bench.contract import toy
from bench.protocol.spelling import parse_algorithms, parse_datasets
from bench.results import records
from bench.results.leaderboard import leaderboards
from bench.sweep import driver
from bench.sweep.config import Sweep
from bench.sweep.matching import matched_rounds
from bench.sweep.pool import InProcess
from bench.training.rounds import Run
from bench.tuning.study import Study
from bench.tuning.trial import attempt
from bench.validation.inspection import inspect
from bench.validation.rebuilding import CannotRebuild, rebuild

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
EXAMPLES = sum(toy.SIZES)


def finished(call: str | Algorithm, engine: str = "serial", **changed: Any) -> Run:
    algorithm = parse_algorithms(call)[0] if isinstance(call, str) else call
    return toy.finish(toy.run(algorithm, engine, setting=replace(toy.SETTING, **changed)))


def cost(call: str | Algorithm, engine: str = "serial", **changed: Any) -> dict[str, float]:
    found = finished(call, engine, **changed).outcome().cost
    return {key: value for key, value in found.items() if value is not None}


@ENGINES
@pytest.mark.parametrize("name", ["fedavg_ft", "fedbabu"])
def test_tuning_before_the_test_is_counted_apart_from_training(name: str, engine: str) -> None:
    none, some, many = (cost(f"{name}(finetune_epochs={epochs})", engine) for epochs in (0, 5, 100))
    assert none["train_samples"] == some["train_samples"] == many["train_samples"]
    assert [each["adaptation_samples"] for each in (none, some, many)] == [0, 5 * EXAMPLES, 100 * EXAMPLES]
    assert many["adaptation_flops"] == pytest.approx(20 * some["adaptation_flops"]) and none["adaptation_flops"] == 0
    if name == "fedavg_ft":  # the same steps as in training
        a_sample = some["train_flops"] / some["train_samples"]
        assert some["adaptation_flops"] / some["adaptation_samples"] == pytest.approx(a_sample, rel=1e-6)


def test_clients_held_out_of_training_are_tuned_at_a_cost() -> None:
    assert cost("fedavg", unseen=1)["adaptation_samples"] == 5 * toy.SIZES[-1]
    assert cost("fedavg", unseen=1, unseen_labels=False)["adaptation_samples"] == 0


def test_what_making_a_personal_model_reads_is_counted_once() -> None:
    # All examples are remembered, and once more to choose a share; a pass without a gradient counts a third.
    assert cost("knnper")["adaptation_samples"] == pytest.approx(2 * EXAMPLES / 3)


@dataclass(frozen=True, kw_only=True)
class TwoTrips(Algorithm):
    """A trip that trains, and one that trains three times as long and with half of the operations."""

    long: int = 3

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(), Exchange("head_only"))

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(1)), private

    def head_only(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        body = shared["body"]
        head = task.sgd(lambda h, b: task.loss({"body": body, "head": h}, b), shared["head"], data.batches(self.long))
        return {"head": head}, private


def test_operations_are_those_of_each_exchange() -> None:
    both, first = cost(TwoTrips(), rounds=2), cost("fedavg", rounds=2, epochs=1)
    short = cost(TwoTrips(long=1), rounds=2)
    assert short["train_flops"] - first["train_flops"] == pytest.approx(
        (both["train_flops"] - first["train_flops"]) / 3, rel=1e-6
    )
    assert short["train_flops"] < 2 * first["train_flops"]  # heads alone take fewer


@dataclass(frozen=True, kw_only=True)
class Trips(Algorithm):
    """FedAvg, of the cohort or of everyone."""

    everyone: bool

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(everyone=self.everyone),)

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private


@dataclass(frozen=True, kw_only=True)
class Fixed(Algorithm):
    """Sends a matrix that never changes."""

    constant: ClassVar[frozenset[str]] = frozenset({"matrix"})

    def init_server(self, task: Task) -> Tree:
        return {**task.init(), "matrix": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        model = {"body": shared["body"], "head": shared["head"]}
        return task.sgd(task.loss, model, data.batches(1)), private


def test_a_payload_that_never_changes_is_sent_once_to_each_client() -> None:
    run = finished(Fixed(), participation=1.0)
    matrix, model = tree.nbytes(run.progress.server["matrix"]), tree.nbytes(run.task.init())
    assert run.outcome().cost["bytes_down"] == 8 * (4 * model + matrix)


def test_every_cost_of_computing_is_a_number() -> None:
    for call in ("fedavg", "local", "centralised", "creff(match_steps=1,head_epochs=1)"):
        found = finished(call, rounds=1).outcome().cost
        whose = ("train", "adaptation", "server")
        assert all(isinstance(found[f"{each}_{what}"], float) for each in whose for what in ("samples", "flops"))


# Equal samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "rounds"),
    [
        ("fedavg", 60),
        ("centralised", 60),
        ("ditto", 30),
        ("fedrep(head_epochs=10,body_epochs=2)", 10),
        ("fedavg_ft(finetune_epochs=5)", 57),
        ("fedavg_ft(finetune_epochs=200)", 1),
        ("fedavg+focal(gamma=1)", 60),
    ],
)
def test_rounds_that_make_samples_equal(call: str, rounds: int) -> None:
    setting = replace(toy.SETTING, rounds=60, participation=1.0, match="samples")
    assert matched_rounds(parse_algorithms(call)[0], setting) == rounds


def test_tuning_of_all_clients_weighs_more_where_few_take_part() -> None:
    setting = replace(toy.SETTING, rounds=60, epochs=1, participation=0.25)
    assert matched_rounds(parse_algorithms("fedavg_ft(finetune_epochs=5)")[0], setting) == 40


def test_a_trip_to_everyone_weighs_more_where_few_take_part() -> None:
    setting = replace(toy.SETTING, rounds=60, epochs=1, participation=0.25)
    everyone, drawn = (matched_rounds(Trips(everyone=each), setting) for each in (True, False))
    assert (everyone, drawn) == (15, 60)


@pytest.mark.parametrize(
    "call", ["fedavg_ft(finetune_epochs=3)", "fedrep(head_epochs=3,body_epochs=1)", "ditto", "scaffold", "moon"]
)
def test_what_is_then_processed_is_the_budget_or_a_little_less(call: str) -> None:
    setting: dict[str, Any] = {"rounds": 12, "participation": 1.0}
    budget = cost("fedavg", **setting)["train_samples"]
    algorithm = parse_algorithms(call)[0]
    rounds = matched_rounds(algorithm, replace(toy.SETTING, **setting))
    assert 1 < rounds <= 12
    spent = [cost(algorithm, **{**setting, "rounds": each}) for each in (rounds, rounds + 1)]
    totals = [each["train_samples"] + each["adaptation_samples"] for each in spent]
    assert totals[0] <= budget < totals[1]


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of equal samples."""
    out = tmp_path_factory.mktemp("matched")
    asked = Sweep(
        algorithms=tuple(parse_algorithms("fedavg,ditto,fedavg_ft(finetune_epochs=1)")),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 6, "epochs": 1, "participation": 0.5, "match": "samples", "eval_every": 2},
        data_root=out,
    )
    driver.run(asked.expand(), out, pool=InProcess())
    return out


def test_runs_of_equal_samples_stand_in_one_table_and_say_how_many_rounds(matched: Path) -> None:
    found, _ = records.read_all(matched)
    (board,) = leaderboards(found)
    labels = {row.label: row for row in board.rows}
    assert set(labels) == {"fedavg", "ditto [3 rounds]", "fedavg_ft(finetune_epochs=1) [4 rounds]"}
    samples = {label: row.cost["samples"].mean or 0.0 for label, row in labels.items()}
    assert all(share == pytest.approx(samples["fedavg"], rel=0.2) for share in samples.values())
    evaluated = {record.label: record.rounds()["round"].tolist() for record in found}
    assert evaluated["ditto [3 rounds]"] == [2, 3] and evaluated["fedavg"] == [2, 4, 6]
    for record in found:
        assert rebuild(record).run(matched).id == record.id and not inspect(record.folder, matched).problems


def test_rounds_that_match_no_samples_are_found(matched: Path) -> None:
    record = next(each for each in records.read_all(matched)[0] if each.algorithm == "ditto")
    identity = json.loads(json.dumps(record.identity))
    for rounds in (4, 3.0, None):
        identity["algorithm"]["rounds"] = rounds
        with pytest.raises(CannotRebuild, match="by the setting there are 3"):
            rebuild(replace(record, identity=identity))


def test_a_trial_of_a_search_has_as_many_samples_as_all_others(tmp_path: Path) -> None:
    asked = Sweep(
        algorithms=tuple(parse_algorithms("fedrep(body_epochs=1)")), datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 12, "epochs": 1, "participation": 1.0, "match": "samples"}, data_root=tmp_path,
    )  # fmt: skip
    (run,) = asked.expand()
    study = Study(run=run, seeds=(0,), space={"head_epochs": IntDistribution(1, 5)})
    spent = []
    for number, epochs in enumerate((1, 2, 5)):
        ended = attempt(study, study.begun({"head_epochs": epochs}, number), tmp_path, print)
        spent.append(ended.cost[0]["train_samples"])
    assert spent[0] == spent[1] == spent[2] and run.rounds == 1  # ten epochs of the head, and one of the body
