"""What clients keep between rounds: on the run's device while that is little, in a file when clients are many.

A personal head of 1,203 classes and 2,048 features is 10 MB; ten thousand of them are more than memory holds, and a run
touches a cohort at a time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.system import durable
from bench.training.checkpoint import is_like
from bench.tree import Tree

IN_MEMORY_BYTES = 2**28
"""States of all clients together that are kept in memory, on a GPU in its own; more go to a file."""


class StatesUnwritable(OSError):
    """The file of private states cannot be written. The message says why and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


class StatesDamaged(StatesUnwritable):
    """A state in the file is not what was written there."""


class Store(ABC):
    """Private states by client, in memory or a file, made when a client first takes part.

    Args:
        initial: The state of a client that never took part; shared by all of them.
        device: Where states are used.
    """

    def __init__(self, initial: Tree, device: str) -> None:
        self.initial, self.device = initial, device

    @abstractmethod
    def __getitem__(self, client: int) -> Tree:
        """Give a client's state, on the device."""

    @abstractmethod
    def __setitem__(self, client: int, state: Tree) -> None:
        """Keep a client's state."""

    @abstractmethod
    def clients(self) -> Sequence[int]:
        """Give the clients that took part, ascending."""

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """Give what a checkpoint must hold; what it stands for is safe on disk until the next `release`."""

    @abstractmethod
    def restore(self, snapshot: dict[str, Any]) -> bool:
        """Return to a snapshot; False, or any error, where that cannot be done."""

    @abstractmethod
    def release(self) -> None:
        """Tell that the newest snapshot has been saved, and older ones are not needed any more."""

    def all(self) -> Iterator[Tree]:
        """Give the states of the clients that took part, by client, one at a time."""
        return (self[client] for client in self.clients())

    def nbytes(self) -> int:
        """Count the bytes kept for all clients together."""
        return tree.nbytes(self.initial) * len(self.clients())


def store(initial: Tree, clients: int, device: str, file: Path | None) -> Store:
    """Make a store: in memory if all states fit in `IN_MEMORY_BYTES`, else in a file.

    Args:
        initial: Of every client.
        clients: How many there are.
        device: Where states are used.
        file: Where they are written; None for a temporary file.
    """
    if tree.nbytes(initial) * clients <= IN_MEMORY_BYTES:
        return InMemory(initial, device)
    return InFile(initial, device, file)


class InMemory(Store):
    """States as a dictionary, on the device: nothing is copied from round to round."""

    def __init__(self, initial: Tree, device: str) -> None:
        super().__init__(initial, device)
        self.states: dict[int, Tree] = {}

    def __getitem__(self, client: int) -> Tree:
        return self.states.get(client, self.initial)

    def __setitem__(self, client: int, state: Tree) -> None:
        self.states[client] = tree.map(_keep, state)

    def clients(self) -> Sequence[int]:
        """Give the clients that took part, ascending."""
        return sorted(self.states)

    def nbytes(self) -> int:
        """Count the bytes kept for all clients together."""
        return sum(tree.nbytes(state) for state in self.states.values())

    def snapshot(self) -> dict[str, Any]:
        """Give all states."""
        return {"states": self.states}

    def release(self) -> None:
        """Do nothing: a snapshot is saved whole."""

    def restore(self, snapshot: dict[str, Any]) -> bool:
        """Take the states of a snapshot."""
        if snapshot.keys() != {"states"}:
            return False
        states = snapshot["states"]
        if not all(type(client) is int and is_like(state, self.initial) for client, state in states.items()):
            return False
        self.states = {client: tree.to(state, self.device) for client, state in states.items()}
        return True


@dataclass(frozen=True)
class _Leaf:
    """Where a leaf lies in a state's row."""

    path: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    size: int

    def read(self, row: bytearray) -> Tensor:
        """Give the leaf as a view of a row."""
        count = self.shape.numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(row, dtype=self.dtype, count=count, offset=self.start).view(self.shape)


