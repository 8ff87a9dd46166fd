"""Which runs are on Ray together, by cores, by memory and by shares of GPUs; on a stand-in that only keeps accounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest

from bench.sweep import cluster, config, on_ray
from bench.sweep.cluster import DEATHS_OF_RAY, RayDied, Session
from bench.sweep.local_ray import Home
from bench.sweep.on_ray import OnRay
from bench.sweep.pool import Failure
from bench.sweep.run import Run
from bench.sweep.schedule import Forecast, Schedule
from bench.sweep.watch import append, progress_file
from bench.training.outcome import Report

GIB = 2.0**30


@dataclass(eq=False)
class Task:
    """A run that was given to Ray."""

    run: Run
    options: dict[str, float]


@dataclass
class Accounts:
    """A cluster that does nothing: of the tasks that it was given, the oldest ends when somebody waits."""

    resources: dict[str, float]
    nodes: int = 1
    out: Path = Path("unused")
    outcome: Callable[[Run, int], Any] = lambda run, time: None
    """What becomes of a run, the first time and later: a failure, an error that is raised, or nothing."""
    tasks: list[Task] = field(default_factory=list)
    together: list[list[Task]] = field(default_factory=list)
    """All tasks that were there, at each wait."""
    times: dict[str, int] = field(default_factory=dict)
    cancelled: list[Task] = field(default_factory=list)
    left: Schedule = field(default_factory=lambda: Schedule([]))
    started: int = 0
    """How often Ray was started."""
    dead: bool = False
    """Whether Ray is; set by outcomes."""
    said: list[str] = field(default_factory=list)
    """Why runs wait again, and which rounds were told of."""

    def drive(self, runs: Sequence[Run], forecasts: dict[str, Forecast], device: str, **options: Any) -> list[str]:
        """Do runs, and give in order which ended, with an asterisk if badly."""
        ended: list[str] = []
        errors = {"RayError": type("RayError", (Exception,), {})}
        for name in ("NodeDiedError", "ObjectLostError", "OutOfMemoryError", "RayTaskError"):
            errors[name] = type(name, (errors["RayError"],), {})
        ray: Any = SimpleNamespace(
            remote=lambda **_: lambda function: SimpleNamespace(options=self._options),
            cluster_resources=lambda: self.resources,
            nodes=lambda: [{"Alive": True, "Resources": {"memory": self.resources.get("memory", 0.0) / self.nodes}}],
            wait=self._wait,
            get=self._get,
            exceptions=SimpleNamespace(**errors),
            cancel=lambda task, force: self.cancelled.append(task),
        )
        self.errors = errors
        watcher: Any = SimpleNamespace(
            started=lambda run: None,
            retried=lambda run, reason: self.said.append(reason),
            progressed=lambda run, report: self.said.append(f"round {report.round}"),
            ended=lambda run, reason: ended.append(f"{run.seed}{'' if reason is None else '*'}"),
        )
        schedule = self.left = Schedule(runs, forecasts)
        nothing: Any = None
        drive = on_ray._Drive(
            options.get("jobs"), device, options.get("workers", 1), schedule, self.out, nothing, watcher
        )
        with patch.object(cluster, "session", lambda *_: self._session(ray)):
            cluster.lasting(drive.go, 1, tell=self.said.append)
        assert drive.places == {} and all(room == pytest.approx(1.0) for room in drive.room)
        return ended

    @contextmanager
    def _session(self, ray: Any) -> Iterator[Session]:
        self.started += 1
        self.tasks.clear()
        self.dead = False
        yield Session(ray, cast(Home, SimpleNamespace(is_alive=lambda patience: not self.dead)))

    def _options(self, **options: float) -> Any:
        def remote(payload: Any, out: str) -> Task:
            self.tasks.append(Task(payload, options))
            return self.tasks[-1]

        return SimpleNamespace(remote=remote)

    def _wait(self, references: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        self.together.append(list(self.tasks))
        return [self.tasks[0]], self.tasks[1:]

    def _get(self, task: Task) -> Any:
        self.tasks.remove(task)
        time = self.times[task.run.id] = self.times.get(task.run.id, 0) + 1
        outcome = self.outcome(task.run, time)
        if isinstance(outcome, str):
            raise self.errors[outcome]
        return outcome

    def most(self) -> int:
        """Count the tasks that were there together at most."""
        return max(map(len, self.together))


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A payload is its run; a GPU has 80 GiB."""
    monkeypatch.setattr(on_ray, "packed", lambda plugins, value: value[1])
    monkeypatch.setattr(on_ray, "gpu_bytes", lambda: 80 * GIB)
    yield


