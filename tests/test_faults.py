"""What goes wrong in a sweep: workers, machines, drivers, disks and memory that fail, models that diverge.

Everything runs in processes of its own, which are killed by their number; clusters of several nodes on this machine.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.results.claims import Claimed, _remark, claim, is_claimed
from tests.processes import ROOT, digests, finish, start, wait

FAULTY = '''
"""Faulty: FedAvg in which something goes wrong.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        everywhere
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import Algorithm, register, tree

HERE = Path(os.environ["FAULTY"])


def note(name, text):  # whole or not at all: the test reads it meanwhile, and two workers may write it
    written = HERE / f"{name}.{os.getpid()}"
    written.write_text(text)
    written.replace(HERE / name)


@register("faulty")
@dataclass(frozen=True, kw_only=True)
class Faulty(Algorithm):
    fault: str = "none"
    name: str = ""
    seconds: float = 0.0
    stackable = False

    def init_server(self, task):
        with (HERE / "begun").open("a") as file:
            file.write(f"{self.fault} {self.name} {task.init()['head']['weight'].sum():.6f}\\\\n")
        return task.init()

    def local_update(self, task, shared, private, data):
        if int(task.round) == 0:
            with (HERE / "first").open("a") as file:
                file.write(".")
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            node = sys.modules["ray"].get_runtime_context().get_node_id()
            note(f"node-{self.fault}{self.name}", node)
        note(f"pid-{self.fault}{self.name}", str(os.getpid()))
        time.sleep(self.seconds)
        late = int(task.round) >= 3
        if self.fault == "dies" and late:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raises" and late:
            raise KeyError("what is not there")
        if self.fault == "hungry" and late and not (HERE / "over").exists():
            raise MemoryError("no more of it")
        model = task.sgd(task.loss, shared, data.batches(task.epochs))
        if self.fault == "diverges" and late:
            model = tree.map(lambda leaf: leaf * torch.nan, model)
        if self.fault == "fills" and late:
            (Path(os.environ["FILLS"]) / "stuff").write_bytes(b"0" * 10**9)
        return model, private