class InFile(Store):
    """States as rows of a file, a slot each.

    A state is written to a free slot, never over the one that the last checkpoint refers to: a checkpoint holds the
    slots' numbers and SHA-256 only, and yet finds every state as it was, or finds that it is not. A client that never
    took part has no slot. Rows are read and written at their positions; pages of a mapped file would count as memory of
    this process.

    Args:
        initial: Of every client: its leaves say how a row is laid out.
        device: Where states are used.
        file: Where rows are written; None for a temporary file.
    """

    def __init__(self, initial: Tree, device: str, file: Path | None) -> None:
        super().__init__(initial, device)
        self.leaves: list[_Leaf] = []
        self.row = 0
        for path, leaf in tree.flatten(self.initial).items():
            size = leaf.numel() * leaf.element_size()
            self.leaves.append(_Leaf(path, leaf.shape, leaf.dtype, self.row, size))
            self.row += -(-size // 8) * 8  # aligned for any dtype
        self.slots: dict[int, int] = {}
        self.digests: dict[int, str] = {}
        """SHA-256 of each client's row; on the disk they are the checkpoint's, so that an old row is a wrong one."""
        self.pinned: set[int] = set()  # of the newest snapshot; those of the one before are not free until `release`
        self.free: list[int] = []
        self.end = 0
        try:
            self.file = _open(file)
        except OSError as error:
            raise _unwritable(file, error) from error
        weakref.finalize(self, os.close, self.file)
        self.name = file

    def __getitem__(self, client: int) -> Tree:
        slot = self.slots.get(client)
        if slot is None:
            return self.initial
        try:
            row = bytearray(os.pread(self.file, self.row, slot * self.row))
        except OSError as error:
            raise self._damaged(client) from error
        if hashlib.sha256(row).hexdigest() != self.digests[client]:
            raise self._damaged(client)
        leaves = iter(self.leaves)
        return tree.to(tree.map(lambda _: next(leaves).read(row), self.initial), self.device)

    def __setitem__(self, client: int, state: Tree) -> None:
        row = bytearray(self.row)
        leaves = tree.flatten(state)
        for leaf in self.leaves:
            content = leaves[leaf.path].detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
            row[leaf.start : leaf.start + leaf.size] = content.data
        old = self.slots.get(client)
        if old is not None and old not in self.pinned:
            slot = old
        elif self.free:
            slot = self.free.pop()
        else:
            slot, self.end = self.end, self.end + 1
        try:
            done = 0
            while done < self.row:
                done += os.pwrite(self.file, memoryview(row)[done:], slot * self.row + done)
        except OSError as error:
            raise _unwritable(self.name, error) from error
        self.slots[client], self.digests[client] = slot, hashlib.sha256(row).hexdigest()

    def clients(self) -> Sequence[int]:
        """Give the clients that took part, ascending."""
        return sorted(self.slots)

    def snapshot(self) -> dict[str, Any]:
        """Have all rows on disk, and give their slots."""
        try:
            os.fsync(self.file)
        except OSError as error:
            raise _unwritable(self.name, error) from error
        self.pinned = set(self.slots.values())
        return {"slots": {k: (slot, self.digests[k]) for k, slot in self.slots.items()}, "row": self.row}

    def release(self) -> None:
        """Free the slots that only an older snapshot refers to."""
        self.free = sorted(set(range(self.end)) - self.pinned - set(self.slots.values()), reverse=True)

    def restore(self, snapshot: dict[str, Any]) -> bool:
        """Take the slots of a snapshot, if the file is as long as they need and laid out alike; rows are compared with
        their digests when they are read.
        """
        if snapshot.keys() != {"slots", "row"} or snapshot["row"] != self.row:
            return False
        slots = {client: slot for client, (slot, _) in snapshot["slots"].items()}
        used = set(slots.values())
        if not all(type(n) is int and n >= 0 for n in used):
            return False
        end = 1 + max(used, default=-1)
        if os.fstat(self.file).st_size < end * self.row:
            return False
        self.digests = {client: digest for client, (_, digest) in snapshot["slots"].items()}
        self.slots, self.end, self.pinned = slots, end, used
        self.release()
        return True

    def _damaged(self, client: int) -> StatesDamaged:
        return StatesDamaged(
            f"the state of client {client} in {self.name or tempfile.gettempdir()} is not what was written there; the "
            "disk may be failing, and the same command begins the run anew"
        )


def _open(file: Path | None) -> int:
    """Open a file to read and write, made if it is not there, in place of what is no file; one without a name goes when
    it is closed.
    """
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or not file.is_file():
            durable.remove(file)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    handle, name = tempfile.mkstemp()
    os.unlink(name)
    return handle


def _keep(leaf: Tensor) -> Tensor:
    """Give a leaf in memory of its own; a slice of a stack would keep the whole stack alive."""
    leaf = leaf.detach()
    alone = leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    return leaf if alone else leaf.clone()


def _unwritable(file: Path | None, error: OSError) -> StatesUnwritable:
    where = file or tempfile.gettempdir()
    return StatesUnwritable(
        f"the clients' states cannot be written to {where}: {error.strerror}; free some space there"
    )
