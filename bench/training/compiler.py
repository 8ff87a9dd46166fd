"""torch's compiler, which is loaded only where it is used: that takes a second of every process.

Before it differentiates, `torch.func` asks the compiler to stand aside (`torch._dynamo.compiled_autograd._disable()`),
and loads it to ask. A compiler that is not there compiles nothing, so something else may answer in its place.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch


class _Absent:
    """Answers that nothing is compiled; asked for anything else, the compiler comes and takes its place."""

    compiled_autograd = SimpleNamespace(_disable=nullcontext)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch._dynamo"), name)


def leave_out() -> None:
    """Have torch do without its compiler until somebody uses it."""
    if "_dynamo" not in vars(torch):
        vars(torch)["_dynamo"] = _Absent()
