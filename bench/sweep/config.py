"""From options to runs: a `Sweep` is what was asked for, and each of its cells a `Run`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from bench.algorithm import Algorithm
from bench.dataset import Dataset
from bench.models import MODELS, Model, build, has_body, has_norm
from bench.models import teacher as teachers
from bench.models.teacher import Teacher
from bench.protocol.presets import DEFAULT, Preset
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import name as name
from bench.protocol.spelling import parse_algorithms as parse_algorithms
from bench.protocol.spelling import parse_dataset as parse_dataset
from bench.protocol.spelling import parse_datasets as parse_datasets
from bench.protocol.spelling import parse_imbalance as parse_imbalance
from bench.protocol.spelling import parse_seeds as parse_seeds
from bench.splits import auxiliary
from bench.sweep.matching import matched_rounds
from bench.sweep.resolving import resolve_setting
from bench.sweep.run import Run
from bench.training import engine as engines

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Some of a sweep's cells, where they are no full product; what it says nothing of, it has all of."""

    datasets: tuple[Dataset, ...] = ()
    imbalance: tuple[float | None, ...] = ()
    alpha: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for: every algorithm in every cell of datasets, imbalance factors, alphas and seeds."""

    algorithms: tuple[Algorithm, ...]
    optional: tuple[Algorithm, ...] = ()
    """Those of them that are left out of cells in which they cannot be."""
    datasets: tuple[Dataset, ...]
    setting: str = "quick"
    """Name in `SETTINGS`."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Fields of the setting to replace, except imbalance and alpha."""
    imbalance: tuple[float | None, ...] = ()
    """None: the natural tail. Empty: the setting's."""
    alpha: tuple[float, ...] = ()
    """Empty: the setting's."""
    grids: tuple[Grid, ...] = ()
    """Of these cells, those that are run; empty: all."""
    seeds: tuple[int, ...] = (0,)
    engine: str = "auto"
    """"auto", "serial" or "stacked"."""
    precision: str = "fp32"
    device: str = "cpu"
    """"cpu", "cuda" or "mps"."""
    weights: Path | None = None
    """File of a body that models start from."""
    teacher: Path | None = None
    """File of a teacher's features, for algorithms that need one."""
    data_root: Path
    plugins: tuple[Path, ...] = ()
    presets: tuple[Preset, ...] = (DEFAULT,)
    """Every algorithm is run as each of them says."""
    workers: int = 1
    """Processes of each run."""

    def expand(self) -> list[Run]:
        """List the runs, each once, algorithms innermost: a sweep cut short has whole comparisons.

        Raises:
            BadConfig: A setting or field is unknown or out of range, an algorithm does not fit the model, or a preset
                does not have it; of an optional one only if there is nothing else to run.
            BadModel: The model does not fit the images.
            BadWeights: The file of weights cannot be read.
            BadTeacher: Nor can that of a teacher's features.
        """
        return list(self._expanded[0].values())

    def left_out(self) -> list[str]:
        """Say which optional algorithms are left out, and why, once each; errors as of `expand`."""
        return [f"left out of the set: {why}" for why in dict.fromkeys(map(str, self._expanded[1]))]

    def unread(self) -> list[str]:
        """Say where a field that was given changes no number: the kind of norm layers of a network that has none, or
        what happens to running statistics that there are not.
        """
        asked, found = self.overrides, []
        models = {run.setting.model: run for run in self.expand()} if {"norm", "statistics"} & asked.keys() else {}
        for model, run in models.items():
            normed = has_norm(_model(run.dataset, run.setting))
            if "norm" in asked and not normed:
                said = "has no norm layers, so this changes no number"
                found.append(f"norm = {asked['norm']}: {model} {said} ('bench show {model}')")
            if asked.get("statistics", "shared") != "shared" and (not normed or run.setting.norm != "batch"):
                said = "so this changes no number; networks with norm layers have some with --set norm=batch"
                found.append(f"statistics = {asked['statistics']}: {model} has no running statistics here, {said}")
        return found

    @cached_property
    def _expanded(self) -> tuple[dict[str, Run], list[BadConfig]]:
        """The runs by their ids, and why others are none."""
        runs: dict[str, Run] = {}
        refusals: list[BadConfig] = []
        for dataset, cell in self._cells():
            setting = resolve_setting(self.setting, dataset, {**self.overrides, **cell})
            for seed, preset, algorithm in itertools.product(self.seeds, self.presets, self.algorithms):
                try:
                    run = self._run(algorithm, preset, dataset, setting, seed)
                except BadConfig as refusal:
                    if algorithm not in self.optional:
                        raise
                    refusals.append(refusal)
                else:
                    runs.setdefault(run.id, run)
        if refusals and not runs:
            raise refusals[0]
        idle = self.overrides.get("auxiliary")
        if idle is not None and not any(run.setting.auxiliary for run in runs.values()):
            raise BadConfig(f"--auxiliary {idle}: nothing that is run needs images at the server; leave the option out")
        if self.teacher is not None and not any(run.teacher for run in runs.values()):
            raise BadConfig(f"--teacher {self.teacher.name}: nothing that is run needs a teacher; leave the option out")
        return runs, refusals

    def _cells(self) -> Iterator[tuple[Dataset, dict[str, float | None]]]:
        """Give each dataset with imbalance and alpha, as far as something was said of them.

        Raises:
            BadConfig: No grid has anything of what was asked for.
        """
        found = False
        for grid in self.grids or (Grid(),):
            datasets = _both(self.datasets, grid.datasets)
            axes = {"imbalance": _both(self.imbalance, grid.imbalance), "alpha": _both(self.alpha, grid.alpha)}
            if any(values is None for values in axes.values()):
                continue
            given = {axis: values for axis, values in axes.items() if values}
            for dataset in datasets or ():
                for values in itertools.product(*given.values()):
                    found = True
                    yield dataset, dict(zip(given, values, strict=True))
        if not found:
            raise BadConfig("--grid: none of its cells has the datasets, imbalances and alphas that are asked for")

    def _run(self, asked: Algorithm, preset: Preset, dataset: Dataset, setting: Setting, seed: int) -> Run:
        algorithm, lr = preset.choose(asked)
        lr = None if lr in (None, setting.lr) else replace(setting, lr=lr).lr  # checked
        model = _model(dataset, setting)
        if "body" in algorithm.needs and not has_body(model):
            others = ", ".join(known for known in MODELS if known != setting.model)
            needs = f"{name(algorithm)} needs a model with a body and a head"
            raise BadConfig(f"{needs}, and {setting.model} has no body; choose among {others}")
        if "pixels" in algorithm.needs and not dataset.pictures:
            needs = f"{name(algorithm)} needs examples that are made of pixels, which it attacks"
            raise BadConfig(f"{needs}, and those of {name(dataset)} are not; choose a dataset of pictures")
        if "sgd" in algorithm.needs and setting.optimiser != "sgd":
            needs = f"{name(algorithm)} reckons with steps of SGD, which follow the gradient"
            raise BadConfig(f"{needs}, and optimiser = {setting.optimiser} takes others; leave one of both out")
        rounds = matched_rounds(algorithm, setting) if setting.match == "samples" else setting.rounds
        return Run(
            algorithm=algorithm,
            dataset=dataset,
            setting=_for_server(algorithm, setting),
            rounds=None if rounds == setting.rounds else rounds,
            seed=seed,
            engine=engines.choose(self.engine, model, setting.batch_size, self.device),
            precision=self.precision,
            device=self.device,
            weights=self.weights,
            teacher=self._taught(algorithm, setting),
            data_root=self.data_root,
            plugins=self.plugins,
            lr=lr,
            # What changes nothing is the default: the same run, under the same name.
            preset="default" if algorithm == asked and lr is None else preset.name,
            workers=self.workers,
        )

    def _taught(self, algorithm: Algorithm, setting: Setting) -> Teacher | None:
        """Leave the teacher to algorithms that need one: for the others nothing is as it was not.

        Raises:
            BadConfig: An algorithm needs one, and there is none, or it saw other images.
        """
        if "teacher" not in algorithm.needs:
            return None
        if setting.shifts:
            said = f"shift = {setting.shift}: the teacher of {name(algorithm)} saw the images as they are"
            raise BadConfig(f"{said}; leave the shift or the method out")
        if self._teacher is None:
            raise BadConfig(
                f"{name(algorithm)} needs a teacher's features of all training images and classes; name their file "
                "with --teacher"
            )
        return self._teacher

    @cached_property
    def _teacher(self) -> Teacher | None:
        return None if self.teacher is None else teachers.named(self.teacher)


