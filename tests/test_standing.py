"""Whom numbers are believed of: what the board ran again, counted again, or could not, and what that does to tables."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.dataset import DataMissing
from bench.files import source
from bench.protocol.identity import identify
from bench.results import layout, packing, records, standing, table
from bench.results.comparison import compare, part_over_datasets
from bench.results.leaderboard import Leaderboard, leaderboards
from bench.results.standing import Standing
from bench.sweep import driver
from bench.sweep.apart import NotToItsEnd, execute_apart
from bench.sweep.config import Sweep, parse_algorithms, parse_datasets
from bench.sweep.pool import InProcess
from bench.validation import rerun as reruns
from bench.validation import submission
from bench.validation.board import Board
from bench.validation.found import Problem
from bench.validation.recount import recount
from bench.validation.report import validate
from bench.validation.rerun import candidates, rerun
from tests.test_command import Bench
from tests.test_command import bench as bench
from tests.test_results import document, store
from tests.test_validation import COMMAND, ROOT, Forger, a_little_better, all_right

ROUNDS = {"rounds": 3, "eval_every": 1, "unseen": 2, "epochs": 1}


def swept(out: Path, algorithms: str, seeds: tuple[int, ...] = (0,), keep_models: bool = False) -> Path:
    """Run some on digits, and write their table."""
    sweep = Sweep(
        algorithms=tuple(parse_algorithms(algorithms)),
        datasets=tuple(parse_datasets("digits")),
        overrides=ROUNDS,
        seeds=seeds,
        data_root=ROOT,
    )
    assert {each.status for each in driver.run(sweep.expand(), out, pool=InProcess(), keep_models=keep_models)} == {
        "done"
    }
    return written(out)


def written(out: Path) -> Path:
    """Write the table as a forger would too."""
    found, _ = records.read_all(out)
    (out / "README.md").write_text(table.results_readme(leaderboards(found), records.prose(out), COMMAND))
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(tmp_path_factory.mktemp("published"), "fedavg,fedrep(head_epochs=1)")


@pytest.fixture(scope="module")
def with_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(tmp_path_factory.mktemp("kept"), "fedavg_ft(finetune_epochs=1)", keep_models=True)


@pytest.fixture
def out(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "results"))


def folder(out: Path, algorithm: str = "fedavg") -> Path:
    return next(each.folder for each in records.read_all(out)[0] if each.algorithm == algorithm)


def again(out: Path, here: Path) -> reruns.Rerun:
    return rerun(records.read(here), candidates(validate(out, ROOT).inspected, ROOT)[here.name])


def elsewhere(forger: Forger) -> Forger:
    """Say that it was run on a machine that nobody has, with the states of another rounding."""
    forger.document["hardware"]["cpu"] = "Z80"
    forger.document["digest"] = "0" * 64
    return forger


# What a rerun finds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "key", "value"), [("versions", "torch", "1.0"), ("hardware", "cpu", "Z80")])
def test_a_run_of_another_machine_is_reproduced_within_what_such_runs_differ_by(
    out: Path, part: str, key: str, value: str
) -> None:
    forger = Forger(folder(out))
    forger.document[part][key] = value
    forger.document["digest"] = "0" * 64
    here = forger.save()
    found = again(out, here)
    assert found.agrees and not found.exact and found.runs == 3
    assert f"{key} was {value} there" in str(found) and "every number lies within" in str(found)
    assert found.within.keys() == {key for key, value in records.read(here).metrics.items() if value is not None}
    assert 0 < found.within["generic"] < 0.02  # of 360 test images; 8 points were allowed once


def test_a_machine_that_does_not_exist_is_no_way_around_the_bits(out: Path) -> None:
    """The bits that come out decide, and not what is said of the machine."""
    path = folder(out) / "run.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "hardware": {**told["hardware"], "cpu": "Z80"}}))
    found = again(out, path.parent)
    assert found.exact and "to the bit" in str(found)


def a_point_more(forger: Forger) -> None:
    """Lift the generic model in the last round by four test images a class: about a point."""
    rows = (forger.counts["model"] == "generic") & (forger.counts["round"] == 3)
    forger.counts.loc[rows, "correct"] = (forger.counts["correct"] + 4).clip(upper=forger.counts["total"])[rows]
    forger.recompute()


def few_for_many(forger: Forger) -> None:
    """Take right answers of the many classes for the few, whatever the mean."""
    counts, last = forger.counts, forger.counts["round"] == 3
    few, many = (forger.counts["class"].isin(forger.document["groups"][group]) for group in ("few", "many"))
    generic = last & (counts["model"] == "generic")
    counts.loc[generic & few, "correct"] = counts.loc[generic & few, "total"]
    counts.loc[generic & many, "correct"] //= 2
    forger.recompute()


def the_worst_clients(forger: Forger) -> None:
    """Let the clients that are served worst be served well."""
    counts = forger.counts
    mine = (counts["round"] == 3) & (counts["model"] == "personal")
    sums = counts[mine].groupby("client")[["correct", "total"]].sum()
    worst = (sums["correct"] / sums["total"]).nsmallest(2).index
    rows = mine & counts["client"].isin(worst)
    counts.loc[rows, "correct"] = counts.loc[rows, "total"]
    forger.recompute()


def an_earlier_round(forger: Forger) -> None:
    """Lift a curve where it moves no metric of the last round, nor the best."""
    rows = (forger.counts["model"] == "generic") & (forger.counts["round"] == 1)
    forger.counts.loc[rows, "correct"] = 0
    forger.recompute()


def less_work(forger: Forger) -> None:
    forger.document["cost"]["train_flops"] *= 0.9


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (all_right, "generic.few is 100.0 %"),
        (a_little_better, "is"),
        (a_point_more, "generic"),
        (few_for_many, "generic.few is 100.0 %"),
        (the_worst_clients, "personal of client"),
        (an_earlier_round, "generic after round 1 is 0.0 %"),
        (less_work, "cost.train_flops"),
    ],
)
def test_what_was_made_up_on_a_machine_that_nobody_has_is_not_reproduced(
    out: Path, forge: Callable[[Forger], None], says: str
) -> None:
    forger = elsewhere(Forger(folder(out)))
    forge(forger)
    found = again(out, forger.save())
    assert not found.agrees and any(says in each for each in found.differs), found.differs
    assert "run again, it differs" in str(found)


def test_a_failed_run_is_run_again_like_any_other(out: Path) -> None:
    record = records.read(folder(out))
    told = {key: value for key, value in record.document.items() if key not in ("status", "tables", "metrics", "cost")}
    shutil.rmtree(record.folder)
    records.fail(out, record.id, told, "the loss is not a number")
    found = again(out, out / record.id)
    assert not found.agrees and "it does not fail" in str(found)


def test_a_run_that_fails_in_the_same_way_is_verified(tmp_path: Path) -> None:
    sweep = Sweep(
        algorithms=tuple(parse_algorithms("fedavg")),
        datasets=tuple(parse_datasets("digits")),
        overrides={**ROUNDS, "lr": 1e6, "weight_decay": 1e6},
        seeds=(0,),
        data_root=ROOT,
    )
    (run,) = sweep.expand()
    driver.run([run], tmp_path / "out", pool=InProcess())
    record = records.read(tmp_path / "out" / run.id)
    assert record.status == "failed"
    for left in ("claim", "checkpoint.pt"):  # of a worker that was killed
        (record.folder / left).touch()
    assert not validate(tmp_path / "out", ROOT, [record.folder]).problems
    found = again(tmp_path / "out", record.folder)
    assert found.exact and "it fails in the same way" in str(found) and reruns.entry(found).kind == "verified"


def test_a_run_that_takes_longer_than_it_may_is_stopped(tmp_path: Path) -> None:
    sweep = Sweep(
        algorithms=tuple(parse_algorithms("fedavg")),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 100_000},
        seeds=(0,),
        data_root=ROOT,
    )
    (run,) = sweep.expand()
    with pytest.raises(NotToItsEnd, match="stopped after 1 s, which --time-limit is"):
        execute_apart(run, tmp_path, 1)


# What the board notes ---------------------------------------------------------------------------------------


def test_what_comes_out_is_noted_until_the_run_is_touched(out: Path, bench: Bench) -> None:
    run = folder(out).name
    shutil.rmtree(folder(out, "fedrep"))
    written(out)
    answer = bench("validate", out, "--rerun", 1, "--rerun-seed", 3, "--time-limit", "9m", "--write", "--json")
    said = json.loads(answer.out)
    assert f"1 of 1 runs can be run again here; seed 3 (--rerun-seed) draws {run}" in answer.err
    assert answer.status == 0 and said["rerun"][0]["exact"] and said["standing"][run] == "verified"
    entry = standing.read(out)[run]
    assert (entry.kind, entry.runs, entry.within) == ("verified", 1, {}) and "the same to the bit" in str(entry)
    assert entry.versions["torch"] == torch.__version__.split("+")[0]
    found = {record.id: record for record in records.read_all(out)[0]}
    assert found[run].cost["wall_seconds"] == entry.cost["wall_seconds"] != records.read(out / run).cost["wall_seconds"]
    forger = Forger(out / run)
    a_little_better(forger)
    forger.save()
    assert {record.stands for record in records.read_all(out)[0]} == {"self-reported"}
    board = Board(report=validate(out, ROOT), root=ROOT)
    board.rerun(run)
    assert board.differing == 1 and board.note(out) == []


def test_a_rerun_that_cannot_be_is_refused(out: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a number of runs is wanted" in bench("validate", out, "--rerun", "0").err
    assert "say which runs" in bench("validate", out, "--write").err
    assert "--time-limit" in bench("validate", out, "--rerun", 1, "--time-limit", "soon").err
    assert "there is no such folder" in bench("validate", out / "nowhere").err

    def missing(dataset: object, root: Path) -> None:
        raise DataMissing("not here")

    monkeypatch.setattr(source, "labels", missing)
    answer = bench("validate", out, "--rerun", "1")
    assert answer.status == 3 and "no run's data and device are at hand" in answer.err
    answer = bench("validate", out, "--rerun", folder(out).name)
    assert answer.status == 2 and "cannot be run again here: its images are not at hand" in answer.err


def test_what_the_board_cannot_run_is_noted_as_that_and_never_takes_a_better_word_back(out: Path) -> None:
    here = folder(out)
    board = Board(report=validate(out, ROOT), root=ROOT)
    board.rerun(here.name)
    board.note(out)
    assert standing.read(out)[here.name].kind == "verified"
    later = Board(report=validate(out, ROOT), root=ROOT)
    later.stopped = {record.id: "it was stopped after 3 s" for record in records.read_all(out)[0]}
    (noted,) = later.note(out)
    assert noted == folder(out, "fedrep").name
    assert {run: entry.kind for run, entry in standing.read(out).items()} == {
        here.name: "verified", noted: "unrepeatable"
    }  # fmt: skip
    assert "cannot be run again here" in str(standing.read(out)[noted])


def test_a_run_with_a_problem_is_not_verified_though_its_bits_come_out(out: Path) -> None:
    here, report = folder(out), validate(out, ROOT)
    board = Board(report=replace(report, problems=(Problem(f"{here.name}/run.json", "", "is odd"),)), root=ROOT)
    board.rerun(here.name)
    assert board.outcomes[0].exact and board.note(out) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "cuda"}, "there is no cuda"),
        ({"weights": {"sha256": "0" * 64}}, "somebody's own file of weights"),
    ],
)
def test_why_a_run_cannot_be_run_again_is_said(out: Path, change: dict[str, Any], says: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    forger = Forger(folder(out))
    forger.document["identity"] |= change
    forger.document |= {key: value for key, value in change.items() if key == "device"}
    here = forger.save()
    (one,) = [each for each in validate(out, ROOT).inspected if each.folder.name == here.name]
    assert one.asked is not None and says in str(reruns.obstacle(one, ROOT))


def test_nobody_says_of_a_run_of_their_own_what_it_stands_as(out: Path) -> None:
    forger = Forger(folder(out))
    forger.document |= {"standing": ENTRY | {"kind": "verified"}, "submission": "somebody"}
    record = records.read(forger.save())
    assert record.standing is None and record.submission is None and record.stands == "self-reported"


# Models that are handed in ----------------------------------------------------------------------------------


def test_right_answers_are_counted_of_models_that_were_handed_in(
    with_models: Path, tmp_path: Path, bench: Bench
) -> None:
    out = Path(shutil.copytree(with_models, tmp_path / "mine"))
    results = tmp_path / "results"
    answer = bench("submit", out, "--to", results, "--models", "--data-root", ROOT)
    assert answer.status == 0, answer.err
    (pack,) = results.iterdir()
    (record,) = records.read_all(results)[0]
    assert record.pack == pack and record.has_models and record.models_folder == pack / "models" / record.id
    assert record.submission == pack.name
    written(results)
    answer = bench("validate", results, "--recount", "--write", "--data-root", ROOT)
    assert answer.status == 0 and "tested again, give its right answers" in answer.err, answer.err + answer.out
    (record,) = records.read_all(results)[0]
    assert record.stands == "recounted"


def test_right_answers_that_models_do_not_give_are_found(with_models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(with_models, tmp_path / "mine"))
    forger = Forger(next(out.glob("*/run.json")).parent)
    a_point_more(forger)
    here = forger.save()
    (one,) = validate(out, ROOT).inspected
    assert one.asked is not None
    (said,) = recount(records.read(here), one.asked, ROOT)
    assert said.startswith("generic has ") and "right answers, not" in said
    board = Board(report=validate(out, ROOT), root=ROOT)
    board.recount()
    assert board.differing == 1 and board.note(out) == []


def test_models_stay_behind_unless_they_are_wanted(with_models: Path) -> None:
    (here,) = (path.parent for path in with_models.glob("*/run.json"))
    assert [*submission.gather([here])] == [here.name]
    assert [*submission.gather([here], models=True)] == [here.name, f"{here.name}/models"]


# What stands in tables --------------------------------------------------------------------------------------

ENTRY = {"date": "2026-03-04", "commit": None, "versions": {"torch": "2"}, "hardware": {"cpu": "x"}, "document": ""}


def planted(out: Path, algorithm: str, seeds: range | tuple[int, ...], value: float, pack: str | None = None) -> None:
    """Store runs of a made-up algorithm, in folders or as a submission."""
    place = out if pack is None else out / "waiting"
    for seed in seeds:
        store(place, document(algorithm, seed=seed, values={"personal.balanced": value + seed / 1000}))
    if pack is not None:
        packing.pack(records.read_all(place)[0], out / pack)
        shutil.rmtree(place)


def note(out: Path, kind: str, algorithm: str, submission: str | None = None, **only: Any) -> None:
    """Note what the board found out about runs; about some of them, by their seeds or their dataset."""
    entries = {
        record.id: Standing(**{**ENTRY, "kind": kind, "document": records.digest(out, record.id)})  # type: ignore[arg-type]
        for record in records.read_all(out)[0]
        if (record.algorithm, record.submission) == (algorithm, submission)
        and record.seed in only.get("seeds", {record.seed})
        and record.dataset == only.get("dataset", record.dataset)
    }
    standing.note(out, entries)


def boards(out: Path) -> list[Leaderboard]:
    found, damaged = records.read_all(out)
    assert not damaged
    return leaderboards(found)


def test_a_strangers_seed_or_failure_joins_nobodys_row(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(3), 0.8, "ours")
    planted(tmp_path, "fedavg", (3,), 0.1, "theirs")
    (board,) = boards(tmp_path)
    assert [(row.label, row.seeds, row.submission) for row in board.rows] == [
        ("fedavg @ours", (0, 1, 2), "ours"),
        ("fedavg @theirs", (3,), "theirs"),
    ]
    assert any("handed in as theirs" in line for line in layout.remarks(board))
    assert [row.ranks for row in board.rows] == [True, False]


def test_runs_of_ones_own_are_one_row_wherever_they_lie(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(2), 0.8)
    (record, *_), _ = records.read_all(tmp_path)
    planted(tmp_path, "fedavg", (2,), 0.8)
    (row,) = boards(tmp_path)[0].rows
    assert row.seeds == (0, 1, 2) and row.label == "fedavg" and record.submission is None


def test_a_strangers_newer_version_hides_nobodys_row(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(2), 0.8)
    store(
        tmp_path / "waiting",
        document("fedavg", seed=0, values={"personal.balanced": 0.1}, version=9, finished="2099-01-01T00:00:00+00:00"),
    )
    packing.pack(records.read_all(tmp_path / "waiting")[0], tmp_path / "theirs")
    shutil.rmtree(tmp_path / "waiting")
    assert sorted(row.submission or "" for row in boards(tmp_path)[0].rows) == ["", "theirs"]


def test_runs_that_the_board_ran_again_are_one_row_whoever_handed_them_in(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(2), 0.8, "ours")
    planted(tmp_path, "fedavg", (2,), 0.8, "theirs")
    note(tmp_path, "verified", "fedavg", "ours")
    assert len(boards(tmp_path)) == 2
    note(tmp_path, "reproduced", "fedavg", "theirs")
    (board,) = boards(tmp_path)
    (row,) = board.rows
    assert row.seeds == (0, 1, 2) and row.standings == ("verified", "verified", "reproduced")
    assert row.standing == "reproduced" and row.submission is None


def test_what_the_board_ran_is_not_ranked_beside_what_it_did_not(tmp_path: Path) -> None:
    for algorithm, value in (("fedavg", 0.8), ("fedrep", 0.7), ("ditto", 0.9), ("local", 0.99)):
        planted(tmp_path, algorithm, range(3), value)
    assert [board.standing for board in boards(tmp_path)] == ["self-reported"]
    note(tmp_path, "verified", "fedavg")
    note(tmp_path, "reproduced", "fedrep")
    note(tmp_path, "unrepeatable", "local")
    found = boards(tmp_path)
    assert [(board.standing, [row.label for row in board.rows]) for board in found] == [
        ("run again", ["fedavg", "fedrep"]),
        ("self-reported", ["ditto"]),
        ("unrepeatable", ["local"]),
    ]
    assert [layout.title(board).rpartition(", ")[2] for board in found] == [
        "standing = run again", "standing = self-reported", "standing = unrepeatable"
    ]  # fmt: skip
    heading, cells = layout.grid(found[0], str, str)
    assert heading[2] == "standing" and [row[2] for row in cells] == ["verified", "reproduced"]
    assert any("the same to the bit" in line for line in layout.remarks(found[0]))
    assert "standing" not in layout.grid(found[1], str, str)[0]
    parts = compare(found, "personal.balanced").parts
    assert [{pair.first, pair.second} for part in parts for pair in part.pairs] == [{"fedavg", "fedrep"}]


def test_a_row_stands_as_the_weakest_of_its_runs(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(3), 0.8)
    note(tmp_path, "verified", "fedavg", seeds=(0, 2))
    (board,) = boards(tmp_path)
    (row,) = board.rows
    assert row.standing == board.standing == "self-reported"
    assert any("2 of its 3 runs were looked at by the board" in line for line in layout.remarks(board))


def test_averages_over_datasets_are_of_rows_that_are_believed_alike(tmp_path: Path) -> None:
    for dataset, clients in (("digits", 20), ("faces", 21)):
        for algorithm, value in (("fedavg", 0.8), ("fedrep", 0.7)):
            for seed in range(2):
                values, setting = {"personal.balanced": value + seed / 1000}, {"clients": clients}
                store(tmp_path, document(algorithm, seed=seed, dataset=dataset, values=values, setting=setting))
    assert part_over_datasets(boards(tmp_path), "personal.balanced") is not None
    for algorithm in ("fedavg", "fedrep"):
        note(tmp_path, "verified", algorithm, dataset="digits")
    assert part_over_datasets(boards(tmp_path), "personal.balanced") is None
    for algorithm in ("fedavg", "fedrep"):
        note(tmp_path, "verified", algorithm)
    assert part_over_datasets(boards(tmp_path), "personal.balanced") is not None


def test_rows_whose_seeds_may_have_been_chosen_come_last_and_are_never_bold(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(12), 0.5)
    planted(tmp_path, "fedrep", range(12), 0.4)
    planted(tmp_path, "ditto", tuple(range(1, 13)), 0.9)
    (board,) = boards(tmp_path)
    assert [row.label for row in board.rows] == ["fedavg", "fedrep", "ditto"]
    assert layout.best(board)["balanced"] == "fedavg"
    assert any("ditto: " in line and "not ranked" in line for line in layout.remarks(board))
    failed = document("fedavg", seed=12)
    records.fail(tmp_path, identify(failed["identity"]), failed, "broken")
    assert boards(tmp_path)[0].rows[0].ranks  # a failed seed was tried, too


def test_a_damaged_file_of_the_board_makes_every_run_self_reported_and_is_said(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(2), 0.8)
    note(tmp_path, "verified", "fedavg")
    path = tmp_path / standing.FILE
    for text in (
        "[]",
        "{}",
        '{"format": 1, "runs": {}}',
        path.read_text().replace('"verified"', '"certified"'),
        "[" * 9999,
    ):
        path.write_text(text)
        found, damaged = records.read_all(tmp_path)
        assert {record.stands for record in found} == {"self-reported"}
        assert len(damaged) == 1 and "until then every run is self-reported" in damaged[0]


@pytest.mark.parametrize("odd", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_file_of_the_board_that_is_none_is_damaged(odd: Callable[[Path], object], tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", (0,), 0.8)
    odd(tmp_path / standing.FILE)
    _, (said,) = records.read_all(tmp_path)
    assert "cannot be read" in said and "until then every run is self-reported" in said


def test_the_csv_and_the_json_say_what_rows_stand_as(tmp_path: Path) -> None:
    planted(tmp_path, "fedavg", range(2), 0.8, "ours")
    note(tmp_path, "verified", "fedavg", "ours")
    heading, line = (row.split(",") for row in table.render(boards(tmp_path), "csv").splitlines())
    told = dict(zip(heading, line, strict=True))
    assert (told["standing"], told["submission"]) == ("verified", "ours")
    content = json.loads(table.render(boards(tmp_path), "json"))
    assert content["leaderboards"][0]["rows"][0]["standings"] == ["verified", "verified"]
