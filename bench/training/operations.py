"""Floating-point operations, counted while work is done: products of matrices, convolutions and attention.

A multiplication and an addition are two. The numbers are those of torch's own counter
(`torch.utils.flop_counter`), which a test compares; that one loads torch's compiler, for a second in each process,
and passes over products that are added in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Count = Callable[[Sequence[Any], Any], int]
"""(what an operation is given by position, what it gives) -> floating-point operations."""


class Operations(TorchDispatchMode):
    """Counts the operations of what is done within, forward and backward: `with Operations() as done`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        count = _COUNTS.get(func._overloadpacket)
        if count is None:
            with self:  # what a composed operation is made of is seen one by one; without gradients it comes as a whole
                answer = func.decompose(*args, **kwargs or {})
            return func(*args, **kwargs or {}) if answer is NotImplemented else answer
        answer = func(*args, **kwargs or {})
        self.total += count(args, answer)
        return answer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch leave its compiler where it is."""
        return False


def _product(a: Tensor, b: Tensor) -> int:
    """(..., m, k) by (..., k, n)."""
    return 2 * a.numel() * b.shape[-1]


def _convolution(given: Sequence[Any], out: Tensor) -> int:
    x, weight, transposed = given[0], given[1], given[6]
    return _slide(x if transposed else out, weight)


def _convolution_backward(given: Sequence[Any], gradients: Sequence[Tensor | None]) -> int:
    slope, x, weight, transposed, (for_x, for_weight, _) = given[0], given[1], given[2], given[7], given[10]
    places, others = (x, slope) if transposed else (slope, x)
    count = _slide(places, weight) if for_x else 0
    if for_weight:  # with every channel of the other, as torch counts them, whatever the groups
        count += 2 * places.numel() * others.shape[1] * math.prod(weight.shape[2:])
    return count


def _slide(places: Tensor, weight: Tensor) -> int:
    """A kernel, at every place of (B, c, height, width)."""
    return 2 * places.shape[0] * math.prod(places.shape[2:]) * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Queries by keys, and what that gives by values."""
    return _scores(query, key) * (key.shape[-1] + value.shape[-1])


def _attention_backward(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Queries by keys once more; two products for the gradients of either."""
    return _scores(query, key) * (3 * key.shape[-1] + 2 * value.shape[-1])


def _scores(query: Tensor, key: Tensor) -> int:
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2]


_ATEN = torch.ops.aten
_COUNTS: dict[Any, _Count] = {
    _ATEN.mm: lambda given, out: _product(*given[:2]),
    _ATEN.bmm: lambda given, out: _product(*given[:2]),
    _ATEN.addmm: lambda given, out: _product(*given[1:3]),
    _ATEN.addmm_: lambda given, out: _product(*given[1:3]),
    _ATEN.baddbmm: lambda given, out: _product(*given[1:3]),
    _ATEN.baddbmm_: lambda given, out: _product(*given[1:3]),
    _ATEN.convolution: _convolution,
    _ATEN._convolution: _convolution,
    _ATEN.convolution_backward: _convolution_backward,
}
for _kernel in ("efficient_attention", "flash_attention", "flash_attention_for_cpu", "cudnn_attention"):
    _forward, _backward = (getattr(_ATEN, f"_scaled_dot_product_{_kernel}{end}") for end in ("", "_backward"))
    _COUNTS[_forward] = lambda given, out: _attention(*given[:3])
    _COUNTS[_backward] = lambda given, out: _attention_backward(*given[1:4])
