"""From options to runs: a `Sweep` is what was asked for, a `Run` one cell of it, with an identity."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.algorithm import Algorithm
from bench.dataset import Dataset, Labels, Splits
from bench.models import BUILT_IN, MODELS, build, has_body
from bench.models import teacher as teachers
from bench.models.teacher import Features, Teacher
from bench.models.weights import digest, read
from bench.part import Part
from bench.plugins.registry import source_digest, told
from bench.protocol.identity import identify
from bench.protocol.presets import DEFAULT, Preset
from bench.protocol.settings import LATER, BadConfig, Setting, named
from bench.protocol.spelling import label
from bench.protocol.spelling import name as name
from bench.protocol.spelling import parse_algorithms as parse_algorithms
from bench.protocol.spelling import parse_dataset as parse_dataset
from bench.protocol.spelling import parse_datasets as parse_datasets
from bench.protocol.spelling import parse_imbalance as parse_imbalance
from bench.protocol.spelling import parse_seeds as parse_seeds
from bench.protocol.words import spell_imbalance
from bench.splits import auxiliary
from bench.splits.auxiliary import Reserve
from bench.sweep.matching import matched_rounds
from bench.sweep.resolving import resolve_setting
from bench.training import engine as engines
from bench.tree import Tree

P = TypeVar("P")


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
    """"fp32", without TF32, or "bf16"."""
    device: str = "cpu"
    """"cpu", "cuda" or "mps", resolved."""
    weights: Path | None = None
    """File of a body that models start from."""
    teacher: Teacher | None = None
    """File of a teacher's features; None: the algorithm needs none."""
    data_root: Path
    plugins: tuple[Path, ...] = ()
    """Files that a worker must load before it can unpickle the rest."""
    lr: float | None = None
    """Learning rate of this algorithm alone, where a preset has one; None: the setting's."""
    rounds: int | None = None
    """Rounds of this algorithm alone, where samples are matched; None: the setting's."""
    preset: str = "default"
    """What the algorithm's fields and its learning rate were chosen by; changes no number."""
    workers: int = 1
    """Processes that share the clients of a round; changes no number."""

    @property
    def label(self) -> str:
        """The algorithm as on the command line, and what it was chosen by: `fedrep(head_epochs=5) [tuned, lr 0.02]`."""
        notes = [] if self.preset == "default" else [self.preset]
        notes += [] if self.lr is None else [f"lr {self.lr:g}"]
        notes += [] if self.rounds is None else [f"{self.rounds} round{'s' * (self.rounds != 1)}"]
        notes += [] if self.setting.auxiliary is None else [f"auxiliary {self.setting.auxiliary}"]
        notes += [] if self.teacher is None else [str(self.teacher)]
        return label(self.algorithm) + (f" [{', '.join(notes)}]" if notes else "")

    def trained_by(self) -> Setting:
        """Give the setting that this run trains by: the protocol, with a learning rate and rounds of its own."""
        lr, rounds = self.lr or self.setting.lr, self.rounds or self.setting.rounds
        return replace(self.setting, lr=lr, rounds=rounds)

    def identity(self) -> dict[str, Any]:
        """Give everything that can change the numbers, and nothing else, as JSON's types."""
        algorithm = describe_plugin(self.algorithm)
        if self.lr is not None:
            algorithm["lr"] = self.lr
        if self.rounds is not None:
            algorithm["rounds"] = self.rounds
        if self.setting.auxiliary is not None:
            algorithm["auxiliary"] = _describe_origin(self.setting.auxiliary)
        if self.teacher is not None:
            algorithm["teacher"] = self.teacher.digest
        return {
            "algorithm": algorithm,
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

    def fields(self) -> dict[str, Any]:
        """Give the setting's fields as they are stored; images at the server are told with the algorithm."""
        fields = asdict(self.setting)
        del fields["auxiliary"]
        return {field: value for field, value in fields.items() if field not in LATER or value != LATER[field]}

    def overrides(self) -> dict[str, object]:
        """Give the fields that differ from the named setting's, and the file of weights if there is one."""
        usual = named(self.setting.name, self.dataset)
        changed = {key: value for key, value in self.fields().items() if value != getattr(usual, key)}
        return changed if self.weights is None else {**changed, "weights": self.weights.name}

    def __str__(self) -> str:
        """Say in words which cell this is: for progress and errors."""
        setting = self.setting
        cell = f"{self.label} on {label(self.dataset)}"
        alpha = "" if setting.alpha is None else f", alpha {setting.alpha:g}"
        return f"{cell}, imbalance {spell_imbalance(setting.imbalance)}{alpha}, seed {self.seed}"

    def _protocol(self) -> dict[str, Any]:
        setting = self.fields()
        del setting["name"]
        protocol = {"dataset": describe_plugin(self.dataset), "setting": setting}
        if self.setting.model not in BUILT_IN:
            protocol["model"] = describe_model(self.setting.model)
        return protocol if self.weights is None else {**protocol, "weights": digest(self.weights)}

    def read_weights(self) -> Tree | None:
        """Read the body that the models start from, if there is one.

        Raises:
            BadWeights: The file is not for the setting's model.
        """
        if self.weights is None:
            return None
        dataset, setting = self.dataset, self.setting
        return read(self.weights, build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm))

    def read_teacher(self, images: int) -> Features | None:
        """Read what the teacher makes of images and classes, if the algorithm needs one.

        Args:
            images: How many the official training part has.

        Raises:
            BadTeacher: The file is not for the dataset.
        """
        return None if self.teacher is None else self.teacher.read(images, self.dataset.num_classes)

    def reserved(self, labels: Labels) -> list[Tensor]:
        """See that there are the images at the server, if the algorithm needs some; errors of `reserve`.

        Args:
            labels: Of the run's dataset.

        Returns:
            Official training rows that must be there, besides those of clients.
        """
        if self.setting.auxiliary is None:
            return []
        origin = auxiliary.parse(self.setting.auxiliary)
        needs = self.algorithm.needs
        return auxiliary.rows_wanted(origin, needs, self.dataset, labels, self.setting, self.data_root)

    @property
    def datasets(self) -> list[Dataset]:
        """What it reads: its own dataset, and another if images at the server come from there."""
        origin = None if self.setting.auxiliary is None else auxiliary.parse(self.setting.auxiliary).dataset
        return [self.dataset] if origin is None else [self.dataset, origin]

    def reserve(self, splits: Splits) -> Reserve | None:
        """Find the images at the server, if the algorithm needs some.

        Args:
            splits: Of the run's dataset, with its official test part.

        Raises:
            BadConfig: There are not enough.
            DataMissing, DataDamaged: Those of another dataset cannot be read.
        """
        if self.setting.auxiliary is None:
            return None
        origin = auxiliary.parse(self.setting.auxiliary)
        return auxiliary.reserve(origin, self.algorithm.needs, self.dataset, splits, self.setting, self.data_root)


