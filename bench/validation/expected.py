"""What must stand in a run's folder: all that follows from its identity without training anything.

An identity names an algorithm, a dataset, a setting and a seed. From these the run is rebuilt as it was asked for, and
with it its description, its split where the data are at hand, which models are tested when, and what it sends.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError

from bench import keys, models, tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.dataset import Dataset, Labels
from bench.files import source
from bench.protocol.composition import compose
from bench.protocol.identity import canonical, identify
from bench.protocol.settings import SETTINGS, BadConfig, Setting
from bench.protocol.spelling import label, name
from bench.registry import ALGORITHMS, DATASETS, PARTS, BadPlugin, Registry, UnknownPlugin
from bench.results.record import Record
from bench.splits import auxiliary
from bench.splits.split import describe, make_split
from bench.sweep.config import Run
from bench.sweep.matching import matched_rounds
from bench.task import Task
from bench.training import engine as engines
from bench.training.population import draw_cohort
from bench.training.rounds import PRECISIONS

P = TypeVar("P")
Cells = npt.NDArray[np.int64]
"""(3, n): client, class and number of test images, in this order, ascending; client -1 for a generic model."""

DEVICES = ("cpu", "cuda")
_STAND_IN = "digits"
"""Of which every machine has the data; stands for a dataset where only the other parts of a run matter."""
_MOST_BYTES = 2**29
"""Of a model that is made to count what is sent; of larger ones the bytes are compared between seeds only."""


class CannotRebuild(ValueError):
    """An identity is of nothing that this code could run. `key` is where, the message says what is wrong there."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run as it was asked for."""

    record: Record
    algorithm: Algorithm
    dataset: Dataset | None
    """None where the identity tells a user's own files by their contents: nobody else can open them."""
    setting: Setting
    lr: float | None = None
    """Learning rate of this algorithm alone, where a preset had one."""
    rounds: int | None = None
    """Rounds of this algorithm alone, where samples were matched."""
    outdated: Mapping[str, str]
    """Which of "algorithm" and "dataset" this code has a later version of, that may give other numbers; in words."""

    @property
    def own_weights(self) -> bool:
        """Whether models start from a file of weights."""
        return "weights" in self.record.identity

    @property
    def trained_by(self) -> Setting:
        """The setting with the rounds of the algorithm's own."""
        return self.setting if self.rounds is None else replace(self.setting, rounds=self.rounds)

    def run(self, root: Path, plugins: tuple[Path, ...] = ()) -> Run:
        """Give the run; its dataset is a stand-in where there is none."""
        return Run(
            algorithm=self.algorithm,
            dataset=self.dataset or DATASETS[_STAND_IN](),
            setting=self.setting,
            seed=self.record.seed,
            engine=self.record.engine,
            precision=self.record.precision,
            device=self.record.device,
            data_root=root,
            plugins=plugins,
            lr=self.lr,
            rounds=self.rounds,
            preset=str(self.record.document.get("preset", "default")),  # changes no number, but the label
        )


def rebuild(record: Record) -> Asked:
    """Make the run of an identity anew.

    Raises:
        CannotRebuild: The identity names a plug-in or a version that this code does not know, a value has the wrong
            type or range, a part is missing, or it is not spelled as this code spells it.
    """
    identity = record.identity
    seed = identity.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise CannotRebuild("identity.seed", f"is {seed!r}, and must be a whole number from 0 to 2^32 - 1")
    for key, allowed in (("engine", tuple(engines.BY_NAME)), ("precision", tuple(PRECISIONS)), ("device", DEVICES)):
        if identity.get(key) not in allowed:
            raise CannotRebuild(f"identity.{key}", f"is {identity.get(key)!r}, and must be one of {', '.join(allowed)}")
    for key in ("seed", "engine", "precision", "device"):
        if getattr(record, key) != identity[key]:
            raise CannotRebuild(key, f"is {getattr(record, key)!r}, and the identity says {identity[key]!r}")
    outdated: dict[str, str] = {}
    algorithm = _algorithm(identity, outdated)
    dataset = _plugin(DATASETS, identity.get("dataset"), "dataset", outdated)
    setting = _setting(identity.get("setting"), str(record.setting["name"]))
    setting = replace(setting, auxiliary=_origin(identity["algorithm"], algorithm))
    asked = Asked(
        record=record,
        algorithm=algorithm,
        dataset=dataset,
        setting=setting,
        lr=_own_rate(identity["algorithm"]),
        rounds=_own_rounds(identity["algorithm"], algorithm, setting),
        outdated=outdated,
    )
    _require_its_spelling(asked)
    return asked


