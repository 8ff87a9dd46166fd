"""What a person asks of a sweep, and what that means: algorithms and datasets, where runs execute, who is told.

Importing this imports no torch: `bench run --help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.algorithm import Algorithm
    from bench.dataset import Dataset
    from bench.sweep.config import Grid, Sweep
    from bench.sweep.pool import Pool
    from bench.sweep.run import Run
    from bench.sweep.schedule import Budget
    from bench.tracking import Mirror

DEFAULT_ALGORITHMS = "fedavg,fedavg_prior,fedrep,fedbabu,creff,fedloge"
DEFAULT_DATASET = "digits"
DEFAULT_SETTING = "quick"
_OF_THE_SETTING = (
    "partition", "clients", "participation", "rounds", "epochs", "batch_size", "lr", "model", "eval_clients",
    "auxiliary", "match",
)  # fmt: skip
"""Options that replace a field of the setting of the same name."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `bench run`, by their names; text is as on the command line."""

    algos: str | Sequence[str | Algorithm]
    dataset: str | Sequence[str | Dataset]
    preset: str
    imbalance: str | None
    alpha: str | None
    grid: tuple[str, ...]
    seeds: str
    plugin: tuple[Path, ...]
    setting: str
    partition: str | None
    clients: int | None
    participation: float | None
    rounds: int | None
    match: str | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    model: str | None
    eval_clients: int | None
    auxiliary: str | None
    weights: Path | None
    teacher: Path | None
    set: tuple[str, ...] | Mapping[str, object]
    engine: str
    precision: str
    device: str
    jobs: int | None
    workers_per_run: int
    ray: str | None
    shared_out: bool
    no_ship: bool
    out: Path
    data_root: Path | None
    tracking_uri: str | None
    time_budget: str | None
    force: bool
    keep_models: bool


def sweep(asked: Asked) -> Sweep:
    """Read what is asked for.

    Raises:
        BadConfig, BadPlugin, UnknownPlugin: It makes no sense; the message says what would.
    """
    from bench.files import data_root
    from bench.plugins.cells import note_sources
    from bench.plugins.names import meant
    from bench.plugins.registry import load_plugin
    from bench.protocol.bundles import SETTINGS
    from bench.protocol.presets import parse_presets
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import ask, parse_assignments, parse_numbers
    from bench.protocol.words import split_list
    from bench.sweep import config

    if asked.ray == "":
        raise BadConfig("--ray is empty; local, off or the address of a cluster is wanted")
    if asked.tracking_uri == "":
        raise BadConfig("--tracking-uri is empty; the address of an MLflow server or off is wanted")
    stems = [file.stem for file in asked.plugin]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise BadConfig(f"--plugin: two files are called {twice}.py, and plug-ins are known by it; rename one")
    for file in asked.plugin:
        load_plugin(file)
    note_sources()
    overrides = dict(asked.set) if isinstance(asked.set, Mapping) else parse_assignments(asked.set)
    for field in (*_OF_THE_SETTING, "imbalance", "alpha"):
        if field in overrides:
            raise BadConfig(f"--set {field}: use --{field.replace('_', '-')}")
    given = {field: getattr(asked, field) for field in _OF_THE_SETTING}
    overrides |= {field: value for field, value in given.items() if value is not None}
    factors = split_list(asked.imbalance) if asked.imbalance is not None else []
    if asked.imbalance is not None and not factors:
        raise BadConfig("--imbalance is empty; a number such as 50 is wanted")
    algorithms = ask(asked.algos)
    for sentence in algorithms.left_out:
        print(sentence, file=sys.stderr)
    return config.Sweep(
        algorithms=algorithms.algorithms,
        optional=algorithms.optional,
        datasets=tuple(config.parse_datasets(asked.dataset)),
        setting=meant(asked.setting, SETTINGS) or asked.setting,
        overrides=overrides,
        imbalance=tuple(config.parse_imbalance(factor) for factor in factors),
        alpha=() if asked.alpha is None else tuple(parse_numbers(asked.alpha, "--alpha")),
        grids=tuple(map(_grid, asked.grid)),
        seeds=tuple(config.parse_seeds(asked.seeds)),
        engine=asked.engine,
        precision=asked.precision,
        device=config.resolve_device(asked.device),
        weights=None if asked.weights is None else asked.weights.resolve(),
        teacher=None if asked.teacher is None else asked.teacher.resolve(),
        data_root=data_root(asked.data_root).resolve(),
        plugins=tuple(file.resolve() for file in asked.plugin),
        presets=parse_presets(asked.preset, asked.out),
        workers=asked.workers_per_run,
    )


