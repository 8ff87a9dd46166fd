"""What a sweep will take, in which order it goes, and what no longer begins: probes, the schedule, the dry run."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.command import plan
from bench.command.main import main
from bench.plugins.registry import load_plugin
from bench.protocol import provenance
from bench.protocol.settings import BadConfig
from bench.sweep import config, execution, forecast
from bench.sweep.run import Run
from bench.sweep.schedule import Budget, Forecast, Outlook, Schedule, cell, order, parse_duration, wall_seconds
from bench.task import Task
from bench.training import rounds
from tests.processes import start, wait

SLEEPER = '''
"""Sleeper: FedAvg that takes a known time and memory.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

import math
import os
import time
from dataclasses import dataclass

import torch

from bench import Algorithm, register


@register("sleeper")
@dataclass(frozen=True, kw_only=True)
class Sleeper(Algorithm):
    stackable = False
    step: float = 0.002
    """Seconds a batch."""
    megabytes: int = 0
    round: float = 0.0
    """Seconds a round."""
    kills: bool = False
    raises: bool = False

    def broadcast(self, task, server):
        return server

    def local_update(self, task, shared, private, data):
        if self.kills:
            os.kill(os.getpid(), 9)
        if self.raises:
            raise OverflowError("too much")
        ballast = torch.ones(self.megabytes * 2**20, dtype=torch.uint8)
        time.sleep(self.step * math.ceil(int(data.n) / task.batch_size) * task.epochs)
        return shared, private

    def aggregate(self, task, server, uploads):
        time.sleep(0 if "HURRY" in os.environ else self.round)
        return server