def runs_of(count: int) -> list[Run]:
    (one,) = config.Sweep(
        algorithms=tuple(config.parse_algorithms("fedavg")),
        datasets=tuple(config.parse_datasets("digits")),
        data_root=Path("data"),
    ).expand()
    return [replace(one, seed=seed) for seed in range(count)]


def peaks(runs: Sequence[Run], *gib: float) -> dict[str, Forecast]:
    """Forecast the memory of the first runs; of those after them nothing is known."""
    return {
        run.id: Forecast(seconds=1.0, peak_bytes=peak * GIB, how="measured")
        for run, peak in zip(runs, gib, strict=False)
    }


@pytest.mark.parametrize(("peak", "together"), [(6.0, 1), (5.0, 2), (3.0, 3), (0.5, 4), (30.0, 1)])
def test_runs_are_together_as_far_as_their_measured_memory_goes(peak: float, together: int) -> None:
    accounts, runs = Accounts({"CPU": 4.0, "memory": 10 * GIB}, nodes=2), runs_of(6)
    assert sorted(accounts.drive(runs, peaks(runs, *[peak] * 6), "cpu")) == list("012345")
    assert accounts.most() == together
    asked = {task.options["memory"] for tasks in accounts.together for task in tasks}
    assert asked == {int(min(peak, 5.0) * GIB)}, "no task asks for more than the largest machine has"


def test_runs_of_unknown_memory_are_together_by_cores_and_ask_for_none() -> None:
    accounts, runs = Accounts({"CPU": 3.0, "memory": 10 * GIB}), runs_of(5)
    accounts.drive(runs, {}, "cpu")
    assert accounts.most() == 3
    assert {tuple(task.options) for tasks in accounts.together for task in tasks} == {("num_gpus",)}


@pytest.mark.parametrize(
    ("peak", "gpus", "together"),
    [(10.0, 1, 6), (40.0, 1, 1), (35.0, 1, 2), (35.0, 2, 4), (50.0, 2, 2), (0.1, 1, 8), (200.0, 1, 1)],
)
def test_runs_share_gpus_by_their_measured_memory(peak: float, gpus: int, together: int) -> None:
    accounts, runs = Accounts({"CPU": 8.0, "GPU": float(gpus)}), runs_of(9)
    accounts.drive(runs, peaks(runs, *[peak] * 9), "cuda")
    assert accounts.most() == together
    (share,) = {task.options["num_gpus"] for tasks in accounts.together for task in tasks}
    assert share == pytest.approx(min((1.1 * peak * GIB + 600 * 2**20) / (80 * GIB), 1.0))


def test_a_run_of_unknown_memory_has_a_gpu_for_itself() -> None:
    accounts, runs = Accounts({"CPU": 8.0, "GPU": 1.0}), runs_of(5)
    accounts.drive(runs, peaks(runs[1:], 1.0, 1.0), "cuda")
    for tasks in accounts.together:
        unknown = [task for task in tasks if task.run not in runs[1:3]]
        assert len(tasks) == 1 if unknown else len(tasks) <= 2
        assert all(task.options["num_gpus"] == 1.0 for task in unknown)


@pytest.mark.parametrize(("jobs", "gpus", "share"), [(3, 1, 1 / 3), (3, 2, 1 / 2), (2, 4, 1.0)])
def test_as_many_jobs_as_were_asked_for_share_gpus_evenly(jobs: int, gpus: int, share: float) -> None:
    accounts, runs = Accounts({"CPU": 8.0, "GPU": float(gpus)}), runs_of(6)
    accounts.drive(runs, {}, "cuda", jobs=jobs)
    assert accounts.most() == jobs
    assert {task.options["num_gpus"] for tasks in accounts.together for task in tasks} == {share}


def test_what_fits_on_no_single_gpu_waits_though_two_have_room_together() -> None:
    accounts, runs = Accounts({"CPU": 8.0, "GPU": 2.0}), runs_of(3)
    accounts.drive(runs, peaks(runs, 45.0, 45.0, 45.0), "cuda")
    assert accounts.most() == 2