'''
QUIET = ("--json", "--tracking-uri", "off")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the plug-in, in which it notes what it does."""
    (tmp_path / "faulty.py").write_text(FAULTY.replace("\\\\", "\\"))
    monkeypatch.setenv("FAULTY", str(tmp_path))
    yield tmp_path


def words(algorithms: str, *more: object, rounds: int = 12) -> tuple[object, ...]:
    return ("run", "--algos", algorithms, "--plugin", "faulty.py", "--rounds", rounds, *QUIET, *more)


def begun(here: Path) -> Counter[str]:
    """How often runs began at their first round."""
    file = here / "begun"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def number(here: Path, name: str) -> int:
    """Wait for the process that does a run, and give its number."""
    file = here / f"pid-{name}"
    wait(file.exists)
    return int(file.read_text())


# Workers ----------------------------------------------------------------------------------------------------


def test_a_run_whose_workers_are_killed_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(here: Path) -> None:
    asked = words("faulty(seconds=0.05),fedavg", rounds=30)
    whole, _ = finish(start(*asked, "--ray", "off", "--out", "whole", cwd=here))
    (here / "pid-none").unlink()
    process = start(*asked, "--ray", "local", "--out", "killed", cwd=here)
    for how in (signal.SIGKILL, signal.SIGTERM):  # the second is what Ray ends workers by
        seen = checkpoints(here, whole["runs"][0]["id"])
        wait(lambda seen=seen: checkpoints(here, whole["runs"][0]["id"]) - seen)  # type: ignore[misc]
        os.kill(number(here, "none"), how)
    killed, err = finish(process)
    assert digests(killed) == digests(whole)
    assert [run["status"] for run in killed["runs"]] == ["done", "done"]
    assert err.count("the worker died (killed, or out of memory); another one will go on") == 2
    assert (here / "first").read_text().count(".") == 16, "eight clients in each sweep: what was saved is not redone"


def checkpoints(folder: Path, run_id: str) -> set[int]:
    return {path.stat().st_mtime_ns for path in folder.glob(f"killed/{run_id}/checkpoint.pt")}


def test_a_run_that_kills_every_worker_fails_with_a_reason_and_the_others_are_done(here: Path) -> None:
    printed, err = finish(start(*words("faulty(fault='dies'),fedavg"), "--ray", "local", cwd=here), status=1)
    failed, done = printed["runs"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert failed["reason"].startswith("the worker died (killed, or out of memory), 3 times in a row")
    told = json.loads((here / "runs" / failed["id"] / "run.json").read_text())
    assert told["reason"] == failed["reason"] and told["started"] is None and told["finished"] is not None
    assert err.count("another one will go on") == 2


@pytest.mark.parametrize("ray", ["off", "local"])
def test_a_model_that_diverges_and_a_plugin_that_raises_fail_alone_and_say_why(here: Path, ray: str) -> None:
    asked = words("faulty(fault='diverges'),fedavg,faulty(fault='raises')")
    printed, err = finish(start(*asked, "--ray", ray, cwd=here), status=1)
    assert [run["status"] for run in printed["runs"]] == ["failed", "done", "failed"]
    assert "no longer finite" in printed["runs"][0]["reason"] and "'what is not there'" in printed["runs"][2]["reason"]
    assert "2 of 3 runs failed" in err
    table = start("table", "--format", "md", cwd=here).communicate()[0]
    assert "seed 0 failed" in table and "no longer finite" in table and "what is not there" in table
    again, _ = finish(start(*asked, "--ray", "off", cwd=here), status=1)
    assert [run["status"] for run in again["runs"]] == ["failed", "cached", "failed"]


def test_a_run_that_ran_out_of_memory_goes_on_alone(here: Path) -> None:
    process = start(*words("faulty(fault='hungry'),faulty(seconds=0.2)"), "--ray", "local", "--jobs", "2", cwd=here)
    number(here, "hungry")
    wait(lambda: any(here.glob("runs/*/run.json")))  # the failure is on disk, and the other run still goes on
    (here / "over").touch()
    printed, err = finish(process)
    assert [run["status"] for run in printed["runs"]] == ["done", "done"]
    assert "no more of it" in err and "it will go on alone" in err


def test_runs_that_ray_stops_for_want_of_memory_get_all_of_it_once_and_then_fail_with_a_reason(here: Path) -> None:
    little = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}  # more is always in use
    asked = words("faulty(seconds=0.1),faulty(name='other', seconds=0.1)", rounds=50)
    printed, err = finish(start(*asked, "--ray", "local", "--jobs", "2", cwd=here, **little), status=1)
    assert err.count("memory ran out; fewer --jobs need less; it will go on alone") == 2
    assert all("memory ran out" in run["reason"] for run in printed["runs"])


# Machines ---------------------------------------------------------------------------------------------------

CLUSTER = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster

here = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
(here / "address").write_text(cluster.address)
for line in sys.stdin:
    node = next(node for node in nodes if node.node_id == line.strip())
    cluster.remove_node(node, allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster(here: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a cluster of two nodes beside its head; the number of a node on standard input removes it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLUSTER, str(here)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        start_new_session=True,
    )
    try:
        wait((here / "address").exists)
        yield process
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_run_whose_machine_is_lost_goes_on_on_another(here: Path, cluster: subprocess.Popen[str]) -> None:
    address = (here / "address").read_text()
    asked = words("faulty(seconds=0.05),fedavg", rounds=30)
    process = start(*asked, "--ray", address, "--out", "killed", cwd=here)
    wait(lambda: bool(checkpoints(here, "*")) and (here / "node-none").exists())
    assert cluster.stdin is not None and cluster.stdout is not None
    node = (here / "node-none").read_text()
    cluster.stdin.write(node + "\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "removed\n"
    printed, err = finish(process)
    assert [run["status"] for run in printed["runs"]] == ["done", "done"]
    assert "another one will go on" in err
    whole, _ = finish(start(*asked, "--ray", "off", "--out", "whole", cwd=here))
    assert digests(printed) == digests(whole)


# Drivers ----------------------------------------------------------------------------------------------------


def test_two_drivers_on_one_folder_do_each_run_once(here: Path) -> None:
    asked = words("faulty(seconds=0.02)", "--seeds", "4", rounds=8)
    drivers = [start(*asked, "--ray", ray, cwd=here) for ray in ("off", "local")]
    printed = [finish(driver)[0] for driver in drivers]
    assert digests(printed[0]) == digests(printed[1])
    assert sorted(begun(here).values()) == [1, 1, 1, 1], "each seed was begun by one of the two"


def test_a_run_is_claimed_by_one_process_and_given_back_by_one_that_is_killed(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from bench.results.claims import claim\n"
    code += "with claim(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    assert is_claimed(tmp_path)
    with pytest.raises(Claimed), claim(tmp_path):
        pass
    other.kill()
    other.communicate()
    assert not is_claimed(tmp_path)
    with claim(tmp_path):
        assert is_claimed(tmp_path)
    assert not is_claimed(tmp_path) and list(tmp_path.iterdir()) == []


def test_that_nobody_is_kept_away_on_a_file_system_without_locks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("bench.results.claims.fcntl.flock", flock)
    _remark.cache_clear()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with claim(tmp_path / name):
            pass
    said = capsys.readouterr().err
    assert said.startswith("the file system has no locks: two sweeps") and said.count("\n") == 1
    with claim(tmp_path):
        _remark.cache_clear()  # another process, which only looks
        assert not is_claimed(tmp_path) and not is_claimed(tmp_path)
    assert capsys.readouterr().err == said
    monkeypatch.undo()
    _remark.cache_clear()
    with claim(tmp_path):
        assert is_claimed(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_claim_that_is_given_back_while_another_process_asks_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    really = os.open

    def given_back_meanwhile(file: Path, *how: int) -> int:
        handle = really(file, *how)
        if not opened:  # its holder ends before we have locked what we opened, and takes the name away
            file.unlink()
        opened.append(handle)
        return handle

    monkeypatch.setattr("bench.results.claims.os.open", given_back_meanwhile)
    with claim(tmp_path):
        assert is_claimed(tmp_path), "a claim on a file without a name keeps nobody out"
    assert not is_claimed(tmp_path)


def test_a_sweep_whose_driver_is_killed_three_times_ends_with_the_bits_of_one_that_was_not(here: Path) -> None:
    asked = words("faulty(seconds=0.01),fedrep", "--seeds", "3", rounds=10)
    for kill in range(3):
        process = start(*asked, "--ray", "local", "--out", "killed", cwd=here)
        wait(lambda least=kill + 1: len([*here.glob("killed/*/run.json")]) >= least)  # type: ignore[misc]
        kept = {path: path.stat().st_mtime_ns for path in here.glob("killed/*/run.json")}
        process.kill()
        process.communicate()
    killed, _ = finish(start(*asked, "--ray", "local", "--out", "killed", cwd=here))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was finished is not written again"
    whole, _ = finish(start(*asked, "--ray", "off", "--out", "whole", cwd=here))
    assert digests(killed) == digests(whole)


# Disks ------------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_runs_in_a_sentence_loses_nothing_and_the_same_command_goes_on(here: Path) -> None:
    """In a name space of its own, where a small disk can be mounted."""
    disk = here / "disk"
    disk.mkdir()
    space = ["unshare", "-rm"]
    probe = [*space, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    command = [sys.executable, "-m", "bench", *map(str, words("fedavg,faulty(fault='fills'),fedper"))]
    script = f"""
mount -t tmpfs -o size=2m none {disk}
"$@"
echo ----
rm {disk}/stuff
FILLS=/nowhere "$@"
"""
    done = subprocess.run(
        [*space, "sh", "-c", script, "sh", *command, "--ray", "off", "--out", str(disk / "runs")],
        capture_output=True, text=True, cwd=here, check=False, env={**os.environ, "FILLS": str(disk)},
    )  # fmt: skip
    first, second = (json.loads(printed)["runs"] for printed in done.stdout.split("----"))
    assert [run["status"] for run in first] == ["done", "failed", "failed"], done.stderr
    assert all("No space left on device" in run["reason"] for run in first[1:])
    assert [run["status"] for run in second] == ["cached", "failed", "done"], "the plug-in has nothing to fill"
    assert second[0]["digest"] == first[0]["digest"] and "Traceback" not in done.stderr
