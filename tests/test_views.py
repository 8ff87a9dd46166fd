"""Who is tested, when, and how it is averaged: the personal numbers, each recomputed by hand from what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bench import Algorithm, LocalData, Task, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training import metrics
from bench.training.rounds import Diverged, Run
from tests import by_hand
from tests.test_adaptation import data_of

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
ONE_ROUND = replace(toy.SETTING, rounds=1)
FEW = replace(toy.SETTING, participation=0.3, rounds=2)
"""Two cohorts of two of eight clients: most are never drawn."""


def finished(call: str, engine: str = "serial", **changed: Any) -> Run:
    return toy.finish(toy.run(parse_algorithms(call)[0], engine, setting=replace(toy.SETTING, **changed)))


def right(run: Run, model: str) -> dict[int, tuple[dict[int, int], dict[int, int]]]:
    """Right answers and images by class, by client, of a model after the last round."""
    found: dict[int, tuple[dict[int, int], dict[int, int]]] = {}
    tally = next(each for each in run.progress.counts if each.model == model and each.round == run.setting.rounds)
    for client, label, correct, total, _ in tally.rows.T.tolist():
        here, there = found.setdefault(client, ({}, {}))
        here[label], there[label] = correct, total
    return found


def right_rows(run: Run) -> list[list[int]]:
    rows: list[list[int]] = next(each for each in run.progress.counts if each.model == "personal").rows.T.tolist()
    return rows


def accuracy(cell: tuple[dict[int, int], dict[int, int]]) -> float:
    return sum(cell[0].values()) / sum(cell[1].values())


# Averages ---------------------------------------------------------------------------------------------------


def test_balanced_is_a_mean_over_the_classes_that_a_client_has_and_then_over_clients() -> None:
    correct = torch.tensor([[9, 0, 0], [4, 1, 2], [0, 0, 0]])
    total = torch.tensor([[10, 2, 0], [8, 1, 4], [0, 0, 0]])
    found = metrics.summarise({"personal": (correct, total), "unseen": (correct, total)}, {"few": torch.tensor([2])})
    assert (
        found["personal.balanced"]
        == found["unseen.balanced"]
        == pytest.approx(((0.9 + 0) / 2 + (0.5 + 1 + 0.5) / 3) / 2)
    )
    assert found["personal"] == pytest.approx((9 / 12 + 7 / 13) / 2)
    assert found["personal.few"] == 0.5  # of the only client that has such images


def test_it_is_counted_over_the_run_as_by_hand() -> None:
    run = finished("fedavg")
    by_hand = [sum(here[c] / there[c] for c in there) / len(there) for here, there in right(run, "personal").values()]
    assert run.outcome().metrics["personal.balanced"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_means_of_ten_and_the_best_are_absent_where_not_every_evaluation_has_the_metric() -> None:
    plain, tuned = (finished(call).outcome().metrics for call in ("fedavg", "fedavg_ft"))
    for key in metrics.FOLLOWED:
        assert plain[f"{key}@last10"] is not None and plain[f"{key}@best"] is not None
        absent = key != "generic"
        assert (tuned[f"{key}@last10"] is None) == (tuned[f"{key}@best"] is None) == absent
    once = finished("fedavg_ft", eval_every=4).outcome().metrics
    assert once["personal@last10"] == once["personal@best"] == once["personal"]


def test_masked_is_absent_where_the_test_has_classes_that_training_had_not() -> None:
    assert finished("fedavg").outcome().metrics["personal.masked"] is not None
    for rule in ("own", "global"):
        found = finished("fedavg", client_test=rule, unseen=1).outcome().metrics
        assert found["personal.masked"] is None and found["unseen.masked"] is None
        assert found["personal"] is not None


# Who is tested ----------------------------------------------------------------------------------------------


@ENGINES
def test_drawn_and_never_part_the_clients_that_are_tested(engine: str) -> None:
    run = toy.finish(toy.run(ALGORITHMS["fedper"](), engine, setting=FEW))
    cohorts = {client for round in range(2) for client in run.population.cohort(round)}
    outcome, cells = run.outcome(), right(run, "personal")
    groups: dict[str, list[float]] = {"drawn": [], "never": []}
    for client, cell in cells.items():
        groups["drawn" if client in cohorts else "never"].append(accuracy(cell))
    assert all(groups.values())
    for name, values in groups.items():
        assert outcome.metrics[f"personal.{name}"] == pytest.approx(sum(values) / len(values))
        assert outcome.tested[name] == len(values)
    images = [sum(there.values()) for _, there in cells.values()]
    assert outcome.tested["clients"] == len(cells) == 7  # one has no examples, hence no test
    assert outcome.tested["images"] == [min(images), max(images)] and outcome.tested["worst_decile"] == 1


def test_who_was_drawn_is_known_after_each_round_and_after_an_interruption(tmp_path: Any) -> None:
    whole = toy.finish(toy.run(ALGORITHMS["ditto"](), setting=FEW))
    begun = toy.run(ALGORITHMS["ditto"](), setting=FEW, checkpoint=tmp_path / "checkpoint.pt")
    begun.saved -= 100
    begun.step()
    resumed = toy.finish(toy.run(ALGORITHMS["ditto"](), setting=FEW, checkpoint=tmp_path / "checkpoint.pt"))
    assert resumed.outcome().tested == whole.outcome().tested
    assert resumed.outcome().metrics == whole.outcome().metrics
    drawn = [
        {client for client, *_, known in tally.rows.T.tolist() if known == 1}
        for tally in whole.progress.counts
        if tally.model == "personal"
    ]
    first = set(whole.population.cohort(0)) - {toy.SIZES.index(0)}
    assert drawn[0] == first and drawn[0] < drawn[1]


def test_where_everybody_is_drawn_nobody_never_is() -> None:
    everybody = finished("fedavg", participation=1.0).outcome()
    assert everybody.metrics["personal.never"] is None and everybody.metrics["personal.drawn"] is not None
    assert everybody.tested["never"] == 0


@pytest.mark.parametrize("call", ["centralised", "feddbe", "local(budget='converged')"])
def test_the_same_clients_are_compared_whatever_a_method_asks_of_the_others(call: str) -> None:
    setting: dict[str, Any] = {"participation": 0.3, "rounds": 2}
    expected, found = (finished(each, **setting) for each in ("fedavg", call))
    assert found.outcome().tested == expected.outcome().tested and found.outcome().metrics["personal.never"] is not None
    known = [{(row[0], row[4]) for row in right_rows(run)} for run in (expected, found)]
    assert known[0] == known[1]


@dataclass(frozen=True, kw_only=True)
class Welcomes(Algorithm):
    """FedAvg with a private offset of the bias: 0 from the start, 1 for who trained, 2 for a newcomer."""

    def init_client(self, task: Task) -> Tree:
        return {"offset": torch.zeros(())}

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        return {"offset": torch.full((), 2.0)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(task.epochs)), {"offset": torch.ones(())}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        head = {**shared["head"], "bias": 0 * shared["head"]["bias"] + private["offset"]}
        return {"body": shared["body"], "head": head}


@ENGINES
def test_who_was_never_drawn_starts_as_a_newcomer_does(engine: str) -> None:
    run = toy.finish(toy.run(Welcomes(), engine, setting=FEW))
    task, server = run.task_at(1), run.progress.server
    models = run.evaluator.models(task, server, server, run.store, list(range(8)), True)
    drawn = {*run.population.cohort(0), *run.population.cohort(1)}
    offsets = [float(model["head"]["bias"][0]) for model in models["personal"]]
    assert offsets == [1.0 if client in drawn else 2.0 for client in range(8)]
    assert [float(model["head"]["bias"][0]) for model in models["personal:after"]] == [1.0] * 8
    assert run.store[next(k for k in range(8) if k not in drawn)]["offset"] == 0  # nothing of it is kept


# When -------------------------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("name", ["fedavg", "fedper", "fedrep", "ditto", "fedloge"])
def test_after_is_the_clients_model_right_after_its_local_work(name: str, engine: str) -> None:
    run = finished(name, engine, rounds=2)
    algorithm, task, server = run.algorithm, run.task_at(1), run.progress.server
    models = run.evaluator.models(task, server, algorithm.broadcast(task, server), run.store, [0, 4], True)
    for place, client in enumerate((0, 4)):
        shared = toy.received(run, client, 1)
        upload, private = algorithm.local_update(task, shared, run.store[client], data_of(run, client))
        trained: Tree = {**shared, **{key: upload[key] for key in ("body", "head") if key in upload}}
        expected = algorithm.personal_model(task, trained, private, data_of(run, client))
        assert expected is not None
        assert tree.largest_difference(models["personal:after"][place], expected) < 1e-5
        if client == 0:
            assert tree.largest_difference(models["personal"][place], expected) > 1e-3


def test_after_is_measured_once_and_costs_nothing() -> None:
    run = finished("fedavg")
    rounds = [tally.round for tally in run.progress.counts if tally.model == "personal:after"]
    assert rounds == [4] and run.outcome().cost["adaptation_samples"] == 0


def test_a_channel_does_not_change_the_view_after_training() -> None:
    plain, carried = finished("fedavg", rounds=1), finished("fedavg+topk(share=0.5)", rounds=1)
    views = []
    for run in (plain, carried):
        task, server = run.task_at(0), plain.progress.server
        shared = {**run.algorithm.broadcast(task, run.progress.server), **server}
        seen, _ = run.algorithm.after_training(task, shared, run.store[0], data_of(run, 0))
        views.append({key: seen[key] for key in ("body", "head")})
    assert tree.largest_difference(*views) == 0


def test_a_loss_part_has_its_say_in_the_view_after_training() -> None:
    run = finished("fedavg+balanced_softmax", rounds=1)
    shared = toy.received(run, 0)
    task = replace(run.task_at(0), round=0)
    seen, _ = run.algorithm.after_training(task, shared, {}, data_of(run, 0))
    upload, _ = run.algorithm.client_verb("local_update")(task, shared, {}, data_of(run, 0))
    assert tree.largest_difference(seen, upload) == 0


def test_tuning_is_by_the_settings_rate_whatever_the_schedule() -> None:
    tuned, rates = [], (((0.5, 1e-9),), ())
    for steps in rates:
        run = finished("fedavg_ft(finetune_epochs=1)", rounds=2, lr_steps=steps)
        task, server = run.task_at(1), run.progress.server
        models = run.evaluator.models(task, server, server, run.store, [0], True)
        tuned.append(tree.largest_difference(models["personal:0 epochs"][0], models["personal"][0]))
    assert min(tuned) > 1e-2  # by the last round's rate it would be nothing


@pytest.mark.parametrize("rule", ["size", "uniform"])
def test_the_setting_says_whose_model_counts_how_much(rule: str) -> None:
    run = toy.run(ALGORITHMS["fedavg"](), setting=replace(ONE_ROUND, participation=1.0, client_weights=rule))
    uploads = [toy.upload_once(run, client)[0] for client in range(8)]
    run.step()
    weights = [float(size if rule == "size" else size > 0) for size in toy.SIZES]
    mean = tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)) / sum(weights),
                    *uploads)  # fmt: skip
    assert tree.largest_difference(run.progress.server, mean) < 1e-6


@ENGINES
def test_a_final_visit_trains_private_parts_on_the_final_broadcast(engine: str) -> None:
    plain, visited = (finished("fedrep", engine, rounds=2, final_visit=each) for each in (False, True))
    assert tree.largest_difference(plain.progress.server, visited.progress.server) == 0  # nothing is sent
    task, shared = visited.task_at(1), toy.received(visited, 3, 1)
    data = by_hand.data_of(visited, 3, 2)  # batches of no round of training
    _, private = visited.algorithm.local_update(task, shared, plain.store[3], data)
    assert tree.largest_difference(visited.store[3], private) < 1e-5
    assert tree.largest_difference(visited.store[3], plain.store[3]) > 1e-3


@dataclass(frozen=True, kw_only=True)
class Breaks(Welcomes):
    """Is no longer finite when it is visited for the second time."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return shared, {"offset": 1.0 + torch.where(private["offset"] > 0, torch.nan, 0.0)}


