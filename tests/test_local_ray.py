"""Ray on this machine: private while it lives, started again when it dies, and gone when its sweep ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.command.main import main
from bench.protocol.settings import BadConfig
from bench.results.claims import claim
from bench.sweep import local_ray
from bench.sweep.cluster import DEATHS_OF_RAY, import_ray
from tests.processes import SLOW, digests, finish, in_homes, of_ray, start, wait

FIRST = ("run", "--algos", "slow(seconds=0.1),fedavg", "--plugin", "slow.py", "--rounds", 6)
QUIET = ("--json", "--tracking-uri", "off")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for folders of Ray, whose path is short enough for it, with a plug-in."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        folder = Path(name)
        (folder / "slow.py").write_text(SLOW)
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        import_ray()
        yield folder


# The folder


def test_the_folder_and_the_token_are_private_and_gone_in_the_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's own")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with local_ray.home() as home:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert home.folder.parent == here and token.parent == home.folder
        assert [path.stat().st_mode & 0o777 for path in (home.folder, token)] == [0o700, 0o600]
        assert len(token.read_text()) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in os.environ, "it would be taken instead"
        with local_ray.home() as other:
            assert other.folder != home.folder and home.folder.exists()
    assert os.environ["RAY_AUTH_TOKEN"] == "the user's own"
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    assert list(here.glob("bench-ray-*")) == []


def test_watchers_are_left_out_of_ray_only_as_long_as_it_is_ours(here: Path) -> None:
    from ray._private.node import Node

    before = [vars(Node)[name] for name in local_ray._WATCHERS]
    with local_ray.home():
        assert all(vars(Node)[name] not in before for name in local_ray._WATCHERS)
    assert [vars(Node)[name] for name in local_ray._WATCHERS] == before


def test_where_names_of_sockets_would_be_too_long_the_folder_is_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = "session_2026-11-26_16-23-11_721323_4194304/sockets/plasma_store"
    assert local_ray._LONGEST + len(f"/{local_ray.PREFIX}12345678/r/{longest}") <= 107
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long" * 10)
    assert local_ray._place() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/not/there")
    with pytest.raises(BadConfig, match=r"no folder can be made in /not/there .* have RAY_TMPDIR name another one"):
        local_ray.home().__enter__()


def test_what_a_driver_that_was_killed_has_left_is_tidied_by_the_next(here: Path) -> None:
    left, going, other = (here / f"bench-ray-{name}" for name in ("left", "going", "link"))
    for folder in (left, going):
        folder.mkdir()
    other.symlink_to(going)
    code = "import sys, time; file = open(sys.argv[1], 'w'); print(flush=True); time.sleep(60)"
    agents = [
        subprocess.Popen([sys.executable, "-c", code, f"{folder}/log"], stdout=subprocess.PIPE)
        for folder in (left, going)
    ]
    for agent in agents:
        assert agent.stdout is not None and agent.stdout.readline()
    try:
        with claim(going), local_ray.home():
            agents[0].wait(5)
            assert not left.exists()
            assert agents[1].poll() is None and (going / "log").exists()
    finally:
        for agent in agents:
            agent.kill()
            agent.communicate()


def test_what_is_started_while_others_are_ended_is_ended_too(here: Path) -> None:
    code = (
        "import subprocess, sys, time; file = open(sys.argv[1], 'w'); print(flush=True)\n"
        "while True: subprocess.Popen(['sleep', '60'], stdout=file); time.sleep(0.02)"
    )
    with local_ray.home() as home:
        begun = subprocess.Popen([sys.executable, "-c", code, f"{home.folder}/log"], stdout=subprocess.PIPE)
        assert begun.stdout is not None and begun.stdout.readline()
    begun.communicate(timeout=5)
    assert in_homes([home.folder]) == []


# Ray itself


def test_a_raylet_that_is_killed_is_started_again_in_private_and_no_run_fails(here: Path) -> None:
    import psutil

    own = Path.home() / ".ray"
    before = own.exists() and [(file, file.stat().st_mtime_ns) for file in own.iterdir()]
    process = start(*FIRST, *QUIET, "--ray", "local", "--jobs", 2, "--out", "killed", cwd=here)
    wait(lambda: bool([*here.glob("killed/*/checkpoint.pt")]))
    (home,) = here.glob("bench-ray-*")
    assert home.stat().st_mode & 0o777 == 0o700
    family = of_ray(process.pid)
    assert family.keys() == {"raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent", "worker"}, "nobody looks on"
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for pids in family.values()
        for pid in pids
        if psutil.pid_exists(pid)
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3 and set(listening) == {"127.0.0.1"}
    os.kill(family["raylet"][0], signal.SIGKILL)
    printed, err = finish(process)
    assert [run["status"] for run in printed["runs"]] == ["done", "done"]
    assert "Ray's own processes died (killed, or out of memory); the run goes on from what was saved" in err
    assert "another one will go on" not in err and "\x1b" not in err, "Ray itself is not heard"
    assert list(here.glob("bench-ray-*")) == [] and in_homes([home]) == []
    assert before == (own.exists() and [(file, file.stat().st_mtime_ns) for file in own.iterdir()])
    whole, _ = finish(start(*FIRST, *QUIET, "--ray", "off", "--out", "whole", cwd=here))
    assert digests(printed) == digests(whole)


@pytest.mark.parametrize("kind", [RuntimeError, Exception])  # the latter of a raylet that was killed as it started
def test_ray_that_does_not_start_leaves_the_runs_waiting_and_says_so(
    kind: type[Exception], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[str] = []

    def init(**options: object) -> None:
        tries.append(os.environ["RAY_AUTH_TOKEN_PATH"])
        raise kind("no\nmore")

    monkeypatch.chdir(here)
    monkeypatch.setattr(import_ray(), "init", init)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, FIRST), *QUIET, "--ray", "local"], prog_name="bench")
    said = "bench: --ray local: Ray does not start or answer there (no); 0 of 2 runs are done and kept, the others wait"
    err = capsys.readouterr().err
    assert ended.value.code == 1 and f"{said}. The same command goes on: " in err
    assert not list(here.glob("runs/*/run.json")) and len(set(tries)) == len(tries) == DEATHS_OF_RAY + 1


def test_nothing_of_ray_is_left_when_it_is_interrupted_while_it_starts(here: Path) -> None:
    """As from a terminal, where all of a group are told, or by a scheduler."""
    moments = {"gcs_server": signal.SIGINT, "raylet": signal.SIGINT, "DashboardAgent": signal.SIGTERM}
    begun = {what: start(*FIRST, *QUIET, "--ray", "local", "--out", what, cwd=here) for what in moments}
    until = time.monotonic() + 120
    waiting = dict(moments)
    while waiting and time.monotonic() < until:
        for what in [what for what in waiting if what in of_ray(begun[what].pid)]:
            how = waiting.pop(what)
            if how == signal.SIGINT:
                os.killpg(begun[what].pid, how)
            else:
                begun[what].send_signal(how)
    assert not waiting
    interrupted = time.monotonic()
    for what, process in begun.items():
        _, err = finish(process, status=130)
        assert "interrupted: 0 of 2 runs are done and kept" in err, what
    assert time.monotonic() - interrupted < 60  # on a busy machine; 20 s are meant
    assert in_homes([here]) == [] and list(here.glob("bench-ray-*")) == []
