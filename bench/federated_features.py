"""Classifiers re-trained at the server on features that it makes up, whose gradients match those of clients' images.

What CReFF (Shang et al. 2022, https://arxiv.org/abs/2204.13399) does, for methods that add to it. A head is
{"weight": (C, d), "bias": (C,)}; the gradient of a class is the head's, of the mean cross-entropy of what is of that
class: {"weight": (C, C, d), "bias": (C, C)} for all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.data import LocalData
from bench.models.layers import apply_linear
from bench.tree import Tree


def class_gradients(head: Tree, features: Callable[[Tensor], Tensor], data: LocalData) -> dict[str, Tensor]:
    """Take the gradient of each class over a client's images of it, without augmentation; zero of a class not there.

    Args:
        head: What is differentiated by.
        features: (B, channels, height, width) -> (B, d).
        data: The client's examples.
    """
    c, d = head["weight"].shape
    weight, bias = data.key.new_zeros(c, c, d).float(), data.key.new_zeros(c, c).float()
    for batch in data.plain_batches():
        z = features(batch.x).float()
        of_class = F.one_hot(batch.y, c) * batch.weight[:, None]
        residual = apply_linear(head, z).softmax(1) - F.one_hot(batch.y, c)  # d CE / d logits
        weight = weight + torch.einsum("bc,bk,bd->ckd", of_class, residual, z)
        bias = bias + torch.einsum("bc,bk->ck", of_class, residual)
    count = data.class_counts.clamp(min=1)
    return {"weight": weight / count[:, None, None], "bias": bias / count[:, None]}


def matched(
    features: Tensor,
    head: Tree,
    target: Mapping[str, Tensor],
    present: Tensor,
    steps: int,
    lr: float,
    anchors: Tensor | None = None,
    pull: float = 0.0,
) -> Tensor:
    """Descend the mismatch of gradients by SGD; of a class that nobody holds there is none.

    A step adds rows of features, targets, head and anchors. Where these are few, each class is computed in the
    coordinates of what they span: the same descent, of shorter vectors.

    Args:
        features: (C, m, d).
        head: What gradients are taken at.
        target: Gradients of the classes.
        present: (C,) bool, whether there is one.
        steps: Of the descent.
        lr: Its learning rate.
        anchors: (C, d); `pull` times the mean cross-entropy of features · anchors is descended besides, in all
            classes. None: there are none, and a class that nobody holds keeps its features to the bit.
        pull: How much they count.
    """
    classes, m, _ = features.shape
    parts = [features, target["weight"], head["weight"].expand_as(target["weight"])]
    if anchors is not None:
        parts.append(anchors.expand_as(target["weight"]))
    rows = torch.cat(parts, 1)
    basis = None
    if 2 * rows.shape[1] <= rows.shape[2]:
        basis, triangle = torch.linalg.qr(rows.mT)
        rows = triangle.mT
    start, wanted, weight, *rest = (part.contiguous() for part in rows.split([part.shape[1] for part in parts], 1))
    one_hot = torch.eye(classes, device=features.device)[:, None]
    x = start.clone()
    for _ in range(steps):
        share = (x @ weight.mT + head["bias"]).softmax(2)
        residual = (share - one_hot) / x.shape[1]
        by_weight = mismatch_slope(residual.mT @ x, wanted)
        by_bias = mismatch_slope(residual.sum(1), target["bias"])
        by_share = (x @ by_weight.mT + by_bias[:, None]) / x.shape[1]
        by_logit = share * (by_share - (share * by_share).sum(2, keepdim=True))
        apart = [(x @ each.mT).softmax(2).sub_(one_hot) for each in rest]
        x.baddbmm_(residual, by_weight, alpha=-lr).baddbmm_(by_logit, weight, alpha=-lr)
        for each, off in zip(rest, apart, strict=True):
            x.baddbmm_(off, each, alpha=-lr * pull / (classes * m))
    moved = x - start if basis is None else (x - start) @ basis.mT
    return features + moved if rest else torch.where(present[:, None, None], features + moved, features)


def retrained(head: Tree, features: Tensor, epochs: int, lr: float, key: Tensor) -> Tree:
    """Train a head by softmax regression, in batches of 32; its gradient in closed form, for it takes thousands of
    tiny steps.

    Args:
        head: Where it starts.
        features: (C, m, d).
        epochs: Passes over all.
        lr: Of SGD without momentum.
        key: () int64, of the order in each epoch.
    """
    x = features.flatten(0, 1)
    one_hot = torch.eye(len(features), device=x.device).repeat_interleave(features.shape[1], 0)
    x, weights = F.pad(x, (0, 1), value=1.0), torch.cat([head["weight"], head["bias"][:, None]], 1)
    shuffled, labels = torch.empty_like(x), torch.empty_like(one_hot)  # memory that is new each time is slow
    for epoch in range(epochs):
        order = keys.permutation(keys.fold(key, epoch), len(x))
        torch.index_select(x, 0, order, out=shuffled)
        torch.index_select(one_hot, 0, order, out=labels)
        for batch, y in zip(shuffled.split(32), labels.split(32), strict=True):
            residual = torch.softmax(batch @ weights.T, 1).sub_(y)
            weights.addmm_(residual.T, batch, alpha=-lr / len(batch))
    return {"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}


def mismatch_slope(a: Tensor, b: Tensor) -> Tensor:
    """Give the gradient, by `a`, of 1 - cosine over the last axis; 1e-6 keeps zero rows finite."""
    length, other = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    product = length * other + 1e-6
    cosine = (a * b).sum(-1, keepdim=True) / product
    along: Tensor = a * (cosine * other / (product * length.clamp(min=1e-30)))
    return along.addcmul_(b, 1 / product, value=-1)