def _algorithm(identity: Mapping[str, object], outdated: dict[str, str]) -> Algorithm:
    """Make the method, and put its parts on it."""
    method = _plugin(ALGORITHMS, identity.get("algorithm"), "algorithm", outdated)
    assert method is not None  # only a dataset may stand for a user's own files
    described = identity["algorithm"].get("parts", [])  # type: ignore[attr-defined]
    if not isinstance(described, list):
        raise CannotRebuild("identity.algorithm.parts", "is no list")
    old: dict[str, str] = {}
    parts = [_plugin(PARTS, each, f"algorithm.parts.{place}", old) for place, each in enumerate(described)]
    outdated |= {"algorithm": ", ".join((*outdated.values(), *old.values()))} if old else {}
    try:
        return compose(method, [part for part in parts if part is not None])
    except BadConfig as error:
        raise CannotRebuild("identity.algorithm.parts", f"cannot be: {error}") from error


def _plugin(registry: Registry[P], described: object, part: str, outdated: dict[str, str]) -> P | None:
    key = f"identity.{part}"
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise CannotRebuild(key, "names no plug-in")
    called, version = described["name"], described.get("version")
    try:
        kind = registry[called]
    except (UnknownPlugin, BadPlugin) as error:
        raise CannotRebuild(f"{key}.name", f"is unknown here ({error}); a file is named with --plugin") from error
    known: int = kind.revision if issubclass(kind, Dataset) else kind.version  # type: ignore[attr-defined]
    if type(version) is not int or version < 1:
        raise CannotRebuild(f"{key}.version", f"is {version!r}, and must be a whole number from 1 on")
    if version > known:
        raise CannotRebuild(f"{key}.version", f"is {version}, and this code knows {called} up to {known}; update it")
    if issubclass(kind, Dataset) and kind.identity is not Dataset.identity:
        return None
    if version == known:
        return _typed(kind, described.get("fields"), f"{key}.fields")
    outdated[part] = f"version {version} of {called}, which is at version {known} here"
    try:
        return _typed(kind, described.get("fields"), f"{key}.fields")
    except CannotRebuild:  # its fields were others
        return kind()


def _own_rate(described: object) -> float | None:
    """Read the learning rate of an algorithm's own, if it has one."""
    lr = described.get("lr") if isinstance(described, dict) else None
    if lr is not None and (type(lr) is not float or lr <= 0):
        raise CannotRebuild("identity.algorithm.lr", f"is {lr!r}, and must be a number above 0")
    return lr


def _own_rounds(described: object, algorithm: Algorithm, setting: Setting) -> int | None:
    """Read the rounds of an algorithm's own, if it has some."""
    rounds = described.get("rounds") if isinstance(described, dict) else None
    wanted = matched_rounds(algorithm, setting) if setting.match == "samples" else setting.rounds
    if rounds != (None if wanted == setting.rounds else wanted) or isinstance(rounds, float):
        raise CannotRebuild("identity.algorithm.rounds", f"is {rounds!r}, and by the setting there are {wanted}")
    return rounds


def _origin(described: object, algorithm: Algorithm) -> str | None:
    """Read where images at the server come from, if the algorithm needs some."""
    key, told = "identity.algorithm.auxiliary", described.get("auxiliary") if isinstance(described, dict) else None
    if (told is not None) != bool(algorithm.needs & auxiliary.NEEDS):
        raise CannotRebuild(key, f"is {told!r}, and an algorithm has it if it needs images at the server")
    if told is None:
        return None
    try:
        return str(auxiliary.parse(told["images"]))
    except (BadConfig, UnknownPlugin, BadPlugin, KeyError, TypeError) as error:
        raise CannotRebuild(key, f"is {told!r}, which names no images ({error})") from error


def _setting(described: object, called: str) -> Setting:
    if called not in SETTINGS:
        raise CannotRebuild("setting.name", f"is {called!r}, and there are {', '.join(SETTINGS)}")
    values = {**described, "name": called} if isinstance(described, dict) else None
    return _typed(Setting, values, "identity.setting")


def _typed(kind: type[P], values: object, key: str) -> P:
    """Make a dataclass of JSON's values."""
    if not isinstance(values, dict):
        raise CannotRebuild(key, "is no object")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for field in values:
        if field not in known:
            raise CannotRebuild(f"{key}.{field}", f"is no field; there are {', '.join(known) or 'none'}")
    try:  # as JSON, in which a list may be a tuple, and yet no text a number
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (key, *first["loc"])))
        raise CannotRebuild(place, f"cannot be taken: {first['msg']}") from error


