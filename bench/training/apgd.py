"""An attack whose steps adapt: the worst of several runs on two losses.

Croce, Hein. Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-Free Attacks. ICML
2020. https://arxiv.org/abs/2003.01690 (Algorithm 1, APGD on cross-entropy and on targeted DLR)

It is not AutoAttack, which is two attacks more: FAB and Square.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.attacks import Ball

TARGETS = 9
"""Most classes that images are driven to, the likeliest first."""
_RHO = 0.75
"""Share of the steps since a checkpoint that must have gained."""
_FIRST, _SHORTER, _LEAST = 0.22, 0.03, 0.06
"""Until the first checkpoint, by how much the next span is shorter, and how long it is at least: shares of all steps.
"""
_ALPHA = 0.75
"""Of a step, what follows the slope; the rest goes on as before."""

Score = Callable[[Tensor], Tensor]


def worst(score: Score, x: Tensor, y: Tensor, ball: Ball, steps: int, own: Tensor) -> Tensor:
    """Attack images on cross-entropy, and those that withstand by DLR towards up to `TARGETS` classes, one by one.

    With three classes and fewer, where DLR is not defined, on cross-entropy alone. Arguments and result as of
    `bench.training.robustness.by_pgd`; whoever is left decides how long it takes.
    """
    logits = score(x)
    found = logits.argmax(1)
    classes = logits.shape[1]
    likeliest = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    found = _on(found, y, partial(_run, score, x, y, ball, steps, keys.fold(own, "ce")), _entropies)
    for k in range(min(TARGETS, classes - 1) if classes > 3 else 0):
        run = partial(_run, score, x, y, ball, steps, keys.fold(own, "dlr", k))
        found = _on(found, y, run, partial(_dlr_of, likeliest[:, k]))
    return found


def _on(
    found: Tensor, y: Tensor, run: Callable[[Tensor, Callable[..., Tensor]], Tensor], loss: Callable[..., Tensor]
) -> Tensor:
    """Attack the images that are still recognised."""
    left = torch.nonzero(found == y).flatten()
    return found.index_copy(0, left, run(left, loss)) if len(left) else found


def _entropies(left: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _dlr_of(targets: Tensor, left: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return dlr(logits, y, targets[left])


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Give the targeted difference of logits ratio, -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2): (B,).

    Args:
        logits: (B, C), C > 3.
        y: (B,) classes.
        target: (B,) others.
    """
    ordered = logits.sort(1, descending=True).values
    scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    own, other = (logits.gather(1, of[:, None])[:, 0] for of in (y, target))
    return (other - own) / (scale + 1e-12)


def checkpoints(steps: int) -> list[int]:
    """Give the steps after which it is seen whether an attack gains: spans of ever fewer of them."""
    span, found = max(int(_FIRST * steps), 1), [0]
    while found[-1] + span < steps:
        found.append(found[-1] + span)
        span = max(span - max(int(_SHORTER * steps), 1), int(_LEAST * steps), 1)
    return found[1:]


def _run(
    score: Score,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    steps: int,
    own: Tensor,
    left: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attack some images once: what they are taken for, (len(left),)."""
    centre, y, found = x[left], y[left], y[left]
    at = ball.anywhere(centre, own[left])
    size = torch.full((len(left), 1, 1, 1), 2.0, device=x.device)  # in epsilons
    before, best, best_at, along = at, at.new_full((len(left),), -torch.inf), at, torch.zeros_like(at)
    gained, halved = at.new_zeros(len(left)), at.new_ones(len(left), dtype=torch.bool)
    best_then, marks, last = best, checkpoints(steps), 0
    value = best
    for step in range(steps + 1):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = score(at)
            following = loss(left, logits, y)
            (slope,) = torch.autograd.grad(following.sum(), at)
        at, following = at.detach(), following.detach()
        found = torch.where(found == y, logits.detach().argmax(1), found)
        gained = gained + (following > value) * (step > 0)
        better = following > best
        value, best = following, torch.where(better, following, best)
        best_at, along = (
            torch.where(better[:, None, None, None], new, old) for new, old in ((at, best_at), (slope, along))
        )
        if step in marks:
            rare = gained < _RHO * (step - last)
            stalls = ~halved & (best <= best_then)
            halved = rare | stalls
            size = torch.where(halved[:, None, None, None], size / 2, size)
            at, slope = (
                torch.where(halved[:, None, None, None], there, here) for there, here in ((best_at, at), (along, slope))
            )
            gained, best_then, last = torch.zeros_like(gained), best, step
        ahead = ball.nearest(at + size * ball.epsilon * slope.sign(), centre)
        share = 1.0 if step == 0 else _ALPHA
        moved = ball.nearest(at + share * (ahead - at) + (1 - share) * (at - before), centre)
        before, at = at, moved
    return found
