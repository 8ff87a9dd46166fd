"""The suite's canonical call, `bench run --algos fedloge,fedrep --dataset inat`, from photographs to a table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import trees

NAME = "inat(classes=6, pixels=16)"
SMALL = ["--model", "small_cnn", "--rounds", "2", "--clients", "4", "--set", "eval_every=1", "--tracking-uri", "off"]


def bench(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def digests(root: Path, out: Path, *more: str) -> dict[str, tuple[str, str]]:
    done = bench(
        "run", "--algos", "fedloge,fedrep", "--dataset", NAME, *SMALL, "--ray", "off",
        "--data-root", root, "--out", out, "--json", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {run["algorithm"]: (run["digest"], run["metrics"]["personal"]) for run in json.loads(done.stdout)["runs"]}


def prepare(root: Path, jobs: int) -> subprocess.CompletedProcess[str]:
    return bench("data", "prepare", "inat(classes=6)", "--size", 16, "--jobs", jobs, "--data-root", root)


def test_without_data_the_call_ends_with_instructions(tmp_path: Path) -> None:
    done = bench("run", "--algos", "fedloge,fedrep", "--dataset", "inat", "--data-root", tmp_path, "--out", tmp_path)
    assert done.returncode == 3 and not done.stdout
    for word in ("train2018.json", "iNaturalist18_train.txt", "bench data fetch inat", "120 GB", "inat2018"):
        assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_photographs_that_are_not_prepared_are_said_to_be(tmp_path: Path) -> None:
    trees.inat(tmp_path, classes=6, largest=6, smallest=3, tested=1)
    done = bench("run", "--dataset", NAME, "--algos", "fedavg", "--data-root", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 3
    assert f"run once: bench data prepare 'inat(classes=6)' --size 16 --data-root {tmp_path}" in done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """A tree prepared in one go by one worker, and what two algorithms make of it."""
    root = tmp_path_factory.mktemp("one")
    trees.inat(root, classes=6, largest=60, smallest=10, tested=4)
    done = prepare(root, jobs=1)
    assert done.returncode == 0, done.stderr
    return root, digests(root, root / "out")


def test_the_call_ends_with_a_table(undisturbed: tuple[Path, dict[str, tuple[str, str]]]) -> None:
    root, found = undisturbed
    assert found.keys() == {"fedloge", "fedrep"}
    done = bench("table", "--out", root / "out")
    assert done.returncode == 0
    assert "inat(pixels=16, classes=6), imbalance natural, alpha 0.5, setting quick" in done.stdout
    assert "fedloge" in done.stdout and "fedrep" in done.stdout


def test_two_workers_killed_in_between_make_the_same_run(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, tuple[str, str]]]
) -> None:
    trees.inat(tmp_path, classes=6, largest=60, smallest=10, tested=4)
    command = [sys.executable, "-m", "bench", "data", "prepare", "inat(classes=6)", "--size", "16", "--jobs", "2"]
    first = subprocess.Popen(
        [*command, "--data-root", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while first.poll() is None and not any((tmp_path / "prepared").glob("*/parts/*")):
        time.sleep(0.02)
    killed = first.poll() is None
    if killed:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = prepare(tmp_path, jobs=2)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path, tmp_path / "out") == undisturbed[1]


def test_natural_users_are_clients_and_a_sample_of_them_is_tested(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, tuple[str, str]]]
) -> None:
    root, _ = undisturbed
    stats = bench("data", "stats", NAME, "--partition", "users", "--data-root", root, "--json", "--clients", "5")
    assert stats.returncode == 0, stats.stderr
    assert len(json.loads(stats.stdout)["clients"]) == 5
    done = bench(
        "run", "--algos", "fedrep", "--dataset", NAME, "--partition", "users", "--eval-clients", 3,
        *SMALL, "--ray", "off", "--data-root", root, "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "personal models of 3 clients tested" in bench("table", "--out", tmp_path, "--format", "md").stdout
