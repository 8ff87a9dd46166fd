"""The models of a run as files that live without this suite.

    models/server.safetensors           the server's last state, what clients begin with, the generic models
    models/clients-00000.safetensors    of some clients: what each keeps, and its tested models; -00001 of others, ...

All files together are one dictionary of tensors, whose keys are paths:

    server/body/hidden/weight           the server's state
    clients/3/head/weight               what client 3 keeps; `clients/initial/...`: one that never took part
    generic/..., generic:NAME/...       the generic model and its variants
    personal/3/..., personal:NAME/3/...     the model of client 3, adapted where it was tested so, and its variants
    unseen/24/..., unseen:NAME/24/...   the same of a client held out of training

Equal tensors are stored once. Beside its tensors a file holds a text of JSON, `about`: `aliases` names each other place
of a tensor or of a whole sub-tree, and where it lies, in the same file or the server's; `empty` the sub-trees without
tensors. This puts all together, with torch and safetensors alone:

    tensors = {}
    for file in sorted(Path("models").glob("*.safetensors"), reverse=True):  # the server's first
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}
            about = json.loads(opened.metadata()["about"])
        for path, place in about["aliases"].items():  # in their order
            found = [key for key in tensors if f"{key}/".startswith(f"{place}/")]
            tensors |= {path + key[len(place):]: tensors[key] for key in found}

`network`, in the server's file, says what the models take: pixels · (1 / (`scale` · `std`)) - `mean` / `std`, a value a
channel; and what they are: `name` and `norm` of a network of `bench.models`, whose docstring has its layers, `classes`,
`shape` of an image, `precision`. Models that are no body and head have a method of the algorithm that scores images
with them: `methods` has its name by variant, such as NAME above, and under `*` that of all other models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from bench import tree
from bench.algorithm import Client, is_usual, method_of
from bench.system import durable, reading
from bench.training.job import Job
from bench.training.states import StatesUnwritable, Store
from bench.tree import Tree

SUFFIX = ".safetensors"
SERVER = f"server{SUFFIX}"
_FILE_BYTES = 2**28
"""Of tensors, after which a file of clients is written: so much, and one client's models, is held in memory."""

_Seen = dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], tuple[Tensor, bytes]]
"""By memory: a tensor, so that its memory is no other's meanwhile, and its fingerprint."""


class Keeper:
    """Writes the models of a run's last evaluation, some clients at a time.

    Args:
        folder: Where to; what lies there already is removed.
        job: The run.

    Raises:
        StatesUnwritable: They cannot be written.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        """SHA-256 by name of a file."""
        self._network = _network(job)
        self._of_server: dict[bytes, str] = {}
        self._held: set[int] = set()
        self._begin()
        durable.remove(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def put(self, path: str, kept: Tree) -> None:
        """Put a tree into the file that is begun, under a path."""
        self._put(path, kept, {})

    def close_server(self) -> None:
        """Write the server's file; what follows is clients'."""
        self._of_server = self._known
        self._write(SERVER, {"network": self._network})

    def clients(self, clients: Sequence[int], store: Store, named: Mapping[str, Sequence[Tree | None]]) -> None:
        """Keep what some clients have.

        Args:
            clients: Which.
            store: Their private states; one that has none keeps nothing.
            named: Tested models by name, one a client, None where it has none.
        """
        took_part = set(store.clients())
        seen: _Seen = {}
        for place, client in enumerate(clients):
            if client in took_part and client not in self._held:
                self._put(f"clients/{client}", store[client], seen)
                self._held.add(client)
            for name, models in named.items():
                if (model := models[place]) is not None:
                    self._put(f"{name}/{client}", model, seen)
            if self._bytes >= _FILE_BYTES:
                self._write_clients()

    def finish(self, store: Store) -> dict[str, str]:
        """Keep the states of all other clients, and give the SHA-256 of each file by its name."""
        for client in store.clients():
            self.clients([client], store, {})
        if self._tensors or self._aliases or self._empty:
            self._write_clients()
        try:
            durable.flush(self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return self.files

    def _put(self, path: str, kept: Tree, seen: _Seen) -> None:
        if tree.flatten(kept):
            self._place(path, kept, seen)

    def _place(self, path: str, node: Tree | Tensor, seen: _Seen) -> None:
        """Store a tensor or a sub-tree, or say where its like is."""
        print_ = _fingerprint(node, seen)
        if (place := self._known.get(print_)) is not None:
            self._aliases[path] = place
        elif isinstance(node, Tensor):
            self._tensors[path] = node.detach().to("cpu", copy=True).contiguous()  # views would share memory
            self._bytes += node.nbytes
        elif not node:
            self._empty.append(path)
            return
        else:
            for key, child in node.items():
                self._place(f"{path}/{key}", child, seen)
        self._known.setdefault(print_, path)

    def _begin(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        self._empty: list[str] = []
        self._bytes = 0
        self._known = dict(self._of_server)

    def _write_clients(self) -> None:
        self._write(f"clients-{len(self.files) - 1:05}{SUFFIX}", {})

    def _write(self, name: str, more: Mapping[str, object]) -> None:
        about = json.dumps({"aliases": self._aliases, "empty": self._empty, **more})
        content = save(self._tensors, {"about": about})  # one text: several come in any order, and bytes would differ
        try:
            durable.put(self.folder / name, content)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.files[name] = hashlib.sha256(content).hexdigest()
        self._begin()


def holds(folder: Path, files: Mapping[str, str]) -> bool:
    """Tell whether a folder has the files that a keeper wrote, at least one."""
    paths = {name: folder / name for name in files}
    if not paths or any(path.is_symlink() for path in (folder, *paths.values())):
        return False
    return all(path.is_file() and sha256(path) == files[name] for name, path in paths.items())


def sha256(file: Path) -> str:
    """Give the SHA-256 of a file, as 64 hexadecimal digits."""
    with reading.opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fingerprint(node: Tree | Tensor, seen: _Seen) -> bytes:
    """Give what equal tensors, or trees of them, have in common and no others."""
    if not isinstance(node, Tensor):
        children = [f"{key} {_fingerprint(child, seen).hex()}" for key, child in sorted(node.items())]
        return hashlib.sha256("\n".join(("tree", *children)).encode()).digest()
    memory = node.data_ptr(), node.shape, node.stride(), node.dtype
    if memory not in seen:
        seen[memory] = node, bytes.fromhex(tree.digest([{"": node}]))
    return seen[memory][1]


def _network(job: Job) -> dict[str, object]:
    dataset, setting, algorithm = job.dataset, job.setting, job.algorithm
    methods = dict(algorithm.predictors)
    if not is_usual(method_of(algorithm, "predict"), Client.predict):
        methods = {"*": "predict", **methods}
    return {
        "name": setting.model,
        "norm": setting.norm,
        "classes": dataset.num_classes,
        "shape": dataset.image_shape,
        "scale": dataset.scale,
        "mean": dataset.mean,
        "std": dataset.std,
        "precision": job.precision,
        "methods": methods,
    }


def _unwritable(folder: Path, error: OSError) -> StatesUnwritable:
    return StatesUnwritable(f"models cannot be written to {folder}: {error.strerror}; free some space there")
