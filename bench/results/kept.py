"""The models that a run kept (`bench run --keep-models`), read again: as trees, and as modules of torch.

`bench.training.keeping` says what the files hold, and how to read them without this suite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from bench import keys, models, tree
from bench.algorithm import Algorithm, method_of
from bench.plugins.registry import ALGORITHMS, source_digest
from bench.results.record import DOCUMENT, DamagedResult, Record
from bench.system import reading
from bench.task import Task
from bench.training.job import PRECISIONS
from bench.training.keeping import SERVER, sha256
from bench.tree import Tree

OF_CLIENTS = ("personal", "unseen")
"""Kinds of models of which each client has its own."""
_AGAIN = "run again with --force --keep-models"
_STATES = ("server", "clients")


class NotKept(LookupError):
    """A run kept no models, or none of this name, or they cannot be used here. The message says what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Network:
    """What the models of a run take, and how they score it."""

    name: str
    """Key in `bench.models.MODELS`."""
    norm: str
    classes: int
    shape: tuple[int, ...]
    """Channels, height, width of an image; or of another example."""
    scale: float
    """The pixel value that stands for 1.0."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    precision: str
    methods: Mapping[str, str]
    """By variant, "*" for all others: method of the algorithm that scores images with a model that is no body and head.
    """


class Kept:
    """The models of a run, read from its files as they are asked for.

    Args:
        record: Of the run.

    Raises:
        NotKept: It kept none.
        DamagedResult: A file is missing, or not what was written.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        if not record.models:
            raise NotKept(f"run {record.id} kept no models; the same 'bench run' with --keep-models writes them")
        if record.pack is not None and not record.has_models:
            raise NotKept(f"run {record.id} lies in a pack without its models; read those of its folder")
        if SERVER not in record.models:
            raise DamagedResult(f"{record.folder / DOCUMENT} lists models without {SERVER}; {_AGAIN}")
        self._files = {name: _opened(record, name) for name in record.models}
        about = {name: json.loads(file.metadata()["about"]) for name, file in self._files.items()}
        known = about[SERVER]["network"]
        lists = {key: tuple(known[key]) for key in ("shape", "mean", "std")}
        self.network = Network(**{**known, **lists})
        self._places: dict[str, Any] = {}
        """Nested as the trees are: a leaf is (file, key), or the path of what it is equal to."""
        for name, file in self._files.items():
            for path in about[name]["empty"]:
                self._put(path, {})
            for path, place in about[name]["aliases"].items():
                self._put(path, place)
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                self._put(key, (name, key))

    def names(self) -> list[str]:
        """Name the tested models: "generic", "generic:NAME", "personal", "personal:NAME", "unseen", ..."""
        kinds = ("generic", *OF_CLIENTS)
        tested = [name for name in self._places if name not in _STATES]
        return sorted(tested, key=lambda name: (kinds.index(name.partition(":")[0]), name))

    def clients(self, name: str) -> list[int]:
        """Give the clients that have a model of a name, ascending: none for a generic one. Of "clients", those that
        keep something.

        Raises:
            NotKept: There is no such model.
        """
        found = self._find(name, None)
        return sorted(int(client) for client in found if client != "initial") if _is_of_clients(name) else []

    def tree(self, name: str, client: int | None = None) -> Tree:
        """Read a model, or a state: "server", or "clients" with a client.

        Args:
            name: Of `names`, or a state's.
            client: Whose; None for what is not a client's.

        Returns:
            The tree that was tested or kept, in host memory; empty for a state without tensors.

        Raises:
            NotKept: There is no such model, or the client has none.
        """
        if _is_of_clients(name) != (client is not None):
            said = "each client has its own, so say whose" if client is None else "it is the same for all clients"
            raise NotKept(f"{name} of run {self.record.id}: {said}")
        read: Tree = self._read(self._find(name, client))
        return read

    def module(self, name: str, client: int | None = None) -> Module:
        """Give a model as a module of torch, in evaluation mode; arguments and errors as of `tree`.

        Raises:
            NotKept: Besides, the algorithm scores images in its own way, and is not known here as it was then.
        """
        return Module(self.tree(name, client), self.network, self._scorer(name))

    def _scorer(self, name: str) -> Callable[[Tree, Tensor], Tensor]:
        """Give what scores images with a model of a name: (model, (B, ...) float32) -> (B, C)."""
        task, methods = self._task(), self.network.methods
        called = methods.get(name.partition(":")[2], methods.get("*"))
        return task.logits if called is None else partial(method_of(_algorithm(self.record), called), task)

    def _task(self) -> Task:
        """Give what a scoring method may ask for, of the last round."""
        record, network, setting = self.record, self.network, self.record.setting
        own: Any = record.identity["algorithm"]
        told: Any = {**setting, **{key: own[key] for key in ("lr", "rounds") if key in own}}
        counts = torch.tensor(record.class_counts)
        return Task(
            model=models.build(network.name, network.classes, network.shape, network.norm),
            num_classes=network.classes,
            num_clients=(record.clients or 0) - told["unseen"],
            rounds=told["rounds"],
            round=told["rounds"] - 1,
            epochs=told["epochs"],
            batch_size=told["batch_size"],
            lr=told["lr"],
            key=keys.fold(keys.key(record.seed), "run"),
            prior=(counts / counts.sum()).float(),
            precision=PRECISIONS[network.precision],
        )

    def _put(self, path: str, place: object) -> None:
        *parents, last = path.split("/")
        node = self._places
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = place

    def _find(self, name: str, client: int | None) -> Any:
        node = self._places.get(name, {} if name in _STATES else None)
        if node is None:
            raise NotKept(f"run {self.record.id} kept no model {name!r}; there are {', '.join(self.names())}")
        if client is None:
            return node
        if str(client) not in node:
            known = ", ".join(map(str, self.clients(name))) or "no client"
            raise NotKept(f"run {self.record.id} kept no {name} of client {client}; there are those of {known}")
        return node[str(client)]

    def _read(self, node: Any) -> Any:
        if isinstance(node, str):
            found: Any = self._places
            for key in node.split("/"):
                found = found[key]
            return self._read(found)
        if isinstance(node, tuple):
            name, key = node
            return self._files[name].get_tensor(key)
        return {key: self._read(child) for key, child in node.items()}


