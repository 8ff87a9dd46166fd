"""A database of MLflow that was cut off, overwritten or left half made: told, moved away, all of it imported again."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench import tracking
from bench.results import records
from bench.tracking import database, mirror, server
from tests.processes import ROOT, wait
from tests.test_tracking import do, fail, import_all, some_runs, watched, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow's own


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two finished runs and a failed one, all in its database, which takes seconds to make."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in server._ENVIRONMENT.items():
            patch.setenv(key, value)
        out = tmp_path_factory.mktemp("made") / "runs"
        first, second, broken = some_runs(3, rounds=2)
        for run in (first, second):
            write(out, run)
        fail(out, broken)
        assert import_all(out, tracking.default_uri(out)) == (0, 0, 3)
        assert not list(out.glob(".mlflow*"))
        yield out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


@pytest.fixture
def quickly(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have new databases made by copying that one, emptied of its runs."""
    whole = made / "mlflow.db"

    def complete(file: Path, *_: object) -> None:
        if file.exists():
            raise database.DatabaseDamaged("half made")
        with closing(sqlite3.connect(whole)) as there, closing(sqlite3.connect(file)) as copy:
            there.backup(copy)
            for table in ("tags", "params", "metrics", "latest_metrics", "runs", "experiments"):
                copy.execute(f"DELETE FROM {table}" + (" WHERE experiment_id != 0" if table == "experiments" else ""))
            copy.commit()

    monkeypatch.setattr(database, "complete", complete)
    yield


