"""Sweeps in MLflow: live, with a server that is lost, and imported afterwards.

What is said to MLflow is tested on one in memory; MLflow itself and its server are started in processes of their own.
`python -m tests.test_tracking 200 100` measures what a mirror of 200 runs of 100 rounds costs.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench import tracking
from bench.results import records
from bench.sweep import config, execution, journal
from bench.sweep.run import Run
from bench.tracking import described, importing, mirror
from bench.tracking.described import Point
from bench.tracking.server import Server, Shown, Status
from bench.training.outcome import Report
from tests.answers import parted
from tests.processes import SLOW, finish, start, wait
from tests.tracked import ask, assert_tracked, free_port, kill, mlflow_server, on_server, tracked

URI = "http://127.0.0.1:1"
METRICS = ("generic", "generic.few", "personal", "personal.balanced", "personal:after")

# MLflow in memory


class Lost(ConnectionError):
    def __str__(self) -> str:
        return "Max retries exceeded with url: /api"


@dataclass
class Kept:
    """A run of an MLflow in memory."""

    title: str
    tags: dict[str, str]
    started: int
    params: dict[str, str] = field(default_factory=dict)
    points: set[Point] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    ended: int | None = None


class Memory:
    """An MLflow that counts requests and may be lost: before one has its effect, or between effect and answer.

    Args:
        dies: At which request, counted from 0; None for never.
        late: Whether the request at which it dies has its effect.
        back: At which request it answers again.
    """

    def __init__(self, dies: int | None = None, late: bool = False, back: int | None = None) -> None:
        self.dies, self.late, self.back = dies, late, back
        self.runs: dict[str, Kept] = {}
        self.requests: list[str] = []
        self.moved: str | None = None
        self.release: threading.Event | None = None
        """If set, requests wait for it: a server that accepts and never answers."""

    def connect(self, uri: str, out: Path) -> Memory:
        self._ask("connect")
        return self

    def create(self, title: str, tags: Mapping[str, str], started: int) -> str:
        lost = self._ask("create")
        name = f"run {len(self.runs)}"
        self.runs[name] = Kept(title, dict(tags), started)
        self._answer(lost)
        return name

    def log(
        self,
        mlflow_run: str,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        lost = self._ask("log")
        kept = self.runs[mlflow_run]
        changed = {key for key, value in (params or {}).items() if kept.params.get(key, value) != value}
        assert not changed, f"params cannot change: {changed}"
        kept.points.update(points)
        kept.params.update(params or {})
        kept.tags.update(tags or {})
        self._answer(lost)

    def end(self, mlflow_run: str, status: Status, ended: int) -> None:
        lost = self._ask("end")
        self.runs[mlflow_run].status, self.runs[mlflow_run].ended = status, ended
        self._answer(lost)

    def keep(self, mlflow_run: str, files: Mapping[str, str]) -> None:
        lost = self._ask("keep")
        self.runs[mlflow_run].files.update(files)
        self._answer(lost)

    def logged(self, mlflow_run: str) -> set[tuple[str, int]]:
        self._answer(self._ask("logged"))
        return {(point.metric, point.step) for point in self.runs[mlflow_run].points}

    def search(self, query: str) -> Iterator[Shown]:
        self._answer(self._ask("search"))
        protocol = re.search(r"tags.`bench.protocol` = '(\w+)'", query)
        status = re.search(r"attributes.status = '(\w+)'", query)
        assert protocol or status
        for name, kept in reversed(self.runs.items()):
            if (protocol is None or kept.tags.get("bench.protocol") == protocol[1]) and (
                status is None or kept.status == status[1]
            ):
                yield Shown(mlflow_run=name, status=kept.status, started=kept.started, tags=dict(kept.tags))

    def open_in(self, folder: str) -> list[Shown]:
        return Server.open_in(self, folder)  # type: ignore[arg-type]

    def _ask(self, what: str) -> bool:
        """Take a request; tells whether its answer will be lost."""
        number = len(self.requests)
        self.requests.append(what)
        if self.release is not None:
            self.release.wait()
            raise Lost
        dead = self.dies is not None and number >= self.dies and (self.back is None or number < self.back)
        if dead and not (self.late and number == self.dies):
            raise Lost
        return dead

    def _answer(self, lost: bool) -> None:
        if lost:
            raise Lost

    @property
    def parents(self) -> list[Kept]:
        return [kept for kept in self.runs.values() if described.PARENT_TAG not in kept.tags]

    def children(self, run: Run | None = None) -> list[Kept]:
        children = [kept for kept in self.runs.values() if described.PARENT_TAG in kept.tags]
        return [kept for kept in children if run is None or kept.tags[described.RUN_TAG] == run.id]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return use(Memory(), monkeypatch)


def use(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Put an MLflow in memory in the place of MLflow, with little patience."""
    for module in (mirror, importing):
        monkeypatch.setattr(module, "Server", memory.connect)
    monkeypatch.setattr(mirror, "import_mlflow", lambda: None)
    monkeypatch.setattr(mirror, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "_REST_SECONDS", 0.05)
    return memory


