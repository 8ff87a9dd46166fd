"""FedReLa: late in training each client once gives rarer labels to examples that look more like these than their class.

Hu et al. FedReLa: Imbalanced Federated Learning via Re-Labeling. ICML 2026. https://arxiv.org/abs/2606.26037

Server keeps   body, head
Client keeps   teacher (later), relabelled (later)
Down           body, head
Up             body, head
Newcomers      the generic model; held out, with five epochs of the head
Departs        trained is FedAvg's model (release: FedLoGe's, FedETF's). Labels are what the model says that the client
               received when it first took part late; it keeps that model, and finds the same labels again in each
               later round (release: keeps them). The model is in evaluation mode and asked once, without augmentation
               (release: mean of five passes over the training stream). A client's class counts stay those of its true
               labels, also for losses with a prior
Elsewhere      authors' code overwrites labels in the data set itself, so that a later test on local data meets the new
               ones unless originals are kept. It starts from a checkpoint of the base run. README and flag differ in
               the learning rate (0.001 and 0.03)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, losses, register, tree
from bench.ranges import Share


@register("fedrela")
@dataclass(frozen=True, kw_only=True)
class FedReLa(Algorithm):
    """Without late rounds (start = 1) it is FedAvg, and with top = 0 too."""

    family: ClassVar[str] = "fedlt"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"top": (0.01, 0.3), "start": (0.5, 0.95)}

    start: Share = 0.9
    """Share of the rounds before labels change (release: 450 of 500 on CIFAR-10, 180 of 200 on CIFAR-100)."""
    top: Share = 0.05
    """Share of the examples that may take a certain label, at most (release: 5 %)."""

    def init_client(self, task: Task) -> Tree:
        """Have no model that gave labels yet."""
        return {"teacher": task.init(), "relabelled": task.key.new_zeros((), dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train as FedAvg does, late in training with the client's changed labels."""
        if task.round < self.start * task.rounds - 1e-9:
            return task.sgd(task.loss, shared, data.batches(task.epochs)), private
        received = {"body": shared["body"], "head": shared["head"]}
        teacher = tree.where(private["relabelled"] > 0, private["teacher"], received)
        y = self.relabelled(task, teacher, data)

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, replace(batch, y=y[batch.example]))

        kept = {"teacher": teacher, "relabelled": torch.ones_like(private["relabelled"])}
        return task.sgd(loss, shared, data.batches(task.epochs)), kept

    def relabelled(self, task: Task, teacher: Tree, data: LocalData) -> Tensor:
        """Draw the client's labels, the same whenever asked: (L,) int64."""
        if not len(data.index):
            return data.y
        said = torch.cat([task.logits(teacher, batch.x).float().softmax(1) for batch in data.plain_batches()])
        chance = self.chances(tree.in_float64(said), data)
        key = keys.fold(data.client_key, "relabel", torch.arange(len(chance), device=chance.device))
        flips = chance > keys.uniform_rows(key, chance.shape[1])
        likeliest = torch.where(flips, chance, -1.0).argmax(1)
        return torch.where(flips.any(1), likeliest, data.y)

    def chances(self, said: Tensor, data: LocalData) -> Tensor:
        """Give how likely each example takes each label, from probabilities (L, C): (L, C), 0 for its own.

        A probability is held against those of the example's class, as a z-score, and against the highest scores of the
        label; a label must be rarer at the client.
        """
        own, counts = losses.one_hot(data.y, said.shape[1]).to(said) * data.mask.to(said)[:, None], data.class_counts
        apart = said - (own.T @ said / counts.clamp(min=1)[:, None])[data.y]
        deviation = (own.T @ apart.square() / counts.clamp(min=1)[:, None]).sqrt().clamp(min=1e-6)
        score = apart / deviation[data.y]
        ranked = score.masked_fill(data.mask[:, None] == 0, -torch.inf).sort(0, descending=True).values
        last = (self.top * tree.in_float64(data.n) + 1e-6).floor().long().minimum(data.n - 1).clamp(min=0)
        threshold = ranked.gather(0, last.expand(1, said.shape[1]))
        rarity = 1 - (counts - counts.min()) / (counts.max() - counts.min()).clamp(min=1)
        rarer = (rarity - rarity[data.y][:, None]).clamp(min=0)
        return (score - threshold).tanh().clamp(min=0) * rarer
