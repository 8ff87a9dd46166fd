"""DeiT-LT: a transformer learns from labels with one token and from a CNN's answers with the other, which becomes the
tail's.

Rangwani, Mondal, Mishra, Asokan, Babu. DeiT-LT: Distillation Strikes Back for Vision Transformer Training on
Long-Tailed Datasets. CVPR 2024. https://arxiv.org/abs/2404.02900

Server keeps   body, head, dist, teacher
Client keeps   nothing
Down           body, head, dist, teacher
Up             body, head, dist, teacher
Departs        a federation trains the teacher in the first rounds, by FedAvg, with balanced softmax and SAM (reference:
               given, trained in one place by PaCo and SAM, whose radius is not known here); class counts are a
               client's, and of a class that it lacks one (reference: of all). What teacher and student see that the
               teacher did not train on is a blanked square of half the width and height (reference: random erasing
               beside mixup, cutmix, RandAugment, colour jitter and repeated augmentation); no labels are smoothed, and
               no branches are left out. Weights come in a late share of the student's rounds (reference: of epochs, in
               the last 100 of 1,200). Optimiser, rate and its schedule are the setting's (reference: AdamW, a cosine
               after a warm-up). On a network without two tokens both heads are on the same features. Down goes all in
               each round, for clients keep nothing: one that kept the teacher would be sent a part; no byte of what
               stands still goes up
Elsewhere      in authors' code weights are on from the beginning where no epoch is said for them, as a tuple of one
               stands where a yes or no is meant; soft and hard labels are told apart by catching an error, so a wrong
               shape anywhere in the loss makes training one of one-hot labels; the best checkpoint is that of the
               highest test accuracy, apart for each head; a class without examples is divided by zero; images of 32
               pixels are tested as ones of 224
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, evaluating, keys, losses, register, tree
from bench.models import Model
from bench.optim import worst_nearby
from bench.ranges import Momentum, Share, Strength


@register("deit_lt")
@dataclass(frozen=True, kw_only=True)
class DeiTLT(Algorithm):
    """First FedAvg of the teacher, then of the student, whose `head` is on the first token and `dist` on the second;
    tested is the mean of both.

    For `--model vit_mini --set optimiser=adamw`; by plain SGD a transformer learns slowly. Plain `fedavg` on the same
    network is the student without a teacher. Clients are not stacked: which label a teacher gives may hang on rounding.
    """

    family: ClassVar[str] = "fedlt"
    stackable: ClassVar[bool] = False
    own_loss: ClassVar[bool] = True
    trains_another: ClassVar[bool] = True
    predictors: ClassVar[Mapping[str, str]] = {"teacher": "taught"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "alpha": (0.1, 0.9),
        "teacher_rounds": (0.2, 0.6),
        "drw": (0.5, 1.0),
        "rho": [0.0, 0.02, 0.05, 0.1, 0.2],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedavg": "whether a teacher, and the rounds that it takes, are worth anything: the same network without",
        "deit_lt(drw=1)": "whether weights of classes do anything",
        "deit_lt(rho=0)": "whether a flat teacher is a better one",
        "deit_lt(balanced=False)": "whether a teacher of the tail is a better one",
        "deit_lt(erased=0)": "whether the teacher must see what it was not trained on",
    }
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("channel", "aggregation"),
        "in the first rounds a teacher travels, and no body or head of the model that is tested",
    )

    teacher: Literal["small_cnn", "resnet8", "resnet20", "resnet32", "resnet18"] | None = None
    """The network that teaches (reference: ResNet-32); None: ResNet-8, or for images below 32 pixels a small CNN."""
    teacher_rounds: Share = 0.4
    """Share of the rounds in which the teacher trains, and nothing else (ours; reference: before)."""
    balanced: bool = True
    """Whether the teacher trains with balanced softmax (ours; reference: a loss for long tails)."""
    rho: Strength = 0.05
    """How far the worst point lies at which a teacher's gradient is taken (ours). 0: an ordinary teacher."""
    alpha: Share = 0.5
    """Share of the teacher's labels in the loss (reference: 0.5). 0: there is no distillation, and `dist` stays."""
    beta: Momentum = 0.9999
    """Of the effective number of examples, by which the teacher's labels are weighed (reference: 0.9999)."""
    drw: Share = 0.92
    """Share of the student's rounds, rounded down, after which they are weighed (reference: 1,100 of 1,200 epochs). 1:
    never."""
    erased: Share = 0.25
    """Share of the student's training images of which a square is blanked, for the teacher too (reference: 0.25)."""

    def network(self, task: Task) -> Model:
        """Give the teacher's network."""
        usual = "resnet8" if min(task.model.shape[1:], default=0) >= 32 else "small_cnn"
        return task.network(self.teacher or usual)

    def begins(self, task: Task) -> int:
        """Give the round in which the student begins to train, and the teacher stands still."""
        return math.ceil(self.teacher_rounds * task.rounds - 1e-9)

    def weighs(self, task: Task) -> bool:
        """Tell whether the teacher's labels are weighed in this round."""
        begins = self.begins(task)
        return task.round - begins >= math.floor(self.drw * (task.rounds - begins) + 1e-9)

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Name the phase: what a client computes in it differs."""
        return (Exchange(phase="teacher" if task.round < self.begins(task) else "student"),)

    def init_server(self, task: Task) -> Tree:
        """Start both heads from the halves of the initial one, and draw the teacher."""
        model = task.init()
        head, dist = halved(model["head"], task.model.tokens)
        teacher = self.network(task).init(keys.fold(task.key, "teacher"))
        return {"body": model["body"], "head": head, "dist": dist, "teacher": teacher}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the teacher, or the student by a teacher that stands still."""
        still: Tree = {"body": {}, "head": {}, "dist": {}, "teacher": {}}
        if task.round < self.begins(task):
            return {**still, "teacher": self.trained(task, shared["teacher"], data)}, private
        counts = data.class_counts.float().clamp(min=1)
        weights = losses.class_weights(counts, self.beta if self.weighs(task) else 0.0)
        moving = ["body", *["head"] * (self.alpha < 1), *["dist"] * (self.alpha > 0)]

        def loss(params: Tree, batch: Batch) -> Tensor:
            return self.distilled(task, {**shared, **params}, batch, weights)

        student = {key: shared[key] for key in ("body", "head", "dist")}
        return {
            **still,
            **student,
            **task.sgd(loss, {key: shared[key] for key in moving}, data.batches(task.epochs)),
        }, private

    def trained(self, task: Task, teacher: Tree, data: LocalData) -> Tree:
        """Train the teacher on a client's examples, each step along the gradient at the worst point nearby."""
        network, usual = self.network(task), losses.cross_entropy
        if self.balanced:
            usual = partial(losses.balanced_softmax, class_counts=data.class_counts)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = network.features(params["body"], batch.x)
            return task.criterion(network.logits(params["head"], z), z, batch, usual)

        def at_the_worst(gradient: Tree, params: Tree, batch: Batch) -> Tree:
            return task.gradient(loss, worst_nearby(params, gradient, self.rho), batch)[1]

        return task.sgd(loss, teacher, data.batches(task.epochs), edit=at_the_worst if self.rho else None)

    def distilled(self, task: Task, params: Tree, batch: Batch, weights: Tensor) -> Tensor:
        """Give (1 - alpha) · cross-entropy of the head with labels + alpha · that of `dist` with what the teacher says:
        ().

        Args:
            task: Of the round.
            params: Body, head, dist and teacher.
            batch: As it is; of some of its images a square is blanked first.
            weights: (C,), of classes that the teacher names; the mean is over their sum in the batch.
        """
        if self.alpha:
            batch = replace(batch, x=blanked(batch, self.erased))
        z = task.model.features(params["body"], batch.x)
        of_labels, of_teacher = z.chunk(task.model.tokens, 1)[0], z.chunk(task.model.tokens, 1)[-1]
        fit = task.criterion(task.model.logits(params["head"], of_labels), of_labels, batch)
        if not self.alpha:
            return fit
        said = self.said(task, params["teacher"], batch.x)[:, None]
        values = -task.model.logits(params["dist"], of_teacher).float().log_softmax(1).gather(1, said)[:, 0]
        counted = weights[said[:, 0]] * batch.weight
        return (1 - self.alpha) * fit + self.alpha * (counted * values).sum() / counted.sum().clamp(min=1e-12)

    def said(self, task: Task, teacher: Tree, x: Tensor) -> Tensor:
        """Give what a teacher that stands still takes (B, channels, height, width) images for: (B,) int64."""
        with evaluating(), torch.no_grad():
            return self.taught(task, teacher, x).argmax(1)

    def taught(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score images by a teacher: (B, C)."""
        network = self.network(task)
        return network.logits(model["head"], network.features(model["body"], x))

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the student, with the mean of both heads."""
        return {"body": server["body"], "head": joined(server["head"], server["dist"], task.model.tokens)}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Report beside it either head alone, and the teacher."""
        body, head, dist, tokens = server["body"], server["head"], server["dist"], task.model.tokens
        alone = {"cls": (head, tree.scale(head, 0.0)), "dist": (tree.scale(dist, 0.0), dist)}
        if tokens == 1:
            found: dict[str, Tree] = {"cls": {"body": body, "head": head}, "dist": {"body": body, "head": dist}}
        else:
            found = {name: {"body": body, "head": joined(*pair, tokens, 1.0)} for name, pair in alone.items()}
        return {**found, "teacher": server["teacher"]}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the student, with the mean of both heads."""
        return self.global_model(task, shared)

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give what was sent, with all that the client trained of it."""
        upload, private = self.local_update(task, shared, private, data)
        return tree.merge(shared, upload), private


def halved(head: Tree, tokens: int) -> tuple[Tree, Tree]:
    """Take a head, (C, d) and (C,), apart into one on each of two tokens, of which it is the mean: (C, d/2) and (C,).
    With one token both are what it is.
    """
    if tokens == 1:
        return head, head
    first, *_, last = head["weight"].chunk(tokens, 1)
    return {"weight": 2 * first, "bias": head["bias"]}, {"weight": 2 * last, "bias": head["bias"]}


def joined(head: Tree, dist: Tree, tokens: int, share: float = 0.5) -> Tree:
    """Put two heads together to one on the whole features, whose logits are `share` times the sum of theirs: (C, d)."""
    if tokens == 1:
        return tree.scale(tree.add(head, dist), share)
    weight = torch.cat([head["weight"], dist["weight"]], 1)
    return {"weight": share * weight, "bias": share * (head["bias"] + dist["bias"])}


def blanked(batch: Batch, share: float) -> Tensor:
    """Give a batch's images, of a share of which a square of half the height and width is at its mean, wherever it
    lies; what is no image stays as it is.
    """
    x = batch.x
    if not share or x.ndim != 4:
        return x
    drawn = keys.uniform_rows(keys.fold(batch.keys, "blanked"), 3)
    inside = (drawn[:, 0] < share)[:, None, None, None]
    for axis, place in ((2, drawn[:, 1]), (3, drawn[:, 2])):
        side = x.shape[axis]
        wide = side // 2
        beyond = torch.arange(side, device=x.device) - (place * (side - wide + 1)).floor()[:, None]
        within = (beyond >= 0) & (beyond < wide)
        inside = inside & (within[:, None, :, None] if axis == 2 else within[:, None, None, :])
    return torch.where(inside, 0.0, x)
