"""Any method with any part, on digits for a few rounds: which run, and why others are refused.

python -m tests.pairs                 # every method with every loss
python -m tests.pairs correction      # with every correction, channel or aggregation
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

from bench.plugins.registry import ALGORITHMS, PARTS
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms, parse_datasets
from bench.sweep.config import Sweep
from bench.sweep.execution import job
from bench.training.rounds import Run

ROUNDS = 3


def main(kind: str) -> int:
    """Run all pairs, and say what became of them.

    Returns:
        How many neither ran nor were refused.
    """
    torch.set_num_threads(1)
    ran, refused, failed = 0, defaultdict[str, list[str]](list), {}
    for method in ALGORITHMS:
        for part in (name for name in PARTS if PARTS[name].kind == kind):
            call = f"{method}+{part}"
            try:
                metrics = run(call)
            except BadConfig as error:
                refused[str(error).rpartition(": ")[2]].append(call)
            except Exception as error:  # whatever it is, it belongs into the list
                failed[call] = f"{type(error).__name__}: {error}"
            else:
                tested = [metrics.get(model) for model in ("generic", "personal")]
                if any(share is not None and 0 <= share <= 1 for share in tested):
                    ran += 1
                else:
                    failed[call] = "no model was tested"
    print(f"{ran + sum(map(len, refused.values())) + len(failed)} pairs: {ran} ran, {len(failed)} failed")
    for reason, calls in refused.items():
        methods = Counter(call.partition("+")[0] for call in calls)
        print(f"{len(calls)} refused: {reason} ({', '.join(methods)})")
    for call, reason in failed.items():
        print(f"{call}: {reason}")
    return len(failed)


def run(call: str) -> dict[str, float | None]:
    """Run one pair, and give its metrics."""
    (algorithm,) = parse_algorithms(call)
    needs = {"auxiliary": "own:4"} if {"auxiliary", "public"} & algorithm.needs else {}
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(
            algorithms=(algorithm,),
            datasets=tuple(parse_datasets("digits")),
            seeds=(0,),
            overrides={"rounds": ROUNDS, "eval_every": ROUNDS, **needs},
            data_root=Path(folder),
        )
        (asked,) = sweep.expand()
        run = Run(job(asked))
        while run.progress.round < ROUNDS:
            run.step()
        return dict(run.outcome().metrics)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:] or ("loss",)), 1))