def _require_its_spelling(asked: Asked) -> None:
    """Require the identity that this code gives to the run: one run has one identity, and so one folder."""
    given = asked.record.identity
    spelled = asked.run(Path()).identity()
    if asked.dataset is None:
        spelled["dataset"] = given["dataset"]
    for key in asked.outdated:
        spelled[key] = given[key]
    if asked.own_weights:
        spelled["weights"] = given["weights"]
    for key in dict.fromkeys((*spelled, *given)):
        if key not in spelled:
            raise CannotRebuild(f"identity.{key}", "is no part of an identity")
        if key not in given or canonical({key: spelled[key]}) != canonical({key: given[key]}):
            raise CannotRebuild(f"identity.{key}", f"is not as this code writes it: {json.dumps(spelled[key])}")


# What a run says of itself ----------------------------------------------------------------------------------


def description(asked: Asked) -> dict[str, object]:
    """Give the keys of run.json that repeat the identity in other words, as far as this code can tell."""
    record, identity, run = asked.record, asked.record.identity, asked.run(Path())
    protocol: dict[str, object] = {key: identity[key] for key in ("dataset", "setting", "weights") if key in identity}
    told: dict[str, object] = {
        "protocol": identify(protocol),
        "algorithm": name(asked.algorithm),
        "tier": asked.algorithm.tier,
        "imbalance": asked.setting.imbalance,
        "alpha": asked.setting.alpha,
        "seed": run.seed,
        "engine": run.engine,
        "precision": run.precision,
        "device": run.device,
        "setting": run.fields(),
    }
    if not asked.outdated:
        told |= {"call": repr(asked.algorithm)}
        told |= {"label": run.label} if record.label is not None else {}
        if asked.dataset is not None:
            told["dataset"] = label(asked.dataset)
            overrides = run.overrides()
            told["overrides"] = (
                {**overrides, "weights": record.overrides.get("weights")} if asked.own_weights else overrides
            )
    return told


# Its split --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """What a result says of its split, and what is tested on whom."""

    described: Mapping[str, object]
    """Keys of run.json: fingerprint, clients, class_counts, groups, heterogeneity."""
    tested: Mapping[str, Cells]
    """By "generic", "personal", "unseen": on how many images of which class, client by client."""
    images: Mapping[int, int]
    """Test images of each client whose personal models are tested."""
    classes: Mapping[int, int]
    """Classes among their training images."""
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


@lru_cache(maxsize=64)
def _dealt(dataset: Dataset, root: Path, setting: Setting, seed: int) -> Dealt:
    labels = _labels(dataset, root)
    split = make_split(labels, dataset.num_classes, setting, seed)
    said = describe(labels, split, dataset.num_classes, setting.groups)
    clients = len(split.clients)
    training = setting.training_clients(clients)
    kinds = {"personal": range(training), "unseen": range(training, clients)}
    tested = {"generic": _cells([-1], [np.arange(len(labels.test))], labels, dataset.num_classes)}
    for kind, those in kinds.items():
        chosen = evaluated(setting, those, seed)
        rows = [split.tests[client].numpy() for client in chosen]
        tested[kind] = _cells(chosen, rows, labels, dataset.num_classes)
    sizes = [len(rows) for rows in split.clients]
    visited = sum(sizes[client] for cohort in cohorts(setting, clients, seed) for client in cohort)
    described = {key: said[key] for key in ("fingerprint", "class_counts", "groups", "heterogeneity")}
    chosen = evaluated(setting, kinds["personal"], seed)
    images = {k: len(split.tests[k]) for k in chosen}
    classes = {k: int(said["clients"][k]["classes"]) for k in chosen}
    return Dealt(
        images=images, classes=classes, described={**described, "clients": clients}, tested=tested, visited=visited
    )


@lru_cache(maxsize=2)
def _labels(dataset: Dataset, root: Path) -> Labels:
    return source.labels(dataset, root)


def _cells(clients: list[int], rows: list[Cells], labels: Labels, num_classes: int) -> Cells:
    """Count test images: see `Cells`."""
    truth = labels.test.numpy()
    table = np.array([np.bincount(truth[those], minlength=num_classes) for those in rows]).reshape(-1, num_classes)
    client, which = table.nonzero()
    return np.stack([np.asarray(clients, dtype=np.int64)[client], which, table[client, which]]).astype(np.int64)


