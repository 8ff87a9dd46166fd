"""A GPU that is not there: tensors on the device `virtual` are computed on the CPU, to its bits, and what CUDA would
refuse, or would make the host wait for, is told.

It is a device of torch like any other, behind the dispatch key that torch keeps for devices of others: autograd, vmap,
autocast and `torch.load` treat it as they treat CUDA, and nothing of the suite is replaced. Its memory is the host's,
of which torch is told by DLPack that it lies elsewhere. A kernel is the CPU's, called on the same memory under its
other name, after two questions.

Are all tensors there? On CUDA a tensor on the host has no business beside one on the device, unless it is a number, ()
in shape, in an elementwise operation, or an index. All else raises `Mixed`.

Does the host wait? `WAITS` and `_why` list what waits on CUDA, which is what `torch.cuda.set_sync_debug_mode` warns of.
Each time is noted with the line that asked for it.

Not seen are: how long anything takes, memory, kernels that CUDA lacks, its rounding, and a copy to a device that is not
waited for while the host changes what is copied.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "virtual"
ROOT = Path(__file__).parents[1]
_PASSING_ON = {Path(__file__), *(ROOT / "bench" / "training" / file for file in ("operations.py", "replay.py"))}
"""Files through which operations pass on their way here."""

_SIZE = "how long the result is only the device knows"
_CONVERGED = "whether it converged is asked for"
WAITS = {
    "_local_scalar_dense": "a number goes to the host, by item, bool, int, float, tolist or as an argument",
    "equal": "the answer goes to the host",
    "nonzero": _SIZE,
    "masked_select": _SIZE,
    "_unique": _SIZE,
    "_unique2": _SIZE,
    "unique_dim": _SIZE,
    "unique_consecutive": _SIZE,
    "unique_dim_consecutive": _SIZE,
    "isin": "where there are many to be looked for they are sorted, and how many differ is asked for",
    "bincount": "the smallest and the largest number are asked for",
    "histc": "the smallest and the largest number are asked for",
    "_linalg_eigh": _CONVERGED,
    "_linalg_svd": _CONVERGED,
    "linalg_eig": _CONVERGED,
    "linalg_lstsq": _CONVERGED,
}
"""Operations after which the host always waits, and why; those after which it sometimes does are in `_why`."""

_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_TAKES_NUMBERS = (
    *_INDEXED, "where", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "fill", "fill_", "floor_divide",
    "floor_divide_", "rsub", "eq_", "ne_", "lt_", "le_", "gt_", "ge_", "copysign_",
)  # fmt: skip
"""Operations that take numbers from the host, and that torch does not call elementwise."""
_SHAPES = ("as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "set_", "is_set_to")
"""Operations that touch no memory: the CPU's do for any device, and what they give lies in the same storage."""
_WHOLE = ("aten::copy_", "aten::convolution", "aten::convolution_backward")
"""What torch would take apart in another way than for the CPU."""

_PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d")
"""What autocast computes in lower precision, here as on CUDA; that it computes some others in float32 is left out."""

_AUTOCAST = torch._C._dispatch_key_parse("AutocastPrivateUse1")
_ON_HOST, _ELSEWHERE = 1, 12  # types of devices, as DLPack counts them
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Mixed(RuntimeError):
    """An operation was given tensors on the host and on the device."""


@dataclass(frozen=True)
class Wait:
    """One time that the host waited for the device."""

    operation: str
    why: str
    where: str
    """File and line that asked for it."""

    def __str__(self) -> str:
        return f"{self.where} waits for the device: {self.operation}, as {self.why}"


_noted: list[Wait] = []
"""All times so far, in this process."""


@contextmanager
def device() -> Iterator[str]:
    """Have the device, by its name. Backward runs in the caller's thread, for torch makes a thread for each device that
    it knows when backward first runs in a process.
    """
    _install()
    with torch.autograd.set_multithreading_enabled(False):
        yield NAME


@contextmanager
def waits() -> Iterator[list[Wait]]:
    """Give a list that in the end holds the times within."""
    found: list[Wait] = []
    start = len(_noted)
    try:
        yield found
    finally:
        found += _noted[start:]


def there(x: object) -> bool:
    """Tell whether something is a tensor on the device."""
    return isinstance(x, Tensor) and x.device.type == NAME


def _as_if(where: int, x: Tensor) -> Tensor:
    """Give the same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(x)
    pointer = _pointer(capsule, b"dltensor")  # to the address, then the device's type, then its number
    ctypes.c_int32.from_address(pointer + 8).value, ctypes.c_int32.from_address(pointer + 12).value = where, 0
    same: Tensor = torch._C._from_dlpack(capsule)
    return same


def _line() -> str:
    """Say which line of the repository is at work."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file not in _PASSING_ON and file.is_relative_to(ROOT):
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "somebody"


def _note(operation: str, why: str) -> None:
    _noted.append(Wait(operation, why, _line()))