def cut(share: float) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def zeros(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = bytes(4096)
    file.write_bytes(content)


def unaligned(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[10_000:14_096] = bytes(4096)
    file.write_bytes(content)


def text(file: Path) -> None:
    file.write_text("this is no database\n" * 1000)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without(words: str) -> Callable[[Path], object]:
    """Take something out of the tables, which hold together without it."""

    def damage(file: Path) -> None:
        with closing(sqlite3.connect(file)) as database:
            database.execute(words)
            database.commit()

    return damage


DAMAGED: dict[str, Callable[[Path], object]] = {
    "emptied": cut(0),
    "cut to a few bytes": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "cut to a header": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "cut to a page": lambda file: file.write_bytes(file.read_bytes()[:4096]),
    "cut in half": cut(0.5),
    "cut at its end": cut(0.99),
    "zeros in the middle": zeros,
    "zeros across pages": unaligned,
    "overwritten": text,
    "a folder": folder,
    "without its version": without("DELETE FROM alembic_version"),
    "without its table of versions": without("DROP TABLE alembic_version"),
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.usefixtures("quickly")
def test_a_damaged_database_is_told_moved_away_and_everything_imported_again(how: str, out: Path) -> None:
    file = out / "mlflow.db"
    DAMAGED[how](file)
    (out / "mlflow.db-journal").write_bytes(b"of the damaged one")
    content, said = b"" if file.is_dir() else file.read_bytes(), list[str]()
    found, _ = records.read_all(out)
    done = tracking.import_records(tracking.default_uri(out), out, found, {}, warn=said.append)
    assert (done.present, done.completed, done.added) == (0, 0, 3)
    (sentence,) = said
    assert sentence.startswith(f"MLflow's database {file} is damaged (")
    assert sentence.endswith("it was moved to mlflow.db.damaged-1, and what is finished is shown in a new one")
    moved = out / "mlflow.db.damaged-1"
    assert moved.is_dir() if how == "a folder" else moved.read_bytes()[:50] == content[:50]
    assert not (out / "mlflow.db-journal").exists(), "it belongs to the one that was moved away"
    assert import_all(out, tracking.default_uri(out)) == (3, 0, 0)


@pytest.mark.usefixtures("quickly")
def test_a_second_damaged_one_has_a_name_of_its_own(out: Path) -> None:
    for number in (1, 2):
        text(out / "mlflow.db")
        assert import_all(out, tracking.default_uri(out)) == (0, 0, 3)
        assert (out / f"mlflow.db.damaged-{number}").read_text().startswith("this is no database")


@pytest.mark.usefixtures("quickly")
def test_a_sweep_imports_all_that_the_folder_holds_once_its_database_was_moved_away(out: Path) -> None:
    runs, said = some_runs(4, rounds=2), list[str]()
    zeros(out / "mlflow.db")
    watcher = watched(out, said, tracking.default_uri(out))
    watcher.begin(runs[3:], runs[:1])
    do(out, runs[3:], watcher)
    watcher.finish("FINISHED", {})
    assert watcher.healthy and len(said) == 1 and "it was moved to mlflow.db.damaged-1" in said[0]
    assert import_all(out, tracking.default_uri(out)) == (4, 0, 0)


@pytest.mark.usefixtures("quickly")
def test_a_database_that_is_overwritten_after_a_sweep_is_moved_away_by_the_next_command(out: Path) -> None:
    runs, said = some_runs(4, rounds=2), list[str]()
    watcher = watched(out, said, tracking.default_uri(out))
    watcher.begin(runs[3:], [])
    do(out, runs[3:], watcher)
    watcher.finish("FINISHED", {})
    assert watcher.healthy and said == []
    text(out / "mlflow.db")
    assert import_all(out, tracking.default_uri(out)) == (0, 0, 4)


@pytest.mark.usefixtures("quickly")
def test_a_database_that_is_overwritten_while_a_sweep_writes_is_moved_away_and_the_sweep_goes_on(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_REST_SECONDS", "_GATHER_SECONDS", "_LOOK_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.05)
    runs, said = some_runs(6, rounds=2), list[str]()
    watcher = watched(out, said, tracking.default_uri(out))
    watcher.begin(runs[3:], [])
    do(out, runs[3:4], watcher)
    watcher.started(runs[4])
    wait(lambda: bool(watcher._sweep.going) and watcher._sweep.going[runs[4].id].mlflow_run is not None, 20)
    text(out / "mlflow.db")
    do(out, runs[4:], watcher)
    wait(lambda: len(said) == 2 and watcher.healthy, 20)
    watcher.finish("FINISHED", {})
    assert "is not written any more" in said[0] and "it was moved to mlflow.db.damaged-1" in said[1]
    assert import_all(out, tracking.default_uri(out)) == (6, 0, 0)


def half_made(file: Path) -> None:
    """Leave a database as a process did that was killed while it made the tables: those of a later step are there."""
    with closing(sqlite3.connect(file)) as changed:
        changed.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        changed.execute("DROP TABLE webhooks")
        changed.execute("PRAGMA user_version = 0")
        changed.commit()


def test_tables_that_were_left_half_made_are_damage_and_the_copy_that_showed_it_is_gone(out: Path) -> None:
    file, connect = out / "mlflow.db", server.import_mlflow()
    half_made(file)
    before = file.read_bytes()
    version = importlib.metadata.version("mlflow")
    assert not database.look_over(file, version)
    with pytest.raises(database.DatabaseDamaged, match="it was not written to its end"):
        database.complete(file, version, connect)
    assert file.read_bytes() == before and not list(out.glob(".mlflow*"))


def test_a_whole_database_that_nobody_has_looked_over_keeps_its_runs(out: Path) -> None:
    file, version = out / "mlflow.db", importlib.metadata.version("mlflow")
    with closing(sqlite3.connect(file)) as changed:
        changed.execute("PRAGMA user_version = 0")
    assert import_all(out, tracking.default_uri(out)) == (3, 0, 0)
    assert database.look_over(file, version) and not database.look_over(file, "another")


def test_a_database_in_use_or_on_a_full_disk_is_not_damaged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_WAIT_SECONDS", 0.1)
    with closing(sqlite3.connect(out / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(tracking.TrackingFailed, match=r"database is locked; what was imported stays, and the same"):
            import_all(out, tracking.default_uri(out))
    assert import_all(out, tracking.default_uri(out)) == (3, 0, 0)


def test_somebody_s_own_database_is_left_where_it_is(out: Path) -> None:
    own = out.parent / "own.db"
    text(own)
    with pytest.raises(tracking.TrackingFailed) as failed:
        import_all(out, f"sqlite:///{own}")
    assert f"the database {own} cannot be opened (file is not a database): move it away or use another" in str(
        failed.value
    )
    assert "the same command" not in str(failed.value) and own.read_text().startswith("this is no database")


def test_what_sqlite_keeps_beside_a_database_goes_with_it(tmp_path: Path) -> None:
    for end in ("", "-journal", "-wal", ".damaged-1"):
        (tmp_path / f"mlflow.db{end}").write_text(end)
    assert database.move_away(tmp_path / "mlflow.db").name == "mlflow.db.damaged-2"
    left = {path.name.removeprefix("mlflow.db.damaged-"): path.read_text() for path in tmp_path.iterdir()}
    assert left == {"1": ".damaged-1", "2": "", "2-journal": "-journal", "2-wal": "-wal"}


def test_nothing_stands_under_its_name_before_it_is_whole(tmp_path: Path) -> None:
    """A process that is killed while MLflow makes the tables; the next one knows nothing of it."""
    file = tmp_path / "mlflow.db"

    class Killed(BaseException):
        pass

    def connect(tracking_uri: str) -> None:
        with closing(sqlite3.connect(tracking_uri.removeprefix("sqlite:///"))) as half:
            half.execute("CREATE TABLE experiments (a)")
        assert not file.exists()
        raise Killed

    with pytest.raises(Killed):
        database.complete(file, "3", connect)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db-journal").write_bytes(b"of one that is gone")
    (tmp_path / ".mlflow.db.123.abc").write_bytes(b"of a process that was killed")
    database.complete(file, "3", make)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"] and database.look_over(file, "3")


def make(tracking_uri: str) -> None:
    with closing(sqlite3.connect(tracking_uri.removeprefix("sqlite:///"))) as made:
        made.executescript("CREATE TABLE alembic_version (a); INSERT INTO alembic_version VALUES (1)")


def test_a_disk_that_fills_inside_a_transaction_is_a_sentence(out: Path) -> None:
    (run,) = some_runs(4, rounds=2)[3:]
    write(out, run)
    most = (out / "mlflow.db").stat().st_size - 4096

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "bench", "track", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "and the same command goes on: bench track" in done.stderr and not list(out.glob("*.damaged-*"))
    assert import_all(out, tracking.default_uri(out)) in ((3, 0, 1), (3, 1, 0))
