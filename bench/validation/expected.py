"""What must stand in a run's folder: all that follows from what was asked for, without training anything.

That is its split where the data are at hand, which models are tested when, and what it sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench import keys, models, tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.dataset import Dataset, Labels
from bench.files import source
from bench.protocol.settings import Setting
from bench.splits import auxiliary
from bench.splits.open_set import episode, known_rows
from bench.splits.split import Split, describe, make_split
from bench.task import Task
from bench.training.population import draw_attacked, draw_cohort
from bench.training.robustness import ROBUST
from bench.validation.rebuilding import Asked

Numbers = npt.NDArray[np.int64]
Cells = npt.NDArray[np.int64]
"""(3, n): client, class and number of test images, in this order, ascending; client -1 for a generic model."""

_MOST_ROUNDS, _MOST_DRAWS = 20_000, 5 * 10**7
"""And clients times rounds: a run of 1,000 clients and 5,000 rounds has 5 million, and its cohorts take some seconds.
"""
_MOST_BYTES = 2**29
"""Of a model that is made to count what is sent; of larger ones the bytes are compared between seeds only."""

# Its split --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """What a result says of its split, and what is tested on whom."""

    described: Mapping[str, object]
    """Keys of run.json: fingerprint, clients, class_counts, groups, heterogeneity."""
    tested: Mapping[str, Cells]
    """By "generic", "personal", "unseen", "generic.robust" ...: on how many images of which class, client by client."""
    images: Mapping[int, int]
    """Test images of each client whose personal models are tested."""
    classes: Mapping[int, int]
    """Classes among their training images."""
    held: Mapping[int, frozenset[int]]
    """Which classes are among the training images of each client that is tested, those held out of training too."""
    open_set: Mapping[int, tuple[int, int]]
    """Of each client that is asked in an open-set test: how many images of known classes, and of open ones."""
    visited: int
    """Training images that the cohorts of all rounds hold together."""


def dealt(asked: Asked, root: Path) -> Dealt:
    """Make a run's split anew, from labels alone.

    Raises:
        DataMissing: The data are not here, or they are a user's own.
        DataDamaged: They are not what they should be.
        PartitionFailed: They cannot be split so.
    """
    assert asked.dataset is not None
    return _dealt(asked.dataset, root, asked.trained_by, asked.record.seed)


@lru_cache(maxsize=512)  # 8 MB each at 9,000 clients, some kB at 20
def _dealt(dataset: Dataset, root: Path, setting: Setting, seed: int) -> Dealt:
    labels = _labels(dataset, root)
    split = make_split(labels, dataset.num_classes, setting, seed)
    said = describe(labels, split, dataset.num_classes, setting.groups)
    clients = len(split.clients)
    training = setting.training_clients(clients)
    kinds = {"personal": range(training), "unseen": range(training, clients)}
    tested = {"generic": _cells([-1], [known_rows(labels.test, split.open).numpy()], labels, dataset.num_classes)}
    for kind, those in kinds.items():
        chosen = evaluated(setting, those, seed)
        rows = [split.tests[client].numpy() for client in chosen]
        tested[kind] = _cells(chosen, rows, labels, dataset.num_classes)
    if setting.attack != "none":
        attacked = draw_attacked(setting, len(labels.test), keys.key(seed)).numpy()
        tested[f"generic.{ROBUST}"] = _cells([-1], [attacked], labels, dataset.num_classes)
        chosen = evaluated(setting, kinds["personal"], seed)
        rows = [np.intersect1d(split.tests[client].numpy(), attacked) for client in chosen]
        tested[f"personal.{ROBUST}"] = _cells(chosen, rows, labels, dataset.num_classes)
    sizes = [len(rows) for rows in split.clients]
    visited = int(drawn(setting, clients, seed).times @ np.asarray(sizes, dtype=np.int64))
    described = {key: said[key] for key in ("fingerprint", "class_counts", "groups", "heterogeneity")}
    chosen = evaluated(setting, kinds["personal"], seed)
    images = {k: len(split.tests[k]) for k in chosen}
    classes = {k: int(said["clients"][k]["classes"]) for k in chosen}
    asked = (*chosen, *evaluated(setting, kinds["unseen"], seed))
    held = {k: frozenset(labels.train[split.clients[k]].unique().tolist()) for k in asked}
    return Dealt(
        images=images,
        classes=classes,
        held=held,
        described={**described, "clients": clients},
        tested=tested,
        open_set=_asked(labels, split, setting, seed) if setting.open_classes else {},
        visited=visited,
    )


def _asked(labels: Labels, split: Split, setting: Setting, seed: int) -> dict[int, tuple[int, int]]:
    """Count what clients are asked in an open-set test."""
    clients = range(setting.training_clients(len(split.clients)), len(split.clients))
    there, found = int(torch.isin(labels.test, split.open).sum()), {}
    for k in evaluated(setting, clients, seed):
        train, test = labels.train[split.clients[k]], labels.test[split.tests[k]]
        if (asked := episode(setting, keys.key(seed), k, train, test, there)) is not None:
            found[k] = len(asked.known), len(asked.open)
    return found


@lru_cache(maxsize=2)
def _labels(dataset: Dataset, root: Path) -> Labels:
    return source.labels(dataset, root)


def _cells(clients: list[int], rows: list[Cells], labels: Labels, num_classes: int) -> Cells:
    """Count test images: see `Cells`."""
    truth = labels.test.numpy()
    table = np.array([np.bincount(truth[those], minlength=num_classes) for those in rows]).reshape(-1, num_classes)
    client, which = table.nonzero()
    return np.stack([np.asarray(clients, dtype=np.int64)[client], which, table[client, which]]).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """The cohorts of all rounds, as `Population.cohort` draws them, counted: a list of them would fill the memory."""

    times: Numbers
    """(clients,): how many each is in."""
    first: Numbers
    """(clients,): the round, from 1 on, of the first that each is in; one more than there are, if it is in none."""


@lru_cache(maxsize=128)
def drawn(setting: Setting, clients: int, seed: int) -> Drawn:
    """Draw the cohorts of a run, which must be `countable`."""
    times, first = np.zeros(clients, dtype=np.int64), np.full(clients, setting.rounds + 1)
    for round in range(setting.rounds):
        cohort = _cohort(setting, clients, seed, round)
        times[cohort] += 1
        first[cohort] = np.minimum(first[cohort], round + 1)
    return Drawn(times=times, first=first)


@lru_cache(maxsize=4)  # exchanges of one round have one cohort
def _cohort(setting: Setting, clients: int, seed: int, round: int) -> Numbers:
    return np.array(draw_cohort(setting, clients, keys.key(seed), round), dtype=np.int64)


def countable(setting: Setting, clients: int) -> bool:
    """Tell whether a run's cohorts are drawn anew: not those of whoever asks for more than anybody trains."""
    return setting.rounds <= _MOST_ROUNDS and setting.rounds * clients <= _MOST_DRAWS