def test_a_final_visit_that_diverges_is_no_result() -> None:
    setting = replace(ONE_ROUND, participation=1.0, final_visit=True)
    with pytest.raises(Diverged, match="diverged: in the final visit a state is no longer finite"):
        toy.finish(toy.run(Breaks(), setting=setting))


@ENGINES
def test_a_final_visit_of_many_is_made_in_parts(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finished("fedrep", engine, rounds=2, final_visit=True)
    monkeypatch.setattr("bench.training.rounds._VISITED_AT_ONCE", 3)
    parts = finished("fedrep", engine, rounds=2, final_visit=True)
    assert tree.largest_difference(toy.states(parts), toy.states(whole)) < (1e-5 if engine == "stacked" else 1e-30)
    costs = [run.outcome().cost for run in (whole, parts)]
    of = ("bytes_down", "adaptation_samples")
    assert [costs[0][key] for key in of] == [costs[1][key] for key in of]


def test_who_is_visited_only_after_training_was_not_drawn_for_it() -> None:
    plain, visited = (toy.finish(toy.run(ALGORITHMS["fedper"](), setting=replace(FEW, final_visit=each)))
                      for each in (False, True))  # fmt: skip
    assert visited.outcome().tested == plain.outcome().tested and plain.outcome().tested["never"] != 0


def test_a_final_visit_is_every_training_clients_and_is_counted() -> None:
    plain, visited = (finished("fedavg", participation=0.5, final_visit=each).outcome() for each in (False, True))
    assert visited.metrics["personal"] == plain.metrics["personal"]  # it keeps nothing
    assert visited.cost["adaptation_samples"] == 2 * sum(toy.SIZES)
    assert visited.cost["train_samples"] == plain.cost["train_samples"]
    model = plain.cost["bytes_down"] or 0.0
    assert (visited.cost["bytes_down"] or 0.0) - model == model / 4 / 4 * 8  # four rounds of four clients, and eight
