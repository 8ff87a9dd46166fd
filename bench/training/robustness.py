"""What models take attacked test images for.

An image counts as recognised under attack if it is taken for its class wherever the attack looks: at the image as it
is, which is where all attacks begin, at each point on the way, and at the end. Each model is attacked by itself, along
the slope of its own predictor, in evaluation mode. Draws are of the run and the image, so that all models of all
methods, whoever computes them, are attacked from the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.algorithm import method_of
from bench.attacks import Ball
from bench.task import Task
from bench.training import apgd
from bench.training.counting import sparse
from bench.training.crew import Crew, Surroundings
from bench.tree import Tree

ROBUST = "robust"
"""Of a model's name, behind a dot: under attack."""
STEPS = {"pgd": 20, "apgd": 100}
"""Of an attack, if nobody says."""
_SLICE = 128  # images that are attacked together
_Item = tuple[Tree, Tensor]
"""A model (empty: the shared one), and (n,) test images."""


def tested(
    here: Surroundings, crew: Crew, task: Task, models: Sequence[Tree], rows: Sequence[Tensor], predictor: str
) -> list[Tensor]:
    """Attack models, each on test images of its own: of each as in `Answers`.

    Args:
        here: The run's.
        crew: Who does it: images of a model are parted where slices end, the same for any number of processes.
        task: Of the round.
        models: Bodies and heads, or whatever the predictor takes.
        rows: (n,) of each, its images.
        predictor: Name of the method that scores them.
    """
    items = [(model, part) for model, own in zip(models, rows, strict=True) for part in own.split(_SLICE)]
    found = crew.map(partial(_attack, task.round, task.lr, predictor), {}, items, [len(part) for _, part in items])
    told = torch.cat(found, 1).cpu()  # the device is asked once for all
    return sparse(told, [len(own) for own in rows], here.task.num_classes)


def _attack(round: int, lr: float, predictor: str, here: Surroundings, shared: Tree, item: _Item) -> Tensor:
    """Give the class of some images, and what they are taken for under attack: (2, n) int64."""
    model, rows = item
    task, test, setting = here.task.at(round, lr), here.population.test, here.population.setting
    predict = method_of(here.algorithm, predictor)
    y = test.y[rows]
    if not len(rows):
        return torch.stack([y, y])
    assert task.ball is not None  # a setting with an attack is refused where there are no pixels

    def score(x: Tensor) -> Tensor:
        return predict(task, model, x).float()

    own = keys.fold(keys.fold(task.key, "attack"), rows)
    steps = STEPS[setting.attack] if setting.attack_steps is None else setting.attack_steps
    attack = by_pgd if setting.attack == "pgd" else apgd.worst
    with here.inference():
        return torch.stack([y, attack(score, test.plain(rows), y, task.ball, steps, own)])


def by_pgd(score: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, ball: Ball, steps: int, own: Tensor) -> Tensor:
    """Attack images by projected gradient descent on cross-entropy, from a point anywhere in the ball.

    Args:
        score: (B, channels, height, width) to (B, C) logits, each image by itself.
        x: (B, channels, height, width).
        y: (B,) int64, their classes.
        ball: Where an attack may go.
        steps: How many it takes.
        own: (B,) int64 keys of the images.

    Returns:
        (B,) int64, the class if the image is taken for it wherever the attack looks, and else the first other one.
    """
    found, at = score(x).argmax(1), ball.anywhere(x, own)
    for _ in range(steps):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = score(at)
            (along,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), at)
        found = torch.where(found == y, logits.detach().argmax(1), found)
        at = ball.nearest(at.detach() + ball.step * along.sign(), x)
    return torch.where(found == y, score(at).argmax(1), found)
