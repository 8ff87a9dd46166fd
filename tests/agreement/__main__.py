"""The study: `python -m tests.agreement [METHOD...] --code FOLDER [--seeds N] [--json FILE] [--write FILE]`.

FOLDER is an authors' checkout, or holds all of them, each called as its repository: FOLDER/FedRep. Without METHOD all
are done; without --code nothing is, and only the table is written.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import torch

from tests.agreement import authors, report
from tests.agreement.problem import Case, Models, Problem
from tests.agreement.report import Row

End: TypeAlias = tuple[Models, dict[str, float | None]]
"""Models, and their metrics."""
Known: TypeAlias = dict[str, End]
METHODS = tuple(sorted(module.name for module in pkgutil.iter_modules(authors.__path__)))


def compared(method: str, case: Case, folder: Path, seeds: int, known: Known) -> list[Row]:
    """Do a case with some seeds: a row for each metric.

    Args:
        method: Its name.
        case: The case.
        folder: Of the authors' code.
        seeds: How many.
        known: What our runs have ended with; what is missing is put in.
    """
    module = import_module(f"{authors.__name__}.{method}")
    rows = [Row(method, case.name, f"{module.REPOSITORY}@{module.COMMIT}", metric) for metric in case.metrics]
    usual = Case("", case.theirs, case.metrics, "fedavg", setting=case.setting)
    for seed in range(seeds):
        problem = Problem(case, seed)
        ours, measured = _ours(case, seed, known)
        _, of_fedavg = _ours(usual, seed, known)
        theirs = case.theirs(problem, folder)
        tested = problem.tested(theirs)
        for row in rows:
            row.ours.append(measured[row.metric])
            row.theirs.append(tested[row.metric])
            row.apart.append(problem.apart(row.metric, theirs, ours))
            row.fedavg.append(of_fedavg[row.metric])
    return rows


def _ours(case: Case, seed: int, known: Known) -> End:
    """Give what our run ends with, which several cases may have."""
    key = repr((case.algorithm, sorted(case.fields.items()), sorted(case.setting.items()), seed))
    if key not in known:
        known[key] = Problem(case, seed).ours()
    return known[key]


def main() -> None:
    """Do what was asked for, tell, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--code", type=Path, help="the authors' checkout, or a folder of several; without, nothing is done"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name has it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="instead of the case's, for a quick look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of all rows, in which those done now are put")
    parser.add_argument("--write", type=Path, metavar="FILE", help="whose table is written anew from all rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = report.read(given.json)
    known: Known = {}
    for method in (given.methods or METHODS) if given.code is not None else ():
        if method not in METHODS:
            parser.error(f"{method}: there is {', '.join(METHODS)}")
        module = import_module(f"{authors.__name__}.{method}")
        folder = given.code.resolve()
        own = folder / module.REPOSITORY.split("/")[1]
        for case in (case for case in module.CASES if given.case in case.name):
            if given.rounds is not None:
                case = replace(case, setting={**case.setting, "rounds": given.rounds})
            began = time.perf_counter()
            found = compared(method, case, own if own.is_dir() else folder, given.seeds, known)
            rows = report.put(rows, found)
            if given.json is not None:
                given.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
            seconds = time.perf_counter() - began
            print(f"{report.table(found)}\n{seconds / given.seeds:.1f} s a seed\n", flush=True)
    if given.write is not None:
        report.write(given.write, rows)


if __name__ == "__main__":
    main()
