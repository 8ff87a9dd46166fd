"""Values on their way between processes: trees of tensors, dataclasses of them and so on.

They keep all that could change a bit of what is computed from them: strides, alignment, and which tensors lie in the
same memory. A result that lies in the memory of what the work was given, as a broadcast body that a client hands back,
is named and not copied; here it is then that very memory again.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

_ALIGNED = 64  # bytes: as torch allocates; kernels may sum in another order where memory begins elsewhere

Memory = tuple[UntypedStorage, int]
"""A storage, and how many bytes of the sender's lie before it; fewer than none where it begins before the sender's."""


@dataclass(frozen=True)
class Parcel:
    """A value with tensors in it, as another process can take it."""

    text: bytes
    """The value, pickled; a tensor is the number of its memory, and where in it it lies."""
    memory: list[np.ndarray[Any, np.dtype[np.uint8]]]
    """(bytes,) each."""
    starts: list[int]
    """How many bytes of the sender's storage lie before each."""
    devices: list[str]
    """"cpu" or "cuda" for each."""

    def nbytes(self) -> int:
        """Count the bytes that travel."""
        return len(self.text) + sum(len(each) for each in self.memory)


def pack(value: object, known: Mapping[int, tuple[str, int]] | None = None) -> tuple[Parcel, list[Memory]]:
    """Make a parcel of a value.

    Args:
        value: Anything that can be pickled, with tensors in it. Of their memory the part is sent that is used.
        known: By its address, memory that the receiver has: (whose, number).

    Returns:
        The parcel, and the memory that was sent, by number, as it is here.
    """
    stream = io.BytesIO()
    packer = _Packer(stream, known or {})
    packer.dump(value)
    memory, sent, starts, devices = [], [], [], []
    for storage, (low, high) in zip(packer.storages, packer.ranges, strict=True):
        start = low // _ALIGNED * _ALIGNED
        used = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (high - start,), (1,))
        memory.append(used.cpu().numpy())
        sent.append((storage, -start))
        starts.append(start)
        devices.append(storage.device.type)
    return Parcel(stream.getvalue(), memory, starts, devices), sent


def unpack(parcel: Parcel, others: Mapping[str, Sequence[Memory]] | None = None) -> tuple[Any, list[Memory]]:
    """Take a value out of its parcel, into memory of its own.

    Args:
        parcel: What `pack` made.
        others: By whose, the memory that the sender knew to be here.

    Returns:
        The value, and its memory by number.
    """
    memory: list[Memory] = []
    for sent, start, device in zip(parcel.memory, parcel.starts, parcel.devices, strict=True):
        mine = torch.empty(len(sent), dtype=torch.uint8)
        mine.numpy()[:] = sent
        memory.append((mine.to(device).untyped_storage(), start))
    return _Unpacker(io.BytesIO(parcel.text), {**(others or {}), _SENT: memory}).load(), memory


def addresses(**memory: Sequence[Memory]) -> dict[int, tuple[str, int]]:
    """Name memory by its address, for `pack`; what is empty has none."""
    return {
        storage.data_ptr(): (whose, number)
        for whose, parts in memory.items()
        for number, (storage, _) in enumerate(parts)
        if storage.nbytes()
    }


_SENT = "sent"


@dataclass(frozen=True)
class _Place:
    whose: str
    number: int
    start: int = 0


class _Packer(pickle.Pickler):
    """Pickles tensors as places in numbered memory."""

    def __init__(self, stream: io.BytesIO, known: Mapping[int, tuple[str, int]]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.known = known
        self.numbers: dict[tuple[int, int], int] = {}
        self.storages: list[UntypedStorage] = []
        self.ranges: list[tuple[int, int]] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        value = value.detach()
        storage = value.untyped_storage()
        begin = value.storage_offset() * value.element_size()
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        end = begin + (last + 1) * value.element_size() if value.numel() else begin
        if storage.data_ptr() in self.known:
            place = _Place(*self.known[storage.data_ptr()])
        else:
            key = storage.data_ptr(), storage.nbytes()
            number = self.numbers.setdefault(key, len(self.storages))
            if number == len(self.storages):
                self.storages.append(storage)
                self.ranges.append((begin, end))
            low, high = self.ranges[number]
            self.ranges[number] = min(low, begin), max(high, end)
            place = _Place(_SENT, number)
        return _lay, (place, value.dtype, value.storage_offset(), tuple(value.shape), value.stride())

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        return (value.whose, value.number) if isinstance(value, _Place) else None


class _Unpacker(pickle.Unpickler):
    """Lays tensors into memory by number."""

    def __init__(self, stream: io.BytesIO, memory: Mapping[str, Sequence[Memory]]) -> None:
        super().__init__(stream)
        self.memory = memory

    def persistent_load(self, name: tuple[str, int]) -> Memory:
        whose, number = name
        return self.memory[whose][number]


def _lay(memory: Memory, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    storage, start = memory
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, offset - start // dtype.itemsize, size, stride)
