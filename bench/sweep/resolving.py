"""From a named setting and what a person replaces of it to the protocol of a run, or a sentence why not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from bench.dataset import Dataset
from bench.models import MODELS, usual_norm
from bench.plugins.names import meant, near
from bench.protocol.bundles import SETTINGS, named
from bench.protocol.settings import (
    LATER,
    NAMED,
    OF_ADAMW,
    OF_AN_ATTACK,
    OF_BALANCED,
    OF_OPEN,
    OF_SHIFT,
    READ_BY,
    WITHOUT_ALPHA,
    BadConfig,
    Setting,
)
from bench.protocol.spelling import check_fields
from bench.protocol.spelling import name as name
from bench.protocol.spelling import parse_algorithms as parse_algorithms
from bench.protocol.spelling import parse_dataset as parse_dataset
from bench.protocol.spelling import parse_datasets as parse_datasets
from bench.protocol.spelling import parse_imbalance as parse_imbalance
from bench.protocol.spelling import parse_seeds as parse_seeds
from bench.splits import auxiliary
from bench.splits.split import PARTITIONS


def resolve_setting(setting: str, dataset: Dataset, overrides: Mapping[str, object]) -> Setting:
    """Give a named setting for a dataset with some fields replaced.

    Raises:
        BadConfig: No such setting, field, partition or model, or a value of the wrong type or range.
    """
    setting = _known("setting", setting, SETTINGS)
    typed = check_fields(Setting, {key: _pairs(key, value) for key, value in overrides.items()}, "a setting")
    if "name" in typed:
        raise BadConfig("a setting's name cannot be set; choose one with --setting")
    if typed.get("auxiliary") is not None:
        origin = auxiliary.parse(typed["auxiliary"])
        auxiliary.check(origin, dataset)
        typed["auxiliary"] = str(origin)
    for key, known in (("model", MODELS), ("partition", PARTITIONS)):
        if key in typed:
            typed[key] = _known(key, typed[key], known)
    typed |= {key: meant(typed[key], names) or typed[key] for key, names in NAMED.items() if key in typed}
    follows = OF_ADAMW if typed.get("optimiser") == "adamw" else {}
    chosen = replace(named(setting, dataset), **{**follows, **typed})
    return _reconcile(chosen, dataset, typed, SETTINGS[setting](dataset).alpha)


def _known(kind: str, name: str, known: Collection[str]) -> str:
    """Give the name that was typed as it is spelt.

    Raises:
        BadConfig: There is none.
    """
    found = meant(name, known)
    if found is None:
        raise BadConfig(f"no {kind} is called {name!r}; {near(name, known)}")
    return found


def _pairs(field: str, value: object) -> object:
    """Let steps of the learning rate be written as a person does: {0.5: 0.1, 0.75: 0.1}, with quotes in TOML."""
    if field != "lr_steps":
        return value
    items: Any = value.items() if isinstance(value, Mapping) else value
    try:
        return tuple(sorted((float(share), float(factor)) for share, factor in items))
    except (TypeError, ValueError) as error:
        pairs = "pairs of a share of the rounds and a factor are wanted, such as {0.5: 0.1, 0.75: 0.1}"
        raise BadConfig(f"lr_steps = {value!r}: {pairs}") from error


def _reconcile(setting: Setting, dataset: Dataset, given: Mapping[str, Any], usual: float | None) -> Setting:
    """Refuse what was given and would do nothing, and let what was not given follow from the partition.

    Args:
        setting: With everything replaced that was given.
        dataset: Says whether it has a tail of its own.
        given: Fields that a person chose.
        usual: The named setting's alpha, before a partition without one was chosen.
    """
    of = f"{name(dataset)} is"
    if "norm" not in given:
        setting = replace(setting, norm=usual_norm(setting.model, setting.norm))
    if "imbalance" in given and given["imbalance"] is None and dataset.tail == "made":
        raise BadConfig(f"--imbalance natural: {of} balanced, so a number such as 50 is wanted")
    if given.get("imbalance") is not None and dataset.tail == "natural":
        said = f"--imbalance {given['imbalance']:g}: {of} long-tailed by nature and is not cut"
        raise BadConfig(f"{said}; leave the option out, or say --imbalance natural")
    if setting.augment != "none" and not dataset.pictures:
        what = "features" if dataset.image_shape[1:] == (1, 1) else "these examples"
        raise BadConfig(f"augment = {setting.augment}: {what} are no pictures to shift or mirror; leave it out")
    if setting.attack != "none" and not dataset.pictures:
        said = f"attack = {setting.attack}: these examples are not made of pixels, which an attack moves"
        raise BadConfig(f"{said}; leave it out, or choose a dataset of pictures")
    if setting.shift != "none" and not dataset.pictures:
        raise BadConfig(f"shift = {setting.shift}: these examples are no pictures that a camera takes; leave it out")
    if "none" not in (setting.attack, setting.shift):
        said = f"attack = {setting.attack}: images that are shifted ({setting.shift}) are not attacked"
        raise BadConfig(f"{said}; leave one of both out")
    if setting.open_classes:
        said = f"open_classes = {setting.open_classes}"
        if not setting.unseen:
            raise BadConfig(
                f"{said}: clients held out of training are asked about them; say how many with --set unseen=4"
            )
        if not setting.unseen_labels:
            raise BadConfig(
                f"{said}: shots have labels, and unseen_labels = False knows of none; leave one of both out"
            )
        if setting.attack != "none":
            raise BadConfig(
                f"{said}: no attack looks at classes that are withheld; leave out attack = {setting.attack}"
            )
    if setting.unseen_severity is not None and not setting.unseen:
        said = f"unseen_severity = {setting.unseen_severity}: no client is held out; say how many with --set unseen=4"
        raise BadConfig(said)
    if not setting.unseen_labels and not setting.unseen:
        raise BadConfig("unseen_labels = False: no client is held out; say how many with --set unseen=4")
    for fields, reads, why, choose in (
        (OF_BALANCED, setting.statistics == "balanced", f"statistics = {setting.statistics} does not read it",
         "choose --set statistics=balanced"),
        (OF_AN_ATTACK, setting.attack != "none", "no test is attacked", "say how with --set attack=pgd"),
        (OF_OPEN, setting.open_classes > 0, "there is no open-set test", "say how many with --set open_classes=3"),
        (OF_SHIFT, setting.shift != "none", "nothing is shifted", "choose --set shift=colour"),
    ):  # fmt: skip
        for key, usual_value in fields.items():
            if not reads and getattr(setting, key) != usual_value:
                raise BadConfig(f"{key} = {getattr(setting, key)}: {why}; leave it out, or {choose}")
    if setting.partition in WITHOUT_ALPHA:
        if given.get("alpha") is not None:
            instead = {"users": "clients are its natural users", "classes": "each client has some classes"}
            how = instead.get(setting.partition, "images are dealt evenly")
            said = f"--alpha {given['alpha']:g}: {how} (partition {setting.partition}), which no alpha shapes"
            raise BadConfig(f"{said}; leave the option out, or choose another --partition")
        setting = replace(setting, alpha=None)
    elif setting.partition == "shards" and given.get("alpha") is None:
        setting = replace(setting, alpha=2.0)
    elif setting.alpha is None:
        setting = replace(setting, alpha=usual)
    for key, partition in READ_BY.items():
        if setting.partition != partition and getattr(setting, key) != LATER[key]:
            said = f"{key} = {getattr(setting, key)}: --partition {setting.partition} does not read it"
            raise BadConfig(f"{said}; leave it out, or choose --partition {partition}")
    if setting.partition == "classes" and setting.classes_per_client is None:
        setting = replace(setting, classes_per_client=2)
    if setting.partition == "users" and "users" not in given and setting.clients is not None:
        setting = replace(setting, users="sample")
    if setting.clients is None and setting.users == "sample":
        raise BadConfig("users = sample: every user is a client; say how many clients there are with --clients")
    if setting.partition != "users":
        if setting.clients is None:
            raise BadConfig(f"--partition {setting.partition}: say among how many clients with --clients")
        if given.get("client_test") == "own":
            raise BadConfig(f"client_test = own needs natural users as clients, not --partition {setting.partition}")
        if setting.client_test == "own":
            setting = replace(setting, client_test="matched")
    return setting