# Runs without training


def some_runs(count: int, rounds: int) -> list[Run]:
    """Give runs on digits: two algorithms, as many seeds as it takes."""
    return config.Sweep(
        algorithms=tuple(config.parse_algorithms("fedavg,fedrep(head_epochs=5)")),
        datasets=tuple(config.parse_datasets("digits")),
        overrides={"rounds": rounds},
        seeds=tuple(range((count + 1) // 2)),
        data_root=Path("data"),
    ).expand()[:count]


def curve(run: Run) -> list[dict[str, float | None]]:
    """Draw a run's metrics, round by round; one of them is absent."""
    draw = random.Random(run.id)
    return [{**{key: draw.random() for key in METRICS}, "unseen": None} for _ in range(run.setting.rounds)]


def write(out: Path, run: Run, minute: int = 0) -> None:
    """Store a run as finished, after five seconds of a minute of 2026."""
    rows = curve(run)
    begun = datetime(2026, 1, 1, 12, minute, tzinfo=UTC)
    document = {
        **execution.document(run, begun.isoformat()),
        "finished": begun.replace(second=5).isoformat(),
        "fingerprint": "0123456789abcdef",
        "clients": 20,
        "class_counts": [1] * 10,
        "groups": {"many": [0]},
        "metrics": {**rows[-1], "personal@last10": 0.5},
        "cost": {"train_samples": 7.0},
        "tested": {"clients": 20, "images": [4, 23], "worst_decile": 2, "one_class": 0, "drawn": 20, "never": 0},
        "digest": f"{minute:064x}",
    }
    counts: dict[str, list[int | str]] = {
        "round": [1],
        "model": ["generic"],
        "client": [-1],
        "class": [0],
        "correct": [1],
        "total": [1],
        "drawn": [-1],
    }
    rounds = [{"round": number, **row} for number, row in enumerate(rows, start=1)]
    records.write(out, run.id, document, rounds, *parted(counts), replace=True)


def fail(out: Path, run: Run, reason: str = "it broke") -> None:
    records.fail(out, run.id, execution.document(run, None), reason)


def watched(out: Path, warn: list[str], uri: str = URI) -> mirror.Mirror:
    return mirror.Mirror(uri, out, {"command": "bench run"}, warn.append)


def do(
    out: Path, runs: Sequence[Run], watcher: mirror.Mirror, broken: Sequence[Run] = (), seconds: float = 0.0
) -> None:
    """Go through runs as a sweep does, two at a time, and train nothing; a round takes so many seconds."""
    for pair in (runs[at : at + 2] for at in range(0, len(runs), 2)):
        for run in pair:
            watcher.started(run)
        for number in range(runs[0].setting.rounds):
            for run in pair:
                watcher.progressed(run, Report(number + 1, run.setting.rounds, 0.1 * number, curve(run)[number]))
            time.sleep(seconds)
        for run in pair:
            if run in broken:
                fail(out, run)
            else:
                write(out, run)
            watcher.ended(run, "it broke" if run in broken else None)


def import_all(out: Path, uri: str = URI) -> tuple[int, int, int]:
    """Import a folder; give how many runs were there, completed and added."""
    found, damaged = records.read_all(out)
    assert not damaged
    done = tracking.import_records(uri, out, found, {"leaderboard.md": "a table"})
    return done.present, done.completed, done.added


def assert_shown(
    memory: Memory, runs: Sequence[Run], broken: Sequence[Run] = (), rounds_of_broken: bool = False
) -> None:
    """Check that every run is shown whole, every round once, in one place; and that nothing is left open."""
    assert {kept.status for kept in memory.runs.values()} <= {"FINISHED", "FAILED", "KILLED"}
    for run in runs:
        whole = [kept for kept in memory.children(run) if described.RECORD_TAG in kept.tags]
        assert len(whole) == 1, f"{run} is shown {len(whole)} times"
        (kept,) = whole
        assert kept.status == ("FAILED" if run in broken else "FINISHED")
        assert kept.ended is not None and kept.started <= kept.ended
        assert kept.params == described.of_run(run).params and kept.params["seed"] == str(run.seed)
        points = Counter((point.metric, point.step) for point in kept.points if point.metric != "seconds")
        assert not points or max(points.values()) == 1
        if run in broken:
            assert kept.tags["reason"] == "it broke"
            continue
        curves = {(key, step) for key in METRICS for step in range(1, run.setting.rounds + 1)}
        assert points.keys() == curves | {
            ("personal_last10", run.setting.rounds),
            ("cost.train_samples", run.setting.rounds),
        }
        values = {(point.metric, point.step): point.value for point in kept.points}
        assert values["personal", 2] == curve(run)[1]["personal"]


# What is said


def test_metric_names_have_only_characters_that_mlflow_takes() -> None:
    assert described.metric_name("generic@last10") == "generic_last10"
    assert described.metric_name("personal:0 epochs.many") == "personal:0 epochs.many"
    assert described.metric_name("personal:α") == "personal:_"


def test_a_run_is_described_alike_live_and_from_its_folder(tmp_path: Path) -> None:
    for run in some_runs(2, rounds=2):
        write(tmp_path, run)
        assert described.of_record(records.read(tmp_path / run.id)) == described.of_run(run)
    said = described.of_run(run)
    assert said.title == "fedrep(head_epochs=5) digits imbalance 10 alpha 0.5 seed 0"
    cell = {"algorithm": "fedrep", "dataset": "digits", "imbalance": "10", "alpha": "0.5", "seed": "0"}
    assert cell.items() <= said.tags.items() and cell.items() <= said.params.items()
    assert said.params["algorithm.head_epochs"] == "5" and said.params["setting.rounds"] == "2"
    assert said.tags["setting"] == "quick" and said.tags["protocol"] == run.protocol


def test_an_outcome_has_a_key_of_its_own(tmp_path: Path) -> None:
    (run,) = some_runs(1, rounds=2)
    keys = []
    for minute in (0, 1):
        write(tmp_path, run, minute)
        keys.append(described.record_key(records.read(tmp_path / run.id)))
    write(tmp_path, run, 0)
    assert keys[0] != keys[1] and described.record_key(records.read(tmp_path / run.id)) == keys[0]


def test_a_run_whose_worker_died_was_over_when_that_was_recorded(tmp_path: Path) -> None:
    (run,) = some_runs(1, rounds=2)
    fail(tmp_path, run)
    os.utime(tmp_path / run.id / "run.json", (1000, 1000))
    assert described.record_times(records.read(tmp_path / run.id)) == (1000_000, 1000_000)


# Live


def test_a_sweep_is_shown_whole_by_a_few_requests_for_each_run(tmp_path: Path, memory: Memory) -> None:
    runs, warnings = some_runs(6, rounds=100), list[str]()
    watcher = watched(tmp_path, warnings)
    watcher.begin(runs, [])
    do(tmp_path, runs, watcher, broken=runs[4:5])
    watcher.finish("FAILED", {"leaderboard.md": "a table"})
    assert warnings == [] and watcher.healthy
    assert_shown(memory, runs, broken=runs[4:5])
    (parent,) = memory.parents
    assert (parent.status, parent.files) == ("FAILED", {"leaderboard.md": "a table"})
    assert parent.params == {"command": "bench run"} and parent.title.startswith("sweep 20")
    assert len(memory.requests) <= 4 * len(runs) + 6, Counter(memory.requests)
    broken = memory.children(runs[4])[0]
    assert {point.step for point in broken.points} == set(range(1, 101))  # how far it came


def test_rounds_appear_while_the_run_goes_on(tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirror._GATHER_SECONDS + 0.5 < 10  # people wait for no longer
    monkeypatch.setattr(mirror, "_GATHER_SECONDS", 0.1)
    (run,) = some_runs(1, rounds=3)
    watcher = watched(tmp_path, [])
    watcher.begin([run], [])
    watcher.started(run)
    for number in (1, 2):
        watcher.progressed(run, Report(number, 3, 0.1, curve(run)[number - 1]))
        wait(lambda upto=number: [len(kept.points) for kept in memory.children(run)] == [6 * upto], 10)  # type: ignore[misc]
    kept = memory.children(run)[0]
    assert kept.status == "RUNNING" and kept.params["algorithm"] == "fedavg"
    watcher.progressed(run, Report(2, 3, 0.2, curve(run)[1]))  # done again by another worker, after one died
    write(tmp_path, run)
    watcher.ended(run, None)
    watcher.finish("FINISHED", {})
    assert_shown(memory, [run])


def test_a_sweep_that_was_interrupted_says_so(tmp_path: Path, memory: Memory) -> None:
    runs = some_runs(2, rounds=2)
    watcher = watched(tmp_path, [])
    watcher.begin(runs, [])
    do(tmp_path, runs[:1], watcher)
    watcher.started(runs[1])
    watcher.progressed(runs[1], Report(1, 2, 0.1, curve(runs[1])[0]))
    watcher.finish("KILLED", {})
    assert [kept.status for kept in memory.runs.values()] == ["KILLED", "FINISHED", "KILLED"]
    assert len(memory.children(runs[1])[0].points) == 6


def test_a_sweep_that_goes_on_ends_what_the_killed_one_left_and_copies_what_is_missing_once(
    tmp_path: Path, memory: Memory
) -> None:
    whole, lost, begun, _ = runs = some_runs(4, rounds=2)
    killed = watched(tmp_path, [])
    killed.begin(runs, [])
    do(tmp_path, [whole], killed)
    for run in (lost, begun):
        killed.started(run)
    wait(lambda: len(memory.children(begun)) == 1)
    write(tmp_path, lost)  # and the driver is killed: nobody finishes
    elsewhere = memory.create("another's", {**memory.children(begun)[0].tags, "bench.folder": "/elsewhere"}, 5)
    for cached in ([whole, lost], runs):
        watcher = watched(tmp_path, [])
        watcher.begin([run for run in runs if run not in cached], cached)
        do(tmp_path, [run for run in runs if run not in cached], watcher)
        watcher.finish("FINISHED", {})
    assert memory.runs.pop(elsewhere).status == "RUNNING"
    assert_shown(memory, runs)
    assert [kept.status for kept in memory.parents] == ["KILLED", "FINISHED", "FINISHED"]
    assert [kept.status for kept in memory.children(begun)] == ["KILLED", "FINISHED"]


def test_a_folder_that_was_damaged_meanwhile_is_shown_as_failed(tmp_path: Path, memory: Memory) -> None:
    runs, warnings = some_runs(2, rounds=2), list[str]()
    watcher = watched(tmp_path, warnings)
    watcher.begin(runs, [])
    watcher.started(runs[0])
    watcher.ended(runs[0], None)
    do(tmp_path, runs[1:], watcher)
    watcher.finish("FINISHED", {})
    assert "run.json" in memory.children(runs[0])[0].tags["reason"] and warnings == []
    assert memory.children(runs[0])[0].status == "FAILED"
    assert_shown(memory, runs[1:])


# The server is lost


@pytest.mark.parametrize("seconds", [0.0, 0.04], ids=["fast", "live"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_whenever_the_server_is_lost_an_import_completes_the_sweep_and_a_second_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, seconds: float
) -> None:
    if seconds:
        monkeypatch.setattr(mirror, "_GATHER_SECONDS", 0.0)
    runs = some_runs(3, rounds=3)
    broken = runs[1:2]
    for dies in range(100):
        out = tmp_path / str(dies)
        memory, warnings = use(Memory(dies, late), monkeypatch), list[str]()
        watcher = watched(out, warnings)
        watcher.begin(runs, [])
        do(out, runs, watcher, broken, seconds)
        watcher.finish("FAILED", {"leaderboard.md": "a table"})
        if dies >= len(memory.requests):
            break
        assert not watcher.healthy and len(warnings) == 1
        for later in range(100):  # the import's server is lost too, ever later, until it is not
            begun = len(memory.requests)
            memory.dies = begun + later
            try:
                present, completed, added = import_all(out)
            except tracking.TrackingFailed as error:
                assert "the same command goes on: bench track" in str(error) and later < 60
            else:
                break
        memory.dies = None
        assert present + completed + added == 3
        assert_shown(memory, runs, broken)
        before = json.dumps([asdict(kept) for kept in memory.runs.values()], default=sorted)
        assert import_all(out) == (3, 0, 0)
        assert json.dumps([asdict(kept) for kept in memory.runs.values()], default=sorted) == before
    assert dies > 10


def test_a_server_that_comes_back_has_everything_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = some_runs(4, rounds=3)
    for dies in range(1, 10):
        out = tmp_path / str(dies)
        memory, warnings = use(Memory(dies, late=dies % 2 == 1, back=dies + 3), monkeypatch), list[str]()
        watcher = watched(out, warnings)
        watcher.begin(runs, [])
        do(out, runs[:2], watcher)
        wait(lambda watcher=watcher, warnings=warnings: warnings and watcher.healthy, 10)  # type: ignore[misc]
        do(out, runs[2:], watcher)
        watcher.finish("FINISHED", {})
        assert len(warnings) == 1 and watcher.healthy
        for kept in memory.runs.values():  # begun by a request whose answer was lost
            kept.status = "KILLED" if kept.status == "RUNNING" else kept.status
        assert_shown(memory, runs)


def test_nothing_is_kept_for_a_server_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = use(Memory(dies=4), monkeypatch)
    (run,) = some_runs(1, rounds=100)
    watcher = watched(tmp_path, [])
    watcher.begin([run], [])
    watcher.started(run)
    for number in range(1, 101):
        watcher.progressed(run, Report(number, 100, 0.1, curve(run)[number - 1]))
    wait(lambda: not watcher.healthy and not watcher._sweep.going[run.id].waiting, 10)
    memory.dies = None
    watcher.finish("KILLED", {})


def test_the_warning_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Memory(dies=0), monkeypatch)
    said: dict[str, list[str]] = {URI: [], tracking.default_uri(tmp_path / "my runs"): []}
    for uri, warnings in said.items():
        watcher = watched(tmp_path / "my runs", warnings, uri)
        watcher.begin([], [])
        watcher.finish("FINISHED", {})
    with_server, beside = (warnings[0] for warnings in said.values())
    assert with_server.startswith(f"MLflow at {URI} is not written any more: nobody answers there. The runs go on")
    assert with_server.endswith(f"by: bench track --out '{tmp_path}/my runs' --tracking-uri {URI}")
    assert beside.endswith(f"by: bench track --out '{tmp_path}/my runs'")


@pytest.mark.parametrize("healthy", [True, False])
def test_a_server_that_never_answers_does_not_keep_the_end_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy: bool
) -> None:
    memory, warnings = use(Memory(None if healthy else 3, back=4), monkeypatch), list[str]()
    monkeypatch.setattr(mirror, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(mirror, "_LOST_SILENT_SECONDS", 0.5)
    runs = some_runs(2, rounds=2)
    watcher = watched(tmp_path, warnings)
    watcher.begin(runs, [])
    do(tmp_path, runs[:1], watcher)
    wait(lambda: len(memory.requests) > 3, 10)
    memory.release = threading.Event()
    do(tmp_path, runs[1:], watcher)
    begun = time.monotonic()
    watcher.finish("FINISHED", {})
    assert time.monotonic() - begun < 5
    assert len(warnings) == 1 and not watcher.healthy
    assert ("it does not answer" in warnings[0]) == healthy
    memory.release.set()


def test_a_backlog_that_takes_too_long_is_left_to_the_import(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, warnings = some_runs(8, rounds=2), list[str]()
    monkeypatch.setattr(mirror, "_CLOSE_SECONDS", 0.5)
    answer = memory._answer

    def slowly(lost: bool) -> None:
        time.sleep(0.1)
        answer(lost)

    monkeypatch.setattr(memory, "_answer", slowly)
    watcher = watched(tmp_path, warnings)
    watcher.begin(runs, [])
    do(tmp_path, runs, watcher)
    begun = time.monotonic()
    watcher.finish("FINISHED", {})
    assert 0.4 < time.monotonic() - begun < 3 and "it takes too long" in warnings[0] and "bench track" in warnings[0]


# Imported


def test_an_import_has_a_parent_and_the_times_of_the_records(tmp_path: Path, memory: Memory) -> None:
    runs = some_runs(3, rounds=2)
    for minute, run in enumerate(runs[:2]):
        write(tmp_path, run, minute)
    fail(tmp_path, runs[2])
    assert import_all(tmp_path) == (0, 0, 3)
    assert_shown(memory, runs, broken=runs[2:])
    (parent,) = memory.parents
    noon = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1000)
    assert parent.title.startswith(f"import of {tmp_path.name} 20") and parent.status == "FAILED"
    assert parent.started == noon and parent.files == {"leaderboard.md": "a table"}
    times = [(kept.started - noon, (kept.ended or 0) - noon) for run in runs[:2] for kept in memory.children(run)]
    assert times == [(0, 5_000), (60_000, 65_000)]
    assert {kept.tags["mlflow.parentRunId"] for kept in memory.children()} == {"run 0"}
    before = len(memory.runs)
    assert import_all(tmp_path) == (3, 0, 0) and len(memory.runs) == before
    write(tmp_path, runs[2], minute=2)  # it was tried again, without MLflow
    assert import_all(tmp_path) == (2, 0, 1)
    assert [kept.status for kept in memory.children(runs[2])] == ["FAILED", "FINISHED"]


def test_what_a_sweep_began_to_show_is_completed_in_its_sweep(tmp_path: Path, memory: Memory) -> None:
    runs = some_runs(4, rounds=3)
    watcher = watched(tmp_path, [])
    watcher.begin(runs, [])
    do(tmp_path, runs[:1], watcher)
    for run in runs[1:3]:
        watcher.started(run)
    wait(lambda: len(memory.children()) == 3)
    (one, two) = (memory.children(run)[0] for run in runs[1:3])
    one.points |= set(described.points(curve(runs[1])[0], 77, 1))  # a round came through, and then no more
    for run in (runs[1], runs[3]):
        write(tmp_path, run)
    assert import_all(tmp_path) == (1, 1, 1)
    assert two.status == "KILLED" and len(memory.parents) == 1  # it never ended
    assert memory.parents[0].status == "FINISHED"
    assert {point.milliseconds for point in one.points if point.step == 1} == {77}
    assert_shown(memory, [runs[0], runs[1], runs[3]])


# MLflow itself


def test_a_later_sweep_has_a_parent_of_its_own_with_finished_runs_copied_once(tmp_path: Path) -> None:
    words = ("run", "--rounds", "2", "--json", "--ray", "off")
    finish(start(*words, "--algos", "fedavg", "--tracking-uri", "off", cwd=tmp_path))
    printed, _ = finish(start(*words, "--algos", "fedavg,local", cwd=tmp_path))
    assert [run["status"] for run in printed["runs"]] == ["cached", "done"]
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert_tracked(uri, printed, tmp_path, rounds=2)
    finish(start(*words, "--algos", "fedavg,local,fedper", cwd=tmp_path))
    names = [run["name"].split()[0] for run in tracked(uri, tmp_path)]
    assert sorted(names) == ["fedavg", "fedper", "local", "sweep", "sweep"]


def test_runs_are_imported_into_a_database_once_and_can_be_searched(tmp_path: Path) -> None:
    runs = some_runs(3, rounds=2)
    for minute, run in enumerate(runs[:2]):
        write(tmp_path / "runs", run, minute)
    fail(tmp_path / "runs", runs[2])
    for said in ("3 added, 0 completed, 0 there already", "0 added, 0 completed, 3 there already"):
        process = start("track", cwd=tmp_path)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and said in out and err == "3 runs of runs\n", err
        assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in out
    shown = tracked(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", tmp_path)
    (parent,) = (run for run in shown if "mlflow.parentRunId" not in run["tags"])
    assert parent["status"] == "FAILED" and sorted(parent["artifacts"]) == ["leaderboard.json", "leaderboard.md"]
    children = {child["tags"]["bench.run_id"]: child for child in shown if child is not parent}
    assert {child["tags"]["mlflow.parentRunId"] for child in children.values()} == {parent["id"]}
    for minute, run in enumerate(runs[:2]):
        child, noon = children[run.id], int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1000)
        assert child["status"] == "FINISHED" and child["started"] == noon + 60_000 * minute == child["ended"] - 5_000
        assert child["history"]["generic"] == [[n, row["generic"]] for n, row in enumerate(curve(run), start=1)]
        assert (
            described.of_run(run).params == child["params"]
            and described.of_run(run).tags.items() <= child["tags"].items()
        )
    assert children[runs[2].id]["status"] == "FAILED" and children[runs[2].id]["tags"]["reason"] == "it broke"
    query = "tags.algorithm = 'fedrep' and params.imbalance = '10' and params.alpha = '0.5' and tags.seed = '0'"
    (found,) = tracked(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", tmp_path, query)
    assert found == children[runs[1].id]


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    (run,) = some_runs(1, rounds=2)
    journal.Journal(tmp_path / "busy", "bench run").begin([run], [])  # by this process, which is alive
    for words, sentence in (
        (("--out", "nowhere"), "nowhere: there is no such folder"),
        (("--out", "busy"), "a sweep is at work in busy"),
        (("--out", ".", "--tracking-uri", "http://127.0.0.1:9"), "cannot be written: nobody answers there"),
    ):
        process = start("track", *words, cwd=tmp_path)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2 and sentence in err and "Traceback" not in err


def test_a_real_server_is_written_live_and_may_die_and_an_import_completes_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    port, of_fedavg = free_port(), "tags.algorithm = 'fedavg'"
    words = (
        "run",
        "--algos",
        "fedavg,slow(seconds=0.05)",
        "--plugin",
        "slow.py",
        "--rounds",
        "30",
        "--json",
        "--ray",
        "off",
    )
    with mlflow_server(tmp_path, port) as (uri, server):
        process = start(*words, "--tracking-uri", uri, cwd=tmp_path)
        wait(lambda: any(run["status"] == "FINISHED" for run in on_server(uri, of_fedavg).values()))
        wait(lambda: on_server(uri, "tags.algorithm = 'slow'") != {})
        kill(server)
        printed, err = finish(process)
    assert [run["status"] for run in printed["runs"]] == ["done", "done"]
    assert err.count(f"MLflow at {uri} is not written any more: nobody answers there") == 1
    assert err.count(f"bench track --out runs --tracking-uri {uri}") == 1
    with mlflow_server(tmp_path, port) as (uri, _):
        process = start("track", "--tracking-uri", uri, cwd=tmp_path)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and "0 added, 1 completed, 1 there" in out, (out, err)
        assert_tracked(uri, printed, tmp_path, rounds=30)
        assert list(on_server(uri, of_fedavg)) == ["fedavg digits imbalance 10 alpha 0.5 seed 0"]
        assert b"<title>MLflow</title>" in ask(uri)  # the interface is there


def test_a_server_that_accepts_and_never_answers_costs_a_warning(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        words = ("run", "--algos", "fedavg", "--rounds", "2", "--json", "--ray", "off")
        begun = time.monotonic()
        printed, err = finish(start(*words, "--tracking-uri", uri, cwd=tmp_path))
        assert time.monotonic() - begun < 60
    assert [run["status"] for run in printed["runs"]] == ["done"]
    assert err.count(f"MLflow at {uri} is not written any more") == 1 and "bench track" in err


# What it costs


def measure(count: int, rounds: int, uri: str | None = None) -> dict[str, float]:
    """Show runs in MLflow that train nothing, in this process, and count what that takes.

    Args:
        count: Runs, two at a time.
        rounds: Of each, all evaluated, with the metrics of `METRICS` twice.
        uri: A tracking URI; SQLite beside the results by default.

    Returns:
        Seconds: "cpu" of this process, all threads, and "wall"; both with the import of mlflow and the making of the
        database, without the making of the results.
    """
    runs = some_runs(count, rounds)
    out = Path(tempfile.mkdtemp())
    try:
        for run in runs:
            write(out, run)
        curves = {
            run.id: [{**row, **{f"masked.{key}": value for key, value in row.items()}} for row in curve(run)]
            for run in runs
        }
        watcher = mirror.Mirror(uri or tracking.default_uri(out), out, {}, print)
        mirror._CLOSE_SECONDS = watcher._patience = 3600.0
        wall, cpu = time.monotonic(), time.process_time()
        watcher.begin(runs, [])
        for pair in (runs[at : at + 2] for at in range(0, count, 2)):
            for run in pair:
                watcher.started(run)
            for number, run in ((number, run) for number in range(rounds) for run in pair):
                watcher.progressed(run, Report(number + 1, rounds, 0.1 * number, curves[run.id][number]))
            for run in pair:
                watcher.ended(run, None)
        watcher.finish("FINISHED", {})
        return {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    print(measure(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4]))
