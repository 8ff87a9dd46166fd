"""From an identity to the run as it was asked for, and to what the run says of itself in other words.

An identity names an algorithm, a dataset, a setting and a seed; what follows from these besides is in `expected`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from bench.algorithm import Algorithm
from bench.dataset import Dataset
from bench.models import MODELS
from bench.models.teacher import Teacher
from bench.plugins.registry import ALGORITHMS, DATASETS, PARTS, BadPlugin, Registry, UnknownPlugin, call
from bench.protocol.bundles import SETTINGS
from bench.protocol.composition import compose
from bench.protocol.identity import canonical, identify
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import label, name
from bench.ranges import checked, hints, shown
from bench.results.record import Record
from bench.splits import auxiliary
from bench.sweep.matching import matched_rounds
from bench.sweep.run import Run
from bench.training import engine as engines
from bench.training.job import PRECISIONS

P = TypeVar("P")

DEVICES = ("cpu", "cuda", "mps")
_STAND_IN = "digits"
"""Of which every machine has the data; stands for a dataset where only the other parts of a run matter."""
_FOUND: dict[tuple[type[Dataset], str, Path], Dataset] = {}
"""Datasets of a user's own files, by what was told of them and where they were looked for."""


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
    """None where the identity tells a user's own files by their contents, and none such are here."""
    setting: Setting
    lr: float | None = None
    """Learning rate of this algorithm alone, where a preset had one."""
    rounds: int | None = None
    """Rounds of this algorithm alone, where samples were matched."""
    teacher: Teacher | None = None
    """Whose features it learnt from, of which only the digest is known: the file is somebody's own."""
    outdated: Mapping[str, str]
    """Which of "algorithm", "dataset" and "model" this code has a later version of, that may give other numbers; in
    words.
    """

    @property
    def own_images(self) -> bool:
        """Whether the identity tells images by their contents, wherever they lie."""
        return self.dataset is None or type(self.dataset).identity is not Dataset.identity

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
            teacher=self.teacher,
            data_root=root,
            plugins=plugins,
            lr=self.lr,
            rounds=self.rounds,
            preset=str(self.record.document.get("preset", "default")),  # changes no number, but the label
        )


def rebuild(record: Record, root: Path | None = None) -> Asked:
    """Make the run of an identity anew.

    Args:
        record: What was published.
        root: Folder of datasets, in which a user's own files may be found again; None: they are not looked for.

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
    dataset = _dataset(identity.get("dataset"), outdated, root)
    if "model" in identity:
        _, old = _known(MODELS, identity["model"], "model")
        outdated |= {} if old is None else {"model": old}
    setting = _setting(identity.get("setting"), str(record.setting["name"]))
    setting = replace(setting, auxiliary=_origin(identity["algorithm"], algorithm))
    asked = Asked(
        record=record,
        algorithm=algorithm,
        dataset=dataset,
        setting=setting,
        lr=_own_rate(identity["algorithm"]),
        rounds=_own_rounds(identity["algorithm"], algorithm, setting),
        teacher=_teacher(identity["algorithm"], algorithm),
        outdated=outdated,
    )
    _require_its_spelling(asked)
    return asked


def _algorithm(identity: Mapping[str, object], outdated: dict[str, str]) -> Algorithm:
    """Make the method, and put its parts on it."""
    method = _plugin(ALGORITHMS, identity.get("algorithm"), "algorithm", outdated)
    described = identity["algorithm"].get("parts", [])  # type: ignore[attr-defined]
    if not isinstance(described, list):
        raise CannotRebuild("identity.algorithm.parts", "is no list")
    old: dict[str, str] = {}
    parts = [_plugin(PARTS, each, f"algorithm.parts.{place}", old) for place, each in enumerate(described)]
    outdated |= {"algorithm": ", ".join((*outdated.values(), *old.values()))} if old else {}
    try:
        return compose(method, parts)
    except BadConfig as error:
        raise CannotRebuild("identity.algorithm.parts", f"cannot be: {error}") from error


def _dataset(described: object, outdated: dict[str, str], root: Path | None) -> Dataset | None:
    """Make the dataset; of a user's own files find it below `root`, None: they are not there."""
    kind, old = _known(DATASETS, described, "dataset")
    if kind.identity is Dataset.identity:
        dataset: Dataset = _plugin(DATASETS, described, "dataset", outdated)
        return dataset
    assert isinstance(described, dict)
    return None if root is None or old is not None else _found(kind, described.get("fields"), root)


