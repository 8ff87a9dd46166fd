"""The counts of a run's last evaluation, computed by the board from models that were handed in with it.

That leaves nothing of the numbers to believe but how the models were trained. Answers to single images in place of
models would leave all: whoever knows the labels can write them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.data import Images
from bench.files import source
from bench.results.kept import load
from bench.results.record import Record
from bench.results.retest import retest
from bench.splits.open_set import known_rows
from bench.splits.shift import shifted
from bench.splits.split import make_split
from bench.validation.rebuilding import Asked

_SHARE = 0.002
"""Of a model's test images, that another machine may score otherwise where two classes tie; one in any case."""


def recount(record: Record, asked: Asked, root: Path) -> list[str]:
    """Test the models of a run, each on the images that it was tested on, and compare right answers.

    Args:
        record: A finished run that kept its models.
        asked: What was run, on a dataset that is at hand.
        root: Of all datasets.

    Returns:
        What differs, in words; nothing, and the counts are those of the models. Models whose tests leave classes out
        (masked) are tested without.

    Raises:
        NotKept: The models cannot be used here.
        DamagedResult: They are not those that the run wrote.
    """
    assert asked.dataset is not None
    kept = load(record)
    splits = source.load(asked.dataset, root)
    split = make_split(splits.labels, asked.dataset.num_classes, asked.trained_by, record.seed)
    network = kept.network
    seen, split = shifted(asked.dataset, splits, split, asked.trained_by, record.seed)
    images = Images(seen.test_x, seen.test_y, network.mean, network.std, scale=asked.dataset.scale)
    frame = record.counts()
    last = frame[frame["round"] == frame["round"].max()]
    found = retest(kept, images, split.tests, known_rows(splits.test_y, split.open))
    said = [] if any(name.startswith("generic") or name.startswith("personal") for name in found) else ["no model"]
    for name, each in found.items():
        told = torch.zeros_like(each.correct), torch.zeros_like(each.total)
        place = {client: k for k, client in enumerate(each.clients)}
        rows = last[last["model"] == name]
        stray = set(rows["client"]) - set(place)
        for column, table in zip(("correct", "total"), told, strict=True):
            for client, label, number in rows[["client", "class", column]].itertuples(index=False):
                if client in place:
                    table[place[client], label] = number
        if stray or not torch.equal(told[1], each.total):
            said.append(f"{name} was tested on other images than its models are for")
        elif (apart := int((told[0] - each.correct).abs().sum())) > max(1.0, _SHARE * float(each.total.sum())):
            said.append(f"{name} has {int(each.correct.sum())} right answers, not {int(told[0].sum())}: {apart} differ")
    return said