def describe_plugin(plugin: Algorithm | Dataset) -> dict[str, Any]:
    """Give name, version and fields of an instance, and the digest of its file if it came with `--plugin`; the same of
    its "parts", if there are some.
    """
    method, *parts = plugin.pieces if isinstance(plugin, Algorithm) else (plugin,)
    described = _describe(method)
    return {**described, "parts": [_describe(part) for part in parts]} if parts else described


def _describe(plugin: Algorithm | Dataset | Part) -> dict[str, Any]:
    described = {
        "name": name(plugin),
        "version": plugin.revision if isinstance(plugin, Dataset) else plugin.version,
        "fields": plugin.identity() if isinstance(plugin, Dataset) else told(plugin),
    }
    digest = source_digest(type(plugin))
    return described if digest is None else {**described, "source": digest}


def describe_model(model: str) -> dict[str, Any]:
    """Give name and version of a network, and the digest of its file if it came with `--plugin`."""
    network = MODELS[model]
    digest = source_digest(network)
    return {"name": model, "version": network.version, **({} if digest is None else {"source": digest})}


def _describe_origin(text: str) -> dict[str, Any]:
    """Give where images at the server come from, and which dataset that is if it is another one."""
    dataset = auxiliary.parse(text).dataset
    return {"images": text, **({} if dataset is None else {"dataset": describe_plugin(dataset)})}


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
        model = build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm)
        if "body" in algorithm.needs and not has_body(model):
            others = ", ".join(known for known in MODELS if known != setting.model)
            needs = f"{name(algorithm)} needs a model with a body and a head"
            raise BadConfig(f"{needs}, and {setting.model} has no body; choose among {others}")
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
            teacher=self._taught(algorithm),
            data_root=self.data_root,
            plugins=self.plugins,
            lr=lr,
            # What changes nothing is the default: the same run, under the same name.
            preset="default" if algorithm == asked and lr is None else preset.name,
            workers=self.workers,
        )

    def _taught(self, algorithm: Algorithm) -> Teacher | None:
        """Leave the teacher to algorithms that need one: for the others nothing is as it was not.

        Raises:
            BadConfig: An algorithm needs one, and there is none.
        """
        if "teacher" not in algorithm.needs:
            return None
        if self._teacher is None:
            raise BadConfig(
                f"{name(algorithm)} needs a teacher's features of all training images and classes; name their file "
                "with --teacher"
            )
        return self._teacher

    @cached_property
    def _teacher(self) -> Teacher | None:
        return None if self.teacher is None else teachers.named(self.teacher)


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
