"""Mean and standard deviation of floating examples, by which they are normalised."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.dataset import Streamed

_ROWS = 4096
"""Examples that are held in float64 at once."""


def moments(x: Tensor | Streamed) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation per channel (feature, column) in float64, over examples and other axes.

    Args:
        x: (N, channels, ...) float16 or float32, N at least 1.

    Returns:
        Two tuples of `channels` numbers. Of a channel that is everywhere the same the deviation is given as 1: it is
        zero after normalisation, whatever it was.
    """
    pieces = torch.arange(len(x)).split(_ROWS)
    channels, each = x.shape[1], int(np.prod(x.shape[2:], dtype=np.int64))
    total, squares = np.zeros(channels), np.zeros(channels)
    for rows in pieces:
        values = x[rows].reshape(len(rows), channels, each).double().numpy()
        total += values.sum((0, 2))
    mean = total / (len(x) * each)
    for rows in pieces:
        values = x[rows].reshape(len(rows), channels, each).double().numpy()
        squares += ((values - mean[:, None]) ** 2).sum((0, 2))
    std = np.sqrt(squares / (len(x) * each))
    std = np.where(std < np.finfo(np.float32).tiny, 1.0, std)  # sums of one float32 are exact: a constant has 0
    return tuple(mean.tolist()), tuple(std.tolist())