def cohorts(setting: Setting, clients: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Give the clients that train in each round, as `Population.cohort` draws them."""
    for round in range(setting.rounds):
        yield draw_cohort(setting, clients, keys.key(seed), round)


def evaluated(setting: Setting, clients: range, seed: int) -> list[int]:
    """Give those of some clients whose personal models are tested, as `Population.evaluated` draws them."""
    if setting.eval_clients is None or setting.eval_clients >= len(clients):
        return list(clients)
    chosen = keys.choice(keys.fold(keys.key(seed), "evaluated"), len(clients), setting.eval_clients)
    return [clients[k] for k in chosen.tolist()]


def drawn_by(asked: Asked, clients: int) -> list[frozenset[int]]:
    """Give the clients that were in the cohort of any round by the end of each round."""
    cohorts_ = map(frozenset, cohorts(asked.trained_by, clients, asked.record.seed))
    return list(itertools.accumulate(cohorts_, lambda known, cohort: known | cohort))


# What it tests and sends ------------------------------------------------------------------------------------


def evaluations(setting: Setting) -> list[int]:
    """Give the rounds after which models are tested."""
    return [r for r in range(1, setting.rounds + 1) if r % setting.eval_every == 0 or r == setting.rounds]


def tested_models(asked: Asked) -> tuple[frozenset[str], frozenset[str]]:
    """Give the names of the models that are tested after a round, and after the last one: those of the toy problem."""
    setting = asked.trained_by
    # All that decides which models there are, and which budgets of adaptation: those may follow the setting's epochs.
    told = {key: getattr(setting, key) for key in ("norm", "statistics", "rounds", "epochs", "unseen_labels")}
    return _tested_models(asked.algorithm, replace(toy.SETTING, unseen=int(setting.unseen > 0), **told))


@cache
def _tested_models(algorithm: Algorithm, setting: Setting) -> tuple[frozenset[str], frozenset[str]]:
    names = []
    for last in (False, True):
        run = toy.run(algorithm, setting=setting)
        run.evaluate(run.task_at(setting.rounds - 1 if last else 0), 1, last)
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


def sent(asked: Asked, clients: int) -> Sent | None:
    """Count what is sent to clients and kept there, from the shapes of the first states.

    Args:
        asked: The run.
        clients: All clients.

    Returns:
        None where the images' shape is not known here, or the model is too large to be made for this; or where there
        are images at the server, on which states may depend.
    """
    if asked.algorithm.needs & auxiliary.NEEDS:
        return None
    setting, pooled = asked.trained_by, "pooled" in asked.algorithm.needs
    shapes = None if asked.dataset is None else _shapes(asked.algorithm, asked.dataset, setting, clients)
    if shapes is None:
        return None
    own_statistics = setting.norm == "batch" and setting.statistics == "personal"
    drawn = list(cohorts(setting, clients, asked.record.seed))
    down, known = 0, set[int]()
    for trip in shapes.trips:
        cohort = range(setting.training_clients(clients)) if trip.everyone else drawn[trip.round]
        down += len(cohort) * trip.changing + len(set(cohort) - known) * trip.constant
        known.update(cohort)
    chosen = any(trip.chosen for trip in shapes.trips)
    if setting.final_visit and not pooled:
        trip, everyone = shapes.trips[-1], set(range(setting.training_clients(clients)))
        down += len(everyone) * trip.changing + len(everyone - known) * trip.constant
        known |= everyone
    kept = shapes.private * (1 if pooled else len(known))
    return Sent(
        pooled=pooled,
        bytes_down=None if pooled or chosen or shapes.packed else down,
        client_state_bytes=None if own_statistics or chosen else kept,
    )


@dataclass(frozen=True)
class _Trip:
    """What one exchange sends to each client."""

    round: int
    everyone: bool
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
    model = models.build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm)
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
            shared = algorithm.broadcast(now, server)
            constant = tree.nbytes({key: part for key, part in shared.items() if key in algorithm.constant})
            changing = tree.nbytes(shared) - constant + tree.nbytes(algorithm.send(now, server, 0))
            trips.append(_Trip(round, exchange.everyone, exchange.cohort is not None, changing, constant))
    packed = type(algorithm).payload_bytes is not Algorithm.payload_bytes
    return _Shapes(tuple(trips), tree.nbytes(private), packed)
