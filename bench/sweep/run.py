"""One cell of a sweep: all that a worker needs, and the identity by which results of it are known."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.algorithm import Algorithm
from bench.dataset import Dataset, Labels, Splits
from bench.models import BUILT_IN, MODELS, build
from bench.models.teacher import Features, Teacher
from bench.models.weights import digest, read
from bench.part import Part
from bench.plugins.registry import source_digest, told
from bench.protocol.bundles import named
from bench.protocol.identity import identify
from bench.protocol.settings import LATER, Setting
from bench.protocol.spelling import label, name
from bench.protocol.words import spell_imbalance
from bench.splits import auxiliary
from bench.splits.auxiliary import Reserve
from bench.tree import Tree


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