def _plugin(registry: Registry[P], described: object, part: str, outdated: dict[str, str]) -> P:
    kind, old = _known(registry, described, part)
    assert isinstance(described, dict)
    outdated |= {} if old is None else {part: old}
    try:
        return _typed(kind, described.get("fields"), f"identity.{part}.fields")
    except CannotRebuild:
        if old is None:
            raise
        return kind()  # its fields were others


def _found(kind: type[Dataset], told: object, root: Path) -> Dataset | None:
    """Find a user's own files, once for all runs that have the same."""
    place = kind, canonical({"told": told}), root
    known = _FOUND.get(place) or (kind.found(told, root) if isinstance(told, dict) else None)
    if known is not None:
        _FOUND[place] = known
    return known


def _known(registry: Registry[P], described: object, part: str) -> tuple[type[P], str | None]:
    """Find a plug-in, and say in words that its version is a later one here, if it is."""
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
    return kind, None if version == known else f"version {version} of {called}, which is at version {known} here"


def _own_rate(described: object) -> float | None:
    """Read the learning rate of an algorithm's own, if it has one."""
    lr = described.get("lr") if isinstance(described, dict) else None
    if lr is None:
        return None
    try:
        return checked(hints(Setting)["lr"], lr)  # type: ignore[no-any-return]
    except ValueError as error:
        raise CannotRebuild("identity.algorithm.lr", f"is {shown(lr)}, and {error}") from error


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


def _teacher(described: object, algorithm: Algorithm) -> Teacher | None:
    """Read which teacher it is, if the algorithm needs one."""
    key, told = "identity.algorithm.teacher", described.get("teacher") if isinstance(described, dict) else None
    if (told is not None) != ("teacher" in algorithm.needs):
        raise CannotRebuild(key, f"is {told!r}, and an algorithm has it if it needs a teacher")
    if told is None:
        return None
    if not isinstance(told, str) or not re.fullmatch("[0-9a-f]{64}", told):
        raise CannotRebuild(key, f"is {told!r}, and must be the SHA-256 of a file")
    return Teacher(Path(), told)


def _setting(described: object, called: str) -> Setting:
    if called not in SETTINGS:
        raise CannotRebuild("setting.name", f"is {called!r}, and there are {', '.join(SETTINGS)}")
    values = {**described, "name": called} if isinstance(described, dict) else None
    return _typed(Setting, values, "identity.setting")


def _typed(kind: type[P], values: object, key: str) -> P:
    """Make a dataclass of JSON's values."""
    if not isinstance(values, dict):
        raise CannotRebuild(key, "is no object")
    known, typed = hints(kind), {}
    for field, value in values.items():
        if field not in known:
            raise CannotRebuild(f"{key}.{field}", f"is no field; there are {', '.join(known) or 'none'}")
        try:
            typed[field] = checked(known[field], value)
        except ValueError as error:
            raise CannotRebuild(f"{key}.{field}", f"is {shown(value)}, and {error}") from error
    try:
        return kind(**typed)
    except (ValueError, TypeError) as error:  # values that do not go together, or one that is not there
        raise CannotRebuild(key, f"cannot be taken: {error}") from error


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
    of_protocol = ("dataset", "setting", "model", "weights")
    protocol: dict[str, object] = {key: identity[key] for key in of_protocol if key in identity}
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
        told |= {"call": call(asked.algorithm)}
        told |= {"label": run.label} if record.label is not None else {}
        if not asked.own_images:
            told["dataset"] = label(asked.dataset)
            overrides = run.overrides()
            told["overrides"] = (
                {**overrides, "weights": record.overrides.get("weights")} if asked.own_weights else overrides
            )
    return told
