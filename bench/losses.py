"""Losses of a batch and their pieces. All are means over the batch's real examples; padding weighs nothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import tree
from bench.data import Batch
from bench.tree import Tree

_SHORT = 1e-6  # features of no direction: divided by less, their gradient would be no sensible number


def mean(values: Tensor, batch: Batch) -> Tensor:
    """Average (B, ...) over the real examples: (...); 0 for a batch of padding only."""
    weight = batch.weight if values.ndim == 1 else batch.weight.reshape(-1, *[1] * (values.ndim - 1))
    return (values * weight).sum(0) / batch.weight.sum().clamp(min=1.0)


def one_hot(y: Tensor, num_classes: int) -> Tensor:
    """Write (B,) labels as rows of zeros with a one: (B, C) float32; an unlabelled example has zeros only.

    Unlike torch's own it looks at no value, so that it may stand in a loss of stacked clients.
    """
    return (y[:, None] == torch.arange(num_classes, device=y.device)).to(torch.float32)


def cosines(features: Tensor | None) -> Tensor:
    """Give the cosine similarity of each two examples: (B, B) float32, under autocast too; 0 with features of zeros.

    Args:
        features: (B, d), as a loss part is given them.

    Raises:
        ValueError: There are none.
    """
    z = required(features)
    with torch.autocast(z.device.type, enabled=False):
        length = z.float().norm(dim=1, keepdim=True)
        unit = torch.where(length > _SHORT, z.float() / length.clamp(min=_SHORT), 0.0)
        return unit @ unit.T


def required(features: Tensor | None) -> Tensor:
    """Give the features that a loss part is given.

    Raises:
        ValueError: There are none.
    """
    if features is None:
        raise ValueError("features = None: this loss is one of features, and the method has none; take one of logits")
    return features


def correlation(z: Tensor, weight: Tensor) -> Tensor:
    """Give the mean squared inner product of two different standardised features, by the number of examples: ().

    It is the mean squared correlation times (n - 1)² / n, of n examples; 0 of one.

    Args:
        z: (B, d).
        weight: (B,), 1 for an example, 0 for padding.

    Source: Shi et al. 2023, https://arxiv.org/abs/2210.00226, as its code has it.
    """
    n, weight, d = weight.sum().clamp(min=1), weight[:, None], z.shape[1]
    apart = (z - (z * weight).sum(0) / n) * weight
    standard = apart / (1e-8 + apart.square().sum(0) / (n - 1).clamp(min=1)).sqrt()
    products = (standard.T @ standard).square()
    return (products.sum() - products.diagonal().sum()) / max(d * (d - 1), 1) / n


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tell which examples have one label, each with itself too, and which have different ones: two of (B, B) float32.

    Neither is true of padding, and of examples without a label.
    """
    real = batch.weight * (batch.y >= 0)
    both = real[:, None] * real
    alike = both * (batch.y[:, None] == batch.y)
    return alike, both - alike


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of (B, C) logits with the batch's labels, computed in float32: (). It is 0 without labels."""
    return mean(_cross_entropies(logits.float(), batch.y), batch)


def _cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Give the cross-entropy of each example: (B,)."""
    if not torch._C._functorch.is_functorch_wrapped_tensor(logits):
        return F.cross_entropy(logits, y, reduction="none", ignore_index=-1)
    # For stacked clients torch puts its own together from more operations, in Python, and loads sympy to check sizes.
    found = torch.log_softmax(logits, 1).gather(1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(y < 0, 0.0, -found)


def balanced_softmax(logits: Tensor, batch: Batch, class_counts: Tensor) -> Tensor:
    """Cross-entropy of logits shifted by the logarithm of class counts; a class with count 0 leaves the
    softmax.

    Args:
        logits: (B, C).
        batch: Labels and weights.
        class_counts: (C,), ≥ 0, any scale.

    Source: Ren et al. 2020, https://arxiv.org/abs/2007.10740, eq. 4.
    """
    return cross_entropy(shifted(logits, class_counts.clamp(min=1e-12).log(), class_counts > 0), batch)


def shifted(logits: Tensor, shift: Tensor, present: Tensor) -> Tensor:
    """Add (C,) shifts to (B, C) logits, in float32; a class that is not `present`, (C,) bool, leaves the softmax."""
    # A finite floor instead of log 0 = -inf keeps padded batches and their gradients finite; exp(-1e4) is
    # exactly 0.
    return logits.float() + torch.where(present, shift, -1e4)


def class_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Weigh each class by one over its effective number of examples, (1 - beta^n) / (1 - beta).

    Args:
        class_counts: (C,) float32 ≥ 0.
        beta: 0, where all weights are 1, to below 1, near which they are inverse frequencies.

    Returns:
        (C,) float32 with a mean of one over the classes that there are; 0 for the others.

    Source: Cui et al. 2019, https://arxiv.org/abs/1901.05555.
    """
    present = class_counts > 0
    rate = math.log(beta) if beta else -math.inf
    # Not 1 - beta^n itself, of which no digit is right where beta is near 1.
    number = -(rate * class_counts.clamp(min=1e-12)).expm1()
    weight = torch.where(present, 1 / number, 0.0)
    return weight * present.sum() / weight.sum().clamp(min=1e-12)


def proximal(params: Tree, anchor: Tree) -> Tensor:
    """Half the squared distance of two trees, running statistics apart: ()."""
    difference = tree.sub(tree.parameters(params), tree.parameters(anchor))
    return 0.5 * tree.dot(difference, difference)
