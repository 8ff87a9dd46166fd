"""Whether models of clients held out of training know what they do not know, from a few labelled shots.

The model is the one that such a client would be given, before any tuning: shots are all that is learnt from. What is
kept of a client is a line, in which its test images stand from the one that is taken for a known class most surely to
the one that is least: `+` one of a known class that is taken for its own, `-` one that is taken for another, `?` one of
an open class. Images that are equally sure stand in brackets, and `|` stands where the threshold is. Every number is a
function of these lines.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bench import tree
from bench.data import Images
from bench.splits.open_set import Episode
from bench.task import Task
from bench.training.crew import Crew, Surroundings
from bench.tree import Tree

METRICS = ("unseen.closed", "unseen.auroc", "unseen.oscr", "unseen.h")
ACCEPTED = 0.9
"""Share of the shots, each judged by the others, that the threshold accepts."""
_RIGHT, _WRONG, _OPEN, _THRESHOLD = "+-?|"
_LINE = re.compile(r"(?:[-+?]|\([-+?]{2,}\))*\|?(?:[-+?]|\([-+?]{2,}\))*")
Judge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_SLICE = 128  # images a pass


def lines(here: Surroundings, crew: Crew, task: Task, models: Sequence[Tree], clients: Sequence[int]) -> dict[int, str]:
    """Put models of clients held out of training to the test: a line of each client that has shots of two classes.

    Args:
        here: The run's.
        crew: Who does it, a client at a time.
        task: Of the round.
        models: One a client; one without a body has no features, and no line.
        clients: Whose they are.
    """
    items = [
        (client, model, asked)
        for client, model in zip(clients, models, strict=True)
        if "body" in model and (asked := here.population.episode(client)) is not None
    ]
    told = crew.map(partial(_asked, task.round, task.lr), {}, items, [len(asked.known) for _, _, asked in items])
    return {client: line for (client, _, _), line in zip(items, told, strict=True)}


def _asked(round: int, lr: float, here: Surroundings, shared: Tree, item: tuple[int, Tree, Episode]) -> str:
    """Ask one client's model, and write down its line."""
    client, model, asked = item
    population, task = here.population, here.task.at(round, lr)
    shots, known, others = (tree.bring(rows, population.device) for rows in (asked.shots, asked.known, asked.open))
    mine = population.index[client][shots]
    rows = torch.cat([population.tests[client][known], population.open[others]])
    classes, labels = population.images.y[mine].unique(return_inverse=True)
    with here.inference():

        def features(images: Images, rows: Tensor) -> Tensor:
            return torch.cat([task.model.features(model["body"], images.plain(part)) for part in rows.split(_SLICE)])

        judge = partial(here.algorithm.open_set, task, model)
        support = features(population.images, mine)
        taken, sure = judge(features(population.test, rows), support, labels)
        least = threshold(judge, support, labels)
    return line(classes[taken] == population.test.y[rows], len(known), sure, least)


def threshold(judge: Judge, support: Tensor, labels: Tensor) -> float | None:
    """Give how sure an image must be to be accepted, so that `ACCEPTED` of the shots are, each judged by the others.

    Args:
        judge: (B, d) features of images, (S, d) of shots and (S,) labels to (B,) classes and (B,) how sure.
        support: (S, d) float32.
        labels: (S,) int64.

    Returns:
        None where a class has a single shot, which no other one could judge.
    """
    if int(torch.bincount(labels).min()) < 2:
        return None
    each = torch.arange(len(labels), device=labels.device)
    alone = [judge(support[k : k + 1], support[each != k], labels[each != k])[1] for k in range(len(labels))]
    ascending = torch.cat(alone).sort().values
    return float(ascending[len(alone) - math.ceil(ACCEPTED * len(alone) - 1e-9)])


def line(right: Tensor, known: int, sure: Tensor, least: float | None) -> str:
    """Write down how a client's images came out.

    Args:
        right: (Q,) bool, whether an image is taken for its own class; of open ones it is not asked.
        known: How many of them, the first ones, are of known classes.
        sure: (Q,) how surely each is of any known class.
        least: The threshold; None: there is none.
    """
    signs = [_RIGHT if each else _WRONG for each in right[:known].tolist()] + [_OPEN] * (len(right) - known)
    written, below = "", least is None
    ordered = sorted(zip(sure.tolist(), signs, strict=True), key=lambda pair: (-pair[0], "+-?".index(pair[1])))
    for value, group in itertools.groupby(ordered, key=lambda pair: pair[0]):
        if not below and least is not None and value < least:
            written, below = written + _THRESHOLD, True
        alike = "".join(sign for _, sign in group)
        written += alike if len(alike) == 1 else f"({alike})"
    return written if below else written + _THRESHOLD


def measured(told: Mapping[str, str] | Mapping[int, str]) -> dict[str, float | None]:
    """Turn lines into metrics, each a mean over clients, fractions 0-1.

    Returns:
        "unseen.closed": images of known classes that are taken for their own; "unseen.auroc": how often an image of a
        known class is surer than one of an open class, a tie being half; "unseen.oscr": the share of images of known
        classes that are accepted and right, averaged over the shares of open ones that are accepted; "unseen.h": the
        harmonic mean of the share of known ones that are accepted and right and the share of open ones that are not.
        None where no client has it.

    Source: oscr is the area under the curve of Dhamija, Günther and Boult (NeurIPS 2018).
    """
    each = [of_client(written) for written in told.values()]
    return {name: _mean(numbers[k] for numbers in each) for k, name in enumerate(METRICS)}


def of_client(written: str) -> tuple[float | None, float | None, float | None, float | None]:
    """Give the four metrics of one client's line."""
    known, others = written.count(_RIGHT) + written.count(_WRONG), written.count(_OPEN)
    closed = written.count(_RIGHT) / known if known else None
    if not known or not others:
        return closed, None, None, None
    surer = accepted = area = 0.0
    before = 0
    for group in re.findall(r"\([^)]*\)|[-+?]", written):
        right, wrong, here = (group.count(sign) for sign in "+-?")
        # of each open image here: the known ones before it, and half of those beside it
        surer += here * (before + (right + wrong) / 2)
        area += here * (accepted + right / 2)
        before, accepted = before + right + wrong, accepted + right
    taken, mark, left = written.partition(_THRESHOLD)
    fit, apart = taken.count(_RIGHT) / known, left.count(_OPEN) / others
    balance = (2 * fit * apart / (fit + apart) if fit + apart else 0.0) if mark else None
    return closed, surer / (known * others), area / (known * others), balance


def is_line(written: str) -> bool:
    """Tell whether a text can be read as a client's line."""
    return _LINE.fullmatch(written) is not None


def asked_of(written: str) -> tuple[int, int]:
    """Count the images of a line: of known classes, and of open ones."""
    return written.count(_RIGHT) + written.count(_WRONG), written.count(_OPEN)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