def evaluated(setting: Setting, clients: range, seed: int) -> list[int]:
    """Give those of some clients whose personal models are tested, as `Population.evaluated` draws them."""
    if setting.eval_clients is None or setting.eval_clients >= len(clients):
        return list(clients)
    chosen = keys.choice(keys.fold(keys.key(seed), "evaluated"), len(clients), setting.eval_clients)
    return [clients[k] for k in chosen.tolist()]


def first_drawn(asked: Asked, clients: int) -> Numbers:
    """Give the round, from 1 on, in whose cohort each client is first, as `Drawn` has it."""
    return drawn(asked.trained_by, clients, asked.record.seed).first


def ever_drawn(asked: Asked, clients: int) -> frozenset[int]:
    """Give the clients that were in the cohort of any round."""
    return frozenset(np.flatnonzero(first_drawn(asked, clients) <= asked.trained_by.rounds).tolist())


# What it tests and sends ------------------------------------------------------------------------------------


def evaluations(setting: Setting) -> list[int]:
    """Give the rounds after which models are tested."""
    return [r for r in range(1, setting.rounds + 1) if r % setting.eval_every == 0 or r == setting.rounds]


def tested_models(asked: Asked) -> tuple[frozenset[str], frozenset[str]]:
    """Give the names of the models that are tested after a round, and after the last one: those of the toy problem."""
    setting = asked.trained_by
    # All that decides which models there are, and which budgets of adaptation: those may follow the setting's epochs.
    told = {key: getattr(setting, key) for key in ("norm", "statistics", "rounds", "epochs", "unseen_labels")}
    told["attack"] = "none" if setting.attack == "none" else "pgd"  # which one decides on no name
    few = replace(toy.SETTING, unseen=int(setting.unseen > 0), attack_steps=1, **told)
    return _tested_models(asked.algorithm, few)


@cache
def _tested_models(algorithm: Algorithm, setting: Setting) -> tuple[frozenset[str], frozenset[str]]:
    names, sizes = [], (4, 4, 4)  # of clients: an epoch, of which there may be very many, is a step
    for last in (False, True):
        run = toy.run(algorithm, setting=replace(setting, clients=len(sizes)), sizes=sizes)
        task = run.task_at(setting.rounds - 1 if last else 0)
        for exchange in algorithm.exchanges(task):
            if exchange.aside and last:  # without what it learns a model is not corrected
                run.exchange(task, exchange)
        run.evaluate(task, 1, last)
        names.append(frozenset(tally.model for tally in run.progress.counts))
    return names[0], names[1]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What follows from the shapes of a run's states."""

    pooled: bool
    """Whether nothing is sent: there is one place."""
    bytes_down: int | None
    """None where nothing is sent, or where it depends on numbers: on clients that the algorithm chooses, or on how a
    payload is packed."""
    client_state_bytes: int | None
    """Kept at all clients that ever took part; None where clients keep statistics of norm layers besides, or the
    algorithm chooses them."""
    client_rounds: int | None
    """How often a client took part in a round; None where nothing is sent, or the algorithm chooses clients."""