@pytest.mark.parametrize("how", ["OutOfMemoryError", Failure("no more memory", "alone")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_without_memory_goes_on_alone_with_a_whole_gpu_and_once(device: str, how: Any) -> None:
    resources = {"CPU": 4.0, "memory": 100 * GIB, "GPU": 1.0}
    accounts, runs = Accounts(resources, outcome=lambda run, time: how if run.seed == 1 else None), runs_of(4)
    ended = accounts.drive(runs, peaks(runs, 1.0, 1.0, 1.0, 1.0), device)
    assert sorted(ended) == ["0", "1*", "2", "3"] and accounts.times[runs[1].id] == 2
    _, again = dict.fromkeys(task for tasks in accounts.together for task in tasks if task.run is runs[1])
    assert all(tasks == [again] for tasks in accounts.together if again in tasks)
    assert again.options["num_gpus"] == (1.0 if device == "cuda" else 0.0)


def test_on_gpus_ray_is_started_with_a_core_for_each_run_that_may_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "cores", lambda device: 16 if device == "cpu" else 2)
    assert OnRay(device="cuda").cpus(9) == 9 and OnRay(device="cuda").cpus(90) == 16
    assert OnRay(device="cuda", jobs=4).cpus(9) == 4 and OnRay(device="cuda", workers=2).cpus(9) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("RayError", "the worker died (killed, or out of memory)"),
        ("NodeDiedError", "its machine was lost"),
        ("ObjectLostError", "its machine was lost"),
    ],
)
def test_of_a_worker_that_died_it_is_said_how_and_rounds_that_are_done_again_are_told_once(
    tmp_path: Path, error: str, reason: str
) -> None:
    (run,) = runs_of(1)
    file = progress_file(tmp_path, run)
    file.parent.mkdir()

    def write(seconds: float, *rounds: int) -> None:
        file.unlink(missing_ok=True)
        for completed in rounds:
            append(file, Report(completed, 3, seconds, None))

    def outcome(run: Run, time: int) -> str | None:
        write(2.0, 2, 3)  # the next worker goes on after round 1, which was saved
        return error if time == 1 else None

    write(1.0, 1, 2)
    accounts = Accounts({"CPU": 1.0}, out=tmp_path, outcome=outcome)
    assert accounts.drive([run], {}, "cpu") == ["0"]
    assert accounts.said == ["round 1", "round 2", f"{reason}; another one will go on", "round 3"]


def test_that_a_run_begins_anew_is_passed_on_from_its_worker(tmp_path: Path) -> None:
    (run,) = runs_of(1)
    file = progress_file(tmp_path, run)
    file.parent.mkdir()
    for report in (Report(0, 2, 0.0, None, "is damaged"), Report(1, 2, 1.0, None), Report(2, 2, 2.0, None)):
        append(file, report)
    accounts = Accounts({"CPU": 1.0}, out=tmp_path, outcome=lambda run, time: None)
    accounts.drive([run], {}, "cpu")
    assert accounts.said == ["round 0", "round 1", "round 2"]


def test_an_interruption_cancels_what_is_going_on() -> None:
    def interrupt(run: Run, time: int) -> None:
        raise KeyboardInterrupt

    accounts, runs = Accounts({"CPU": 3.0}, outcome=interrupt), runs_of(5)
    with pytest.raises(KeyboardInterrupt):
        accounts.drive(runs, {}, "cpu")
    assert len(accounts.cancelled) == 2  # of three, one had ended


DIED = "Ray's own processes died (killed, or out of memory)"


@pytest.mark.parametrize("how", ["NodeDiedError", "RayError", Failure("a worker found nobody")])
def test_the_death_of_ray_is_no_run_s_failure_and_what_was_going_on_goes_on_on_the_next(how: Any) -> None:
    def outcome(run: Run, time: int) -> Any:
        accounts.dead = accounts.started <= DEATHS_OF_RAY and run.seed == 1
        return how if accounts.dead else None

    accounts, runs = Accounts({"CPU": 2.0}, outcome=outcome), runs_of(4)
    assert sorted(accounts.drive(runs, {}, "cpu")) == list("0123")
    assert accounts.started == DEATHS_OF_RAY + 1
    assert accounts.said.count(DIED + "; it is started again, and what was going on goes on from what was saved") == 3
    assert set(accounts.said[:2]) == {f"{DIED}; the run goes on from what was saved"}
    assert accounts.cancelled == []


def test_what_ended_well_before_ray_died_is_done() -> None:
    def outcome(run: Run, time: int) -> None:
        accounts.dead = accounts.started == 1

    accounts, runs = Accounts({"CPU": 3.0}, outcome=outcome), runs_of(3)
    assert sorted(accounts.drive(runs, {}, "cpu")) == list("012")
    assert accounts.started == 2 and set(accounts.times.values()) == {1}


def test_ray_that_dies_once_more_leaves_the_runs_waiting() -> None:
    def outcome(run: Run, time: int) -> str:
        accounts.dead = True
        return "RayError"

    accounts, runs = Accounts({"CPU": 2.0, "GPU": 1.0}, outcome=outcome), runs_of(3)
    with pytest.raises(RayDied, match=r"^Ray's own processes died"):
        accounts.drive(runs, peaks(runs, 1.0, 1.0, 1.0), "cuda")
    assert accounts.started == DEATHS_OF_RAY + 1 and len(accounts.left) == 3
