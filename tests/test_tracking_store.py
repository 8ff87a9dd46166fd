"""MLflow's own database: where it lies, whose experiment was deleted, and who makes it."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import tracking
from bench.results.claims import claim
from bench.tracking import mirror, server
from tests.processes import wait
from tests.test_tracking import do, import_all, some_runs, watched, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow's own
Connect = Callable[[str], Any]


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Give MLflow's client; the working directory is a new one."""
    monkeypatch.chdir(tmp_path)
    for key, value in server._ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    client: Connect = server.import_mlflow()
    return client


def test_the_database_lies_in_the_folder_whatever_that_is_called(connect: Connect, tmp_path: Path) -> None:
    out = Path("what? 100%20 #1 ü+&;=@:b")
    (run,) = some_runs(1, rounds=2)
    write(out, run)
    assert import_all(out, tracking.default_uri(out)) == (0, 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "nothing is made beside the folder"
    assert {path.name for path in out.iterdir()} == {run.id, "mlflow.db", "mlflow-artifacts"}
    *command, uri = shlex.split(tracking.interface_command(tracking.default_uri(out)))
    assert command == ["mlflow", "ui", "--backend-store-uri"]
    client = connect(uri)
    experiment = client.get_experiment_by_name("bench").experiment_id
    parents = [shown for shown in client.search_runs([experiment]) if "bench.run_id" not in shown.data.tags]
    assert [file.path for file in client.list_artifacts(parents[0].info.run_id)] == ["leaderboard.md"]
    assert tracking.import_command(uri, out) == shlex.join(["bench", "track", "--out", str(out)])
    assert import_all(out.resolve(), tracking.default_uri(out.resolve())) == (1, 0, 0)


def test_ordinary_names_stay_as_they_are_in_the_address() -> None:
    assert tracking.default_uri(Path("my runs/ü#1")) == "sqlite:///my runs/ü#1/mlflow.db"


def test_a_name_that_the_library_cannot_open_is_refused_before_a_file_is_made(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_url(uri: str) -> Any:  # of SQLAlchemy 2.0, which takes the path as it is
        path, _, query = uri.partition("///")[2].partition("?")
        return SimpleNamespace(database=path, query=query)

    monkeypatch.setattr("sqlalchemy.engine.make_url", make_url)
    out, warnings = Path("what?"), list[str]()
    (run,) = some_runs(1, rounds=2)
    write(out, run)
    with pytest.raises(tracking.TrackingFailed, match=r"this SQLAlchemy finds no database in what\?, because of"):
        import_all(out, tracking.default_uri(out))
    watcher = watched(out, warnings, tracking.default_uri(out))
    watcher.begin([], [])
    watcher.finish("FINISHED", {})
    assert "because of ? or % in its name" in warnings[0] and "bench track --out" not in warnings[0]
    assert [path.name for path in tmp_path.rglob("*.db")] == [] and os.listdir(tmp_path) == ["what?"]


def test_an_experiment_that_was_deleted_is_to_be_restored(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_GATHER_SECONDS", 0.1)
    out, runs = Path("my runs of " + "long " * 20), some_runs(3, rounds=2)  # no sentence is cut off
    uri = tracking.default_uri(out)
    write(out, runs[0])
    assert import_all(out, uri) == (0, 0, 1)
    client = connect(uri)
    number = client.get_experiment_by_name("bench").experiment_id
    command = f"MLFLOW_TRACKING_URI='{uri}' mlflow experiments restore --experiment-id {number}"
    remedy = f"the experiment bench was deleted in MLflow: restore it ({command}) or use another --tracking-uri"

    client.delete_experiment(number)
    with pytest.raises(tracking.TrackingFailed) as failed:
        import_all(out, uri)
    assert str(failed.value) == f"MLflow at {uri} cannot be written: {remedy}"
    warnings = list[str]()
    watcher = watched(out, warnings, uri)
    watcher.begin([], [])
    watcher.finish("FINISHED", {})
    rest = f"The runs go on, and their results are in {out}; bench track imports what MLflow lacks once that is done"
    assert warnings == [f"MLflow at {uri} is not written any more: {remedy}. {rest}"]

    client.restore_experiment(number)
    meanwhile = list[str]()
    watcher = watched(out, meanwhile, uri)
    watcher.begin(runs[1:], [])
    do(out, runs[1:2], watcher)
    ended = f"tags.`bench.run_id` = '{runs[1].id}' and attributes.status = 'FINISHED'"
    wait(lambda: len(client.search_runs([number], ended)) == 1, 20)
    client.delete_experiment(number)  # while the sweep is at work
    do(out, runs[2:], watcher)
    watcher.finish("FINISHED", {})
    assert meanwhile == warnings

    client.restore_experiment(number)
    present, completed, added = import_all(out, uri)
    assert present + completed + added == 3 and import_all(out, uri) == (3, 0, 0)


class Client:
    """MLflow's client, of a server where another sweep makes the experiment just after it was looked for."""

    experiment: Any = None
    made: Any = SimpleNamespace(experiment_id="7", lifecycle_stage="active")

    def __init__(self, tracking_uri: str) -> None:
        pass

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiment

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.experiment = self.made
        raise RuntimeError("RESOURCE_ALREADY_EXISTS")


def test_a_database_that_another_process_is_making_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = threading.Event()

    class Connected(Client):
        def __init__(self, tracking_uri: str) -> None:
            connected.set()

    monkeypatch.setattr(server, "import_mlflow", lambda: Connected)
    uri = f"sqlite:///{tmp_path}/new/shared.db"
    (tmp_path / "new").mkdir()
    with ThreadPoolExecutor() as pool:
        with claim(tmp_path / "new", "shared.db.claim"):
            opened = pool.submit(server.Server, uri, tmp_path)
            assert not connected.wait(0.5)
        assert opened.result(10).experiment == "7"
        (tmp_path / "new" / "shared.db").unlink()  # of no tables, as the stand-in makes none
        monkeypatch.setattr(server, "_MAKING_SECONDS", 0.3)
        with claim(tmp_path / "new", "shared.db.claim"):  # by one that hangs
            assert pool.submit(server.Server, uri, tmp_path).result(10).experiment == "7"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shared.db"], "nothing is left of it"
    for elsewhere in ("sqlite://", "sqlite:///:memory:", "postgresql://host/name", "http://127.0.0.1:1", "mlruns"):
        assert server._database(elsewhere) is None


def test_an_experiment_that_another_sweep_makes_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "import_mlflow", lambda: Client)
    assert server.Server("http://127.0.0.1:1", tmp_path).experiment == "7"
    monkeypatch.setattr(Client, "made", None)
    with pytest.raises(RuntimeError, match="ALREADY_EXISTS"):
        server.Server("http://127.0.0.1:1", tmp_path)
