"""Sweeps: on Ray and not, killed and continued, interrupted.

Everything runs in processes of its own, as a person starts it: Ray and MLflow leave threads and warnings behind.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.face.progress import Display
from bench.results import records
from bench.results.claims import claim
from bench.sweep import config, driver, execution, pool, watch
from bench.sweep.cluster import WorkersDied
from bench.sweep.run import Run
from bench.sweep.schedule import Schedule
from bench.training.outcome import Report
from bench.training.rounds import Diverged
from bench.training.states import StatesUnwritable
from tests.processes import ROOT, SLOW, alive, digests, finish, start, wait
from tests.tracked import assert_tracked

QUIET = ("--json", "--tracking-uri", "off")
OFF = ("--ray", "off", "--tracking-uri", "off")


# Ray


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, str]:
    """Do one sweep in one process and on Ray, from the root of the checkout, beside a package called datasets.

    Gives the folder of results, what both printed, and the second's standard error.
    """
    folder = tmp_path_factory.mktemp("twice")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "__init__.py").write_text("load_dataset = 'that of Hugging Face'")
    plugin = folder / "slow.py"
    plugin.write_text(SLOW.replace("import os\n", "import os\nfrom datasets import load_dataset\n", 1))
    words = ("run", "--algos", "fedrep,slow(seconds=0)", "--plugin", plugin, "--rounds", "3", "--json")
    beside = {"PYTHONPATH": str(folder)}
    here = start(*words, *OFF, "--out", folder / "here", cwd=ROOT, **beside)
    on_ray = start(*words, "--ray", "local", "--jobs", "2", "--out", folder / "ray", cwd=ROOT, **beside)
    return folder, finish(here)[0], *finish(on_ray)


def test_ray_and_no_ray_give_the_same_digests(twice: tuple[Path, Any, Any, str]) -> None:
    folder, here, on_ray, err = twice
    assert digests(on_ray) == digests(here)
    assert [run["status"] for run in on_ray["runs"]] == ["done", "done"]
    assert err == "setting quick on digits, with other rounds\n"
    left = [path.name for path in (folder / "ray").rglob("*") if path.suffix == ".jsonl" or "checkpoint" in path.name]
    assert left == []


def test_hugging_faces_datasets_is_imported_in_a_worker_and_not_our_folder(
    twice: tuple[Path, Any, Any, str],
) -> None:
    _, here, on_ray, _ = twice
    for printed in (here, on_ray):  # its plug-in could not have been imported otherwise
        assert {run["algorithm"]: run["status"] for run in printed["runs"]}["slow"] == "done"


def test_mlflow_has_a_parent_and_a_child_for_each_run_beside_the_results(
    twice: tuple[Path, Any, Any, str],
) -> None:
    folder, _, on_ray, _ = twice
    assert_tracked(f"sqlite:///{folder / 'ray' / 'mlflow.db'}", on_ray, folder, rounds=3)


def test_an_interruption_keeps_what_is_done_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = ("run", "--algos", "local,slow(seconds=0.3)", "--plugin", "slow.py", "--rounds", "20", *QUIET)
    process = start(*words, cwd=tmp_path)
    wait(lambda: any(tmp_path.glob("runs/*/run.json")) and any(tmp_path.glob("runs/*/checkpoint.pt")))
    os.killpg(process.pid, signal.SIGINT)
    printed, err = finish(process, status=130)
    assert printed is None
    assert "interrupted: 1 of 2 runs are done and kept. The same command goes on: bench run" in err
    wait(lambda: not alive(process.pid), seconds=30)
    again, _ = finish(start(*words, "--ray", "off", cwd=tmp_path))
    assert [run["status"] for run in again["runs"]] == ["cached", "done"]


# Killed


def test_a_run_killed_twice_ends_with_the_digest_of_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = ("run", "--algos", "slow", "--plugin", "slow.py", "--rounds", "40", *QUIET)
    undisturbed = start(*words, "--out", "whole", cwd=tmp_path)
    for _ in range(2):
        before = checkpoints(tmp_path)
        process = start(*words, "--out", "killed", cwd=tmp_path)
        wait(lambda seen=before: checkpoints(tmp_path) - seen)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert not any(tmp_path.glob("killed/*/run.json"))
    progress = next(tmp_path.glob("killed/*/progress.jsonl"))
    resumed = json.loads(progress.read_text().splitlines()[0])
    assert resumed["round"] > 1  # the second start went on where the first was killed
    killed, _ = finish(start(*words, "--out", "killed", cwd=tmp_path))
    whole, _ = finish(undisturbed)
    assert digests(killed) == digests(whole)
    assert killed["runs"][0]["metrics"] == whole["runs"][0]["metrics"]


def checkpoints(folder: Path) -> set[int]:
    return {path.stat().st_mtime_ns for path in folder.glob("killed/*/checkpoint.pt")}


# The pieces, in this process


@pytest.fixture
def run() -> Run:
    (one,) = config.Sweep(
        algorithms=tuple(config.parse_algorithms("fedavg")),
        datasets=tuple(config.parse_datasets("digits")),
        overrides={"rounds": 2},
        data_root=Path("data"),
    ).expand()
    return one


def test_the_tail_of_a_progress_file_is_read_by_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    tail = watch.Tail(file)
    assert tail.read() == []
    first, second, third = (Report(n, 3, 0.5 * n, {"generic": None}) for n in (1, 2, 3))
    watch.append(file, first)
    assert tail.read() == [first] and tail.read() == []
    watch.append(file, second)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert tail.read() == []
    file.write_bytes(whole)
    assert tail.read() == [second]
    file.unlink()
    for report in (third, second, first):  # by another worker, longer than what was read
        watch.append(file, report)
    assert tail.read() == [third, second, first]


def test_the_display_says_in_lines_how_runs_go_where_there_is_no_terminal(run: Run) -> None:
    said = io.StringIO()
    with Display(stream=said) as display:
        display.begin([run], [])
        display.started(run)
        display.progressed(run, Report(2, 2, 1.0, {"generic": 0.5, "personal": None}))
        display.ended(run, None)
    cell = "fedavg on digits, imbalance 10, alpha 0.5, seed 0"
    assert said.getvalue() == f"started: {cell}\ndone: {cell}: generic 50.0 %, balanced –\n"


def test_a_quiet_display_says_failures_only(run: Run) -> None:
    said = io.StringIO()
    with Display(quiet=True, stream=said) as display:
        display.begin([run], [run])
        display.started(run)
        display.ended(run, "it broke")
    assert said.getvalue() == "bench: failed: fedavg on digits, imbalance 10, alpha 0.5, seed 0: it broke\n"


def test_a_record_says_what_was_run_on_what_and_with_which_versions(tmp_path: Path, run: Run) -> None:
    assert execution.execute(run, tmp_path) is None
    record = records.read(tmp_path / run.id)
    assert record.protocol == run.protocol and record.setting["rounds"] == 2
    document = record.document
    assert document["overrides"] == {"rounds": 2} and document["call"] == "FedAvg()"
    assert {"bench", "python", "torch", "numpy"} <= set(document["versions"])  # type: ignore[call-overload]
    assert document["hardware"]["cores"] == os.cpu_count()  # type: ignore[index]
    assert len(record.rounds()) == 2
    assert record.recompute()["personal"] == record.metrics["personal"]
    heterogeneity = document["heterogeneity"]
    assert isinstance(heterogeneity, dict) and heterogeneity


def test_a_run_whose_folder_cannot_be_written_fails_and_the_others_go_on(tmp_path: Path, run: Run) -> None:
    other = replace(run, seed=1)
    (tmp_path / run.id).write_text("a file where a folder should be")
    results = driver.run([run, other], tmp_path, pool=pool.InProcess())
    assert [result.status for result in results] == ["failed", "done"]
    assert "cannot be written" in str(results[0].reason)


@pytest.mark.parametrize(
    ("error", "again", "kept", "traced"),
    [
        (MemoryError("no more of it"), "alone", True, True),
        (StatesUnwritable("the disk is full"), "never", True, False),
        (WorkersDied("killed again and again"), "never", True, False),
        (Diverged("diverged: after round 2"), "never", False, False),
        (KeyError("what is not there"), "never", False, True),
    ],
)
def test_a_run_that_fails_says_why_and_keeps_its_checkpoint_where_it_may_go_on(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, again: str, kept: bool, traced: bool
) -> None:
    def train(job: Any, *, checkpoint: Path, **how: Any) -> None:
        checkpoint.write_bytes(b"")
        raise error

    monkeypatch.setattr(execution, "train", train)
    failure = execution.execute(run, tmp_path)
    assert failure is not None and failure.again == again and str(error.args[0]) in failure.reason
    record = records.read(tmp_path / run.id)
    assert (record.status, record.reason) == ("failed", failure.reason) and record.fingerprint is not None
    assert (record.document["traceback"] is not None) == traced
    assert (tmp_path / run.id / "checkpoint.pt").exists() == kept


def test_what_another_process_has_written_meanwhile_stays(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert execution.execute(run, tmp_path) is None
    monkeypatch.setattr(execution, "finished", lambda *_: False)  # as where a file system has no locks
    before = (tmp_path / run.id / "run.json").read_bytes()
    assert execution.execute(run, tmp_path) is None
    assert (tmp_path / run.id / "run.json").read_bytes() == before


def test_a_run_that_another_process_is_doing_waits_until_that_has_ended(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ELSEWHERE_SECONDS", 0.0)
    told: list[str] = []
    watcher: Any = SimpleNamespace(retried=lambda run, reason: told.append(reason))
    queue = pool.Queue(Schedule([run]), tmp_path, watcher)
    (tmp_path / run.id).mkdir()
    with claim(tmp_path / run.id):
        assert queue.take(lambda run: True) is None and not queue.is_over()
        assert queue.take(lambda run: True) is None and told == ["another process is doing it"]
    assert queue.take(lambda run: True) is run and queue.is_over()
    assert queue.again(run, pool.Failure("another was faster", "later")) and queue.alone == set()
    assert not queue.is_over() and queue.take(lambda run: True) is run


def test_a_run_is_given_up_after_three_deaths_without_a_round_in_between(tmp_path: Path, run: Run) -> None:
    told: list[str] = []
    watcher: Any = SimpleNamespace(retried=lambda run, reason: told.append(reason))
    queue = pool.Queue(Schedule([]), tmp_path, watcher)
    assert [queue.survives(run, "it died", completed) for completed in (1, 1, 2, 2, 2)] == [True] * 4 + [False]
    assert told == ["it died; another one will go on"] * 4 and len(queue.schedule) == 4


def test_force_begins_at_the_first_round_but_takes_nothing_from_a_process_at_work(tmp_path: Path, run: Run) -> None:
    checkpoint, seen = tmp_path / run.id / "checkpoint.pt", []
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"")
    look: Any = lambda *_: seen.append(checkpoint.exists())  # noqa: E731
    driver.run([run], tmp_path, pool=look)
    with claim(checkpoint.parent):
        driver.run([run], tmp_path, pool=look, force=True)
    driver.run([run], tmp_path, pool=look, force=True)
    assert seen == [True, True, False]


def test_what_a_run_took_is_expected_of_the_other_seeds_of_its_cell(tmp_path: Path, run: Run) -> None:
    schedules: list[Schedule] = []

    def schedule(runs: Sequence[Run]) -> Schedule:
        schedules.append(Schedule(runs))
        return schedules[0]

    driver.run([run, replace(run, seed=1)], tmp_path, pool=pool.InProcess(), schedule=schedule)
    cost = records.read(tmp_path / run.id).cost
    expected = schedules[0].forecasts[replace(run, seed=1).id]
    assert (expected.seconds, expected.peak_bytes) == (cost["wall_seconds"], cost["peak_memory_bytes"])


def test_every_split_is_tried_before_any_run(run: Run) -> None:
    crowded = replace(run, setting=replace(run.setting, clients=5000))
    driver.check_data([run])
    with pytest.raises(ValueError, match="use fewer clients"):
        driver.check_data([run, crowded])
