"""Arithmetic on trees: nested dictionaries whose leaves are tensors.

A model is `{"body": {...}, "head": {...}}`; so is its gradient, its momentum, and the difference of two
models. Every function returns a new tree and leaves its arguments alone. Keys keep the order of the first
argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = dict[str, Any]
"""Nested dictionaries of tensors: a value is a `Tensor` or a `Tree`."""

STATISTICS = "stats"
"""Name of the sub-trees that hold running statistics of normalisation layers: sent and stored, never
differentiated.
"""

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices whose tensors have at most 32 bits: there float64 is computed on the CPU, in the same steps."""


def in_float64(x: Tensor) -> Tensor:
    """Give a tensor in float64, on the CPU where its device has none; `.to(x)` brings a result back."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).to(torch.float64)


def counting(device: torch.device | str) -> torch.dtype:
    """Give the type in which a device counts: float64, or float32, exact up to 16,777,216, where it has none."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def map(function: Callable[..., Tensor], first: Tree, *rest: Tree) -> Tree:
    """Apply `function` to corresponding leaves of trees of one structure."""
    return {
        key: map(function, leaf, *(other[key] for other in rest))
        if isinstance(leaf, dict)
        else function(leaf, *(other[key] for other in rest))
        for key, leaf in first.items()
    }


def map_paths(function: Callable[[str, Tensor], Tensor], tree: Tree, prefix: str = "") -> Tree:
    """Apply `function` to each leaf and its path, as `flatten` gives it; sub-trees without leaves stay."""
    return {
        key: map_paths(function, leaf, f"{prefix}{key}/") if isinstance(leaf, dict) else function(prefix + key, leaf)
        for key, leaf in tree.items()
    }


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Give the leaves by path, `{"body/conv/weight": tensor}`, in the tree's order."""
    leaves: dict[str, Tensor] = {}
    for key, leaf in tree.items():
        if isinstance(leaf, dict):
            leaves.update(flatten(leaf, f"{prefix}{key}/"))
        else:
            leaves[prefix + key] = leaf
    return leaves


def unflatten(leaves: Mapping[str, Tensor]) -> Tree:
    """Undo `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def merge(tree: Tree, update: Tree) -> Tree:
    """Give `tree` with the leaves of `update` put in; keys only one of them has are kept."""
    merged = dict(tree)
    for key, leaf in update.items():
        mine = merged.get(key)
        merged[key] = merge(mine, leaf) if isinstance(mine, dict) and isinstance(leaf, dict) else leaf
    return merged


def split(tree: Tree, chosen: Callable[[str], bool], prefix: str = "") -> tuple[Tree, Tree]:
    """Part a tree into the leaves whose path is chosen and the others; sub-trees without leaves are with the others."""
    mine: Tree = {}
    others: Tree = {}
    for key, leaf in tree.items():
        if isinstance(leaf, dict):
            inner, outer = split(leaf, chosen, f"{prefix}{key}/")
            if inner:
                mine[key] = inner
            if outer or not inner:
                others[key] = outer
        else:
            (mine if chosen(prefix + key) else others)[key] = leaf
    return mine, others


def is_statistic(path: str) -> bool:
    """Tell whether a leaf's path lies in a sub-tree of running statistics."""
    return STATISTICS in path.split("/")


