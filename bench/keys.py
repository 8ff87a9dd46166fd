"""Randomness as data: counter-based pseudo-random numbers made of tensor operations.

A key is a () int64 tensor. `fold` derives a key from a key and a name or number; the draws are functions of
the key alone. The same key gives the same bits on a CPU or a GPU, for one client or many stacked ones (under
`torch.func.vmap`), whatever ran before: there is no generator and no state.

Source: the mixing function is that of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators", OOPSLA), evaluated at a counter as in Salmon et al. 2011 ("Parallel random numbers: as
easy as 1, 2, 3", SC).

Of a key on torch's device "meta" only shapes are wanted. Weights are drawn with such keys in every process, and
whatever torch computes there has it load its compiler, for more than a second: so nothing is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import tree


def _signed(value: int) -> int:
    """Give the int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign (torch's shift of int64 is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Make the () int64 key of a seed."""
    return torch.tensor(_mix_host(seed * 0x9E3779B97F4A7C15 + 1), dtype=torch.int64, device=device)


def _mix_host(x: int) -> int:
    """Do what `_mix` does, to a Python integer."""
    x &= (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return _signed(x ^ (x >> 31))


def fold(key: Tensor, *data: int | str | Tensor) -> Tensor:
    """Derive a key: same key and data, same result; anything else, an unrelated one.

    Args:
        key: () int64, or (...) for many keys at once.
        data: Integers, names, or int64 tensors that broadcast with `key`.
    """
    if key.is_meta:
        spread: Tensor = torch.broadcast_tensors(key, *(each for each in data if isinstance(each, Tensor)))[0]
        return spread
    for datum in data:
        if isinstance(datum, str):
            datum = _datum(datum)
        mixed = _mix_host(datum * _GAMMA + _MIX_2) if isinstance(datum, int) else _mix(datum * _GAMMA + _MIX_2)
        key = _mix((key ^ mixed) + _GAMMA)
    return key


def fold_each(key: Tensor, names: Sequence[str]) -> Tensor:
    """Derive a key for each name, that of `fold(key, name)`: (n,) int64."""
    data = torch.tensor([_datum(name) for name in names], dtype=torch.int64)
    return fold(key, tree.bring(data, key.device))


def _datum(name: str) -> int:
    """Give the int64 that stands for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def bits(key: Tensor, n: int) -> Tensor:
    """Draw (n,) int64 whose 64 bits are all random; of many keys (..., n)."""
    return _mix(key[..., None] + torch.arange(1, n + 1, device=key.device) * _GAMMA)


def uniform(key: Tensor, *shape: int) -> Tensor:
    """Draw float32 in [0, 1), multiples of 2^-24."""
    return uniform_rows(key, math.prod(shape)).reshape(shape)


def uniform_rows(keys: Tensor, n: int) -> Tensor:
    """Draw `n` numbers for each of many keys, as `uniform` does for one: (B,) int64 to (B, n) float32.

    A row depends on its key alone: take `batch.keys`, and noise is the same however many stand in a batch.
    """
    if keys.is_meta:
        return keys.new_empty((*keys.shape, n), dtype=torch.float32)
    return _shift(bits(keys, n), 40).to(torch.float32) * 2.0**-24  # 24 bits: exact in float32


def normal(key: Tensor, *shape: int) -> Tensor:
    """Draw float32 from the standard normal distribution (Box and Muller 1958), computed in float64."""
    return normal_rows(key, math.prod(shape)).reshape(shape)


def normal_rows(keys: Tensor, n: int) -> Tensor:
    """Draw `n` numbers for each of many keys, as `normal` does for one: (B,) int64 to (B, n) float32; see
    `uniform_rows`.
    """
    if keys.is_meta:
        return keys.new_empty((*keys.shape, n), dtype=torch.float32)
    draws = (tree.in_float64(_shift(bits(keys, 2 * n), 11)) + 0.5) * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(draws[..., :n]))
    return (radius * torch.cos(2.0 * math.pi * draws[..., n:])).to(keys.device, torch.float32)


def integers(key: Tensor, high: int, *shape: int) -> Tensor:
    """Draw int64 in [0, high); the bias of the remainder is below high / 2^63."""
    return (_shift(bits(key, math.prod(shape)), 1) % high).reshape(shape)


def permutation(key: Tensor, length: int, n: Tensor | int | None = None) -> Tensor:
    """Draw a permutation of 0..n-1, followed by the remaining numbers n..length-1.

    Args:
        key: () int64.
        length: Length of the result.
        n: () int64, how many leading numbers are shuffled, ≤ length; all of them when None. The order of the
            n does not depend on `length`, so a padded client sees its examples in the order of an unpadded
            one.

    Returns:
        (length,) int64.
    """
    draws = _shift(bits(key, length), 1)
    if n is not None:
        position = torch.arange(length, device=key.device)
        draws = torch.where(position < n, draws, torch.iinfo(torch.int64).max)
    return torch.argsort(draws, stable=True)


def choice(key: Tensor, population: int, size: int) -> Tensor:
    """Draw `size` different numbers of 0..population-1, ascending: (size,) int64."""
    return permutation(key, population)[:size].sort().values


def weighted(key: Tensor, weights: Tensor, size: int) -> Tensor:
    """Draw `size` of the numbers 0..len(weights)-1 with replacement, each as likely as its weight: (size,) int64.

    Args:
        key: () int64.
        weights: (n,), ≥ 0, any scale, not all zero. Zeros behind them change no draw.
        size: A longer result begins with the shorter one.
    """
    ends = tree.in_float64(weights).cumsum(0)
    draws = tree.in_float64(_shift(bits(key, size), 11)) * 2.0**-53  # below 1, so that the last end is not reached
    return torch.searchsorted(ends, draws * ends[-1:], right=True).clamp(max=len(weights) - 1).to(key.device)