def _model(dataset: Dataset, setting: Setting) -> Model:
    return build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm, setting.balanced)


def _both(asked: tuple[P, ...], grid: tuple[P, ...]) -> tuple[P, ...] | None:
    """Give what both have, where an empty one has everything; None if that is nothing."""
    if not asked or not grid:
        return asked or grid
    return tuple(each for each in asked if each in grid) or None


def _for_server(algorithm: Algorithm, setting: Setting) -> Setting:
    """Leave images at the server to algorithms that need some: for the others the setting is what it was.

    Raises:
        BadConfig: An algorithm needs some, and there are none of that kind.
    """
    needs = algorithm.needs & auxiliary.NEEDS
    if not needs:
        return replace(setting, auxiliary=None)
    if setting.auxiliary is None:
        raise BadConfig(
            f"{name(algorithm)} needs images at the server ({' and '.join(sorted(needs))}); say which with "
            "--auxiliary, such as own:10 for ten of each class that the tail cut away"
        )
    auxiliary.check_needs(auxiliary.parse(setting.auxiliary), needs, name(algorithm))
    return setting


def resolve_device(device: str) -> str:
    """Resolve "auto": a CUDA GPU where there is one. Apple's ("mps") is asked for by its name: there float64, in which
    models are averaged and weights drawn, is computed on the CPU, and the suite's own tests do not run on it.

    Raises:
        BadConfig: A GPU is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        raise BadConfig("--device cuda: torch finds no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise BadConfig("--device mps: torch finds no Apple GPU here; use --device cpu")
    return device