def _grid(text: str) -> Grid:
    """Read cells such as `imbalance=10,50; alpha=0.5`."""
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import parse_numbers
    from bench.protocol.words import split_at, split_list
    from bench.sweep import config

    said: dict[str, str] = {}
    for piece in split_at(";", text):
        key, equals, values = piece.partition("=")
        if not equals or key.strip() not in ("dataset", "imbalance", "alpha") or key.strip() in said:
            raise BadConfig(f"--grid {text}: values of dataset, imbalance and alpha are wanted, each once, as in "
                "'imbalance=10,50; alpha=0.5'")  # fmt: skip
        said[key.strip()] = values.strip()
    return config.Grid(
        datasets=tuple(config.parse_datasets(said["dataset"])) if "dataset" in said else (),
        imbalance=tuple(config.parse_imbalance(each) for each in split_list(said.get("imbalance", ""))),
        alpha=tuple(parse_numbers(said["alpha"], "--grid alpha")) if "alpha" in said else (),
    )


def expand(read: Sweep) -> list[Run]:
    """List the runs of a sweep; tell standard error which algorithms of a set are in none, and what nothing reads."""
    runs = read.expand()
    for sentence in (*read.left_out(), *read.unread()):
        print(sentence, file=sys.stderr)
    return runs


def budget(asked: Asked) -> Budget | None:
    """Read the time that there is."""
    from bench.sweep.schedule import Budget, parse_duration

    given = asked.time_budget
    return None if given is None else Budget(parse_duration(given, "--time-budget"))


def pool(asked: Asked, device: str, todo: int, warn: Callable[[str], None]) -> Pool:
    """Choose where so many runs execute."""
    from bench.protocol.settings import BadConfig
    from bench.sweep.cluster import has_ray
    from bench.sweep.on_ray import OnRay
    from bench.sweep.pool import InProcess

    for option, said in (("--shared-out", asked.shared_out), ("--no-ship", asked.no_ship)):
        if said and asked.ray in (None, "local", "off"):
            raise BadConfig(f"{option}: runs are on this machine; leave it out, or name a cluster with --ray ADDRESS")
    if asked.ray == "off" or (asked.ray is None and todo <= 1):
        return InProcess()
    if asked.ray is None and not has_ray():
        warn("ray is not installed, so the runs follow each other here; pip install ray for several at once")
        return InProcess()
    where, workers, ship = asked.ray or "local", asked.workers_per_run, not asked.no_ship
    return OnRay(where, asked.jobs, device, workers, shared_out=asked.shared_out, ship=ship, tell=warn)


def mirror(asked: Asked, read: Sweep, todo: int, command: str, warn: Callable[[str], None]) -> Mirror | None:
    """Open MLflow, where so many runs will be shown; None where they will not."""
    from bench import tracking
    from bench.plugins.registry import label

    given = asked.tracking_uri
    if given == "off" or (given is None and todo == 0):
        return None
    if not tracking.has_mlflow():
        warn("mlflow is not installed, so nothing is tracked; pip install mlflow, or use --tracking-uri off")
        return None
    about = {"command": command, "setting": read.setting, "seeds": ",".join(map(str, read.seeds))}
    about |= {"algorithms": ",".join(map(label, read.algorithms)), "dataset": ",".join(map(label, read.datasets))}
    return tracking.Mirror(given or tracking.default_uri(asked.out), asked.out, about, warn)
