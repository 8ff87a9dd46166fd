"""Thousands of stored runs, for measuring what reads them: `python -m tests.thousands 1000 OUT`.

Training 4,000 runs would take a day, so only their splits are made. Each takes a run of `results/` for its template:
the algorithm, its costs, and how often its models were right about each class after each round; with another seed it
has another identity, split and cohorts, and its right answers are drawn so that the curves are about those of the
template. Metrics are computed from what was drawn. `bench validate` finds nothing wrong with them, and `--rerun` would.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.files import data_root
from bench.protocol.identity import identify
from bench.results import records, tables
from bench.results.record import Record
from bench.training import metrics
from bench.training.population import rests_on
from bench.validation.expected import Dealt, Numbers, dealt, evaluations, ever_drawn, first_drawn, sent
from bench.validation.rebuilding import Asked, rebuild
from tests.answers import from_rows

Rates = dict[tuple[str, int], dict[int, float]]
"""By model and round: how often it was right about each class."""
FOLLOWS = ("bytes_down", "client_state_bytes", "client_rounds")
"""Costs that are told by cohorts and shapes."""
TEMPLATES = Path(__file__).parents[1] / "results"


def templates(out: Path = TEMPLATES) -> list[Record]:
    """Give a run of each algorithm on the digits."""
    found = [each for each in records.read_all(out)[0] if each.status == "done" and each.dataset == "digits"]
    return list({each.call: each for each in found}.values())


def make(n: int, out: Path, first: int = 1000, models: Sequence[Record] | None = None) -> list[str]:
    """Store n runs of the templates' algorithms, seed after seed, and give their ids."""
    known = [(each, _rates(each)) for each in models or templates()]
    return [_store(out, *known[k % len(known)], first + k // len(known)) for k in range(n)]


def _store(out: Path, template: Record, rates: Rates, seed: int) -> str:
    identity = {**template.identity, "seed": seed}
    asked = rebuild(replace(template, identity=identity, seed=seed))
    root = data_root(None)
    given, first_in = dealt(asked, root), first_drawn(asked, int(str(template.clients)))
    rows = list(_answers(rates, asked, given, first_in, np.random.default_rng(int(identify(identity), 16))))
    classes = len(template.class_counts)
    groups = {name: torch.tensor(those) for name, those in given.described["groups"].items()}  # type: ignore[attr-defined]
    curves: list[dict[str, Any]] = []
    for round in evaluations(asked.trained_by):
        cells = [row for row in rows if row["round"] == round]
        curves.append({"round": round, **metrics.summarise(*_summed(cells, classes, groups))})
    measured = {key: value for key, value in curves[-1].items() if key != "round"}
    for key in metrics.FOLLOWED:
        measured |= {f"{key}@last10": metrics.last_mean(curves, key), f"{key}@best": metrics.best(curves, key)}
    run = identify(identity)
    known = sent(asked, int(str(template.clients)))
    scales = {
        **dict.fromkeys(("wall_seconds", "device_seconds"), 0.9 + 0.2 * int(run, 16) / 16**12),  # never the same time
        **dict.fromkeys(("train_samples", "train_flops"), given.visited / dealt(rebuild(template), root).visited),
    }
    cost = {
        **{key: value and value * scales.get(key, 1) for key, value in template.cost.items()},
        **({} if known is None else {key: getattr(known, key) for key in FOLLOWS if key in template.cost}),
    }
    document = {
        **{key: value for key, value in template.document.items() if key not in ("files", "tables", "format")},
        **given.described,
        "identity": identity,
        "seed": seed,
        "metrics": measured,
        "cost": cost,
        "digest": hashlib.sha256(run.encode()).hexdigest(),
        "tested": rests_on(given.images, given.classes, ever_drawn(asked, int(str(template.clients)))),
    }
    last = max(row["round"] for row in rows)
    earlier = [row for row in rows if row["round"] < last]
    spread = [each for row in rows if row["round"] == last for each in _spread(row, given)]
    counts = {key: [row[key] for row in earlier] for key in tables.COUNT_COLUMNS}
    predictions = {key: [row[key] for row in spread] for key in tables.PREDICTION_COLUMNS}
    records.write(out, run, document, curves, counts, predictions)
    return run


def _spread(row: dict[str, Any], given: Dealt) -> Iterator[dict[str, Any]]:
    """Say which classes an evaluation took the images of a class for: the wrong ones lie in up to three others."""
    kind = row["model"].split(":")[0].split(".")[0]
    here = given.tested[kind][1][given.tested[kind][0] == row["client"]]
    others = [label for label in here.tolist() if label != row["class"]]
    wrong = row["total"] - row["correct"]
    parts = {row["class"]: row["correct"]}
    for k in range(wrong):
        label = others[(row["class"] * 7 + (k % 3) * 5 + row["client"] * 11) % len(others)]
        parts[label] = parts.get(label, 0) + 1
    for label, count in sorted(parts.items()):
        if count:
            yield {
                **{k: row[k] for k in ("round", "model", "client", "class", "drawn")},
                "predicted": label,
                "count": count,
            }


def _summed(cells: list[dict[str, Any]], classes: int, groups: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    counts, drawn = from_rows(cells, classes)
    return counts, groups, drawn


def _rates(template: Record) -> Rates:
    frame = template.counts().groupby(["model", "round", "class"])[["correct", "total"]].sum()
    found: Rates = defaultdict(dict)
    for (model, round, label), correct, total in frame.itertuples(name=None):
        found[model, round][label] = correct / total
    return found


def _answers(
    rates: Rates, asked: Asked, given: Dealt, first_in: Numbers, generator: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Draw the rows of counts: an image is answered rightly where its own threshold lies below the class's rate."""
    thresholds: dict[tuple[str, int, int], Any] = {}
    usual: dict[tuple[str, int, int, int], int] = {}
    for (model, round), of_classes in rates.items():
        kind = model.split(":")[0].split(".")[0]
        base = model.removesuffix(".masked")
        tested = given.tested[kind].T.tolist()
        classes = Counter(client for client, _, _ in tested)
        for client, label, total in tested:
            place = (base, client, label)
            if place not in thresholds:
                thresholds[place] = generator.random(total)
            noisy = thresholds[place] + generator.normal(0, 0.03, total)
            rate = of_classes.get(label, 0.0)
            correct = int((noisy < rate).sum()) if classes[client] > 1 else total  # there is none to take it for
            if model.endswith(".masked"):
                correct = max(correct, usual.get((*place, round), 0))
            else:
                usual[(*place, round)] = correct
            told = -1 if kind != "personal" else int(first_in[client] <= round)
            yield {
                "round": round, "model": model, "client": client, "class": label,
                "correct": correct, "total": total, "drawn": told,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    made = make(asked.n, asked.out)
    print(f"{len(made)} runs in {asked.out}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
