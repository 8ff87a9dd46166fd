"""A sweep whose driver is killed again and again, compared with one that is left alone: `python -m tests.endurance`.

Two hundred runs on digits by default, some ten minutes on two cores; not a part of `pytest`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.processes import digests, finish, start, wait

ALGORITHMS = "local,fedavg,fedprox,scaffold,fedper,fedrep(head_epochs=2),fedrod,ditto,fedbabu,fedloge"


def main() -> None:
    """Run both sweeps, and print what was lost, what was done twice, and whether all digests are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of each of ten algorithms")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    options = ("--ray", "local", "--json", "--tracking-uri", "off")
    asked = ("run", "--algos", ALGORITHMS, "--seeds", given.seeds, "--rounds", given.rounds, *options)
    runs = 10 * given.seeds
    with tempfile.TemporaryDirectory() as folder:
        here, kept = Path(folder), dict[Path, int]()
        began = time.perf_counter()
        for kill in range(given.kills):
            process = start(*asked, "--out", "killed", cwd=here)
            least = runs * (kill + 1) // (given.kills + 1)
            wait(lambda least=least: len(finished(here)) >= least, seconds=3600)  # type: ignore[misc]
            process.kill()
            process.communicate()
            kept = finished(here)
            print(f"killed with {len(kept)} of {runs} runs done, {time.perf_counter() - began:.0f} s")
        killed, _ = finish(start(*asked, "--out", "killed", cwd=here), seconds=3600)
        again = sum(finished(here)[path] != when for path, when in kept.items())
        print(f"finished after {time.perf_counter() - began:.0f} s; done again although finished: {again}")
        began = time.perf_counter()
        whole, _ = finish(start(*asked, "--out", "whole", cwd=here), seconds=3600)
        print(f"undisturbed: {time.perf_counter() - began:.0f} s")
    equal = sum(digest == digests(killed)[run_id] for run_id, digest in digests(whole).items())
    print(f"equal digests: {equal} of {len(whole['runs'])}")


def finished(folder: Path) -> dict[Path, int]:
    """Give when each finished run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("killed/*/run.json")}


if __name__ == "__main__":
    main()
