"""Sweeps on hosts that share nothing but Ray: code and data go there, results come home, whatever fails meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hosts import Host, cluster, hosts, lacking
from tests.processes import ROOT, digests, finish, start, wait

PLUGIN = '''
"""Slow: FedAvg that takes its time, on pictures that lie in a folder.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        everywhere
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bench import Algorithm, DataMissing, Dataset, Splits, register


@register("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(Algorithm):
    seconds: float = 0.0

    def local_update(self, task, shared, private, data):
        written = Path(os.environ["HOME"]) / f"at work.{os.getpid()}"
        written.write_text(str(os.getpid()))
        written.replace(written.with_suffix(""))
        time.sleep(self.seconds)
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private


@register("pictures")
@dataclass(frozen=True, kw_only=True)
class Pictures(Dataset):
    num_classes: ClassVar[int] = 4
    image_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.3,)

    def load(self, root):
        if not (root / "pictures.npz").is_file():
            raise DataMissing(f"{root} has no pictures.npz; put it there")
        stored = np.load(root / "pictures.npz")
        return Splits(*(torch.from_numpy(stored[key]) for key in ("train_x", "train_y", "test_x", "test_y")))
'''
SWEEP = (
    "run", "--algos", "slow(seconds=0.02),fedrep", "--dataset", "pictures", "--plugin", "slow.py", "--model", "mlp",
    "--clients", "6", "--imbalance", "4", "--json", "--tracking-uri", "off",
)  # fmt: skip

LACKING = lacking()
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"hosts cannot be made here: {LACKING}")
"""Only who may make name spaces can: the root of a machine, or of a container that was given that right."""


def fill(folder: Path) -> None:
    """Write the plug-in, and pictures below a folder of data."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "slow.py").write_text(PLUGIN)
    draws = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 400), ("test", 200)):
        arrays[f"{part}_x"] = draws.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
        arrays[f"{part}_y"] = np.arange(n) % 4
    np.savez(folder / "data" / "pictures.npz", **arrays)


def installed() -> Path | None:
    """Find the package that the interpreter has by itself, which may be that of another checkout."""
    code = "import bench; print(bench.__file__)"
    there = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=there, capture_output=True, text=True, check=False
    )
    return Path(found.stdout.strip()).parent if found.returncode == 0 else None


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Host], str]]:
    """Three hosts of one cluster, of which the first has the checkout, the pictures and no core for runs."""
    folder = tmp_path_factory.mktemp("hosts")
    package = installed()
    away = [ROOT] if package is None or package.is_relative_to(ROOT) else [ROOT, package]
    with hosts(3, folder, hidden=away) as made:
        fill(made[0].folder)
        yield made, cluster(made)


def begin(three: tuple[list[Host], str], *more: object, out: str = "runs") -> subprocess.Popen[str]:
    made, address = three
    words = (sys.executable, "-m", "bench", *SWEEP, "--ray", address, "--out", out, *more)
    return made[0].start(*words, PYTHONPATH=str(ROOT))


def here(tmp_path: Path, *more: object) -> Any:
    """Do the same on this machine alone."""
    fill(tmp_path)
    done = start(*SWEEP, *more, "--ray", "off", "--data-root", tmp_path / "data", "--out", "runs", cwd=tmp_path)
    return finish(done)[0]


def written(host: Host) -> set[str]:
    """Name what a host holds of ours: Ray's own aside."""
    kept = {"home", "tmp", "data", "shm", "ray", "ready"}
    ours = {path.name for path in host.folder.iterdir()} - kept
    return ours | {str(path.relative_to(host.folder)) for path in (host.folder / "data").rglob("*") if path.is_file()}


def test_a_sweep_goes_out_with_its_code_and_data_and_comes_home_with_the_bits_of_one_machine(
    three: tuple[list[Host], str], tmp_path: Path
) -> None:
    made, _ = three
    printed, err = finish(begin(three, "--seeds", "3", "--rounds", "2", "--keep-models"))
    assert [run["status"] for run in printed["runs"]] == ["done"] * 6
    assert err.count("its machine lacks the data; they go along now") >= 1
    (packs,) = {frozenset(written(host)) for host in made[1:]}
    assert len(packs) == 1 and next(iter(packs)).startswith("data/packs/"), "nothing but the pack lies there"
    assert not [*made[1].folder.glob("tmp/bench-run-*"), *made[2].folder.glob("tmp/bench-run-*")]
    for run in printed["runs"]:
        names = {path.name for path in (made[0].folder / "runs" / run["id"]).iterdir()}
        assert names == {"run.json", "rounds.parquet", "counts.parquet", "predictions.parquet", "models"}
    assert digests(printed) == digests(here(tmp_path, "--seeds", "3", "--rounds", "2"))
    again, err = finish(begin(three, "--seeds", "5", "--rounds", "2"))
    assert sorted(run["status"] for run in again["runs"]) == ["cached"] * 6 + ["done"] * 4
    assert "and 0.0 MB of data" in err


def test_workers_hosts_cables_and_drivers_that_fail_cost_nothing_that_was_finished(
    three: tuple[list[Host], str], tmp_path: Path
) -> None:
    made, _ = three
    # long enough for all that goes wrong: a round takes more than half a second, however fast the machine
    asked = ("--algos", "slow(seconds=0.3)", "--seeds", "4", "--rounds", "25")
    out, at_work = made[0].folder / "faults", made[1].folder / "home" / "at work"

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}

    def number() -> str:
        """Wait until a worker on the second host trains, and give its number."""
        at_work.unlink(missing_ok=True)
        wait(at_work.exists)
        return at_work.read_text()

    for _ in range(3):
        driver = begin(three, *asked, out="faults")
        wait(lambda: [*out.glob("*/checkpoint.pt")] != [])
        kept = finished()
        driver.kill()
        driver.communicate()
        assert finished() == kept
    driver = begin(three, *asked, out="faults")
    subprocess.run(["kill", "-9", number()], check=True)
    number()
    made[2].cut()
    time.sleep(3)
    made[2].cut(False)
    number()
    kept = finished()
    made[1].kill()
    printed, err = finish(driver)
    assert err.count("another one will go on") >= 2, "a worker and a host"
    assert {path: time for path, time in finished().items() if path in kept} == kept
    assert {run["status"] for run in printed["runs"]} <= {"done", "cached"}
    alone = here(tmp_path, "--algos", "slow", "--seeds", "4", "--rounds", "25")  # time changes no bit
    assert [run["digest"] for run in printed["runs"]] == [run["digest"] for run in alone["runs"]]
    assert not [*out.glob("*/checkpoint*"), *out.glob("*/claim"), *out.glob("*/progress.jsonl")]
