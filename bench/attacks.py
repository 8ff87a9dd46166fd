"""Images changed so little that people see no difference, and so that a model errs: what an attack may do, and how it
goes on.

No pixel, of pixels in [0, 1], moves by more than epsilon, and it stays a pixel: an ℓ∞ ball. A network is given
normalised images, in which epsilon and the ends of the range are others for each channel; `Ball` has them so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import keys, tree
from bench.data import Batch, Images
from bench.models.layers import evaluating

ATTACKS = ("none", "pgd", "apgd")
"""Of a test: none; projected gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083); or the worst of
runs whose steps adapt, on two losses (Croce, Hein 2020, https://arxiv.org/abs/2003.01690)."""
EPSILON, STEP = 8 / 255, 2 / 255
"""How far a pixel moves at most, and in a step, if nobody says."""


@dataclass(frozen=True, eq=False)
class Ball:
    """What may be made of an image, in the units of what a network is given: (channels, 1, 1) float32 each."""

    epsilon: Tensor
    """Most that a pixel moves."""
    step: Tensor
    """That it moves in a step."""
    low: Tensor
    """The darkest pixel."""
    high: Tensor
    """The brightest one."""

    def nearest(self, x: Tensor, centre: Tensor) -> Tensor:
        """Give what is nearest to `x` of all that may be made of `centre`: (B, channels, height, width), in its layout
        in memory. With an epsilon of 0 that is `centre`, to the bit.
        """
        low, high = torch.maximum(centre - self.epsilon, self.low), torch.minimum(centre + self.epsilon, self.high)
        return torch.empty_like(centre).copy_(torch.minimum(torch.maximum(x, low), high))

    def anywhere(self, x: Tensor, own: Tensor) -> Tensor:
        """Draw uniformly from the ball around each image, with (B,) keys of their own, and stay within the range."""
        draws = 2 * keys.uniform_rows(own, x[0].numel()).reshape(x.shape) - 1
        return self.nearest(x + draws * self.epsilon, x)

    def beside(self, x: Tensor, own: Tensor, deviation: float = 0.001) -> Tensor:
        """Add a little normal noise to each image, with (B,) keys of their own: where a loss is flat at `x` itself.

        Args:
            x: (B, channels, height, width).
            own: Keys.
            deviation: Of pixels in [0, 1].
        """
        unit = self.high - self.low  # of [0, 1]
        noise = keys.normal_rows(own, x[0].numel()).reshape(x.shape)
        return self.nearest(x + deviation * unit * noise, x)

    def ascended(self, value: Callable[[Tensor], Tensor], centre: Tensor, at: Tensor, steps: int) -> Tensor:
        """Take steps along the sign of the slope, each back into the ball: projected gradient descent, upwards.

        Args:
            value: (B, channels, height, width) images to what is to grow, (), a sum or mean over images of which none
                depends on the others.
            centre: The images as they are.
            at: Where to start.
            steps: How many.

        Returns:
            Where it ends, detached.
        """
        for _ in range(steps):
            at = self.nearest(at + self.step * slope(value, at).sign(), centre)
        return at


def around(images: Images, epsilon: float, step: float) -> Ball:
    """Give the ball of images that are made of pixels.

    Args:
        images: Their normalisation is read.
        epsilon: Most that a pixel in [0, 1] moves.
        step: That it moves in a step.
    """
    white = images.scale * images.factor  # that of pixels in [0, 1] is 1
    darkest, brightest = images.offset, white + images.offset
    epsilon_, step_, low, high = (part[:, None, None] for part in (epsilon * white, step * white, darkest, brightest))
    return Ball(epsilon_, step_, low, high)


def attacked(
    ball: Ball | None, value: Callable[[Tensor], Tensor], batch: Batch, steps: int, *, beside: bool = False
) -> Tensor:
    """Attack the images of a training batch: what clients train on, who train against attacks.

    Models are in evaluation mode meanwhile: no step moves running statistics, or lets images of a batch hang together.

    Args:
        ball: Where an attack may go.
        value: As of `Ball.ascended`, by a model that stands still (`frozen`).
        batch: Whose images they are, and whose keys are drawn by.
        steps: How many. 0: images stay as they are.
        beside: Start a little beside each image, and not anywhere in the ball.

    Returns:
        Of the form of `batch.x`, detached.
    """
    assert ball is not None  # what needs pixels does not run without
    if not steps:
        return batch.x
    own = keys.fold(batch.keys, "attack")
    with evaluating():
        start = ball.beside(batch.x, own) if beside else ball.anywhere(batch.x, own)
        return ball.ascended(value, batch.x, start, steps)


def slope(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Differentiate a () value by images, whether or not anybody else differentiates."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(value(at), at)
    return found


def frozen(params: tree.Tree) -> tree.Tree:
    """Give a model by whose parameters nothing is differentiated."""
    return tree.map(Tensor.detach, params)


def divergences(logits: Tensor, others: Tensor) -> Tensor:
    """Give the Kullback-Leibler divergence of what other logits make likely from what logits do: (B, C) -> (B,)."""
    one, other = (each.float().log_softmax(1) for each in (logits, others))
    return (one.exp() * (one - other)).sum(1)
