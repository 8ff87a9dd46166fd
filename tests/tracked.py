"""What MLflow has, read by a process of its own; and a tracking server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import alive, wait

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true"}

INSPECT = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("bench")
runs = []
for run in client.search_runs([experiment.experiment_id], sys.argv[2], order_by=["attributes.start_time"]):
    info, data = run.info, run.data
    history = {key: client.get_metric_history(info.run_id, key) for key in data.metrics}
    artifacts = [file.path for file in client.list_artifacts(info.run_id)]
    runs.append({"name": info.run_name, "id": info.run_id, "status": info.status, "started": info.start_time,
                 "ended": info.end_time, "tags": data.tags, "params": data.params, "metrics": data.metrics,
                 "artifacts": artifacts,
                 "history": {key: [[point.step, point.value] for point in points] for key, points in history.items()}})
print(json.dumps(runs))
"""


def tracked(uri: str, cwd: Path, query: str = "") -> list[dict[str, Any]]:
    """Read what MLflow has, the oldest first."""
    command = [sys.executable, "-c", INSPECT, uri, query]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **QUIET}, timeout=120)
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = json.loads(done.stdout)
    return runs


def assert_tracked(uri: str, printed: Any, cwd: Path, rounds: int) -> None:
    """Compare what MLflow has with what the command printed: one sweep, and a child for each run."""
    runs = tracked(uri, cwd)
    children = [run for run in runs if "mlflow.parentRunId" in run["tags"]]
    (parent,) = (run for run in runs if run not in children)
    assert {child["tags"]["mlflow.parentRunId"] for child in children} == {parent["id"]}
    assert parent["name"].startswith("sweep ") and parent["status"] == "FINISHED"
    assert sorted(parent["artifacts"]) == ["leaderboard.json", "leaderboard.md"]
    by_id = {child["tags"]["bench.run_id"]: child for child in children}
    assert len(children) == len(by_id) == len(printed["runs"])
    for run in printed["runs"]:
        assert_whole(by_id[run["id"]], run, rounds)


def assert_whole(child: dict[str, Any], run: Any, rounds: int) -> None:
    """Compare an MLflow run with what the command printed: everything, and every round once."""
    assert child["status"] == "FINISHED" and child["started"] <= child["ended"]
    assert child["tags"]["bench.digest"] == run["digest"] and child["tags"]["version.torch"]
    assert len(child["tags"]["bench.fingerprint"]) == 16
    cell = {"algorithm": run["algorithm"], "dataset": "digits", "imbalance": "10", "alpha": "0.5", "seed": "0"}
    for told in (child["tags"], child["params"]):
        assert cell.items() <= told.items() and told["setting"] == "quick" and len(told["protocol"]) == 12
    assert child["params"]["setting.rounds"] == str(rounds)
    assert sorted(step for step, _ in child["history"]["personal"]) == list(range(1, rounds + 1))
    assert child["metrics"]["personal"] == pytest.approx(run["metrics"]["personal"])
    assert child["metrics"]["personal_last10"] == pytest.approx(run["metrics"]["personal@last10"])
    assert child["metrics"]["cost.train_samples"] > 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a tracking server on a loopback port, and stop it."""
    where = ("--host", "127.0.0.1", "--port", port, "--workers", 1, "--artifacts-destination", folder / "files")
    words = ("server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", *where)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *map(str, words)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **QUIET},
        start_new_session=True,
    )
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}", process
    finally:
        kill(process)


def answers(address: str) -> bool:
    try:
        return bool(ask(address))
    except OSError:
        return False


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which are in its session."""
    if alive(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask(address: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:  # the experiment is not there yet
        return b'{"experiment": {"experiment_id": "0"}}' if error.code == 404 else error.read()


def on_server(uri: str, query: str = "") -> dict[str, dict[str, Any]]:
    """Ask a server for runs of the experiment, by name, as MLflow's interface does."""
    experiment = json.loads(ask(f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=bench"))
    question = {"experiment_ids": [experiment["experiment"]["experiment_id"]], "filter": query}
    found = json.loads(ask(f"{uri}/api/2.0/mlflow/runs/search", json.dumps(question).encode()))
    runs = {}
    for run in found.get("runs", []):
        values = {kind: {each["key"]: each["value"] for each in run["data"].get(kind, [])} for kind in run["data"]}
        runs[run["info"]["run_name"]] = {"status": run["info"]["status"], "tags": {}, "metrics": {}, **values}
    return runs
