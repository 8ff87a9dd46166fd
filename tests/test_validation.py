"""Published results: what is tampered with is found, what is honest passes, and a rerun has the last word."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from bench.algorithm import Exchange
from bench.dataset import DataMissing
from bench.plugins.registry import ALGORITHMS, DATASETS, load_plugin
from bench.preparing.embedding import Embedding
from bench.protocol.identity import identify
from bench.results import packed, packing, records, storage, tables
from bench.results.content import digest
from bench.results.curves import curves
from bench.results.leaderboard import leaderboards
from bench.results.record import check
from bench.results.table import results_readme
from bench.site import picture
from bench.sweep import driver, execution
from bench.sweep.config import Sweep, parse_algorithms, parse_datasets
from bench.sweep.pool import InProcess
from bench.training import metrics
from bench.training.population import Population
from bench.training.rounds import WORK
from bench.validation import expected, inspection, rebuilding, report, side_by_side, submission
from bench.validation.found import Inspected
from bench.validation.report import validate
from bench.validation.rerun import candidates, draw, rerun
from tests.answers import parted
from tests.test_command import Bench
from tests.test_command import bench as bench
from tests.test_models import Watcher
from tests.test_results import record as result

ROOT = Path("no data here")
"""Digits need none."""
PUBLISHED = Path(__file__).parents[1] / "results"
COMMAND = "bench table --out results --write"


SWEEP = Sweep(
    algorithms=tuple(parse_algorithms("fedavg_ft(finetune_epochs=1),fedrep(head_epochs=1),ditto")),
    datasets=tuple(parse_datasets("digits")),
    overrides={"rounds": 3, "eval_every": 2, "unseen": 2, "epochs": 1},
    seeds=(0, 1),
    data_root=ROOT,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six real runs on digits and their table: adapted, private and plain models, held-out clients, two seeds."""
    out = tmp_path_factory.mktemp("published")
    results = driver.run(SWEEP.expand(), out, pool=InProcess())
    assert {result.status for result in results} == {"done"}
    write_table(out)
    return out


@pytest.fixture
def out(published: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(published, tmp_path / "results"))


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at folders in this process, which knows from one test to the next what methods do on the toy problem."""

    def inspected(places: list[side_by_side.Place], root: Path, *_: object) -> list[Inspected]:
        return [inspection.inspect(folder, root, pack) for folder, pack in places]

    if "processes" not in request.node.name:
        monkeypatch.setattr(report, "inspect_all", inspected)


def write_table(out: Path) -> None:
    """What `bench table --write` does; a forger does not forget it."""
    found, _ = records.read_all(out)
    (out / "README.md").write_text(results_readme(leaderboards(found), records.prose(out), COMMAND))


def complaints(out: Path) -> str:
    return "\n".join(map(str, validate(out, ROOT).problems))


def folder(out: Path, label: str = "fedavg_ft", seed: int = 0) -> Path:
    found = [each for each in records.read_all(out)[0] if each.algorithm == label and each.seed == seed]
    return found[0].folder


def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return content


def _table(columns: Mapping[str, list[Any]]) -> pyarrow.Table:
    kinds = {name: "string" if name == "model" else "int32" for name in columns}
    return pyarrow.table({name: pyarrow.array(cells, type=kinds[name]) for name, cells in columns.items()})


class Forger:
    """Somebody who knows the formats and recomputes all that can be recomputed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document = document(folder)
        self.counts: Any = check(folder, self.document).counts()
        self.predictions: Any = None
        """As they are to be written; None: made of the counts."""
        self.rounds: Any = pandas.read_parquet(folder / "rounds.parquet")

    def recompute(self) -> Forger:
        """Make curves and metrics of the counts."""
        rows: list[dict[str, Any]] = curves(self.counts, len(self.document["class_counts"]), self.document["groups"])
        final = {key: value for key, value in rows[-1].items() if key != "round"}
        for key in metrics.FOLLOWED:
            final |= {f"{key}@last10": metrics.last_mean(rows, key), f"{key}@best": metrics.best(rows, key)}
        self.document["metrics"] = final
        self.rounds = pandas.DataFrame(rows)
        return self

    def save(self, before: Any = None) -> Path:
        """Write the files, with checksums, the identity's hash, the protocol and the folder's name as they must be."""
        rows = [{str(k): v for k, v in row.items()} for row in self.rounds.to_dict("records")]
        earlier, last = parted({str(name): self.counts[name].tolist() for name in self.counts})
        if before is not None:
            earlier = {str(name): before[name].tolist() for name in before}
        if self.predictions is not None:
            last = {str(name): self.predictions[name].tolist() for name in self.predictions}
        written = {"rounds": tables.curves(rows), "counts": _table(earlier), "predictions": _table(last)}
        for name, table in written.items():
            (self.folder / f"{name}.parquet").write_bytes(storage.parquet(table))
            self.document["tables"][name] = digest(table)
        identity = self.document["identity"]
        self.document["protocol"] = identify({key: identity[key] for key in ("dataset", "setting")})
        self.document["id"] = identify(identity)
        (self.folder / "run.json").write_text(json.dumps(self.document, indent=2) + "\n")
        return self.folder.rename(self.folder.with_name(self.document["id"]))

    def set(self, field: str, value: object) -> Forger:
        """Replace a field of the setting wherever it is said."""
        self.document["identity"]["setting"][field] = value
        self.document["setting"][field] = value
        self.document["overrides"][field] = value
        return self


# What is honest ---------------------------------------------------------------------------------------------


def test_honest_results_pass(published: Path) -> None:
    report = validate(published, ROOT)
    assert report.problems == () and report.splits == len(report.runs) == 6
    assert not [note for note in report.notes if "no commit" not in note]


@pytest.mark.parametrize(
    "algorithm", ["feddbe", "local(budget='converged')", "creff", "fedpac", "centralised", "fedavg+topk(share=0.1)"]
)
def test_honest_costs_are_plausible(algorithm: str, tmp_path: Path) -> None:
    (run,) = replace(SWEEP, algorithms=tuple(parse_algorithms(algorithm)), seeds=(0,)).expand()
    assert execution.execute(run, tmp_path) is None
    (tmp_path / run.id / "progress.jsonl").unlink()
    assert validate(tmp_path, ROOT, [tmp_path / run.id]).problems == ()


def test_the_published_results_pass() -> None:
    report = validate(PUBLISHED, ROOT)
    assert report.problems == () and len(report.runs) >= 35
    assert report.splits >= 35  # those on digits, which every machine has


def test_without_the_data_honest_results_pass_and_it_is_said(published: Path, no_data: None) -> None:
    report = validate(published, ROOT)
    assert report.problems == () and report.splits == 0
    assert any("digits is not at hand" in note and note.count(",") == 6 for note in report.notes)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(asked: object, root: Path) -> None:
        raise DataMissing("not here")

    monkeypatch.setattr(inspection, "dealt", missing)


def test_a_failed_run_may_be_published_with_its_reason(out: Path) -> None:
    here = folder(out)
    said = {key: value for key, value in document(here).items() if key not in ("metrics", "cost", "tables", "digest")}
    shutil.rmtree(here)
    records.fail(out, here.name, said, "diverged: after round 2 a state is no longer finite")
    write_table(out)
    assert complaints(out) == ""
    (here / "run.json").write_text(
        (here / "run.json").read_text().replace('"reason": "diverged', '"reason": "", "x": "')
    )
    assert "reason" in complaints(out)