'''
NOON = "2026-01-01T12:00:00+00:00"
OFF = ("--ray", "off", "--tracking-uri", "off")


def runs_of(
    algorithms: str, seeds: int = 1, root: Path = Path("data"), plugin: Path | None = None, **fields: Any
) -> list[Run]:
    if plugin is not None:
        load_plugin(plugin)
    return config.Sweep(
        algorithms=tuple(config.parse_algorithms(algorithms)),
        datasets=tuple(config.parse_datasets("digits")),
        overrides=fields,
        seeds=tuple(range(seeds)),
        engine="serial",
        data_root=root,
        plugins=() if plugin is None else (plugin,),
    ).expand()


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plug-in whose time and memory are known, and which prints when it is imported."""
    file = tmp_path_factory.mktemp("plugin") / "sleeper.py"
    file.write_text(SLEEPER.replace("import torch", "import torch\nprint('whatever')", 1))
    return file


def known(*seconds: float) -> Forecast:
    return Forecast(seconds=seconds[0], peak_bytes=None, how="probed")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# Durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1H 30M 5S", 5405), ("0.5s", 0.5)],
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text, "--time-budget") == seconds


@pytest.mark.parametrize("text", ["", "5", "0s", "-2h", "2h5", "30m1h", "h", "2 days", "1e3s", "nan", "infs"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadConfig, match=r"^--time-budget .* a duration above zero is wanted, such as 45s"):
        parse_duration(text, "--time-budget")


# The schedule


def test_the_longest_comes_first_what_is_unknown_before_it_and_ties_as_given() -> None:
    runs = runs_of("fedavg", seeds=6)
    forecasts = {run.id: known(seconds) for run, seconds in zip(runs, (1, 5, 5, 9), strict=False)}
    expected = [runs[i] for i in (4, 5, 3, 1, 2, 0)]
    assert order(runs, forecasts) == expected
    schedule = Schedule(runs, forecasts)
    assert [schedule.take() for _ in runs] == expected
    assert schedule.take() is None and schedule.exhausted() and schedule.left_out == []


def test_a_run_that_has_no_room_waits_and_one_put_back_is_taken_again() -> None:
    long, short = runs_of("fedavg", seeds=2)
    schedule = Schedule([short, long], {long.id: known(9), short.id: known(1)})
    assert schedule.take(lambda run: run is not long) is short
    assert schedule.take(lambda run: False) is None and len(schedule) == 1 and not schedule.exhausted()
    schedule.put_back(short)
    assert [schedule.take(), schedule.take(), schedule.take()] == [long, short, None]


def test_with_a_budget_only_what_ends_in_time_begins() -> None:
    clock = Clock()
    runs = runs_of("fedavg", seeds=4)
    forecasts = {run.id: known(seconds) for run, seconds in zip(runs, (100, 30, 8, 3), strict=True)}
    schedule = Schedule(runs, forecasts, Budget(60, clock))
    assert schedule.take() is runs[1]  # 100 is more than there is
    clock.now = 30
    assert schedule.left_out == [runs[0]]
    assert schedule.take() is runs[2]
    clock.now = 57.5
    assert schedule.take() is None and schedule.exhausted() and schedule.left_out == [runs[0], runs[3]]


def test_with_a_budget_what_is_unknown_begins_while_any_time_is_left() -> None:
    clock = Clock()
    runs = runs_of("fedavg", seeds=2)
    schedule = Schedule(runs, {}, Budget(60, clock))
    clock.now = 59
    assert schedule.take() is runs[0]
    clock.now = 60
    assert schedule.take() is None and schedule.left_out == [runs[1]]


def test_what_a_seed_took_is_known_of_the_others_of_its_cell() -> None:
    runs = runs_of("fedavg,fedrep", seeds=3)
    fedavg, fedrep = runs[0::2], runs[1::2]
    schedule = Schedule(runs)
    taken = [schedule.take(), schedule.take()]
    assert taken == [fedavg[0], fedrep[0]]
    schedule.learn(fedavg[0], 10, 2.0**30)
    schedule.learn(fedrep[0], 20)
    assert schedule.forecasts[fedavg[2].id] == Forecast(seconds=10, peak_bytes=2.0**30, how="measured")
    assert schedule.take() is fedrep[1]
    schedule.learn(fedrep[1], 4)  # 12 on average
    assert schedule.forecasts[fedrep[2].id].seconds == 12
    assert [schedule.take() for _ in range(3)] == [fedrep[2], fedavg[1], fedavg[2]]


def test_a_cell_is_everything_but_the_seed() -> None:
    (one, other), (longer, _), (rep, _) = runs_of("fedavg", 2), runs_of("fedavg", 2, rounds=7), runs_of("fedrep", 2)
    assert cell(one) == cell(other)
    different = [
        longer,
        rep,
        replace(one, precision="bf16"),
        replace(one, device="cuda"),
        replace(one, engine="stacked"),
    ]
    different += [replace(one, lr=0.01), replace(one, workers=2)]
    assert len({cell(run) for run in (one, *different)}) == 8


@given(st.lists(st.floats(0, 100), max_size=12), st.integers(1, 5), st.lists(st.floats(0, 100), max_size=5))
def test_wall_time_is_that_of_places_which_are_never_idle(
    waiting: list[float], jobs: int, running: list[float]
) -> None:
    running = running[:jobs]
    took = wall_seconds(waiting, jobs, running)
    everything = [*waiting, *running]
    places = [0.0] * jobs
    for i, seconds in enumerate(running):
        places[i] = seconds
    for seconds in waiting:
        places[places.index(min(places))] += seconds
    assert took == pytest.approx(max(places))
    assert took >= max(everything, default=0.0) - 1e-9 and took >= sum(everything) / jobs - 1e-9


# The outlook


def test_the_outlook_of_a_sweep_whose_forecasts_are_right_is_right_from_its_start_to_its_end() -> None:
    seconds = {"a": 40.0, "b": 20.0, "c": 10.0, "d": 10.0}
    outlook = Outlook({run: run for run in seconds}, seconds)
    outlook.started("a", 0)
    outlook.started("b", 0)
    assert outlook.left(0) == 40 and outlook.left(15) == 25
    outlook.progressed("a", 4, 8, 20.0, 20)
    outlook.ended("b", 20)
    assert outlook.left(20) == 20  # c and d follow each other where b was
    outlook.started("c", 20)
    assert outlook.left_of("a", 20) == 20 and outlook.left_of("c", 25) == 5
    assert outlook.left(20) == 20
    outlook.ended("c", 10)
    outlook.started("d", 30)
    assert outlook.left(30) == 10
    outlook.ended("d", 10)
    outlook.ended("a", 40)
    assert outlook.left(40) == 0


def test_the_outlook_without_forecasts_learns_from_rounds_then_from_ends() -> None:
    outlook = Outlook({"a0": "a", "a1": "a", "b0": "b"})
    outlook.started("a0", 0)
    assert outlook.left(0) is None and outlook.left_of("a0", 0) is None
    outlook.progressed("a0", 1, 10, 5.0, 5)  # the first round also warms up
    assert outlook.left(5) is None
    outlook.progressed("a0", 2, 10, 6.0, 6)  # 30 in all
    assert outlook.left_of("a0", 6) == 24 and outlook.left(6) == 24 + 30 + 30
    outlook.ended("a0", 20)
    assert outlook.left(20) == 20 + 20
    outlook.started("a1", 20)
    outlook.ended("a1", None)  # failed: nothing is learnt
    assert outlook.left(21) == 20
    outlook.started("b0", 21)
    outlook.waits("b0")
    assert outlook.left(22) == 20


# Finished runs


def test_finished_runs_of_a_cell_are_the_forecast_of_its_other_seeds(tmp_path: Path) -> None:
    runs = runs_of("fedavg,local", seeds=3, rounds=2)
    for run in runs[:3]:  # two seeds of fedavg, one of local
        assert execution.execute(run, tmp_path) is None
        alter(tmp_path / run.id, started=NOON, finished=NOON)  # as if the first had not loaded libraries
    found = forecast.forecast(runs, tmp_path, probe=False)
    costs = [json.loads((tmp_path / run.id / "run.json").read_text())["cost"] for run in runs[:3]]
    mean = (costs[0]["wall_seconds"] + costs[2]["wall_seconds"]) / 2
    assert found[runs[4].id].seconds == pytest.approx(mean)
    assert found[runs[4].id].how == "measured"
    assert found[runs[4].id].peak_bytes == max(costs[0]["peak_memory_bytes"], costs[2]["peak_memory_bytes"])
    assert found[runs[5].id].peak_bytes == costs[1]["peak_memory_bytes"]
    others = runs_of("fedavg", rounds=3) + runs_of("fedrep", rounds=2)
    assert forecast.forecast(others, tmp_path, probe=False) == {}


def alter(folder: Path, **changes: Any) -> None:
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def probes_of(folder: Path, forecasts: dict[str, float]) -> None:
    """Have the probes of runs, by their calls, in a folder's cache."""
    cache = forecast._Cache(folder / forecast.FILE)
    for call, seconds in forecasts.items():
        (run,) = runs_of(call, rounds=2)
        cache.put(cell(run), run, Forecast(seconds=seconds, peak_bytes=2.0**30, how="probed"))


def test_another_machines_runs_count_only_where_nothing_else_is_known(tmp_path: Path) -> None:
    runs = runs_of("local", seeds=2, rounds=2)
    execution.execute(runs[0], tmp_path)
    cost = json.loads((tmp_path / runs[0].id / "run.json").read_text())["cost"]
    alter(tmp_path / runs[0].id, started=NOON, finished=NOON, cost={**cost, "wall_seconds": 1000.0})
    probes_of(tmp_path, {"local": 50.0})
    found = forecast.forecast(runs, tmp_path, probe=False)[runs[1].id]
    assert (found.seconds, found.how) == (1000, "measured")
    alter(tmp_path / runs[0].id, hardware={**provenance.hardware("cpu"), "cpu": "another"})
    found = forecast.forecast(runs, tmp_path, probe=False)[runs[1].id]
    assert (found.seconds, found.how) == (50, "probed")
    (tmp_path / forecast.FILE).unlink()
    assert forecast.forecast(runs, tmp_path, probe=False)[runs[1].id].seconds == 1000


@pytest.mark.parametrize("change", [{"status": "failed"}, {"cost": {}}, {"started": None}, {"identity": 3}])
def test_failed_and_damaged_runs_forecast_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    (run,) = runs_of("local", rounds=1)
    execution.execute(run, tmp_path)
    assert len(forecast.forecast([run], tmp_path, probe=False)) == 1
    alter(tmp_path / run.id, **change)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json").write_text("{")
    assert forecast.forecast([run], tmp_path, probe=False) == {}


def test_what_came_before_the_rounds_counts_where_nothing_interrupted_the_run(tmp_path: Path) -> None:
    (run,) = runs_of("local", rounds=1)
    execution.execute(run, tmp_path)
    cost = json.loads((tmp_path / run.id / "run.json").read_text())["cost"]
    times = {"started": NOON, "finished": NOON.replace("12:00:00", "12:02:00")}
    alter(tmp_path / run.id, cost={**cost, "wall_seconds": 90.0}, **times)
    assert forecast.forecast([run], tmp_path, probe=False)[run.id].seconds == 119
    alter(tmp_path / run.id, cost={**cost, "wall_seconds": 900.0}, **times)  # the last of several processes
    assert forecast.forecast([run], tmp_path, probe=False)[run.id].seconds == 900


# Probes


def test_a_probe_foretells_the_time_of_a_run_whose_clients_differ_in_size(tmp_path: Path, sleeper: Path) -> None:
    call = "sleeper(step=0.01, round=0.02)"
    (run,) = runs_of(call, plugin=sleeper, rounds=40, participation=0.1, eval_every=40)
    foretold = forecast.probe(run).seconds
    began = time.perf_counter()
    assert execution.execute(run, tmp_path) is None
    took = time.perf_counter() - began
    assert 0.6 * took < foretold < 1.6 * took  # what is not sleep depends on who else computes


@pytest.mark.parametrize(
    ("number", "seconds", "seen"),
    [(20, 100 + 18 * 2 + 6 * 7 + 50, [0, 1, 19]), (3, 100 + 2 + 50, [0, 1, 2]), (2, 100 + 50, [0, 1]), (1, 100, [0])],
)
def test_a_probe_does_three_rounds_and_counts_evaluations(
    monkeypatch: pytest.MonkeyPatch, number: int, seconds: float, seen: list[int]
) -> None:
    clock = Clock()
    monkeypatch.setattr("bench.sweep.forecast.time.perf_counter", clock)
    (run,) = runs_of("fedavg", rounds=number, eval_every=3, participation=1.0)
    done = []

    def step(going: rounds.Run) -> None:
        done.append(going.progress.round)
        clock.now += 100 if done == [0] else 50 if going.progress.round == number - 1 else 2
        going.progress.round += 1

    def evaluate(going: rounds.Run, task: Task, completed: int, last: bool) -> None:
        assert not last
        clock.now += 7

    monkeypatch.setattr(rounds.Run, "step", step)
    monkeypatch.setattr(rounds.Run, "evaluate", evaluate)
    assert forecast.probe(run).seconds == pytest.approx(seconds)
    assert done == seen
    done.clear()
    assert forecast.probe(replace(run, workers=4)).seconds == pytest.approx(seconds / 4)


def test_rounds_that_are_not_probed_are_forecast_by_the_steps_of_their_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(), []
    monkeypatch.setattr("bench.sweep.forecast.time.perf_counter", clock)
    (run,) = runs_of("fedavg", rounds=12, eval_every=12, participation=0.1)

    def step(going: rounds.Run) -> None:
        seen.append(going)
        clock.now += forecast._steps(going, going.progress.round)
        going.progress.round += 1

    monkeypatch.setattr(rounds.Run, "step", step)
    foretold = forecast.probe(run).seconds
    assert len(seen) == 3
    steps = [forecast._steps(seen[0], r) for r in range(12)]
    assert len(set(steps)) > 3 and foretold == pytest.approx(sum(steps))


@pytest.mark.parametrize(
    ("ray", "jobs", "workers", "todo", "at_once"),
    [
        (None, None, 1, 9, 8),
        (None, None, 3, 9, 2),
        ("local", None, 9, 9, 1),
        (None, 3, 3, 9, 3),
        ("off", 3, 1, 9, 1),
        (None, None, 1, 5, 5),
    ],
)
def test_a_plan_counts_on_as_many_runs_at_once_as_there_will_be(
    monkeypatch: pytest.MonkeyPatch, ray: str | None, jobs: int | None, workers: int, todo: int, at_once: int
) -> None:
    monkeypatch.setattr("bench.sweep.cluster.cores", lambda device: 8)
    options: Any = SimpleNamespace(ray=ray, jobs=jobs, workers_per_run=workers)
    assert plan._jobs(options, "cpu", todo) == at_once


def test_each_process_of_a_run_costs_its_hours(tmp_path: Path) -> None:
    one, other = runs_of("fedavg", seeds=2)
    other = replace(other, workers=3)
    known = {run.id: Forecast(seconds=3600.0, peak_bytes=None, how="probed") for run in (one, other)}
    total = forecast.total([one, other], known, jobs=2)
    assert (total.hours, total.wall_seconds) == (1 + 3, 3600.0)


@pytest.fixture(scope="module")
def probed(sleeper: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run], list[str]]:
    """Probes of six cells, two seeds each: the folder, the runs, and what was said."""
    folder = tmp_path_factory.mktemp("probed")
    calls = "sleeper(step=0),sleeper(step=0, megabytes=300),sleeper(kills=True),sleeper(raises=True)"
    runs = runs_of(calls, seeds=2, root=folder, plugin=sleeper, rounds=3)
    (cifar,) = config.parse_datasets("cifar10")
    missing = [replace(run, dataset=cifar) for run in runs[:2]]
    ballast = bytearray(b"x") * (200 * 2**20)
    said: list[str] = []
    forecast.forecast([*missing, *runs], folder, jobs=2, say=said.append)
    del ballast
    return folder, runs, said


Probed = tuple[Path, list[Run], list[str]]


def test_the_memory_of_a_probe_is_its_own(probed: Probed) -> None:
    folder, runs, _ = probed
    found = forecast.forecast(runs, folder, probe=False)
    small, large = (found[run.id].peak_bytes or 0.0 for run in runs[:2])
    assert 280 * 2**20 < large - small < 330 * 2**20


def test_a_probe_that_fails_or_dies_is_said_and_the_others_go_on(probed: Probed) -> None:
    folder, runs, said = probed
    assert list(forecast.forecast(runs, folder, probe=False)) == [runs[i].id for i in (0, 4, 1, 5)]
    on = "on digits, imbalance 10, alpha 0.5"
    assert f"no forecast for sleeper(kills=True) {on}: its process died (killed, or out of memory)" in said
    start = f"no forecast for sleeper(raises=True) {on}: OverflowError: too much (sleeper.py, line "
    assert any(sentence.startswith(start) for sentence in said), "with the line of the plug-in"


def test_missing_data_are_said_once_a_dataset(probed: Probed) -> None:
    _, _, said = probed
    (sentence,) = [sentence for sentence in said if "cifar10" in sentence and sentence.startswith("no forecast")]
    assert "bench data fetch cifar10" in sentence


def test_a_probe_is_made_once_a_cell_and_machine(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, runs, said = probed
    assert len([sentence for sentence in said if sentence.startswith("probing")]) == 6
    monkeypatch.setattr(forecast, "_start", None)
    found = forecast.forecast([runs[0], runs[4]], folder)
    assert found[runs[0].id] == found[runs[4].id] and found[runs[0].id].how == "probed"
    monkeypatch.setattr(provenance, "hardware", lambda device: {"cpu": "another"})
    assert forecast.forecast(runs, folder, probe=False) == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "probes": {"a": 3}}'])
def test_a_cache_that_is_not_ours_is_no_cache(tmp_path: Path, content: str) -> None:
    (tmp_path / forecast.FILE).write_text(content)
    assert forecast.forecast(runs_of("local", rounds=2), tmp_path, probe=False) == {}
    probes_of(tmp_path, {"local": 5.0})
    assert len(forecast.forecast(runs_of("local", rounds=2), tmp_path, probe=False)) == 1


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(forecast, "_probe_all", lambda cells, jobs, say: [(key, known(1)) for key in cells])
    assert len(forecast.forecast(runs_of("local"), tmp_path / "file" / "below")) == 1


# The command

Bench = Callable[..., tuple[str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, sleeper: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Call the command in this process, in an empty folder; give what it printed and said."""
    monkeypatch.chdir(tmp_path)
    load_plugin(sleeper)
    capsys.readouterr()  # what the plug-in prints

    def call(*words: object, status: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.out, printed.err

    return call


PLAN = (
    "run",
    "--algos",
    "local,fedavg",
    "--rounds",
    "2",
    "--seeds",
    "2",
    "--engine",
    "serial",
    "--tracking-uri",
    "off",
)


def test_a_dry_run_prints_time_and_memory_of_each_run_and_the_cost_of_all(bench: Bench, tmp_path: Path) -> None:
    probes_of(tmp_path / "runs", {"local": 100.0, "fedavg": 7300.0})
    bench(*PLAN, "--ray", "off", "--algos", "local", "--seeds", "1")
    alter(next(tmp_path.glob("runs/*/run.json")).parent, hardware={})  # as if of elsewhere
    out, err = bench(*PLAN, "--dry-run", "--jobs", "2")
    ids = [run.id for run in runs_of("local,fedavg", 2, rounds=2)]
    cell = "on digits, imbalance 10, alpha 0.5, seed"
    assert err == "" and out.splitlines() == [
        f"{ids[0]}  cached           –         –  local {cell} 0",
        f"{ids[1]}  to do    2 h 2 min   1.0 GiB  fedavg {cell} 0",
        f"{ids[2]}  to do        100 s   1.0 GiB  local {cell} 1",
        f"{ids[3]}  to do    2 h 2 min   1.0 GiB  fedavg {cell} 1",
        "",
        "4 runs: 1 cached, 3 to do; 4.1 core-hours, in about 2 h 3 min (2 at once, longest first), "
        "with at most 1.0 GiB a run",
    ]


def test_the_json_of_a_dry_run_adds_up(bench: Bench, tmp_path: Path) -> None:
    probes_of(tmp_path / "runs", {"local": 100.0, "fedavg": 7300.0})
    document = json.loads(bench(*PLAN, "--dry-run", "--jobs", "2", "--json")[0])
    assert [run["seconds"] for run in document["runs"]] == [100, 7300, 100, 7300]
    assert {run["forecast"] for run in document["runs"]} == {"probed"}
    assert {run["peak_memory_bytes"] for run in document["runs"]} == {2**30}
    expected = {"runs": 4, "unknown": 0, "jobs": 2, "wall_seconds": 7400.0, "core_hours": pytest.approx(14800 / 3600)}
    assert document["total"] == expected
    alone = json.loads(bench(*PLAN, "--dry-run", "--ray", "off", "--json")[0])["total"]
    assert (alone["jobs"], alone["wall_seconds"]) == (1, 14800)


def test_without_probes_a_dry_run_lists_runs_even_where_data_are_missing_and_writes_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    words = ("run", "--dataset", "cifar10,digits", "--data-root", ".", "--algos", "local", "--dry-run", "--no-probe")
    out, err = bench(*words)
    assert err == "" and [row.split()[1:3] for row in out.splitlines()[:2]] == [["to", "do"]] * 2
    assert out.splitlines()[-1] == "2 runs: 0 cached, 2 to do; of 2 nothing is known, and they are not counted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--clients", "2000"), "dirichlet: 503 images cannot give each of 2,000 clients 2 images; use fewer clients"),
        (("--partition", "classes", "--clients", "4"), "classes_per_client = 2 of 4 clients leaves some classes"),
        (("--dataset", "cifar10,digits", "--data-root", ".", "--partition", "users"), "users: this dataset does"),
        (("--algos", "fedic", "--auxiliary", "own:9999"), "own:9999"),
    ],
)
@pytest.mark.parametrize("dry", [("--dry-run", "--no-probe"), ("--dry-run",), ()])
def test_what_cannot_be_is_refused_by_a_dry_run_as_by_the_run(
    words: tuple[str, ...], said: str, dry: tuple[str, ...], bench: Bench, tmp_path: Path
) -> None:
    words = words if dry else tuple(word.replace("cifar10,", "") for word in words)  # a plan needs no data
    out, err = bench("run", "--algos", "local", *words, *dry, status=2)
    assert out == "" and said in err and err.count("\n") == 1


def test_a_dry_run_probes_what_is_not_known(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe_all(cells: dict[str, Run], jobs: int, say: Callable[[str], None]) -> list[tuple[str, Forecast]]:
        asked.append(([run.seed for run in cells.values()], jobs))
        say("probing")
        return [(key, known(60)) for key in cells]

    monkeypatch.setattr(forecast, "_probe_all", probe_all)
    for said in ("bench: probing\n", ""):  # the second is instant
        out, err = bench(*PLAN, "--dry-run", "--jobs", "2")
        assert err == said and "4 to do; 0.067 core-hours, in about 2 min" in out
    assert asked == [([0, 0], 2)]
    assert [path.name for path in Path("runs").iterdir()] == [forecast.FILE]


def test_a_dry_run_says_what_a_time_budget_leaves_out(bench: Bench, tmp_path: Path) -> None:
    probes_of(tmp_path / "runs", {"local": 100.0, "fedavg": 7300.0})
    out, _ = bench(*PLAN, "--dry-run", "--jobs", "2", "--time-budget", "2h")
    assert [row[14:22] for row in out.splitlines()[:4]] == ["to do   ", "too late", "to do   ", "too late"]
    assert "4 runs: 0 cached, 2 to do, 2 too late for --time-budget; 0.056 core-hours, in about 100 s" in out
    document = json.loads(bench(*PLAN, "--dry-run", "--ray", "off", "--json", "--time-budget", "7450s")[0])
    assert [run["status"] for run in document["runs"]] == ["to do", "to do", "too late", "too late"]
    _, err = bench(*PLAN, "--time-budget", "soon", status=2)
    assert err.startswith("bench: --time-budget 'soon': a duration above zero is wanted") and err.count("\n") == 1


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the processes of a process")
def test_an_interrupted_dry_run_prints_what_it_knows_and_leaves_no_process(tmp_path: Path, sleeper: Path) -> None:
    words = ("run", "--plugin", sleeper, "--algos", "sleeper(step=0),sleeper(round=1000)", "--dry-run", "--jobs", "2")
    process = start(*words, cwd=tmp_path)
    wait(lambda: (tmp_path / "runs" / forecast.FILE).exists())
    probes = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "interrupted: what was not probed yet has no forecast" in err and "Traceback" not in err
    assert (
        len(out.removeprefix("whatever\n").splitlines()) == 4 and out.count("–") == 2 and "of 1 nothing is known" in out
    )
    assert probes != [] and not any(Path(f"/proc/{pid}").exists() for pid in probes)


def test_a_sweep_stops_beginning_runs_in_time_and_the_same_command_goes_on(bench: Bench) -> None:
    words = ("run", "--algos", "sleeper(round=0.3)", "--rounds", "4", "--seeds", "3", *OFF, "--json")
    out, err = bench(*words, "--time-budget", "1s")
    # nothing was known: one could begin, and when it ended the time was over
    assert [run["status"] for run in json.loads(out)["runs"]] == ["done", "waiting", "waiting"]
    assert "bench: 2 runs were not begun, they would not have ended within --time-budget 1.0 s; the same command" in err
    assert err.count("  sleeper(round=0.3) on digits, imbalance 10, alpha 0.5, seed") == 2
    out, err = bench(*words, "--time-budget", "2s")  # a run is known to take longer
    assert json.loads(out)["runs"][0]["status"] == "cached"
    again = [run["status"] for run in json.loads(bench(*words)[0])["runs"]]
    assert again[0] == "cached" and again[2] == "done"


def test_a_sweep_begins_with_the_longest_as_far_as_a_dry_run_knows(bench: Bench, tmp_path: Path) -> None:
    probes_of(tmp_path / "runs", {"local": 20.0, "fedavg": 60.0, "fedprox": 40.0})
    bench(*PLAN, "--algos", "local,fedavg,fedprox", "--seeds", "1", "--ray", "off")
    (file,) = tmp_path.glob("runs/sweeps/*.json")
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text())["runs"]
    began = sorted(runs.values(), key=lambda run: float(run["began"]))
    assert [run["title"].partition(" on")[0] for run in began] == ["fedavg", "fedprox", "local"]
