"""What is the same for every algorithm of a comparison: the model, the loss, local SGD, and the sizes of
things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import keys, losses, models, tree
from bench.attacks import Ball
from bench.data import Batch, LocalData
from bench.models import Model
from bench.models.balanced import united
from bench.models.layers import Recorder, is_norm_statistic, training
from bench.optim import Adam, Rule, Sgd
from bench.tree import Tree

Loss = Callable[[Tree, Batch], Tensor | tuple[Tensor, Tree]]
"""Parameters and a batch to a () loss. What is carried from step to step comes with it: the next values of leaves of
the parameters that lie under `stats`, as the running statistics of norm layers do. They are sent, kept and averaged,
and never differentiated, decayed or clipped.
"""
Edit = Callable[[Tree, Tree, Batch], Tree]
"""Gradient, the parameters it was taken at, and the batch, to the gradient that the step follows."""
Criterion = Callable[[Tensor, Batch], Tensor]
"""(B, C) logits and a batch to a () loss."""


@dataclass(frozen=True)
class Task:
    """Read-only surroundings of an algorithm."""

    model: Model
    num_classes: int
    num_clients: int
    """Training clients; held-out ones are not counted."""
    rounds: int
    epochs: int
    """Local epochs of a round."""
    batch_size: int
    lr: float
    """Learning rate of this round."""
    key: Tensor
    """() int64, randomness of the run."""
    initial_lr: float | None = None
    """Learning rate before any schedule, which tuning before the test is a multiple of; None: `lr`."""
    update_rule: str = "sgd"
    """By which clients train: one of `bench.optim.OPTIMISERS`."""
    momentum: float = 0.0
    """Of SGD; 0 where another rule has moments of its own."""
    weight_decay: float = 0.0
    decay_vectors: bool = True
    """Whether weight decay pulls at biases and norm layers too."""
    clip: float | None = None
    """Largest Euclidean norm of a gradient, before weight decay; None for no clipping."""
    round: int = 0
    """Index of the current round, 0..rounds-1."""
    cohort: tuple[int, ...] | None = None
    """Clients of the trip under way, ascending: known to the server's methods, None at clients and in tests."""
    prior: Tensor | None = None
    """(C,) float32 global class frequencies, only for algorithms that declare the need "prior"."""
    teacher: Tensor | None = None
    """(C, d) float32, what a teacher that stands still makes of the classes, only for algorithms that declare the need
    "teacher"; of images it is `data.teacher`.
    """
    ball: Ball | None = None
    """What an attack may make of an image: the setting's; None where examples are not made of pixels."""
    frozen_statistics: bool = False
    weights: Tree | None = None
    """Body that every model starts from, trained elsewhere; None: drawn."""
    start: Tree | None = None
    """Leaves of the body that follow from what clients told of their training images; None: the model asks nothing."""
    precision: torch.dtype = torch.float32
    still: bool = False
    """Set while models are adapted: norm layers outside the trained parameters are in evaluation mode."""
    stacked: bool = False
    """Set by the stacked engine: gradients by `torch.func`, batches may be padded."""
    objective: Callable[[Tensor, Tensor | None, Batch], Tensor] | None = None
    """What a loss part puts in the place of cross-entropy, from logits, features and a batch; None: nothing."""
    auxiliary: LocalData | None = None
    """Labelled images at the server, only for algorithms that declare the need "auxiliary", and never at a client."""
    public: LocalData | None = None
    """Unlabelled images (y is -1) that everybody has, only for algorithms that declare the need "public". In a round
    they come in the same batches everywhere.
    """

    def init(self) -> Tree:
        """Give the initial model, the same for every algorithm of a run."""
        drawn = self.model.init(keys.fold(self.key, "model"))
        if self.start is not None:
            drawn = {**drawn, "body": tree.merge(drawn["body"], tree.clone(self.start))}
        return drawn if self.weights is None else tree.merge(drawn, {"body": tree.clone(self.weights)})

    def network(self, name: str) -> Model:
        """Give another network for the same images and classes, with the same norm if it can: a teacher, for example.

        Its trees, `.init(key)` at first, are state like any other: they travel, are counted and averaged. A method that
        keeps it under `teacher` scores images with `logits(w["teacher"]["head"], features(w["teacher"]["body"], x))`.
        Nothing is asked of training images for it.

        Args:
            name: Key in `bench.models.MODELS`.

        Raises:
            BadModel: There is no such network, or the images are too small for it.
        """
        norm = models.usual_norm(name, self.model.norm) if name in models.MODELS else None
        return models.build(name, self.num_classes, self.model.shape, norm, self.model.balanced)

    def server_key(self, purpose: str) -> Tensor:
        """Give randomness for the server's work of this round."""
        return keys.fold(self.key, "server", purpose, self.round)

    def logits(self, params: Tree, x: Tensor) -> Tensor:
        """Score images with a model: (B, C)."""
        return self.model.logits(params["head"], self.model.features(params["body"], x))

    def loss(self, params: Tree, batch: Batch) -> Tensor:
        """Mean cross-entropy of a model on a batch, or what a loss part puts in its place: ()."""
        z = self.model.features(params["body"], batch.x)
        return self.criterion(self.model.logits(params["head"], z), z, batch)

    def criterion(
        self, logits: Tensor, features: Tensor | None, batch: Batch, usual: Criterion = losses.cross_entropy
    ) -> Tensor:
        """Give the loss of logits: where a paper says cross-entropy, and a loss part may put another loss.

        Args:
            logits: (B, C).
            features: (B, d), what the logits are made of; None where there is no such thing.
            batch: Labels and weights.
            usual: What the paper has, if it is not cross-entropy; the method then says `own_loss = True`.

        Returns:
            () mean over the real examples.
        """
        return usual(logits, batch) if self.objective is None else self.objective(logits, features, batch)

    def gradient(self, loss: Loss, params: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree]:
        """Differentiate a loss in training mode: for methods that take steps of their own.

        Returns:
            The () loss, its gradient (running statistics left out), and `params` with the next running
            statistics.
        """
        statistics, moving = tree.split(params, tree.is_statistic)

        def recorded(moving: Tree) -> tuple[Tensor, Tree]:
            return self._recorded(loss, tree.merge(moving, statistics), statistics, batch)

        if self.stacked:
            gradient, (value, following) = torch.func.grad_and_value(recorded, has_aux=True)(moving)
            return value, gradient, tree.merge(params, following)
        moving = tree.map(lambda leaf: leaf.detach().requires_grad_(), moving)
        value, following = recorded(moving)
        gradient = iter(_differentiate(value, list(tree.flatten(moving).values())))
        return value.detach(), tree.map(lambda _: next(gradient), moving), tree.merge(params, following)

    @torch.no_grad()
    def batch_statistics(self, params: Tree, batch: Batch) -> Tree:
        """Measure on one batch what running statistics are a moving mean of, in training mode.

        Args:
            params: A model. Not changed in place.
            batch: Of which padding counts for nothing.

        Returns:
            What lies below `stats` in the model: of norm layers the mean and the unbiased variance of what they are
            given, or their running statistics where that is one value a channel; all else as it is.
        """
        statistics, _ = tree.split(params, tree.is_statistic)
        return self._recorded(self.loss, params, statistics, batch, alone=True)[1]

    def sgd(
        self,
        loss: Loss,
        params: Tree,
        batches: Iterable[Batch],
        lr: float | None = None,
        *,
        edit: Edit | None = None,
        clip_apart: tuple[str, ...] = (),
    ) -> Tree:
        """Train by mini-batches and the setting's rule of a step, SGD unless it says otherwise, with its weight decay
        and clipping; momentum and other moments start at zero.

        Args:
            loss: Mean loss of a batch; may close over fixed trees. Whatever is not in `params` does not move.
            params: Where to start. Not changed in place.
            batches: The stream, usually `data.batches(task.epochs)`. A batch of padding only changes nothing.
            lr: Learning rate; the task's by default.
            edit: Puts another gradient in its place, before clipping, decay and momentum.
            clip_apart: Keys of `params` whose gradients are clipped each by itself.

        Returns:
            The trained parameters, detached.
        """
        return self.train(self.optimiser(lr, clip_apart), loss, params, batches, edit=edit)[0]

    def resume_sgd(
        self,
        loss: Loss,
        params: Tree,
        batches: Iterable[Batch],
        momentum: Tree | None,
        lr: float | None = None,
    ) -> tuple[Tree, Tree]:
        """Train like `sgd` from a given momentum, or whatever the rule keeps (None: zero), and give the last too."""
        return self.train(self.optimiser(lr), loss, params, batches, momentum)

    def optimiser(self, lr: float | None = None, clip_apart: tuple[str, ...] = ()) -> Sgd | Adam:
        """Give the setting's rule of a step, at the round's learning rate or another."""
        lr = self.lr if lr is None else lr
        if self.update_rule == "adamw":
            return Adam(lr, (0.9, 0.999), 1e-8, self.weight_decay, self.clip, clip_apart, self.decay_vectors)
        return Sgd(lr, self.momentum, self.weight_decay, self.clip, clip_apart, self.decay_vectors)

    def train(
        self,
        rule: Rule,
        loss: Loss,
        params: Tree,
        batches: Iterable[Batch],
        kept: Tree | None = None,
        edit: Edit | None = None,
    ) -> tuple[Tree, Tree]:
        """Train like `sgd` by any rule, for example `bench.optim.Adam`.

        Args:
            rule: How parameters follow a gradient.
            loss: As for `sgd`.
            params: As for `sgd`.
            batches: As for `sgd`.
            kept: What the rule kept earlier; None: it starts.
            edit: As for `sgd`.

        Returns:
            The trained parameters, detached, and what the rule keeps.
        """
        kept = rule.start(tree.parameters(params)) if kept is None else kept
        if isinstance(rule, Sgd) and not self.stacked:
            return self._sgd_in_place(rule, loss, params, batches, kept, edit)
        for batch in batches:
            _, gradient, following = self.gradient(loss, params, batch)
            if edit is not None:
                gradient = edit(gradient, params, batch)
            moved, kept = self._step(rule, following, gradient, kept, batch)
            params = tree.where(batch.real, moved, params)
        return params, kept

    def step(self, rule: Rule, params: Tree, gradient: Tree, kept: Tree | None, batch: Batch) -> tuple[Tree, Tree]:
        """Take one step in a loop of one's own; a batch of padding only changes nothing.

        Args:
            rule: `task.optimiser()`, or one of `bench.optim`.
            params: A model, its running statistics included.
            gradient: Of the parameters, from `task.gradient`.
            kept: What the rule kept; None: it starts.
            batch: Where the gradient comes from.

        Returns:
            The next model, and what the rule keeps.
        """
        kept = rule.start(tree.parameters(params)) if kept is None else kept
        moved, kept = self._step(rule, params, gradient, kept, batch)
        return tree.where(batch.real, moved, params), kept

    def statistics_of(self, model: Tree, data: LocalData) -> Tree:
        """Take running statistics anew, over all of a client's examples as they are: a forward pass in training mode.

        Of each batch a norm layer has its mean and variance under those of the layers before, and of all together
        those of the union. Without examples they stay.

        Returns:
            The statistics of the norm layers of `model`, which has body and head.
        """
        start = found = tree.split(model, is_norm_statistic)[0]
        count = data.n.new_zeros((), dtype=torch.float32)
        for batch in data.plain_batches():
            recorder = Recorder(batch.weight, self.stacked, frozen=False, alone=True)
            with torch.no_grad(), training(recorder):
                self.model.features(model["body"], batch.x)
            here, n = recorder.following(start), batch.weight.sum()
            share = n / (count + n).clamp(min=1)
            found, count = tree.where(batch.real, united(found, here, share), found), count + n
        return found

    @property
    def _mixed(self) -> bool:
        return self.precision != torch.float32

    def _step(self, rule: Rule, params: Tree, gradient: Tree, kept: Tree, batch: Batch) -> tuple[Tree, Tree]:
        """Take a step; what is kept is guarded against padding already, parameters not yet."""
        moved, following = rule.step(tree.parameters(params), gradient, kept)
        # A client that has run out of batches stays where it is.
        return tree.merge(params, moved), tree.where(batch.real, following, kept)

    def _recorded(
        self, loss: Loss, params: Tree, statistics: Tree, batch: Batch, alone: bool = False
    ) -> tuple[Tensor, Tree]:
        """Compute a loss in training mode: its value, and the next running statistics and carried values."""
        moving = frozenset(map(id, tree.flatten(statistics).values())) if self.still else None
        balanced = self.model.balanced
        recorder = Recorder(batch.weight, self.stacked, self.frozen_statistics, moving, alone, balanced, batch.y)
        # Where nothing is cast, a context that does nothing would cost as much as a small layer.
        cast = torch.autocast(batch.x.device.type, self.precision) if self._mixed else nullcontext()
        with training(recorder), cast:
            value = loss(params, batch)
        value, carried = (value, None) if isinstance(value, Tensor) else value
        if balanced is not None and balanced.penalty:
            value = value + balanced.penalty * recorder.penalty
        if carried is None:
            return value, recorder.following(statistics) if recorder.seen else statistics
        statistics = recorder.following(statistics)
        return value, tree.merge(statistics, tree.like(carried, statistics))

    def _sgd_in_place(
        self, rule: Sgd, loss: Loss, params: Tree, batches: Iterable[Batch], kept: Tree, edit: Edit | None
    ) -> tuple[Tree, Tree]:
        # Copies are updated in place, all leaves in one call; convolutions are faster channels-last.
        leaves = {path: _own(leaf) for path, leaf in tree.flatten(tree.parameters(params)).items()}
        velocity = {path: _own(leaf) for path, leaf in tree.flatten(kept).items()}
        values, velocities = list(leaves.values()), list(velocity.values())
        apart = [[k for k, path in enumerate(leaves) if path.split("/")[0] == key] for key in rule.clip_apart]
        together = [k for k in range(len(values)) if not any(k in group for group in apart)]
        pulled = [k for k, leaf in enumerate(values) if rule.decays(leaf)]
        decayed = [values[k] for k in pulled]
        for leaf in values:
            leaf.requires_grad_()
        statistics = tree.split(params, tree.is_statistic)[0]
        current = tree.merge(tree.merge(params, tree.unflatten(leaves)), statistics)
        for batch in batches:
            value, following = self._recorded(loss, current, statistics, batch)
            gradient = _differentiate(value, values)
            if edit is not None:
                unlike = tree.map(torch.Tensor.detach, current)
                edited = tree.flatten(edit(_like(tree.parameters(unlike), leaves, gradient), unlike, batch))
                gradient = [edited[path].clone() for path in leaves]  # it may lie in memory of the author's
            with torch.no_grad():
                if rule.clip is not None:
                    for group in (together, *apart):
                        parts = [gradient[k] for k in group]
                        if parts:
                            total = torch.stack(torch._foreach_norm(parts)).norm()
                            torch._foreach_mul_(parts, (rule.clip / (total + 1e-6)).clamp(max=1.0))
                if rule.weight_decay and decayed:
                    torch._foreach_add_([gradient[k] for k in pulled], decayed, alpha=rule.weight_decay)
                if rule.momentum and values:
                    torch._foreach_mul_(velocities, rule.momentum)
                    torch._foreach_add_(velocities, gradient)
                    gradient = velocities
                if values:  # frozen features have a body without weights
                    torch._foreach_add_(values, gradient, alpha=-rule.lr)
            if following is not statistics:
                statistics = tree.map(torch.Tensor.detach, following)
                current = tree.merge(current, statistics)
        return tree.map(torch.Tensor.detach, current), tree.unflatten(velocity)

    def at(self, round: int, lr: float) -> Task:
        """Give the task of a round, with batches of its own of the images at the server."""
        task = replace(self, round=round, lr=lr)
        if self.auxiliary is not None:
            task = replace(task, auxiliary=self.auxiliary.anew(task.server_key("auxiliary")).after(round * self.epochs))
        if self.public is not None:
            task = replace(task, public=self.public.anew(task.server_key("public")).after(round * self.epochs))
        return task

    def at_client(self) -> Task:
        """Give the same as a client has it: what lies at the server is not there, and what it processes is its own."""
        task = self if self.auxiliary is None else replace(self, auxiliary=None)
        return task if task.public is None else replace(task, public=task.public.anew(task.public.key))

    def samples(self) -> float:
        """Count what was processed of `auxiliary` and `public`."""
        return sum(float(data.samples()) for data in (self.auxiliary, self.public) if data is not None)


def _own(leaf: Tensor) -> Tensor:
    """Copy a leaf, convolution weights channels-last."""
    layout = torch.channels_last if leaf.ndim == 4 else torch.contiguous_format
    return leaf.detach().clone(memory_format=layout)


def _like(params: Tree, leaves: dict[str, Tensor], gradient: list[Tensor]) -> Tree:
    """Give a gradient the structure of parameters, sub-trees without leaves included."""
    return tree.merge(params, tree.unflatten(dict(zip(leaves, gradient, strict=True))))


def _differentiate(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Give the gradient of a () value; zero for a leaf it does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradient = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, gradient, strict=True)]