def parameters(tree: Tree) -> Tree:
    """Give the tree without running statistics."""
    return split(tree, is_statistic)[1]


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack K trees into one whose leaves have a leading axis of length K."""
    return map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])


def pick(tree: Tree, index: int | Tensor | slice) -> Tree:
    """Index the leading axis of every leaf."""
    return map(lambda leaf: leaf[index], tree)


def put(table: Tree, rows: Tensor, values: Tree) -> Tree:
    """Replace rows of a table, a tree whose leaves are (N, ...); `pick(table, rows)` gives them back.

    Args:
        table: A row for each client, for instance.
        rows: (K,) int64, each number once, for instance `uploads.clients`.
        values: Leaves (K, ...) of the table's dtypes. Leaves of the table that it lacks keep their rows.

    Raises:
        LookupError: The table has no place for some value.
    """
    lacking = values.keys() - table.keys()
    if lacking:
        raise LookupError(f"the table has no {', '.join(sorted(lacking))}; it has {', '.join(table) or 'nothing'}")
    placed = {
        key: put(table[key], rows, value) if isinstance(value, dict) else table[key].index_copy(0, rows, value)
        for key, value in values.items()
    }
    return {**table, **placed}


def unstack(tree: Tree) -> Iterator[Tree]:
    """Undo `stack`; the leaves are views."""
    for k in range(len(next(iter(flatten(tree).values())))):
        yield pick(tree, k)


def add(a: Tree, b: Tree, scale: float | Tensor = 1.0) -> Tree:
    """Give a + scale · b."""
    return map(lambda x, y: x + scale * y, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """Give a - b."""
    return map(torch.sub, a, b)


def scale(a: Tree, factor: float | Tensor) -> Tree:
    """Give factor · a."""
    return map(lambda x: x * factor, a)


def like(a: Tree, other: Tree) -> Tree:
    """Give the leaves of `a` without their history, in the dtype that they have in another tree."""
    return {
        key: like(leaf, other[key]) if isinstance(leaf, dict) else leaf.detach().to(other[key].dtype)
        for key, leaf in a.items()
    }


def zeros_like(a: Tree) -> Tree:
    """Give a tree of zeros of the same shapes and dtypes."""
    return map(torch.zeros_like, a)


def clone(a: Tree) -> Tree:
    """Copy every leaf into memory of its own."""
    return map(torch.clone, a)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Give `a` if a () bool is true and `b` if it is not, without a branch, which stacked clients cannot take."""
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Give the () inner product over all leaves."""
    left, right = flatten(a), flatten(b)
    return torch.stack([(left[path] * right[path]).sum() for path in left] or [torch.zeros(())]).sum()


def norm(a: Tree) -> Tensor:
    """Give the () Euclidean norm over all leaves, in float64."""
    total: Tensor = torch.stack([in_float64(leaf).norm() for leaf in flatten(a).values()]).norm()
    return total


def shortened(a: Tree, longest: float) -> Tree:
    """Scale a tree down to a norm of `longest`; one that is no longer stays as it is."""
    factor = (longest / norm(a)).clamp(max=1.0)
    return map(lambda leaf: leaf * factor.to(leaf), a)


def to(a: Tree, device: torch.device | str) -> Tree:
    """Move every leaf to a device."""
    return map(lambda leaf: leaf.to(device), a)


def bring(x: Tensor, device: torch.device | str) -> Tensor:
    """Bring a tensor from the host to a device. On CUDA nobody waits, for it is read by the time this returns; on
    Apple's it would not be.
    """
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def nbytes(a: Tree) -> int:
    """Count the bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in flatten(a).values())


def packed_nbytes(a: Tree, bits: int | None = None) -> int:
    """Count the bytes of all leaves, each packed in the shortest of three ways and rounded up to whole bytes.

    A leaf of n entries of b bits, of which k are not zero, takes the least of

        n · b                   all entries
        k · (b + ⌈log2 n⌉)      those that are not zero, each with its place
        n + k · b               a bit an entry, whether it is zero, and those that are not

    What tells the three apart, and k, are not counted.

    Args:
        a: What is sent: dense tensors, pruned, masked or quantised ones among them. Not within `torch.func.vmap`.
        bits: b, for what is quantised to fewer bits than its dtype has; by default the dtype's, and 1 for bool.
    """
    return sum(-(-_packed_bits(leaf, bits) // 8) for leaf in flatten(a).values())


def _packed_bits(leaf: Tensor, bits: int | None) -> int:
    n, k = leaf.numel(), int(leaf.count_nonzero())
    b = bits or (1 if leaf.dtype == torch.bool else 8 * leaf.element_size())
    place = max(n - 1, 0).bit_length()
    return min(n * b, k * (b + place), n + k * b)


def largest_difference(a: Tree, b: Tree) -> float:
    """Give the largest absolute difference of two trees; infinite where their structure differs."""
    left, right = flatten(a), flatten(b)
    if left.keys() != right.keys():
        return math.inf
    return max(
        (float((in_float64(x) - in_float64(right[path])).abs().max()) for path, x in left.items() if x.numel()),
        default=0.0,
    )


def same_memory(a: Tree, b: Tree) -> bool:
    """Tell whether two trees are views of the very same tensors."""
    left, right = flatten(a), flatten(b)
    return left.keys() == right.keys() and all(
        x is right[path] or (x.data_ptr() == right[path].data_ptr() and x.shape == right[path].shape)
        for path, x in left.items()
    )


def is_finite(*trees: Tree) -> bool:
    """Tell whether no floating-point leaf of trees on one device holds an infinity or NaN; it is asked once for all."""
    leaves = [leaf for each in trees for leaf in flatten(each).values() if leaf.is_floating_point()]
    return not leaves or bool(torch.stack([leaf.isfinite().all() for leaf in leaves]).all())


def digest(trees: Iterable[Tree]) -> str:
    """Give the SHA-256 over paths, shapes, dtypes and bytes of all leaves, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for tree in trees:
        for path, leaf in sorted(flatten(tree).items()):
            sha.update(f"{path} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
            sha.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
