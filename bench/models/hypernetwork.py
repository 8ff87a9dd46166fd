"""A hypernetwork: a network that turns a vector into the weights of another one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.models.layers import apply_linear, linear
from bench.tree import Tree


def hypernetwork(key: Tensor, inputs: int, width: int, layers: int, model: Tree) -> Tree:
    """Draw one whose first models are all the given one: its last layer starts with weights of zero.

    Args:
        key: () int64.
        inputs: Length e of the vector.
        width: Units h of each hidden layer.
        layers: Hidden layers that follow the first.
        model: What is written: parameters only, in leaves of any shape.

    Returns:
        "hidden", linear layers by number, and "output", of which each leaf of the model has a `weight` (h, ...) and a
        `bias` (...).
    """
    hidden = {str(k): linear(keys.fold(key, k), width, size) for k, size in enumerate([inputs] + [width] * layers)}
    weight = tree.map(lambda leaf: leaf.new_zeros(width, *leaf.shape), model)
    return {"hidden": hidden, "output": {"weight": weight, "bias": model}}


def write(writer: Tree, vectors: Tensor) -> Tree:
    """Turn vectors, (K, e), into models: leaves (K, ...)."""
    first, *others = writer["hidden"].values()
    z = apply_linear(first, vectors)
    for layer in others:
        z = apply_linear(layer, F.relu(z))
    return tree.map(lambda w, b: b + torch.tensordot(z, w, 1), writer["output"]["weight"], writer["output"]["bias"])