class Module(torch.nn.Module):
    """A kept model in evaluation mode: floating-point tensors are parameters, others buffers, under their paths.

    Args:
        model: As it was tested.
        network: What it takes.
        score: (model, images) -> logits.
    """

    def __init__(self, model: Tree, network: Network, score: Callable[[Tree, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._score = network, score
        self._shape = tree.map(lambda leaf: leaf.new_empty(0), model)
        for path, leaf in tree.flatten(model).items():
            if leaf.is_floating_point() and not tree.is_statistic(path):
                self.register_parameter(path, torch.nn.Parameter(leaf, requires_grad=False))
            else:
                self.register_buffer(path, leaf)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Score images.

        Args:
            x: (B, channels, height, width) float32, normalised as the run's were.

        Returns:
            (B, C) float32, larger is likelier.
        """
        leaves = {**self._parameters, **self._buffers}
        model = tree.map_paths(lambda path, _: leaves[path], self._shape)  # type: ignore[arg-type, return-value]
        precision = PRECISIONS[self.network.precision]
        with torch.autocast(x.device.type, precision, precision != torch.float32):
            return self._score(model, x).float()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Make of raw pixels, (B, channels, height, width) uint8, what `forward` takes."""
        mean, std = torch.tensor(self.network.mean), torch.tensor(self.network.std)
        factor, offset = 1.0 / (self.network.scale * std), -mean / std  # to the bit as `bench.data.Images` does
        factor, offset = (each.to(pixels.device)[:, None, None] for each in (factor, offset))
        return pixels.to(torch.float32) * factor + offset


def load(record: Record) -> Kept:
    """Open the models that a run kept; errors of `Kept`."""
    return Kept(record)


def module(record: Record, name: str, client: int | None = None) -> Module:
    """Give one kept model of a run as a module of torch; errors of `Kept` and `Kept.module`."""
    return load(record).module(name, client)


def _is_of_clients(name: str) -> bool:
    return name == "clients" or name.partition(":")[0] in OF_CLIENTS


def _opened(record: Record, name: str) -> Any:
    """Open a file of models, if it is the one that was written."""
    path = record.models_folder / name
    try:
        found = sha256(path)
    except OSError as error:
        raise DamagedResult(f"{path} cannot be read: {reading.why(error)}; {_AGAIN}") from error
    if found != record.models[name]:
        raise DamagedResult(f"{path} is not the file that {DOCUMENT} was written with; {_AGAIN}")
    return safe_open(path, "pt")


def _algorithm(record: Record) -> Algorithm:
    """Make the algorithm of a run anew, without its parts, if it scores images as it did then."""
    told: Any = record.identity["algorithm"]
    kind = ALGORITHMS[told["name"]]
    if (kind.version, source_digest(kind)) != (told["version"], told.get("source")):
        raise NotKept(
            f"run {record.id}: {told['name']} scores images in its own way, and is another version here than that of "
            "the run; run again with --force --keep-models"
        )
    algorithm: Algorithm = TypeAdapter(kind).validate_json(json.dumps(told["fields"]))
    return algorithm
