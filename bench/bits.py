"""Whole numbers in few bits each, packed into bytes: what is sent then takes as many bytes as it says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(numbers: Tensor, width: int) -> Tensor:
    """Write numbers one after the other, lowest bit first: (n,) int32 in 0..2^width-1 to (⌈n · width / 8⌉,) uint8."""
    spread = ((numbers[:, None] >> _places(width, numbers)) & 1).flatten()
    rows = F.pad(spread, (0, -len(spread) % 8)).reshape(-1, 8)
    return (rows << _places(8, numbers)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, width: int, n: int) -> Tensor:
    """Undo `pack`: (n,) int32."""
    spread = ((packed.to(torch.int32)[:, None] >> _places(8, packed)) & 1).flatten()
    rows = spread[: n * width].reshape(n, width)
    return (rows << _places(width, packed)).sum(1).to(torch.int32)


def _places(count: int, beside: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=beside.device)
