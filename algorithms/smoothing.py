"""Adaptive Smoothing: the robust model is everybody's, each client has an accurate one beside it, and what both make
likely is mixed.

Bai, Anderson, Kim, Sojoudi. Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing. 2023.
https://arxiv.org/abs/2301.12554

Server keeps   body, head
Client keeps   standard
Down           body, head
Up             body, head
Passes         E; before the test adaptive / 3
Newcomers      never drawn, the robust model stands in the place of the standard one too, so that the mixture predicts
               as the generic model; held out, that with five epochs of the standard part, before which an adaptive
               share is fitted
Departs        one federation trains both (paper: two networks trained before, the accurate one on ImageNet-21k too, the
               robust one on millions of generated images): the generic model as FAT trains it by its defaults, and at
               each client a head, or a whole model, on the same batches as they are. An adaptive share is a logistic of
               four numbers, fitted by each client (paper: a network on features of both, trained on many attacks). It
               lies between alpha and 1 (code: in such a range, by a scale and a bias). The client attacks its training
               images as they are taken, not as they are labelled
Elsewhere      authors' code has two parametrisations of the share, of which one is ignored where the mixing network is
               on; its script and its file of settings differ in scales and range, its front page and its model card in
               accuracies. An attack on one of the two parts alone, or past the share, overstates what a mixture
               withstands; a mixture of logits is another model, and so is a mean of logarithms
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, evaluating, losses, register
from bench.attacks import attacked, frozen
from bench.ranges import Positive, Share, Steps

FIT_STEPS, DECAY = 200, 0.01
"""Of the fit of an adaptive share: steps of rate 1 along the slope, and what keeps its numbers small (ours)."""


@register("smoothing")
@dataclass(frozen=True, kw_only=True)
class Smoothing(Algorithm):
    """FAT for the generic model. A personal model is a body, a head, the client's `standard` part, and where the share
    is adaptive the `rule` (5,) that gives it.

    The share has no part in training. A loss part stands in the place of cross-entropy in both losses, not in the
    attack. The sign of a slope makes a pixel of what is rounding elsewhere, so clients are not stacked.
    """

    family: ClassVar[str] = "pfl"
    stackable: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"body", "pixels"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "alpha": (0.0, 1.0),
        "scale_standard": (0.25, 4.0),
        "scale_robust": (0.25, 4.0),
        "personal": ["head", "all"],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "smoothing(alpha=1)": "the robust model alone: whether clients gain anything by a part of their own",
        "smoothing(alpha=0)": "the standard part alone: what mixing keeps of robustness",
        "fat": "the same generic model, without anything personal",
    }

    alpha: Share = 0.8
    """Share of the robust model, the least one where it is adaptive (ours; code: 0.96 for CIFAR-10). Above a half it
    decides wherever it is sure enough (`certified`)."""
    scale_standard: Positive = 1.0
    """Of the standard part's logits (ours; code: 1.2 for CIFAR-10, 2 for CIFAR-100)."""
    scale_robust: Positive = 1.0
    """Of the robust model's logits (ours; code: 0.3 for CIFAR-10, 1 for CIFAR-100)."""
    adaptive: bool = False
    """Whether the share follows the image, by how sure both parts are (ours: no; paper: yes)."""
    personal: Literal["head", "all"] = "head"
    """What is the client's own: a head, on the robust body as it is, or a model from body to head (paper: all)."""
    steps: Steps = 10
    """Of the attack on each batch, and on the images by which a share is fitted (ours, as of FAT)."""

    @property
    def own(self) -> tuple[str, ...]:
        """Keys of a model that the standard part has of its own."""
        return ("head",) if self.personal == "head" else ("body", "head")

    def init_client(self, task: Task) -> Tree:
        """Start the standard part as the initial model that all algorithms share."""
        model = task.init()
        return {"standard": {key: model[key] for key in self.own}}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the robust model on attacked batches, and the standard part on them as they are."""

        def loss(w: dict[str, Tree], batch: Batch) -> Tensor:
            robust: Tree = {"body": w["body"], "head": w["head"]}
            hard = self.attacked(task, frozen(robust), batch)
            return task.loss(robust, replace(batch, x=hard)) + self.standard_loss(task, w, data, batch)

        start = {"body": shared["body"], "head": shared["head"], "standard": private["standard"]}
        trained = task.sgd(loss, start, data.batches(task.epochs), clip_apart=("standard",))
        return {"body": trained["body"], "head": trained["head"]}, {"standard": trained["standard"]}

    def attacked(self, task: Task, model: Tree, batch: Batch) -> Tensor:
        """Give the images of a batch after an attack on whatever `predict` takes, which stands still: as `batch.x`."""
        return attacked(
            task.ball, lambda x: losses.cross_entropy(self.predict(task, model, x), batch), batch, self.steps
        )

    def standard_loss(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        """Give the loss of the standard part on images as they are: (). No slope of it reaches the robust model."""
        standard = model["standard"]
        if "body" in standard:
            return task.loss(standard, batch)
        with evaluating():
            z = task.model.features(frozen(model["body"]), batch.x)
        return task.criterion(task.model.logits(standard["head"], z), z, batch)

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest robust model with the client's standard part, and what decides between them."""
        model = {"body": shared["body"], "head": shared["head"], "standard": private["standard"]}
        return {**model, "rule": self.rule(task, model, data)} if self.adaptive else model

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Report both parts by themselves beside the mixture."""
        robust = {"body": shared["body"], "head": shared["head"]}
        return {"robust": robust, "standard": {**robust, **private["standard"]}}

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Have the robust model in the place of the standard one too."""
        return {"standard": {key: shared[key] for key in self.own}}

    def newcomer_adaptation(self, task: Task) -> Adaptation:
        """Train the standard part alone, as long as other methods tune a head."""
        return Adaptation(epochs=5, parts=("standard",), curve=(), loss="standard_loss")

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score by the mixture, a personal model; by the head, all others. A part without a share is not asked."""
        if "standard" not in model:
            return task.logits(model, x)
        if self.alpha == 1:
            return self.scale_robust * task.logits(model, x)
        standard, robust = self.scores(task, model, x)
        if self.adaptive:
            return mixture(standard, robust, self.alpha, doubt(standard, robust, model["rule"]))
        return standard if self.alpha == 0 else mixture(standard, robust, self.alpha)

    def scores(self, task: Task, model: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the scaled logits of both parts, the standard one first: (B, C) float32 each."""
        standard = model["standard"]
        z = task.model.features(model["body"], x)
        own = task.model.features(standard["body"], x) if "body" in standard else z
        robust, accurate = task.model.logits(model["head"], z), task.model.logits(standard["head"], own)
        return self.scale_standard * accurate.float(), self.scale_robust * robust.float()

    def rule(self, task: Task, model: Tree, data: LocalData) -> Tensor:
        """Fit what tells a client's training images under attack from those as they are: (5,).

        The attack is on the mixture, with a rule that does not know yet, away from what it takes images for.
        """
        unknowing = {**model, "rule": task.key.new_zeros(5, dtype=torch.float32)}
        found, under = [unknowing["rule"].new_zeros(0, 4)], [unknowing["rule"].new_zeros(0)]
        for batch in data.plain_batches():
            taken = replace(batch, y=self.predict(task, unknowing, batch.x).argmax(1))
            for x, label in ((batch.x, 0.0), (self.attacked(task, unknowing, taken), 1.0)):
                found.append(sureness(*self.scores(task, model, x)))
                under.append(batch.weight.new_full((len(x),), label))
        return fitted(torch.cat(found), torch.cat(under))


