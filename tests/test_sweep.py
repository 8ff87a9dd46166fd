"""Sweeps: on Ray and not, killed and continued, interrupted, and mirrored in MLflow.

Everything runs in processes of its own, as a person starts it: Ray and MLflow leave threads and warnings behind.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import config, pool, sweep, tracking, watch
from bench.command.progress import Display
from bench.config import Run
from bench.results import records
from bench.rounds import Report

ROOT = Path(__file__).parents[1]
QUIET = ("--json", "--tracking-uri", "off")
OFF = ("--ray", "off", "--tracking-uri", "off")

SLOW = '''
"""Slow: FedAvg that takes its time, and says in which process.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench import Algorithm, register


@register("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(Algorithm):
    seconds: float = 0.1

    def local_update(self, task, shared, private, data):
        if "SLOW_PID" in os.environ:
            Path(os.environ["SLOW_PID"]).write_text(str(os.getpid()))
        time.sleep(self.seconds)
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
'''


def start(*words: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command in a session of its own, so that it can be interrupted as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        # a job in the background of a shell inherits a deaf ear for interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[Any, str]:
    """Wait for the command; give what it printed as JSON (None if nothing) and on standard error."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert out == "" or out.startswith("{"), out
    return (json.loads(out) if out else None), err


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def digests(printed: Any) -> dict[str, str]:
    return {run["id"]: run["digest"] for run in printed["runs"]}


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
    left = [path.name for path in (folder / "ray").rglob("*") if path.suffix in (".jsonl", ".pt", ".partial")]
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
    assert_mirrored(f"sqlite:///{folder / 'ray' / 'mlflow.db'}", on_ray, folder, rounds=3)


def test_the_death_of_a_worker_fails_its_run_and_the_same_command_mends_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    pid = tmp_path / "pid"
    words = ("run", "--algos", "slow,fedavg", "--plugin", "slow.py", "--rounds", "20", *QUIET)
    process = start(*words, "--ray", "local", cwd=tmp_path, SLOW_PID=str(pid))
    wait(lambda: pid.exists() and pid.read_text() != "")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    printed, err = finish(process, status=1)
    assert [run["status"] for run in printed["runs"]] == ["failed", "done"]
    assert "the worker died" in printed["runs"][0]["reason"] and "1 of 2 runs failed" in err
    stored = json.loads((tmp_path / "runs" / printed["runs"][0]["id"] / "run.json").read_text())
    assert stored["status"] == "failed" and stored["reason"] == printed["runs"][0]["reason"]
    mended, _ = finish(start(*words, cwd=tmp_path))  # one run is left: no Ray
    assert [run["status"] for run in mended["runs"]] == ["done", "cached"]


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


def alive(group: int) -> bool:
    """Tell whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


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


# MLflow

INSPECT = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("bench")
runs = []
for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]):
    history = client.get_metric_history(run.info.run_id, "personal")
    artifacts = [file.path for file in client.list_artifacts(run.info.run_id)]
    runs.append({"name": run.info.run_name, "id": run.info.run_id, "status": run.info.status, "tags": run.data.tags,
                 "params": run.data.params, "metrics": run.data.metrics, "artifacts": artifacts,
                 "history": [[metric.step, metric.value] for metric in history]})
print(json.dumps(runs))
"""


def mirrored(uri: str, cwd: Path) -> list[dict[str, Any]]:
    """Read what MLflow has, in a process of its own."""
    command = [sys.executable, "-c", INSPECT, uri]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = json.loads(done.stdout)
    return runs


def assert_mirrored(uri: str, printed: Any, cwd: Path, rounds: int) -> None:
    """Compare what MLflow has with what the command printed: one sweep, and a child for each run."""
    parent, *children = mirrored(uri, cwd)
    assert parent["name"].startswith("sweep ") and parent["status"] == "FINISHED"
    assert sorted(parent["artifacts"]) == ["leaderboard.json", "leaderboard.md"]
    by_id = {child["tags"]["bench.run_id"]: child for child in children}
    assert len(children) == len(by_id) == len(printed["runs"])
    for run in printed["runs"]:
        child = by_id[run["id"]]
        assert child["tags"]["mlflow.parentRunId"] == parent["id"] and child["status"] == "FINISHED"
        assert child["tags"]["bench.digest"] == run["digest"] and child["tags"]["version.torch"]
        assert child["tags"]["algorithm"] == run["algorithm"] and len(child["tags"]["bench.fingerprint"]) == 16
        assert child["params"]["setting.rounds"] == str(rounds) and child["params"]["seed"] == "0"
        assert sorted(step for step, _ in child["history"]) == list(range(1, rounds + 1))
        assert child["metrics"]["personal"] == pytest.approx(run["metrics"]["personal"])
        assert child["metrics"]["personal_last10"] == pytest.approx(run["metrics"]["personal@last10"])
        assert child["metrics"]["cost.samples"] > 0


def test_a_later_sweep_has_a_parent_of_its_own_with_finished_runs_copied_once(tmp_path: Path, run: Run) -> None:
    words = ("run", "--rounds", "2", "--json", "--ray", "off")
    sweep.run([run], tmp_path / "runs", pool=pool.InProcess())
    printed, _ = finish(start(*words, "--algos", "fedavg,local", cwd=tmp_path))
    assert [run["status"] for run in printed["runs"]] == ["cached", "done"]
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert_mirrored(uri, printed, tmp_path, rounds=2)
    finish(start(*words, "--algos", "fedavg,local,fedper", cwd=tmp_path))
    names = [run["name"].split()[0] for run in mirrored(uri, tmp_path)]
    assert sorted(names) == ["fedavg", "fedper", "local", "sweep", "sweep"]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a tracking server on a free loopback port, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--host", "127.0.0.1", "--port", port, "--workers", 1, "--artifacts-destination", folder / "files")
    words = ("server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", *where)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *map(str, words)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        start_new_session=True,
    )
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def answers(address: str) -> bool:
    try:
        return bool(ask(address))
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which are in its session."""
    if alive(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def on_server(uri: str) -> dict[str, dict[str, Any]]:
    """Ask a server for the runs of the experiment, by name."""
    experiment = json.loads(ask(f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=bench"))
    body = json.dumps({"experiment_ids": [experiment["experiment"]["experiment_id"]]}).encode()
    found = json.loads(ask(f"{uri}/api/2.0/mlflow/runs/search", body))
    runs = {}
    for run in found.get("runs", []):
        values = {
            kind: {each["key"]: each["value"] for each in run["data"].get(kind, [])} for kind in ("tags", "metrics")
        }
        runs[run["info"]["run_name"]] = {"status": run["info"]["status"], **values}
    return runs


def ask(address: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:  # the experiment is not there yet
        return b'{"experiment": {"experiment_id": "0"}}' if error.code == 404 else error.read()


def test_a_real_server_is_written_live_and_may_die_without_loss(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with mlflow_server(tmp_path) as (uri, server):
        words = ("run", "--algos", "fedavg,slow", "--plugin", "slow.py", "--rounds", "60", "--json", "--ray", "off")
        process = start(*words, "--tracking-uri", uri, cwd=tmp_path)
        wait(lambda: "personal" in on_server(uri).get("slow digits seed 0", {"metrics": {}})["metrics"])
        shown = on_server(uri)
        stop(server)
        printed, err = finish(process)
    first, second = printed["runs"]
    assert (first["status"], second["status"]) == ("done", "done")
    assert err.count(f"MLflow at {uri} is not written any more: nobody answers there") == 1
    finished, going = shown["fedavg digits seed 0"], shown["slow digits seed 0"]
    assert finished["status"] == "FINISHED" and finished["tags"]["bench.digest"] == first["digest"]
    assert finished["metrics"]["personal"] == pytest.approx(first["metrics"]["personal"])
    assert going["status"] == "RUNNING" and going["metrics"]["seconds"] > 0


def test_metric_names_have_only_characters_that_mlflow_takes() -> None:
    assert tracking.metric_name("generic@last10") == "generic_last10"
    assert tracking.metric_name("personal:0 epochs.many") == "personal:0 epochs.many"
    assert tracking.metric_name("personal:α") == "personal:_"


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
    first, second = (Report(n, 3, 0.5 * n, {"generic": None}) for n in (1, 2))
    watch.append(file, first)
    assert tail.read() == [first] and tail.read() == []
    watch.append(file, second)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert tail.read() == []
    file.write_bytes(whole)
    assert tail.read() == [second]


def test_the_display_says_in_lines_how_runs_go_where_there_is_no_terminal(run: Run) -> None:
    said = io.StringIO()
    with Display(stream=said) as display:
        display.begin([run], [])
        display.started(run)
        display.progressed(run, Report(2, 2, 1.0, {"generic": 0.5, "personal": None}))
        display.ended(run, None)
    cell = "fedavg on digits, imbalance 10, alpha 0.5, seed 0"
    assert said.getvalue() == f"started: {cell}\ndone: {cell}: generic 50.0 %, personal –\n"


def test_a_quiet_display_says_failures_only(run: Run) -> None:
    said = io.StringIO()
    with Display(quiet=True, stream=said) as display:
        display.begin([run], [run])
        display.started(run)
        display.ended(run, "it broke")
    assert said.getvalue() == "bench: failed: fedavg on digits, imbalance 10, alpha 0.5, seed 0: it broke\n"


def test_a_record_says_what_was_run_on_what_and_with_which_versions(tmp_path: Path, run: Run) -> None:
    assert sweep.execute(run, tmp_path) is None
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
    results = sweep.run([run, other], tmp_path, pool=pool.InProcess())
    assert [result.status for result in results] == ["failed", "done"]
    assert "cannot be written" in str(results[0].reason)


def test_every_split_is_tried_before_any_run(run: Run) -> None:
    crowded = replace(run, setting=replace(run.setting, clients=5000))
    sweep.check_data([run])
    with pytest.raises(ValueError, match="use fewer clients"):
        sweep.check_data([run, crowded])