def test_results_of_an_earlier_version_stay_valid_and_are_not_run_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document["identity"]["algorithm"]["fields"]["gone"] = 1
    here = forger.save()
    shutil.rmtree(folder(out, "ditto", 1))
    write_table(out)
    assert "identity.algorithm.fields.gone is no field" in complaints(out)
    known = ALGORITHMS["ditto"].version
    monkeypatch.setattr(ALGORITHMS["ditto"], "version", known + 1)
    report = validate(out, ROOT)
    assert report.problems == () and here.name not in candidates(report.inspected, ROOT)
    told = f"made by version {known} of ditto, which is at version {known + 1} here"
    assert any(told in note for note in report.notes)
    monkeypatch.setattr(DATASETS["digits"], "revision", 2)
    report = validate(out, ROOT)
    assert report.problems == () and candidates(report.inspected, ROOT) == {} and report.splits == 0


def test_what_follows_from_a_setting_is_what_the_run_does(published: Path) -> None:
    record = records.read(folder(published, "ditto", 1))
    asked = rebuilding.rebuild(record)
    run = asked.run(ROOT)
    splits = run.dataset.load(ROOT)
    from bench.splits.split import make_split

    setting = replace(run.setting, participation=0.3, rounds=5, eval_clients=4)
    split = make_split(splits.labels, run.dataset.num_classes, setting, run.seed)
    population = Population(run.dataset, splits, split, setting, run.seed, "cpu")
    cohorts = [population.cohort(round) for round in range(5)]
    drawn = expected.drawn(setting, population.size, run.seed)
    assert drawn.times.tolist() == [sum(k in cohort for cohort in cohorts) for k in range(population.size)]
    first = [next((r for r, cohort in enumerate(cohorts, start=1) if k in cohort), 6) for k in range(population.size)]
    assert drawn.first.tolist() == first and 6 in first
    trained = range(population.training)
    assert tuple(expected.evaluated(setting, trained, run.seed)) == population.evaluated(trained)
    repeated = execution.document(run, None)
    told = rebuilding.description(asked)
    assert {key: json.loads(json.dumps(repeated[key])) for key in told} == json.loads(json.dumps(told))
    left = {"identity", "versions", "hardware", "commit", "started", "preset", "workers"}
    assert set(repeated) - set(told) <= left  # a new key of run.json that repeats the identity is to be compared too


