"""Memory on real data: a run with many personal models stays small."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

GIBIBYTE = 2**30


@pytest.mark.real
def test_forty_full_personal_resnets_on_cifar10_stay_under_two_gibibytes() -> None:
    """All of CIFAR-10 is loaded and all forty models are trained, kept, sent and tested, on a few images each."""
    root = Path(os.environ.get("BENCH_DATA", "/nowhere"))
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"{root}/cifar-10-batches-py is not there")
    code = """
        from dataclasses import replace
        from pathlib import Path
        import sys
        import torch
        torch.set_num_threads(1)
        from bench.dataset import Labels
        from bench.plugins.registry import ALGORITHMS, DATASETS
        from bench.training.job import Job
        from bench.training.rounds import Run
        from bench.protocol.bundles import SETTINGS
        from bench.splits.split import make_split

        dataset = DATASETS["cifar10"]()
        splits = dataset.load(Path(sys.argv[1]))
        setting = replace(SETTINGS["quick"](dataset), imbalance=50.0, clients=40, participation=1.0, rounds=1)
        split = make_split(splits.labels, 10, setting, 0)
        run = Run(Job(ALGORITHMS["ditto"](), dataset, splits, split, setting, 0, "serial"))
        run.population.index = [rows[:32] for rows in run.population.index]
        run.population.tests = [rows[:130] for rows in run.population.tests]
        test = run.population.test
        test.x, test.y = test.x[:1000], test.y[:1000]
        run.population.official = torch.arange(1000)
        run.population.tests = [rows[rows < 1000] for rows in run.population.tests]
        run.step()
        assert len(run.store.clients()) == 40
        print(run.outcome().cost["peak_memory_bytes"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 2 * GIBIBYTE