def mixture(standard: Tensor, robust: Tensor, alpha: float, doubt: Tensor | None = None) -> Tensor:
    """Give the logarithm of (1 - share) · softmax(standard) + share · softmax(robust): (B, C).

    Args:
        standard: (B, C) logits.
        robust: (B, C) logits.
        alpha: The share, or its least.
        doubt: (B,); the share is then alpha + (1 - alpha) · sigmoid(doubt).
    """
    least = robust.new_full((), alpha)
    share, rest = least.log(), (1 - least).log()
    if doubt is not None:  # of a share that rounds to 1 the slope would be undefined, of its logarithm it is not
        share = torch.logaddexp(share, rest + F.logsigmoid(doubt))[:, None]
        rest = (rest + F.logsigmoid(-doubt))[:, None]
    return torch.logaddexp(rest + standard.log_softmax(1), share + robust.log_softmax(1))


def certified(robust: Tensor, alpha: float) -> Tensor:
    """Tell for which images the class that a robust model holds likeliest is the mixture's too, whatever the standard
    part says: where its probability exceeds every other by more than (1 - alpha) / alpha.

    For then alpha · (h_y - h_j) > 1 - alpha ≥ (1 - alpha) · (g_j - g_y); by as much and no more it may be a tie. Where
    the robust model is so sure in all of a ball, no attack within it has an effect. With a share up to a half it is
    nowhere sure enough.

    Args:
        robust: (B, C) probabilities h.
        alpha: The share, or its least.

    Returns:
        (B,) bool.
    """
    first, second = robust.topk(2, 1).values.unbind(1)
    return alpha * (first - second) > 1 - alpha


def sureness(standard: Tensor, robust: Tensor) -> Tensor:
    """Give how sure two parts are: (B, 4), of each the lead of its likeliest class, and the entropy in nats."""
    found: list[Tensor] = []
    for logits in (standard, robust):
        p = logits.softmax(1)
        first, second = p.topk(2, 1).values.unbind(1)
        found += [first - second, -(p * logits.log_softmax(1)).sum(1)]
    return torch.stack(found, 1)


def doubt(standard: Tensor, robust: Tensor, rule: Tensor) -> Tensor:
    """Give the log odds of an attack, by a (5,) rule whose last number stands alone: (B,)."""
    return sureness(standard, robust) @ rule[:4] + rule[4]


def fitted(found: Tensor, under: Tensor) -> Tensor:
    """Fit a logistic by gradient descent on numbers of mean 0 and deviation 1, and give it for those as they are.

    Args:
        found: (n, 4).
        under: (n,), 1 under attack, else 0.

    Returns:
        (5,) weights, the last one of a constant; zeros where n is 0.
    """
    n = max(len(found), 1)
    mean = found.sum(0) / n
    deviation = ((found - mean).square().sum(0) / n).sqrt().clamp(min=1e-3)
    standing = torch.cat([(found - mean) / deviation, torch.ones_like(under)[:, None]], 1)
    rule = found.new_zeros(5)
    for _ in range(FIT_STEPS):
        rule = rule - standing.T @ ((standing @ rule).sigmoid() - under) / n - DECAY * rule
    weights = rule[:4] / deviation
    return torch.cat([weights, (rule[4] - weights @ mean)[None]])