def test_an_exchange_with_everyone_is_counted_with_everyone(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = rebuilding.rebuild(records.read(folder(published, "ditto", 1)))
    exchanges = (Exchange(everyone=True), Exchange())
    monkeypatch.setattr(type(asked.algorithm), "exchanges", lambda self, task: exchanges)
    expected._shapes.cache_clear()
    run = asked.run(ROOT)
    assert execution.execute(run, tmp_path) is None
    cost, known = records.read(tmp_path / run.id).cost, expected.sent(asked, 20)
    expected._shapes.cache_clear()
    assert known is not None
    assert (cost["bytes_down"], cost["client_state_bytes"]) == (known.bytes_down, known.client_state_bytes)


# One thing changed ------------------------------------------------------------------------------------------


def leaves(value: object, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List all numbers, texts and nulls of a JSON document, and empty containers."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        yield place
    for key, content in inside:
        yield from leaves(content, (*place, key))


def altered(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return 0.5 if value is None else not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.25
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return [0] if isinstance(value, list) else {"x": 0}


SELF_REPORTED = {
    # Of other hours and machines nobody knows; a rerun says what the same code gives here and now.
    *(("versions", package) for package in ("bench", "python", "torch", "torchvision", "numpy", "scipy", "pandas")),
    ("versions", "scikit-learn"),
    *(("hardware", key) for key in ("machine", "cpu", "cores", "instructions")),
    *(("cost", key) for key in ("wall_seconds", "device_seconds", "peak_memory_bytes")),
    ("commit",),
    ("started",),
    ("finished",),
    ("preset",),
    ("workers",),
}
BY_A_RERUN = {("digest",), ("sent", "2")} | {("cost", key) for key in WORK if key != "server_samples"}


def test_every_leaf_of_run_json_that_is_changed_is_found(out: Path) -> None:
    here = folder(out)
    file = here / "run.json"
    original = file.read_text()
    everything = list(leaves(json.loads(original)))
    missed = set()
    for place in everything:
        content = json.loads(original)
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = altered(inside[place[-1]])
        file.write_text(json.dumps(content, indent=2))
        report = validate(out, ROOT, [here])  # this run alone: no other gives it away, and the table neither
        if not report.problems:
            missed.add(place)
        for problem in report.problems:
            assert "\n" not in str(problem) and problem.file.startswith(here.name)
    assert len(everything) > 120
    assert missed <= SELF_REPORTED | BY_A_RERUN, missed - SELF_REPORTED - BY_A_RERUN
    print(f"{len(everything) - len(missed)} of {len(everything)} changed leaves found; not: {sorted(missed)}")


def test_every_leaf_of_run_json_that_is_removed_is_found(out: Path) -> None:
    here = folder(out)
    file = here / "run.json"
    original = file.read_text()
    may_lack = {
        "commit",
        "label",
        "preset",
        "workers",
        "started",
        "reason",
        "clients",
        "traceback",
        "sent",
    }  # as before
    for key in json.loads(original):
        content = json.loads(original)
        del content[key]
        file.write_text(json.dumps(content))
        assert validate(out, ROOT, [here]).problems or key in may_lack, key
    for part in ("metrics", "cost", "groups", "setting", "tested", "tables", "identity", "overrides", "heterogeneity"):
        for key in json.loads(original)[part]:
            content = json.loads(original)
            del content[part][key]
            file.write_text(json.dumps(content))
            assert validate(out, ROOT, [here]).problems, (part, key)


@pytest.mark.parametrize("value", [None, True, -1, 10**30, 1e308, "", "x", [], [[]], {"x": 1}])
def test_nothing_that_is_made_up_stops_the_validation(out: Path, value: object) -> None:
    here = folder(out)
    original = json.loads((here / "run.json").read_text())
    for key in ("class_counts", "groups", "setting", "identity", "heterogeneity", "versions", "tables"):
        for inside in (False, True):
            content = json.loads(json.dumps(original))
            if inside:
                part = content[key]
                part[next(iter(part)) if isinstance(part, dict) else 0] = value
            else:
                content[key] = value
            (here / "run.json").write_text(json.dumps(content))
            found = validate(out, ROOT, [here]).problems
            assert found and not any("\n" in str(problem) for problem in found), (key, inside)


Tampering = Callable[[Path], object]
TAMPERINGS: dict[str, tuple[Tampering, str]] = {}
"""What is done to a folder of results, and what is to be said of it."""


def tampering(says: str) -> Callable[[Tampering], Tampering]:
    def note(change: Tampering) -> Tampering:
        TAMPERINGS[change.__name__] = (change, says)
        return change

    return note


@tampering("metrics.personal is")
def a_metric_changed_by_a_billionth(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["metrics"]["personal"] += 1e-9
    forger.save()


@tampering("predictions.parquet: does not hold what run.json was written with")
def a_count_changed(out: Path) -> None:
    forger = Forger(folder(out))
    digests = dict(forger.document["tables"])
    forger.counts.loc[3, "correct"] -= 1
    here = forger.save()
    content = document(here) | {"tables": digests}
    (here / "run.json").write_text(json.dumps(content))


@tampering("metrics.")
def a_count_changed_and_its_checksum(out: Path) -> None:
    forger = Forger(folder(out))
    last = forger.counts.index[forger.counts["correct"] > 0][-1]
    forger.counts.loc[last, "correct"] -= 1
    forger.save()


@tampering("correct is not between 0 and total")
def more_right_than_tested(out: Path) -> None:
    forger = Forger(folder(out))
    early = forger.counts.index[forger.counts["round"] == 2][5]
    forger.counts.loc[early, "correct"] = forger.counts.loc[early, "total"] + 1
    forger.recompute().save()


@tampering("total has other test images")
def a_harder_class_tested_less(out: Path) -> None:
    forger = Forger(folder(out))
    rows = (forger.counts["class"] == 8) & (forger.counts["model"] == "generic")
    forger.counts.loc[rows, "total"] -= 1
    forger.counts["correct"] = forger.counts[["correct", "total"]].min(axis=1)
    forger.recompute().save()


@tampering("total has other test images")
def the_worst_client_left_out(out: Path) -> None:
    forger = Forger(folder(out))
    mine = forger.counts[forger.counts["model"] == "personal"].groupby("client")[["correct", "total"]].sum()
    worst = (mine["correct"] / mine["total"]).idxmin()
    forger.counts = forger.counts[forger.counts["client"] != worst]
    forger.recompute().save()


@tampering("total has other test images")
def one_row_left_out(out: Path) -> None:
    forger = Forger(folder(out))
    forger.counts = forger.counts.drop(index=forger.counts.index[-1])
    forger.recompute().save()


@tampering("stands there twice")
def a_row_twice(out: Path) -> None:
    forger = Forger(folder(out))
    forger.counts = pandas.concat([forger.counts, forger.counts.iloc[[4]]])
    forger.save()


@tampering("client is no client of the model")
def a_client_too_many(out: Path) -> None:
    forger = Forger(folder(out))
    extra = forger.counts[(forger.counts["client"] == 0) & forger.counts["model"].str.startswith("personal")]
    forger.counts = pandas.concat([forger.counts, extra.assign(client=77)])
    forger.recompute().save()


@tampering("class is none of the 10 classes")
def a_class_too_many(out: Path) -> None:
    forger = Forger(folder(out))
    forger.counts.loc[2, "class"] = 10
    forger.save()


@tampering("correct of personal.masked is below that of personal")
def masked_answers_made_fewer(out: Path) -> None:
    forger = Forger(folder(out))
    rows = (forger.counts["model"] == "personal.masked") & (forger.counts["correct"] > 1)
    forger.counts.loc[forger.counts.index[rows][0], "correct"] -= 1
    forger.recompute().save()


@tampering("model has not the models of fedrep after round")
def a_model_made_up(out: Path) -> None:
    forger = Forger(folder(out, "fedrep"))
    other = Forger(folder(out)).counts
    forger.counts = pandas.concat([forger.counts, other[other["model"] == "generic"]]).sort_values(
        "round", kind="stable"
    )
    forger.recompute().save()


@tampering("model has not the models of ditto after round")
def a_model_hidden(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.counts = forger.counts[forger.counts["model"] != "generic"]
    forger.recompute().save()


@tampering("round has [3], and by the setting models are tested after [2, 3]")
def a_round_hidden(out: Path) -> None:
    forger = Forger(folder(out))
    forger.counts = forger.counts[forger.counts["round"] == 3]
    forger.recompute().save()


def taken(out: Path, label: str = "fedavg_ft") -> Forger:
    """Somebody who writes predictions as they please."""
    forger = Forger(folder(out, label))
    forger.predictions = records.read(forger.folder).predictions()
    return forger


@tampering("predictions.parquet: stands there twice")
def a_prediction_twice(out: Path) -> None:
    forger = taken(out)
    forger.predictions = pandas.concat([forger.predictions, forger.predictions.iloc[[4]]])
    forger.save()


@tampering("predictions.parquet: predicted is none of the 10 classes")
def a_class_predicted_too_many(out: Path) -> None:
    forger = taken(out)
    forger.predictions.loc[2, "predicted"] = -1
    forger.save()


@tampering("predictions.parquet: count is below 1")
def what_never_happened(out: Path) -> None:
    forger = taken(out)
    forger.predictions.loc[2, "count"] = 0
    forger.save()


@tampering("predictions.parquet: total has other test images")
def an_image_more(out: Path) -> None:
    forger = taken(out)
    wrong = forger.predictions["class"] != forger.predictions["predicted"]
    forger.predictions.loc[forger.predictions.index[wrong][0], "count"] += 1
    forger.save()


@tampering("predictions.parquet: predicted is a class that the client never trained on")
def a_masked_class_predicted(out: Path) -> None:
    forger = taken(out)
    masked = forger.predictions[forger.predictions["model"] == "personal.masked"]
    wrong = masked[masked["class"] != masked["predicted"]]
    for place, row in wrong.iterrows():
        absent = set(range(10)) - set(masked[masked["client"] == row["client"]]["class"])
        if absent:  # of a client's test, which has the classes of its training images
            forger.predictions.loc[place, "predicted"] = min(absent)
            break
    forger.save()


@tampering("predictions.parquet: round has [2, 3], and must be of the last evaluation alone")
def an_earlier_round_among_the_predictions(out: Path) -> None:
    forger = taken(out)
    forger.predictions = pandas.concat([forger.predictions.assign(round=2), forger.predictions])
    forger.save()


@tampering("counts.parquet: round has [2, 3], and the last evaluation, of which predictions are, is after round 3")
def counts_stored_twice(out: Path) -> None:
    forger = taken(out)
    forger.save(before=forger.counts)


@tampering("run.json: tables.notes is none of a run of format 3")
def a_table_more(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["tables"]["notes"] = "0" * 64
    forger.save()


@tampering("rounds.parquet: generic is")
def a_curve_changed(out: Path) -> None:
    forger = Forger(folder(out))
    forger.rounds.loc[0, "generic"] += 0.01
    forger.save()


@tampering("rounds.parquet: has not the columns")
def a_curve_hidden(out: Path) -> None:
    forger = Forger(folder(out))
    forger.rounds = forger.rounds.drop(columns="personal.worst_decile")
    forger.save()


@tampering("rounds.parquet: round is [2, 4]")
def a_round_renamed(out: Path) -> None:
    forger = Forger(folder(out))
    forger.rounds["round"] = [2, 4]
    forger.save()


@tampering("the stored counts give")
def counts_swapped_between_seeds(out: Path) -> None:
    one, other = Forger(folder(out, seed=0)), Forger(folder(out, seed=1))
    one.counts, other.counts = other.counts, one.counts
    one.save(), other.save()


@tampering("total has other test images")
def counts_and_metrics_swapped_between_seeds(out: Path) -> None:
    one, other = Forger(folder(out, seed=0)), Forger(folder(out, seed=1))
    one.counts, other.counts = other.counts, one.counts
    one.recompute().save(), other.recompute().save()


@tampering("model has not the models of fedrep")
def counts_and_metrics_of_another_algorithm(out: Path) -> None:
    one, other = Forger(folder(out, "fedrep")), Forger(folder(out, "ditto"))
    one.counts = other.counts
    one.recompute().save()


@tampering("fingerprint is '0123456789abcdef', and the data give")
def another_fingerprint(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["fingerprint"] = "0123456789abcdef"
    forger.save()


@tampering("class_counts is [")
def other_class_counts(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["class_counts"][0] -= 1
    forger.save()


@tampering("groups.few is")
def easier_groups(out: Path) -> None:
    forger = Forger(folder(out))
    groups = forger.document["groups"]
    groups["few"], groups["medium"] = [], sorted(groups["few"] + groups["medium"] + groups["many"][-1:])
    groups["many"] = groups["many"][:-1]
    forger.recompute().save()


@tampering("cost.bytes_down is")
def less_sent_down(out: Path) -> None:
    for seed in (0, 1):
        forger = Forger(folder(out, seed=seed))
        forger.document["cost"]["bytes_down"] /= 2
        forger.save()


@tampering("cost.bytes_up does not go with that of the run's other seeds")
def less_sent_up(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["cost"]["bytes_up"] /= 2
    forger.save()


@tampering("cost.train_flops does not go with")
def less_computed(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["cost"]["train_flops"] /= 2
    forger.save()


def test_a_method_may_compute_a_little_more_a_sample_with_another_seed(out: Path) -> None:
    """Rounds in which it does otherwise, and what a visit costs once, fall on clients of other sizes."""
    forger = Forger(folder(out))
    forger.document["cost"]["train_flops"] *= 1.007
    forger.save()
    assert not [each for each in validate(out, ROOT).problems if "train_flops" in str(each)]


@tampering("cost.train_samples is")
def other_epochs(out: Path) -> None:
    Forger(folder(out)).set("epochs", 3).save()


@tampering("setting cannot be: dirichlet: none of")
def a_split_that_cannot_be_made(out: Path) -> None:
    Forger(folder(out)).set("alpha", 1e-9).save()


def cheaper(out: Path, key: str, value: float) -> None:
    """Say less of a cost, for all seeds alike."""
    for seed in (0, 1):
        forger = Forger(folder(out, seed=seed))
        forger.document["cost"][key] = value
        forger.save()


@tampering("cost.train_samples is 1, and cohorts of")
def samples_left_out_of_all_seeds(out: Path) -> None:
    cheaper(out, "train_samples", 1.0)


@tampering("cost.train_flops is 1, and as many samples take")
def work_left_out_of_all_seeds(out: Path) -> None:
    cheaper(out, "train_flops", 1.0)


@tampering("cost.train_flops is 1e+15, and as many samples take")
def work_beyond_all_sense(out: Path) -> None:
    cheaper(out, "train_flops", 1e15)


@tampering("cost.bytes_up is 1, and clients send what they are sent")
def nothing_sent_up_by_any_seed(out: Path) -> None:
    cheaper(out, "bytes_up", 1.0)


@tampering("cost.peak_memory_bytes is 1, and the model alone takes")
def no_memory_taken(out: Path) -> None:
    cheaper(out, "peak_memory_bytes", 1.0)


@tampering("cost.wall_seconds is 1e-09, and no machine does that in less than")
def no_time_taken(out: Path) -> None:
    cheaper(out, "wall_seconds", 1e-9)


@tampering("versions is not an object of version numbers")
def a_version_that_is_text(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["versions"]["torch"] = "3<script>alert(1)</script>"
    forger.save()


@tampering("preset is 'verified by the maintainers', and no preset can be called so")
def a_preset_that_praises_itself(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document |= {"preset": "verified by the maintainers"}
    forger.document["label"] += " [verified by the maintainers]"
    forger.save()


@tampering("cost.client_state_bytes is")
def less_kept(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document["cost"]["client_state_bytes"] = 0.0
    forger.save()


@tampering("cost.wall_seconds is -1.0")
def a_negative_cost(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["cost"]["wall_seconds"] = -1.0
    forger.save()


@tampering("metrics is there, and the run failed")
def a_bad_seed_called_failed(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document |= {"status": "failed", "reason": "power cut"}
    forger.save()


@tampering("algorithm is 'fedavg', and by the identity it is 'ditto'")
def another_name(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document |= {"algorithm": "fedavg"}
    forger.save()


@tampering("label is 'mine', and by the identity it is 'ditto'")
def another_label(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document |= {"label": "mine"}
    forger.save()


@tampering("setting.epochs is 5, and by the identity it is 1")
def a_setting_that_is_not_the_identitys(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["setting"]["epochs"] = 5
    forger.save()


@tampering("overrides.unseen is not there, and by the identity it is 2")
def a_departure_hidden(out: Path) -> None:
    forger = Forger(folder(out))
    del forger.document["overrides"]["unseen"]
    forger.save()


@tampering("tier is 'A', and by the identity it is 'S'")
def another_tier(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["tier"] = "A"
    forger.save()


@tampering("identity.algorithm.version is 99, and this code knows ditto up to")
def a_version_of_tomorrow(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document["identity"]["algorithm"]["version"] = 99
    forger.save()


@tampering("identity.algorithm.version is 0")
def no_version(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.document["identity"]["algorithm"]["version"] = 0
    forger.save()


@tampering("identity.dataset.version is 2, and this code knows digits up to 1")
def a_dataset_of_tomorrow(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["identity"]["dataset"]["version"] = 2
    forger.save()


@tampering("versions.bench is 99.0.0, and this is")
def a_bench_of_tomorrow(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["versions"]["bench"] = "99.0.0"
    forger.save()


@tampering("has format 4, and this version reads formats up to 3")
def another_format(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["format"] = 4
    forger.save()


@tampering("drawn names others than the clients drawn by round")
def a_client_that_was_never_drawn(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.counts.loc[(forger.counts["drawn"] == 1) & (forger.counts["client"] == 0), "drawn"] = 0
    forger.recompute().save()


@tampering("drawn does not say whether the client was drawn")
def nobody_asks_who_took_part(out: Path) -> None:
    forger = Forger(folder(out, "ditto"))
    forger.counts["drawn"] = -1
    forger.recompute().save()


@tampering("tested is")
def more_clients_than_were_tested(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["tested"]["clients"] += 1
    forger.save()


@tampering("finished lies in the future")
def finished_tomorrow(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["finished"] = "2199-01-01T00:00:00+00:00"
    forger.save()


@tampering("identity.seed is")
def a_seed_as_a_text(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["identity"]["seed"] = "0"
    forger.save()


@tampering("identity.setting is not as this code writes it")
def the_same_run_spelled_otherwise(out: Path) -> None:
    shutil.copytree(here := folder(out), out / "copy")
    forger = Forger(out / "copy")
    forger.document["identity"]["setting"]["imbalance"] = int(forger.document["identity"]["setting"]["imbalance"])
    assert forger.save().name != here.name


@tampering("identity.again is no part of an identity")
def the_same_run_with_one_key_more(out: Path) -> None:
    shutil.copytree(folder(out), out / "copy")
    forger = Forger(out / "copy")
    forger.document["identity"]["again"] = 1
    forger.save()


@tampering("and device_seconds are those of")
def a_copy_as_another_engine(out: Path) -> None:
    shutil.copytree(folder(out), out / "copy")
    forger = Forger(out / "copy")
    forger.document["identity"]["engine"] = forger.document["engine"] = "serial"
    forger.save()


@tampering("digest is that of")
def a_copy_as_another_seed(out: Path) -> None:
    shutil.copytree(folder(out), out / "copy")
    forger = Forger(out / "copy")
    forger.document["identity"]["seed"] = forger.document["seed"] = 7
    forger.document["cost"]["wall_seconds"] += 0.1
    forger.save()


@tampering("and the folder is called 0123456789ab")
def a_copy_under_another_id(out: Path) -> None:
    shutil.copytree(folder(out), out / "0123456789ab")


@tampering("fingerprint is")
def a_better_seed_under_a_worse_ones_name(out: Path) -> None:
    better = folder(out, seed=1)
    shutil.rmtree(folder(out, seed=0))
    forger = Forger(better)
    forger.document["identity"]["seed"] = forger.document["seed"] = 0
    forger.save()


@tampering("round has [2, 3], and by the setting models are tested after")
def fewer_rounds_said(out: Path) -> None:
    Forger(folder(out)).set("rounds", 2).save()


@tampering("cost.bytes_down is")
def less_participation_said(out: Path) -> None:
    Forger(folder(out)).set("participation", 0.2).save()


@tampering("cost.bytes_down is")
def a_smaller_model_said(out: Path) -> None:
    Forger(folder(out)).set("model", "small_cnn").save()


@tampering("fingerprint is")
def another_partition_said(out: Path) -> None:
    Forger(folder(out)).set("alpha", 0.1).save()


@tampering("fingerprint is")
def another_imbalance_said(out: Path) -> None:
    forger = Forger(folder(out)).set("imbalance", 20.0)
    forger.document["imbalance"] = 20.0
    forger.save()


@tampering("client")
def other_clients_said(out: Path) -> None:
    Forger(folder(out)).set("clients", 21).save()


@tampering("identity.setting.lr is '0.05', and must be a number")
def a_learning_rate_as_a_text(out: Path) -> None:
    Forger(folder(out)).set("lr", "0.05").save()


@tampering("identity.algorithm.name is unknown here")
def an_algorithm_nobody_knows(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["identity"]["algorithm"]["name"] = forger.document["algorithm"] = "best_of_all"
    forger.save()


@tampering("NaN is not a number of JSON")
def a_metric_that_is_no_number(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["metrics"]["personal"] = float("nan")
    forger.save()


@tampering("Infinity is not a number of JSON")
def an_infinite_cost(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document["cost"]["bytes_up"] = float("inf")
    forger.save()


@tampering("key 'personal' stands there twice")
def two_metrics_of_one_name(out: Path) -> None:
    file = folder(out) / "run.json"
    file.write_text(file.read_text().replace('"personal": ', '"personal": 0.99, "personal": ', 1))


@tampering("counts.parquet: is no Parquet file")
def a_file_cut_off(out: Path) -> None:
    file = folder(out) / "counts.parquet"
    file.write_bytes(file.read_bytes()[:-40])


@tampering("rounds.parquet: cannot be read")
def a_file_removed(out: Path) -> None:
    (folder(out) / "rounds.parquet").unlink()


@tampering("has the columns")
def a_column_more(out: Path) -> None:
    forger = Forger(folder(out))
    forger.counts["note"] = 1
    forger.save()


@tampering("README.md: line")
def a_folder_removed(out: Path) -> None:
    table = (out / "README.md").read_text()
    shutil.rmtree(folder(out))
    write_table(out)
    (out / "README.md").write_text(table)


@tampering("README.md: line")
def the_table_edited(out: Path) -> None:
    table = (out / "README.md").read_text()
    (out / "README.md").write_text(table.replace("| `ditto`", "| `ditto (ours)`"))


@tampering("README.md: is not there")
def the_table_removed(out: Path) -> None:
    (out / "README.md").unlink()


@tampering("has no run.json: the run is unfinished")
def an_unfinished_run(out: Path) -> None:
    (folder(out) / "run.json").unlink()


@tampering("checkpoint.pt: does not belong into a run's folder")
def something_else_in_a_run(out: Path) -> None:
    (folder(out) / "checkpoint.pt").write_bytes(b"")


def test_studies_may_lie_beside_the_runs(out: Path) -> None:
    (out / "studies").mkdir()
    (out / "studies" / "mine.md").write_text("# What it shows")
    assert complaints(out) == ""


def test_reproductions_may_lie_beside_the_runs(out: Path) -> None:
    (out / "reproductions").mkdir()
    (out / "reproductions" / "fedrep.md").write_text("# What came out")
    assert complaints(out) == ""


def test_pictures_may_lie_beside_the_runs_and_nothing_that_acts(out: Path) -> None:
    (out / "pictures").mkdir()
    svg = picture.drawn(leaderboards(result("fedavg", seed=seed) for seed in range(5)), "personal.balanced")
    place = out / "pictures" / "best.svg"
    place.write_text(svg)
    assert complaints(out) == ""
    for added, said in (
        ("<script>alert(1)</script>", "has 'script', which none of ours has"),
        ("<g onload='alert(1)'/>", "has 'onload', which none of ours has"),
        ("<a/>", "has 'a', which none"),
        ("<image/>", "has 'image', which none"),
        ("<g xlink:href='https://example.org'/>", "href', which none of ours has"),
        ("<style>@import 'x';</style>", "fetches something"),
        ("<path fill='URL(https://example.org)'/>", "fetches something"),
        ("<x:g xmlns:x='http://www.w3.org/1999/xhtml'/>", "which none of ours has"),
        ("<!-- -->", "has more than elements"),
        ("<g>", "cannot be read"),
    ):
        place.write_text(svg.replace("</svg>", f"{added}</svg>"))
        assert said in complaints(out), added
    place.write_text('<!DOCTYPE svg [<!ENTITY a "b">]>' + svg)
    assert "has more than elements" in complaints(out)
    place.rename(place.with_suffix(".png"))
    assert "is no drawing" in complaints(out)


def test_measurements_of_speed_may_lie_beside_the_runs(out: Path) -> None:
    (out / "speed").mkdir()
    for name, content in (("README.md", b"# Fast"), ("cnn.json", b"{}"), ("growth.png", b"\x89PNG...")):
        (out / "speed" / name).write_bytes(content)
    assert complaints(out) == ""


@tampering("speed/growth.png: does not belong into speed, as it is neither a text")
def a_program_for_a_picture(out: Path) -> None:
    (out / "speed").mkdir()
    (out / "speed" / "growth.png").write_bytes(b"\x7fELF")


@tampering("speed/cnn.json: does not belong into speed, as it cannot be read")
def a_measurement_that_is_none(out: Path) -> None:
    (out / "speed").mkdir()
    (out / "speed" / "cnn.json").write_text("{" * 5000)


@tampering("better: does not belong into a folder of published results")
def something_else_beside_the_runs(out: Path) -> None:
    (out / "better").mkdir()


@tampering("verified.json: 0123456789ab is no run of this folder")
def a_verification_of_nothing(out: Path) -> None:
    (out / "verified.json").write_text(json.dumps({"format": 2, "runs": {"0123456789ab": ENTRY}}))


@tampering("was looked at with another run.json than the one that is here")
def a_run_changed_after_it_was_verified(out: Path) -> None:
    (out / "verified.json").write_text(json.dumps({"format": 2, "runs": {folder(out).name: ENTRY}}))


@tampering("verified.json: cannot be read")
def a_verification_that_is_none(out: Path) -> None:
    (out / "verified.json").write_text("[]")


ENTRY = {
    "kind": "verified",
    "date": "2026-01-02",
    "commit": None,
    "versions": {"torch": "2"},
    "hardware": {"cpu": "x"},
    "document": "0" * 64,
}
_LEAVE_THE_TABLE = {"an_algorithm_nobody_knows", "a_folder_removed", "the_table_edited", "the_table_removed"}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_although_the_table_was_written_anew(out: Path, name: str) -> None:
    change, says = TAMPERINGS[name]
    change(out)
    if name not in _LEAVE_THE_TABLE:
        write_table(out)
    found = complaints(out)
    assert says in found, found
    if name not in _LEAVE_THE_TABLE:
        assert "README.md" not in found


WITHOUT_DATA = {
    "a_harder_class_tested_less": "total has other test images",
    "the_worst_client_left_out": "total has other test images",
    "counts_and_metrics_swapped_between_seeds": "total has other test images",
    "another_fingerprint": "fingerprint differs from that of other runs of its protocol and seed",
    "other_class_counts": "class_counts differs from that of other runs of its protocol",
    "a_better_seed_under_a_worse_ones_name": "fingerprint differs from that of other runs of its protocol and seed",
    "a_copy_as_another_seed": "digest is that of",
}


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_where_the_data_are_not_at_hand_runs_are_compared_with_each_other(out: Path, no_data: None, name: str) -> None:
    TAMPERINGS[name][0](out)
    write_table(out)
    found = complaints(out)
    assert WITHOUT_DATA[name] in found, found


# What only a rerun can tell ---------------------------------------------------------------------------------


def all_right(forger: Forger) -> None:
    forger.counts["correct"] = forger.counts["total"]
    forger.recompute()


def a_little_better(forger: Forger) -> None:
    rows = forger.counts["correct"] < forger.counts["total"]
    forger.counts.loc[rows, "correct"] += 1
    forger.recompute()


def another_digest(forger: Forger) -> None:
    forger.document["digest"] = hashlib.sha256(b"made up").hexdigest()


def another_learning_rate(forger: Forger) -> None:
    forger.set("lr", 0.04)


def another_momentum(forger: Forger) -> None:
    forger.set("momentum", 0.4)


def another_batch_size(forger: Forger) -> None:
    forger.set("batch_size", 8)


def another_field(forger: Forger) -> None:
    forger.document["identity"]["algorithm"]["fields"]["pull"] = 0.5
    forger.document |= {"call": "Ditto(pull=0.5)", "label": "ditto(pull=0.5)"}


def another_engine(forger: Forger) -> None:
    forger.document["identity"]["engine"] = forger.document["engine"] = "serial"


def another_precision(forger: Forger) -> None:
    forger.document["identity"]["precision"] = forger.document["precision"] = "bf16"


def work_left_out(forger: Forger) -> None:
    forger.document["cost"]["train_flops"] *= 0.9


def answers_swapped(forger: Forger) -> None:
    """Swap what a client got right in two classes of one group with as many test images: no metric changes."""
    counts = forger.counts
    group = {label: name for name, labels in forger.document["groups"].items() for label in labels}
    mine = counts[counts["model"].str.startswith("personal")]
    of = ["round", "model", "client", "class", "correct", "total"]
    cells = list(mine[of].itertuples(index=False, name=None))
    round, model, client, one, other = next(
        (*place, c, d)
        for (*place, c, right, total), (*there, d, others, images) in itertools.combinations(cells, 2)
        if (place, group[c], total) == (there, group[d], images) and right != others
    )
    for each in [model] if model not in ("personal", "personal.masked") else ["personal", "personal.masked"]:
        rows = (counts["model"] == each) & (counts["round"] == round) & (counts["client"] == client)
        first, second = (counts.index[rows & (counts["class"] == label)][0] for label in (one, other))
        counts.loc[[first, second], "correct"] = counts.loc[[second, first], "correct"].to_numpy()


def classes_taken_for_others(forger: Forger) -> None:
    """Have wrong answers of the generic model be of another class: nothing that is counted changes."""
    frame = forger.predictions = records.read(forger.folder).predictions()
    wrong = frame[(frame["model"] == "generic") & (frame["class"] != frame["predicted"])]
    there = set(zip(wrong["class"], wrong["predicted"], strict=True))
    place, row = next(iter(wrong.iterrows()))
    free = (label for label in range(10) if label != row["class"] and (row["class"], label) not in there)
    frame.loc[place, "predicted"] = next(free)


ADVERSARIES = (
    classes_taken_for_others, answers_swapped, all_right, a_little_better, another_digest, another_learning_rate,
    another_momentum, another_batch_size, another_field, another_engine, another_precision,
    work_left_out,
)  # fmt: skip


@pytest.mark.parametrize("forge", ADVERSARIES)
def test_what_a_forger_makes_to_fit_is_found_by_a_rerun(out: Path, forge: Callable[[Forger], None]) -> None:
    for other in ("fedavg_ft", "fedrep"):
        for seed in (0, 1):
            shutil.rmtree(folder(out, other, seed))
    shutil.rmtree(folder(out, "ditto", 1))  # nothing is left to compare with
    forger = Forger(folder(out, "ditto"))
    forge(forger)
    here = forger.save()
    write_table(out)
    report = validate(out, ROOT)
    assert report.problems == (), "this is found without a rerun by now: move it to the tamperings"
    again = rerun(records.read(here), candidates(report.inspected, ROOT)[here.name])
    assert not again.agrees and "run again, it differs" in str(again)


def test_an_honest_run_comes_out_to_the_bit(published: Path) -> None:
    report = validate(published, ROOT)
    possible = candidates(report.inspected, ROOT)
    assert len(possible) == 6 and draw(list(possible), 2, 5) == draw(list(reversed(possible)), 2, 5)
    assert len({tuple(draw(list(possible), 2, seed)) for seed in range(20)}) > 5
    again = rerun(records.read(folder(published)), possible[folder(published).name])
    assert again.exact and again.because is None and again.runs == 1 and "to the bit" in str(again)


# The command ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_found(out: Path, bench: Bench) -> None:
    answer = bench("validate", out)
    assert answer.status == 0 and "6 finished runs of 1 protocol; the split of 6 was made anew" in answer.out
    assert answer.out.rstrip().endswith("0 problems." if "0 problems" in answer.out else "no problems.")
    a_metric_changed_by_a_billionth(out)
    answer = bench("validate", out)
    assert answer.status == 1 and f"{folder(out).name}/run.json: metrics.personal is" in answer.out
    assert answer.err.rstrip().endswith("put back the files that the runs wrote, or run them again")
    answer = bench("validate", out, "--json")
    said = json.loads(answer.out)
    assert answer.status == 1 and said["runs"] == 6 and said["problems"][0]["key"] == "metrics.personal"


def test_two_results_of_one_run_are_a_problem_and_a_copy_is_none(out: Path) -> None:
    packing.pack(records.read_all(out)[0], out / "all")
    assert complaints(out) == ""
    here = folder(out)
    text = (out / here.name / "run.json").read_text()
    commit = f'"commit": "{"0" * 40}"'
    (out / here.name / "run.json").write_text(re.sub(r'"commit": ("\w+(-dirty)?"|null)', commit, text))
    write_table(out)
    assert complaints(out) == (
        f"{here.name}: another result in each of {out / 'all'} and {out / here.name}; remove all but the right one"
    )


def test_the_curves_of_a_pack_are_those_that_its_runs_had(out: Path, tmp_path: Path) -> None:
    here = folder(out)
    said = document(here)
    said["tables"]["rounds"] = "0" * 64
    (here / "run.json").write_text(json.dumps(said))
    found = [check(path, document(path)) for path in sorted(out.iterdir()) if path.is_dir()]
    packing.pack(found, tmp_path / "pack")
    (problem,) = [each for each in validate(tmp_path / "pack", ROOT).problems if each.file != "README.md"]
    assert str(problem) == (
        f"{here.name}/rounds.parquet: was another when the run was packed than what the stored counts give"
    )


# Many runs --------------------------------------------------------------------------------------------------


def test_several_processes_find_what_one_does(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        began: int | None = None
        done = 0

        def say(self, sentence: str) -> None:
            raise AssertionError(sentence)

        def begin(self, what: str, total: int, done: int = 0) -> None:
            assert self.began is None and not done
            self.began = total

        def advance(self, pieces: int) -> None:
            self.done += pieces

    mine = tmp_path / "took_part.py"
    text = (Path(__file__).parents[1] / "algorithms" / "ditto.py").read_text()
    mine.write_text(text.replace('"ditto"', '"took_part"'))
    load_plugin(mine)
    (algorithm,) = parse_algorithms("took_part")
    (run,) = replace(SWEEP, algorithms=(algorithm,), seeds=(0,), plugins=(mine,)).expand()
    assert execution.execute(run, out) is None
    for change in ("a_model_hidden", "a_round_hidden"):
        TAMPERINGS[change][0](out)
    monkeypatch.setattr(side_by_side, "_AT_A_TIME", 2)
    one, bar = validate(out, ROOT, plugins=[mine], jobs=1), Bar()
    several = validate(out, ROOT, plugins=[mine], jobs=2, progress=bar)
    assert (bar.began, bar.done) == (7, 7) and several.splits == one.splits == 7
    assert several.problems == one.problems and len(one.problems) > 2
    assert several.notes == one.notes and several.runs == one.runs
    assert [each.folder for each in several.inspected] == sorted(each.folder for each in one.inspected)


# Submissions ------------------------------------------------------------------------------------------------


def test_a_submission_holds_the_results_and_nothing_else(out: Path, bench: Bench, tmp_path: Path) -> None:
    (out / "sweeps").mkdir()
    (out / "0123456789ab").mkdir()
    (folder(out) / "checkpoint.pt").write_bytes(b"much")
    answer = bench("submit", out, "--to", tmp_path / "one.zip")
    assert answer.status == 0 and "packed 6 runs" in answer.out and "open a pull request" in answer.out
    assert "left out: 0123456789ab is unfinished." in answer.err
    shutil.copytree(out, tmp_path / "later")
    assert bench("submit", tmp_path / "later", "--to", tmp_path / "two.zip").status == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "taken")
    assert {name.split("/")[1] for name in names} == {"counts.parquet", "predictions.parquet", "runs.parquet"}
    assert len(names) == 3 and len({name.split("/")[0] for name in names}) == 1
    assert len(records.read_all(tmp_path / "taken")[0]) == 6
    write_table(tmp_path / "taken")
    assert complaints(tmp_path / "taken") == ""
    assert bench("submit", out, "--to", tmp_path / "folders").status == 0
    write_table(tmp_path / "folders")
    assert complaints(tmp_path / "folders") == ""
    assert bench("submit", out, "--to", tmp_path / "folders").status == 0  # the same again is no harm


def test_the_plugin_that_made_a_result_comes_along(out: Path, bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "came_along.py"
    mine.write_text("from bench import register\nfrom bench.algorithm import Algorithm\n\n\n"
                    "@register('came_along')\nclass CameAlong(Algorithm):\n    pass\n")  # fmt: skip
    answer = bench("submit", out, "--to", tmp_path / "results", "--plugin", mine)
    assert answer.status == 0 and "can run them again: came_along.py" in answer.out
    (pack,) = packed.packs(tmp_path / "results")
    assert (pack / packed.PLUGINS / "came_along.py").read_bytes() == mine.read_bytes()
    assert packed.opened(pack).note["plugins"] == {"came_along.py": hashlib.sha256(mine.read_bytes()).hexdigest()}
    write_table(tmp_path / "results")
    assert complaints(tmp_path / "results") == ""
    answer = bench("submit", tmp_path / "results", "--to", tmp_path / "again.zip")  # of a pack
    assert answer.status == 0 and "packed 6 runs" in answer.out


def test_ones_own_folder_is_valid_without_a_table(out: Path, bench: Bench) -> None:
    (out / "README.md").unlink(missing_ok=True)
    (out / "sweeps").mkdir()
    (out / "mlflow.db").write_bytes(b"")
    answer = bench("validate", out)
    assert answer.status == 0 and "a folder of one's own" in answer.err
    (folder(out) / "letter.txt").write_text("dear")
    told = bench("validate", out).err.splitlines()[-1]
    assert told == "bench: problems: 1; put back the files that the runs wrote, or run them again"


def test_remedies_fit_the_problems(out: Path, bench: Bench) -> None:
    (out / "letter.txt").write_text("dear")
    assert bench("validate", out).err.splitlines()[-1] == "bench: problems: 1; do what its line says"


def test_a_pack_of_results_is_valid_and_its_damage_is_not(out: Path) -> None:
    packing.pack(records.read_all(out)[0], out / "pack")
    for each in records.read_all(out)[0]:
        shutil.rmtree(each.folder)
    write_table(out)
    report = validate(out, ROOT)
    assert report.problems == () and len(report.runs) == report.splits == 6
    (out / "pack" / "letter.txt").write_text("dear")
    rows = parquet.read_table(out / "pack" / "counts.parquet")
    place = rows.column_names.index("correct")
    parquet.write_table(rows.set_column(place, "correct", [[0] * len(rows)]), out / "pack" / "counts.parquet")
    found = complaints(out)
    assert "pack/letter.txt: does not belong into a pack" in found
    assert "pack/counts.parquet: is not the file that runs.parquet was written with" in found
    assert found.count("/counts.parquet: ") >= 7  # each run's


def test_what_would_not_be_valid_is_not_packed(published: Path, out: Path, bench: Bench, tmp_path: Path) -> None:
    a_metric_changed_by_a_billionth(out)
    answer = bench("submit", out, "--to", tmp_path / "one.zip")
    assert answer.status == 1 and "nothing was packed" in answer.err and "metrics.personal is" in answer.out
    assert not (tmp_path / "one.zip").exists()
    (tmp_path / "one.zip").write_bytes(b"mine")
    assert "with other content" in bench("submit", published, "--to", tmp_path / "one.zip").err
    (tmp_path / "empty").mkdir()
    assert "holds no finished run" in bench("submit", tmp_path / "empty").err


def test_failed_and_unfinished_runs_are_left_out_of_a_submission(out: Path) -> None:
    record = records.read(folder(out))
    failed = replace(rebuilding.rebuild(record).run(ROOT), seed=9)
    records.fail(out, failed.id, execution.document(failed, None), "it broke")
    (out / ("2" * 12)).mkdir()
    chosen, others = submission.finished(out)
    assert len(chosen) == 6 and set(others) == {f"{failed.id} failed (it broke).", f"{'2' * 12} is unfinished."}
    runs = submission.gather(chosen)
    assert submission.packed(runs) == submission.packed(dict(reversed(runs.items()))), "whatever their order"


def test_a_submission_overwrites_nothing(out: Path, tmp_path: Path) -> None:
    runs, to = submission.gather([folder(out), folder(out, "ditto", 1)]), tmp_path / "theirs"
    submission.write(runs, to)
    submission.write(runs, to)  # the same once more
    changed = to / sorted(runs)[1] / "run.json"
    changed.write_text("theirs")
    shutil.rmtree(to / sorted(runs)[0])
    with pytest.raises(submission.NotSubmittable, match="with other content; name another folder"):
        submission.write(runs, to)
    assert changed.read_text() == "theirs" and len(list(to.iterdir())) == 1, "nothing is written by halves"


def test_a_submission_tells_nothing_of_the_machine(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "lab-server-3.example")
    here = folder(out)
    original = (here / "run.json").read_text()
    said = json.loads(original)
    assert list(submission.told(said)) == []
    (here / "run.json").write_text(json.dumps({**said, "dataset": "folder(path='/home/ada/images', pixels=32)"}))
    content = submission.gather([here])[here.name]["run.json"]
    assert json.loads(content)["dataset"] == "folder(path='images', pixels=32)" and b"/ada" not in content
    for change in (
        {"overrides": {"weights": "/home/ada/body.pth"}},
        {"note": r"written to C:\Users\ada\runs"},
        {"worker": {"host": "LAB-SERVER-3"}},
        {"command": "bench run --out ~/runs/today"},
    ):
        (here / "run.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(submission.NotSubmittable, match=f"{next(iter(change))}.* tells .* of this machine"):
            submission.gather([here])


def test_results_on_features_are_checked_where_they_were_made_too(tmp_path: Path, bench: Bench) -> None:
    """Told by what they are: wherever they lie, and under whatever name."""
    digits, here, there = DATASETS["digits"](), tmp_path / "here", tmp_path / "there"
    made = [Embedding(dataset=digits, model=model, norm="group", weights=None) for model in ("linear", "mlp")]
    other, store = (each.make(here, Watcher()) for each in made)
    asked = Sweep(
        algorithms=tuple(parse_algorithms("fedavg")),
        datasets=tuple(parse_datasets(f"features(path='{store.folder}')")),
        overrides={"rounds": 2, "clients": 4},
        data_root=here,
    )
    driver.run(asked.expand(), tmp_path / "runs", pool=InProcess())
    assert bench("submit", tmp_path / "runs", "--to", tmp_path / "results").status == 0
    taken = tmp_path / "results"
    write_table(taken)
    shutil.copytree(store.folder, there / "prepared" / "of another name")
    shutil.copytree(other.folder, tmp_path / "prepared" / store.folder.name)
    for root, splits in ((here, 1), (there, 1), (tmp_path, 0), (ROOT, 0)):
        report = validate(taken, root)
        assert report.problems == () and report.splits == splits
        assert any("own and not here" in note for note in report.notes) == (not splits)
        known = candidates(report.inspected, root)
        assert len(known) == splits
        for run in known.values():
            (record,) = (one.record for one in report.inspected)
            assert record is not None and rerun(record, run).exact


def test_results_on_somebodys_own_images_are_checked_as_far_as_can_be(tmp_path: Path, bench: Bench) -> None:
    random = np.random.default_rng(0)
    parts = {"train_x": (120, 8, 8), "test_x": (40, 8, 8)}
    images: dict[str, Any] = {name: random.integers(0, 256, shape, dtype=np.uint8) for name, shape in parts.items()}
    images |= {"train_y": np.arange(120) % 4, "test_y": np.arange(40) % 4}
    np.savez(tmp_path / "mine.npz", **images)
    asked = Sweep(
        algorithms=tuple(parse_algorithms("fedavg")),
        datasets=tuple(parse_datasets(f"arrays(path='{tmp_path / 'mine.npz'}')")),
        overrides={"rounds": 2, "clients": 4},
        seeds=(0, 1),
        data_root=ROOT,
    )
    driver.run(asked.expand(), tmp_path / "runs", pool=InProcess())
    assert str(tmp_path) in document(folder(tmp_path / "runs", "fedavg"))["dataset"]
    assert bench("submit", tmp_path / "runs", "--to", tmp_path / "results").status == 0
    taken = tmp_path / "results"
    (pack,) = packed.packs(taken)
    packing.unpack(pack, taken)
    shutil.rmtree(pack)
    assert document(folder(taken, "fedavg"))["dataset"] == "arrays(path='mine.npz')"
    write_table(taken)
    report = validate(taken, ROOT)
    assert report.problems == () and report.splits == 0 and candidates(report.inspected, ROOT) == {}
    assert any("somebody's own" in note for note in report.notes)
    forger = Forger(folder(taken, "fedavg"))
    forger.document["seed"] = 5
    forger.save()
    assert "seed is 5, and the identity says" in complaints(taken)
    forger.document |= {"seed": 0, "dataset": "=HYPERLINK('https://example.org')"}
    forger.document["overrides"] |= {"rounds": 9, "first": "place"}
    forger.save()
    said = complaints(taken)
    assert "dataset is \"=HYPERLINK('https://example.org')\", and must be a call of arrays" in said
    assert "overrides.'rounds' is 9, and the setting has not" in said and "overrides.'first' is 'place'" in said


def test_weights_are_named_without_their_folder() -> None:
    shown = submission.told({"overrides": {"weights": "body.pth"}, "source": "https://example.org/some/where"})
    assert list(shown) == []


# The workflow -----------------------------------------------------------------------------------------------


WORKFLOWS = Path(__file__).parents[1] / ".github" / "workflows"


def workflow(name: str = "checks") -> dict[Any, Any]:
    import yaml  # type: ignore[import-untyped]

    content: dict[Any, Any] = yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text())
    return content


def test_the_workflow_checks_code_and_results_and_publishes_the_main_branch_only() -> None:
    jobs = workflow()["jobs"]
    commands = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    for command in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert command in commands["code"].replace("\n", " ")
    for command in ("bench validate results", "bench site --out results --to site"):
        assert command in commands["results"]
    assert workflow()["permissions"] == {"contents": "read"}
    publish = jobs["publish"]
    assert publish["needs"] == ["code", "results"] and set(publish["permissions"]) == {"pages", "id-token"}
    assert "default_branch" in publish["if"] and "github.event_name != 'pull_request'" in publish["if"]


@pytest.mark.parametrize("name", [file.stem for file in WORKFLOWS.glob("*.yml")])
def test_actions_are_named_by_commit_and_leave_no_token(name: str) -> None:
    used = re.findall(r"uses: *(.*)", (WORKFLOWS / f"{name}.yml").read_text())
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", each) for each in used)
    steps = [step for job in workflow(name)["jobs"].values() for step in job["steps"]]
    for step in steps:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "what a pull request is called would be run"


def test_no_pull_request_changes_the_guard_and_the_guard_runs_none() -> None:
    guard = workflow("guard")
    assert set(guard[True]) == {"pull_request_target"} and guard["permissions"] == {"contents": "read"}  # on: is true
    assert [name for name in WORKFLOWS.glob("*.yml") if "pull_request_target:" in name.read_text()] == [
        WORKFLOWS / "guard.yml"
    ]
    (job,) = guard["jobs"].values()
    assert "permissions" not in job
    checkout, *rest = job["steps"]
    assert set(checkout["with"]) == {"fetch-depth", "persist-credentials"}, "the main branch, and nothing else"
    programs = {line.split()[0] for step in rest for line in step["run"].splitlines()}
    assert not any("uses" in step for step in rest)
    assert programs <= {"git", "if", "fi", "echo", "exit", "changed=$(git", "loose=$(git"}
    assert not re.search(r"git (checkout|switch|merge|restore|worktree|apply|submodule)", str(rest))


def test_what_decides_over_results_has_owners() -> None:
    lines = (WORKFLOWS.parent / "CODEOWNERS").read_text().splitlines()
    owned = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith("#")}
    assert set(owned) == {"/.github/", "/bench/", "/results/verified.json", ".gitattributes"} and all(owned.values())


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ("mkdir results/pack-1; echo 1 > results/pack-1/runs.parquet; echo more >> results/README.md", ""),
        ("mkdir results/0123456789ab; echo {} > results/0123456789ab/run.json", "a submission is one pack"),
        ("echo more >> results/NOTES.md; echo more > code.py", ""),
        ("echo more >> results/aaaaaaaaaaaa/run.json", "results/aaaaaaaaaaaa/run.json"),
        ("git rm -qr results/aaaaaaaaaaaa", "results/aaaaaaaaaaaa/run.json"),
        ("git mv results/aaaaaaaaaaaa results/bbbbbbbbbbbb", "results/aaaaaaaaaaaa/rounds.parquet"),
        ("echo {} > results/verified.json", "leave it out"),
    ],
)
def test_the_workflow_lets_nobody_change_what_is_published(tmp_path: Path, change: str, refused: str) -> None:
    steps = workflow("guard")["jobs"]["published"]["steps"]
    script = next(step["run"] for step in steps if step.get("name") == "What is published stays as it is")
    git = "git -c user.name=a -c user.email=a@b"

    def shell(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-e", "-c", text]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment})

    run = "mkdir -p results/aaaaaaaaaaaa; cd results/aaaaaaaaaaaa; echo {} > run.json; echo 1 > rounds.parquet"
    shell(
        f"git init -q .; {run}; cd ../..; echo notes > results/NOTES.md; git add .; {git} commit -qm one"
    ).check_returncode()
    base = shell("git rev-parse HEAD").stdout.strip()
    shell(f"{change}; git add .; {git} commit -qm two").check_returncode()
    head = shell("git rev-parse HEAD").stdout.strip()
    shell(f"git checkout -q {base}").check_returncode()
    done = shell(script, BASE=base, HEAD=head)
    assert "fatal" not in done.stderr
    assert (done.returncode != 0) == bool(refused) and refused in done.stdout, done.stdout + done.stderr
    by_the_board = shell(script, BASE=base, HEAD=head, BOARD="true")
    assert (by_the_board.returncode == 0) == (done.returncode == 0 or refused == "leave it out")


def test_the_board_alone_may_write_and_only_after_everything_ran() -> None:
    assert [file.stem for file in WORKFLOWS.glob("*.yml") if "contents: write" in file.read_text()] == ["board"]
    (job,) = workflow("board")["jobs"].values()
    assert "default_branch" in job["if"] and not {"pull_request", "pull_request_target"} & set(workflow("board")[True])
    *before, last = job["steps"]
    assert not any("token" in str(step) for step in before) and "GH_TOKEN" in last["env"]
    assert "--plugin" not in str(job), "the main branch's code alone"
