"""From options to runs: a `Sweep` is what was asked for, a `Run` one cell of it, with an identity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench import engine as engines
from bench.algorithm import Algorithm
from bench.dataset import Dataset
from bench.identity import identify
from bench.models import MODELS, build, has_body
from bench.registry import source_digest
from bench.settings import SETTINGS, BadConfig, Setting
from bench.spelling import check_fields, label, near
from bench.spelling import name as name
from bench.spelling import parse_algorithms as parse_algorithms
from bench.spelling import parse_dataset as parse_dataset
from bench.spelling import parse_datasets as parse_datasets
from bench.spelling import parse_imbalance as parse_imbalance
from bench.spelling import parse_seeds as parse_seeds
from bench.split import PARTITIONS


@dataclass(frozen=True, kw_only=True)
class Run:
    """One algorithm on one split: all that a worker needs."""

    algorithm: Algorithm
    dataset: Dataset
    setting: Setting
    seed: int
    engine: str
    """"serial" or "stacked", resolved."""
    precision: str = "fp32"
    """"fp32" or "bf16"."""
    device: str = "cpu"
    """"cpu" or "cuda", resolved."""
    data_root: Path
    plugins: tuple[Path, ...] = ()
    """Files that a worker must load before it can unpickle the rest."""

    def identity(self) -> dict[str, Any]:
        """Give everything that can change the numbers, and nothing else, as JSON's types."""
        return {
            "algorithm": describe_plugin(self.algorithm),
            **self._protocol(),
            "seed": self.seed,
            "engine": self.engine,
            "precision": self.precision,
            "device": self.device,
        }

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits of the identity's hash: the name of the run's folder."""
        return identify(self.identity())

    @cached_property
    def protocol(self) -> str:
        """12 hexadecimal digits of the hash of dataset and setting: results that may stand in one table."""
        return identify(self._protocol())

    def overrides(self) -> dict[str, object]:
        """Give the fields that differ from the named setting's."""
        named = SETTINGS[self.setting.name](self.dataset)
        return {key: value for key, value in asdict(self.setting).items() if value != getattr(named, key)}

    def __str__(self) -> str:
        """Say in words which cell this is: for progress and errors."""
        setting = self.setting
        cell = f"{label(self.algorithm)} on {label(self.dataset)}"
        return f"{cell}, imbalance {setting.imbalance:g}, alpha {setting.alpha:g}, seed {self.seed}"

    def _protocol(self) -> dict[str, Any]:
        setting = asdict(self.setting)
        del setting["name"]
        return {"dataset": describe_plugin(self.dataset), "setting": setting}


def describe_plugin(plugin: Algorithm | Dataset) -> dict[str, Any]:
    """Give name, version and fields of an instance, and the digest of its file if it came with `--plugin`."""
    described = {
        "name": name(plugin),
        "version": plugin.version,
        "fields": asdict(plugin),  # type: ignore[call-overload]
    }
    digest = source_digest(type(plugin))
    return described if digest is None else {**described, "source": digest}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for: every algorithm in every cell of datasets, imbalance factors, alphas and seeds."""

    algorithms: tuple[Algorithm, ...]
    datasets: tuple[Dataset, ...]
    setting: str = "quick"
    """Name in `SETTINGS`."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Fields of the setting to replace, except imbalance and alpha."""
    imbalance: tuple[float, ...] = ()
    """Empty: the setting's."""
    alpha: tuple[float, ...] = ()
    """Empty: the setting's."""
    seeds: tuple[int, ...] = (0,)
    engine: str = "auto"
    """"auto", "serial" or "stacked"."""
    precision: str = "fp32"
    device: str = "cpu"
    """"cpu" or "cuda"."""
    data_root: Path
    plugins: tuple[Path, ...] = ()

    def expand(self) -> list[Run]:
        """List the runs, each once, algorithms innermost: a sweep cut short has whole comparisons.

        Raises:
            BadConfig: A setting or field is unknown or out of range, or an algorithm does not fit the model.
            BadModel: The model does not fit the images.
        """
        runs: dict[str, Run] = {}
        for dataset in self.datasets:
            base = resolve_setting(self.setting, dataset, self.overrides)
            cells = itertools.product(self.imbalance or (base.imbalance,), self.alpha or (base.alpha,), self.seeds)
            for imbalance, alpha, seed in cells:
                setting = replace(base, imbalance=float(imbalance), alpha=float(alpha))
                for algorithm in self.algorithms:
                    run = self._run(algorithm, dataset, setting, seed)
                    runs.setdefault(run.id, run)
        return list(runs.values())

    def _run(self, algorithm: Algorithm, dataset: Dataset, setting: Setting, seed: int) -> Run:
        model = build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm)
        if "body" in algorithm.needs and not has_body(model):
            others = ", ".join(known for known in MODELS if known != setting.model)
            needs = f"{name(algorithm)} needs a model with a body and a head"
            raise BadConfig(f"{needs}, and {setting.model} has no body; choose among {others}")
        return Run(
            algorithm=algorithm,
            dataset=dataset,
            setting=setting,
            seed=seed,
            engine=engines.choose(self.engine, model, self.device),
            precision=self.precision,
            device=self.device,
            data_root=self.data_root,
            plugins=self.plugins,
        )


def resolve_setting(setting: str, dataset: Dataset, overrides: Mapping[str, object]) -> Setting:
    """Give a named setting for a dataset with some fields replaced.

    Raises:
        BadConfig: No such setting, field, partition or model, or a value of the wrong type or range.
    """
    if setting not in SETTINGS:
        raise BadConfig(f"no setting is called {setting!r}; {near(setting, SETTINGS)}")
    typed = check_fields(Setting, overrides, "a setting")
    if "name" in typed:
        raise BadConfig("a setting's name cannot be set; choose one with --setting")
    for key, known in (("model", MODELS), ("partition", PARTITIONS)):
        if key in typed and typed[key] not in known:
            raise BadConfig(f"no {key} is called {typed[key]!r}; {near(typed[key], known)}")
    return replace(SETTINGS[setting](dataset), **typed)


def resolve_device(device: str) -> str:
    """Resolve "auto": a GPU where there is one.

    Raises:
        BadConfig: A GPU is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        raise BadConfig("--device cuda: torch finds no GPU here; use --device cpu")
    return device
