"""What every image was taken for: the same as an own loop over the test images, as scikit-learn, by any engine."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.results import classes, records
from bench.results.record import Lacking, Record
from bench.sweep import execution
from bench.sweep.config import Sweep, parse_algorithms, parse_datasets
from bench.training import evaluation
from bench.training.counting import right, sparse
from bench.training.rounds import Run
from tests.test_command import Bench
from tests.test_command import bench as bench

Predictions = dict[str, dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Predictions]:
    """A stored run of FedRep's kin on digits, and by model and client the true and predicted classes, by a loop that
    knows the network's two functions and nothing of how it is evaluated.
    """
    out = tmp_path_factory.mktemp("told")
    fields = {"rounds": 3, "eval_every": 2, "epochs": 1, "unseen": 2, "clients": 9}
    asked = Sweep(
        algorithms=tuple(parse_algorithms("fedavg_ft(finetune_epochs=1)")),
        datasets=tuple(parse_datasets("digits")),
        overrides=fields,
        data_root=out,
    )
    (run,) = asked.expand()
    assert execution.execute(run, out) is None
    going = Run(execution.job(run), None, None)
    while going.progress.round < 3:
        going.step()
    task, server, population = going.task_at(2), going.progress.server, going.population
    shared = going.algorithm.broadcast(task, server)
    models: dict[str, dict[int, Any]] = {"generic": {-1: going.algorithm.global_model(task, server)}}
    for kind, clients in (("personal", range(7)), ("unseen", range(7, 9))):
        made = going.evaluator.models(task, server, shared, going.store, list(clients), True)
        models |= {name: dict(zip(clients, each, strict=True)) for name, each in made.items() if name == kind}
    found: Predictions = {}
    for name, each in models.items():
        for client, model in each.items():
            rows = torch.arange(len(population.test)) if client < 0 else population.tests[client]
            batch = population.test.plain(rows)
            with torch.no_grad():
                scores = task.model.logits(model["head"], task.model.features(model["body"], batch))
            truth = population.test.y[rows].numpy()
            found.setdefault(name, {})[client] = truth, scores.argmax(1).numpy()
            if name == "personal":
                left = scores.masked_fill(population.class_counts(client) == 0, -torch.inf)
                found.setdefault("personal.masked", {})[client] = truth, left.argmax(1).numpy()
    return records.read(out / run.id), found


@pytest.mark.parametrize("model", ["generic", "personal", "personal.masked", "unseen"])
def test_a_confusion_matrix_is_that_of_scikit_learn(told: tuple[Record, Predictions], model: str) -> None:
    record, predictions = told
    everyone = [np.concatenate(each) for each in zip(*predictions[model].values(), strict=True)]
    counted = record.confusion(model)
    assert counted.dtype == np.int64
    assert np.array_equal(counted, confusion_matrix(*everyone, labels=range(10)))
    for client, (truth, guess) in predictions[model].items():
        assert np.array_equal(record.confusion(model, client), confusion_matrix(truth, guess, labels=range(10)))


@pytest.mark.parametrize("model", ["generic", "personal", "personal.masked", "unseen"])
def test_precision_recall_and_f1_are_those_of_scikit_learn(told: tuple[Record, Predictions], model: str) -> None:
    record, predictions = told
    measured = classes.measured(record)
    truth, guess = (np.concatenate(each) for each in zip(*predictions[model].values(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = np.array(precision_recall_fscore_support(truth, guess, labels=range(10), zero_division=np.nan))
        each = [
            precision_recall_fscore_support(t, g, labels=np.unique(t), average="macro", zero_division=np.nan)[:3]
            for t, g in predictions[model].values()
        ]
        f1 = [f1_score(t, g, labels=np.unique(t), average="macro") for t, g in predictions[model].values()]
    got = np.array([[c.precision, c.recall, c.f1, c.images] for c in classes.by_class(record, model)])
    assert got.T.astype(float) == pytest.approx(wanted, nan_ok=True)
    for name, column, of_client in zip(("precision", "recall", "f1"), wanted, zip(*each, strict=True), strict=False):
        pooled = f"{model}.{name}" if model == "generic" else f"{model}.pooled_{name}"
        assert measured[pooled] == pytest.approx(np.nanmean(column))
        assert measured[f"{model}.{name}"] == pytest.approx(np.nanmean(of_client))
    assert measured[f"{model}.f1"] == pytest.approx(np.mean(f1)) and 0.1 < np.mean(f1) < 1


def test_absence_is_no_zero() -> None:
    import pandas

    rows = pandas.DataFrame({"client": 0, "class": [0, 0, 1, 3], "predicted": [0, 2, 0, 3], "count": [6, 2, 4, 1]})
    assert classes._macro(rows) == {
        "f1": pytest.approx((12 / 18 + 0 + 1) / 3),  # class 1 is never recognised, class 2 is not tested
        "precision": pytest.approx((6 / 10 + 1) / 2),  # nothing is taken for class 1
        "recall": pytest.approx((6 / 8 + 0 + 1) / 3),
    }


def test_nothing_is_stored_twice_and_all_can_be_read(told: tuple[Record, Predictions]) -> None:
    record, _ = told
    last = record.predictions()
    stored = record.table("counts").to_pandas()
    assert set(stored["round"]) == {2} and set(last["round"]) == {3} and (last["count"] > 0).all()
    counts, order = record.counts(), ["model", "client", "class", "round"]
    assert set(counts["round"]) == {2, 3} and counts.equals(counts.sort_values(order, ignore_index=True))
    assert record.recompute().items() <= record.metrics.items()
    for frame, keys in ((stored, ["class"]), (last, ["class", "predicted"])):
        order = ["model", "client", *keys, "round"]
        assert frame[order].equals(frame[order].sort_values(order, ignore_index=True))
    assert not [name for name in record.document if name == "files"]
    with pytest.raises(Lacking, match=r"has no model 'generic:best'; it has generic, personal, personal\.masked"):
        record.confusion("generic:best")
    with pytest.raises(Lacking, match="has no test images of client 7 for personal"):
        record.confusion("personal", 7)


def test_stacked_clients_and_portions_of_images_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def tallies(engine: str) -> list[tuple[str, list[list[int]]]]:
        run = toy.run(ALGORITHMS["ditto"](), engine=engine)
        run.evaluate(run.task_at(0), 1, True)
        return [(tally.model, tally.rows.tolist()) for tally in run.progress.predictions]

    serial = tallies("serial")
    assert tallies("stacked") == serial and {name for name, _ in serial} >= {"generic", "personal", "personal.masked"}
    monkeypatch.setattr("bench.training.evaluation._SLICE", 3)
    monkeypatch.setattr("bench.training.evaluation._predicts", lambda here, predictor: True)
    assert tallies("serial") == serial


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", ["fedavg", "fedper", "fedloge(etf_steps=10)"])
def test_heads_on_one_body_are_compared_together_and_give_what_each_gives_alone(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (algorithm,) = parse_algorithms(name)

    def tallies() -> list[tuple[str, list[list[int]]]]:
        run = toy.run(algorithm, engine=engine, setting=replace(toy.SETTING, unseen=2))
        run.step()
        run.evaluate(run.task_at(1), 2, True)
        return [(tally.model, tally.rows.tolist()) for tally in run.progress.predictions]

    together = tallies()
    sizes: list[int] = []
    compare = evaluation._compare

    def noted(here: Any, scores: Any, *rest: Any) -> Any:
        sizes.append(len(scores))
        return compare(here, scores, *rest)

    monkeypatch.setattr(evaluation, "_compare", noted)
    assert tallies() == together and {6, 2} <= set(sizes)
    sizes.clear()
    monkeypatch.setattr(evaluation, "_SCORES", 1)
    assert tallies() == together and set(sizes) == {1}
    monkeypatch.setattr(evaluation, "_memory", lambda model: (id(model),))  # each body is another
    assert tallies() == together


@pytest.mark.parametrize(("model", "passes"), [("linear", 1), ("mlp", 2)])
def test_only_features_of_a_body_without_weights_are_kept_for_the_next_evaluation(
    model: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    embed = evaluation._embed

    def noted(here: Any, body: Any, rows: Any) -> Any:
        asked.append(len(rows))
        return embed(here, body, rows)

    monkeypatch.setattr(evaluation, "_embed", noted)
    run = toy.run(ALGORITHMS["fedavg"](), setting=replace(toy.SETTING, model=model, eval_every=10))
    for round in range(2):
        run.step()
        kept = run.evaluate(run.task_at(round), round + 1, False)
    assert sum(asked) == passes * len(run.population.test)
    assert list(run.evaluator._features) == ([()] if model == "linear" else [])
    run.evaluator._features.clear()
    assert run.evaluate(run.task_at(1), 2, False) == kept


def test_portions_are_as_large_as_they_may_be() -> None:
    def of(*sizes: int) -> list[list[int]]:
        return list(evaluation._portions_of(list(range(10, 10 + len(sizes))), sizes, 5))

    assert of() == [] and of(9) == [[10]] and of(0, 0) == [[10, 11]]
    assert of(2, 3, 1, 9, 9, 0, 5) == [[10, 11], [12], [13], [14], [15, 16]]


def test_models_without_images_or_answers_keep_their_place() -> None:
    taken = torch.tensor([[3, 0, 3, 3, 3, 3, 2], [1, 0, 1, 1, 1, 1, 3]])
    found = sparse(taken, [0, 6, 0, 1, 0], 5)
    assert [each.tolist() for each in found] == [
        [[], [], []],
        [[0, 3], [0, 1], [1, 5]],
        [[], [], []],
        [[2], [3], [1]],
        [[], [], []],
    ]
    correct, total = right(found, 5)
    assert correct.tolist() == [[0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]
    assert total.tolist() == [[0] * 5, [1, 0, 0, 5, 0], [0] * 5, [0, 0, 1, 0, 0], [0] * 5]


def test_many_classes_take_no_room() -> None:
    generator = torch.Generator().manual_seed(0)
    y, guess = torch.randint(8142, (2, 20_000), generator=generator)
    (answers,) = sparse(torch.stack([y, guess]), [20_000], 8142)
    assert answers.shape[1] <= 20_000 and answers[2].sum() == 20_000
    correct, total = right([answers, answers[:, :0]], 8142)
    assert torch.equal(total[0], torch.bincount(y, minlength=8142)) and not total[1].any()
    assert torch.equal(correct[0], torch.bincount(y[y == guess], minlength=8142))


def test_a_checkpoint_keeps_predictions(tmp_path: Path) -> None:
    def run() -> Run:
        return toy.run(ALGORITHMS["fedavg"](), checkpoint=tmp_path / "checkpoint.pt")

    first = run()
    while first.progress.round < first.setting.rounds:
        first.step()
    again = run().progress
    assert again.round == first.setting.rounds and len(again.predictions) == len(first.progress.predictions) >= 3
    assert all(
        torch.equal(one.rows, other.rows)
        for one, other in zip(again.predictions, first.progress.predictions, strict=True)
    )


# Tables -----------------------------------------------------------------------------------------------------


def test_a_table_has_the_columns_that_are_asked_for(bench: Bench) -> None:
    small = ("--rounds", "2", "--tracking-uri", "off", "--ray", "off")
    assert bench("run", "--algos", "fedavg,local", "--seeds", "2", *small).status == 0
    shown = bench(
        "table", "--metrics", "f1,personal.pooled_f1,samples,device_seconds,balanced,generic@best", "--format", "md"
    )
    heading = next(line for line in shown.out.splitlines() if line.startswith("| algorithm"))
    wanted = ["algorithm", "tier", "seeds", "generic.f1", "personal.f1", "personal.pooled_f1", "samples"]
    assert [cell.strip().replace("\\_", "_") for cell in heading.strip("|").split("|")] == [
        *wanted, "device_seconds", "balanced", "generic@best"
    ]  # fmt: skip
    row = next(line for line in shown.out.splitlines() if line.startswith("| `local`"))
    assert row.split("|")[4].strip() == "–" and "(" in row.split("|")[5]
    assert classes.SAYS.replace("_", r"\_") in shown.out
    plain = bench("table")
    assert not re.search(r"\bf1\b", plain.out)  # a commit may have these digits
    record = records.read_all(Path("runs"))[0][0]
    assert f"{100 * classes.measured(record)['personal.f1']:.1f}"[:2] in shown.out  # type: ignore[operator]
    for form in ("latex", "html", "json", "csv"):
        assert "personal.pooled" in bench("table", "--metrics", "personal.pooled_f1", "--format", form).out
    assert "personal.f1" in bench("table", "--metrics", "personal.f1").out.replace("\n", " ")
    wrong = bench("table", "--metrics", "personal.f2")
    assert wrong.status == 2 and "none of this name; there are adaptation_flops," in wrong.err
    assert "did you mean personal" in wrong.err
    late = bench("table", "--metric", "last10", "--metrics", "generic,generic.f1")
    assert late.status == 2 and "generic.f1: it is known of the last round alone" in late.err
    assert "README of a folder has all columns" in bench("table", "--metrics", "f1", "--write").err
    compared = bench("compare", "fedavg", "local", "--metric", "personal.f1")
    assert compared.status == 0 and "personal.f1" in compared.out


def test_what_no_run_tells_is_said(bench: Bench) -> None:
    stored = Path(__file__).parent / "formats" / "2"
    answer = bench("table", "--out", stored, "--metrics", "f1")
    assert answer.status == 2 and "follows of counts by predicted class, which no run here has; there are" in answer.err