def _flat(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for each in x:
            yield from _flat(each)


def _why(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """Say why the host waits after an operation, if it does."""
    if name in WAITS:
        return WAITS[name]
    if name == "repeat_interleave" and named.get("output_size") is None:
        return _SIZE
    if name == "where" and not all(map(there, _flat(given))):
        return "a number is copied from the host"
    if name in ("masked_fill", "masked_fill_", "index_fill", "index_fill_") and there(given[-1]):
        return "a number goes to the host"
    if name in _INDEXED:
        indices = list(_flat(given[1]))
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            return _SIZE
        if not all(map(there, indices)):
            return "an index is copied from the host"
        if name != "index" and "put" in name and given[2].dim() == 0:
            return "a number is copied from the host"  # Python's own, too: on CUDA it comes as a tensor of the host
    return None


class _Kernel:
    """What an operation does on the device."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation
        self.name: str = operation._schema.name.removeprefix("aten::")
        arguments = operation._schema.arguments
        self.tensors = [k for k, each in enumerate(arguments) if str(each.type) == "Tensor"]
        numbers = torch.Tag.pointwise in operation.tags or self.name in _TAKES_NUMBERS
        written = [each.alias_info is not None and each.alias_info.is_write for each in arguments]
        self.from_host = [0 if numbers and not each else -1 for each in written]
        """Axes that a tensor of the host may have, for each argument; -1: it may not be there."""
        if self.name in _INDEXED:
            self.from_host[1] = 64

    def __call__(self, *given: Any, **named: Any) -> Any:
        theirs: dict[int, tuple[Tensor, Tensor]] = {}
        places = [self._at_hand(x, theirs, axes) for x, axes in zip(given, self.from_host, strict=False)]
        results = {key: self._at_hand(x, theirs, -1, grows=True) for key, x in named.items()}
        if (why := _why(self.name, given, named)) is not None:
            _note(self.name, why)
        # Python's number in the place of a tensor comes as what it is, and has an overload of its own.
        numbers = any(k < len(given) and not isinstance(given[k], Tensor) for k in self.tensors)
        result = (self.operation.overloadpacket if numbers else self.operation)(*places, **results)
        for alias, own in theirs.values():
            if alias.shape != own.shape:
                torch.ops.aten.set_.source_Tensor(own, _as_if(_ELSEWHERE, alias))
        return self._back(result, theirs)

    def _at_hand(self, x: Any, theirs: dict[int, tuple[Tensor, Tensor]], axes: int, grows: bool = False) -> Any:
        """Give an argument as the CPU takes it."""
        if isinstance(x, Tensor):
            if x.device.type != NAME:
                if x.dim() > axes:
                    raise Mixed(
                        f"{_line()}: {self.name} is given a tensor of {tuple(x.shape)} on the host beside one on the "
                        "device; make it where the others are, by device= or new_zeros and its like"
                    )
                return x
            # Memory of others cannot grow, as the place of a result has to.
            alias = torch.empty_like(x, device="cpu") if grows and not x.numel() else _as_if(_ON_HOST, x)
            theirs[id(alias)] = alias, x
            return alias
        if isinstance(x, list | tuple):
            return [self._at_hand(each, theirs, axes) for each in x]
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def _back(self, x: Any, theirs: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Give a result as the device's."""
        if isinstance(x, Tensor):
            return theirs[id(x)][1] if id(x) in theirs else _as_if(_ELSEWHERE, x)
        return type(x)(self._back(each, theirs) for each in x) if type(x) in (list, tuple) else x


def _shape(operation: Any) -> Callable[..., Any]:
    return lambda *given, **named: operation._op_dk(torch._C.DispatchKey.CPU, *given, **named)


def _empty(operation: Any) -> Callable[..., Tensor]:
    def empty(*given: Any, **named: Any) -> Tensor:
        return _as_if(_ELSEWHERE, operation(*given, **{**named, "device": torch.device("cpu"), "pin_memory": False}))

    return empty


def _copy(operation: Any) -> Callable[..., Tensor]:
    def copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not there(into):
            _note("copy_", "it goes to the host, whose memory is not pinned")
        elif not there(source) and not non_blocking:
            _note("copy_", "it comes from the host, and `non_blocking` is not said")
        operation(*(_as_if(_ON_HOST, x) if there(x) else x for x in (into, source)))
        return into

    return copy


def _halved(operation: Any) -> Callable[..., Any]:
    """Do under autocast what it does to products: they are of its type."""

    def halved(*given: Any, **named: Any) -> Any:
        kind = torch.get_autocast_dtype(NAME)
        floats = [x.to(kind) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in given]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST)):
            return operation(*floats, **named)

    return halved


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.virtual`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]


_installed: list[torch.library.Library] = []


def _install() -> None:
    """Make the device known to torch, once in a process and for good."""
    if _installed:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    _installed.append(library)
    kinds: dict[str, Callable[[Any], Callable[..., Any]]] = {"empty": _empty, "empty_strided": _empty, "copy_": _copy}
    kinds |= dict.fromkeys(_SHAPES, _shape)
    for full in sorted({*torch._C._dispatch_get_registrations_for_dispatch_key("CPU"), *_WHOLE}):
        namespace, _, called = full.partition("::")
        if namespace == "aten":
            packet, _, overload = called.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(called, kinds.get(packet, _Kernel)(operation), "PrivateUse1")
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    _installed.append(others)
    for called in _PRODUCTS:
        library.impl(called, _halved(getattr(torch.ops.aten, called)), "AutocastPrivateUse1")
    torch.serialization.register_package(0, lambda storage: None, _restored)


def _restored(storage: Any, location: str) -> Any:
    """Put the content of a file where `torch.load` is told to."""
    if not location.startswith(NAME):
        return None
    _note("load", "it comes from the host")
    return _as_if(_ELSEWHERE, torch.empty(0, dtype=torch.uint8).set_(storage)).untyped_storage()