def sent(asked: Asked, clients: int) -> Sent | None:
    """Count what is sent to clients and kept there, from the shapes of the first states.

    Args:
        asked: The run.
        clients: All clients.

    Returns:
        None where the images' shape is not known here, or the model is too large to be made for this; or where there
        are images at the server or a teacher, on which states may depend; or where the run is not `countable`.
    """
    if asked.algorithm.needs & {*auxiliary.NEEDS, "teacher"} or not countable(asked.trained_by, clients):
        return None
    setting, pooled = asked.trained_by, "pooled" in asked.algorithm.needs
    shapes = None if asked.dataset is None else _shapes(asked.algorithm, asked.dataset, setting, clients)
    if shapes is None:
        return None
    own_statistics = setting.norm == "batch" and setting.statistics == "personal"
    down, known, everyone = 0, np.zeros(clients, dtype=bool), np.arange(setting.training_clients(clients))
    visit = [trip for trip in shapes.trips if not trip.aside][-1:] if setting.final_visit and not pooled else []
    final = [replace(trip, everyone=True, round=setting.rounds) for trip in visit]
    present: dict[int, Numbers] = {}
    for trip in (*shapes.trips, *final):
        cohort = everyone if trip.everyone else _cohort(setting, clients, asked.record.seed, trip.round)
        down += len(cohort) * trip.changing + int((~known[cohort]).sum()) * trip.constant
        known[cohort] |= not trip.aside
        present.setdefault(trip.round, np.zeros(clients, dtype=bool))[cohort] = True
    chosen = any(trip.chosen for trip in shapes.trips)
    kept = shapes.private * (1 if pooled else int(known.sum()))
    return Sent(
        pooled=pooled,
        bytes_down=None if pooled or chosen or shapes.packed else down,
        client_state_bytes=None if own_statistics or chosen else kept,
        client_rounds=None if pooled or chosen else sum(int(there.sum()) for there in present.values()),
    )


@dataclass(frozen=True)
class _Trip:
    """What one exchange sends to each client."""

    round: int
    everyone: bool
    aside: bool
    """Whether clients keep nothing of it."""
    chosen: bool
    """Whether the algorithm chooses the clients."""
    changing: int
    """Bytes each time."""
    constant: int
    """Bytes when it first takes part."""


@dataclass(frozen=True)
class _Shapes:
    trips: tuple[_Trip, ...]
    private: int
    """Bytes that one client keeps."""
    packed: bool
    """Whether payloads are counted in a way of the algorithm's own."""


@lru_cache(maxsize=256)
def _shapes(algorithm: Algorithm, dataset: Dataset, setting: Setting, clients: int) -> _Shapes | None:
    shape, balanced = dataset.image_shape, setting.balanced
    model = models.build(setting.model, dataset.num_classes, shape, setting.norm, balanced)
    if tree.nbytes(model.init(keys.key(0, "meta"))) > _MOST_BYTES:
        return None
    try:  # shapes only: nothing is drawn
        return _count(algorithm, model, setting, dataset.num_classes, clients, "meta")
    except (RuntimeError, NotImplementedError):  # an algorithm that looks at numbers
        return _count(algorithm, model, setting, dataset.num_classes, clients, "cpu")


def _count(
    algorithm: Algorithm, model: models.Model, setting: Setting, num_classes: int, clients: int, device: str
) -> _Shapes:
    task = Task(
        model=model,
        num_classes=num_classes,
        num_clients=setting.training_clients(clients),
        rounds=setting.rounds,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        key=keys.key(0, device),
        prior=torch.full((num_classes,), 1 / num_classes, device=device) if "prior" in algorithm.needs else None,
    )
    server, private = algorithm.init_server(task), algorithm.init_client(task)
    trips = []
    for round in range(setting.rounds):
        now = task.at(round, setting.lr)
        for exchange in algorithm.exchanges(now):
            shared, (own,) = algorithm.sends(exchange, now, server, (0,))
            constant = tree.nbytes({key: part for key, part in shared.items() if key in algorithm.constant})
            changing = tree.nbytes(shared) - constant + tree.nbytes(own)
            trips.append(
                _Trip(round, exchange.everyone, exchange.aside, exchange.cohort is not None, changing, constant)
            )
    packed = type(algorithm).payload_bytes is not Algorithm.payload_bytes
    return _Shapes(tuple(trips), tree.nbytes(private), packed)
