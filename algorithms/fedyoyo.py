"""FedYoYo: one view of an image teaches the other, and logits are shifted by a mixture of two label distributions.

Yan, Li, Wu, Pang, Lu, Yan, Wang. You Are Your Own Best Teacher: Achieving Centralized-level Performance in Federated
Learning under Heterogeneous and Long-tailed Data. ICCV 2025. https://arxiv.org/abs/2503.06916

Server keeps   body, head, effective
Client keeps   nothing
Down           body, head, prior (C)
Up             effective (C), body, head
Passes         2 × E + 2/3
Departs        `effective` comes up first, and what the server makes of it goes down in the same round; both views have
               the setting's augmentation (reference: the second AutoAugment and Cutout), so that without any they are
               one view twice; effective numbers are those of batches in the stored order
Elsewhere      in authors' code the line that mixes priors stands in the batch loop and overwrites its input: after
               about 40 batches the prior is nearly the client's own. Modules `utils` and `losses` are missing. An alpha
               of 1 means IID, and the maximum over rounds is reported, with stronger augmentation than baselines have
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, losses, register
from bench.ranges import Count, Positive, Share, Strength

ODD, STEP, INERTIA = 1e4, 100.0, 0.9
"""An effective number that is not believed in the first round; the most that one changes in a later one, and the share
of the old one in the new (reference: the same)."""


@register("fedyoyo")
@dataclass(frozen=True, kw_only=True)
class FedYoYo(Algorithm):
    """With `distil` and `tau` 0 it is FedAvg of doubled batches."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True

    distil: Strength = 1.5
    """Weight of one view's teaching of the other (reference: lambda = 1.5, 4 in its script)."""
    temperature: Positive = 1.5
    """Divides the logits of both views (reference: T = 1.5)."""
    warmup: Count = 50
    """Rounds in which that weight grows from nothing, whatever their number (reference: 50)."""
    tau: Strength = 1.5
    """Power of the mixture by whose logarithm logits are shifted (reference: 1.5)."""
    own: Share = 0.1
    """Share of the client's own distribution in the mixture (reference: gamma = 0.1)."""
    mixing: Literal["once", "drift"] = "once"
    """Whether it is made once (paper), or in each step out of the last one, till it is the client's own (reference)."""

    def init_server(self, task: Task) -> Tree:
        """Know no effective numbers yet."""
        return {**task.init(), "effective": task.key.new_zeros(task.num_classes, dtype=torch.float32)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Let the cohort measure, and then train."""
        return Exchange("measure", "estimate"), Exchange()

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model, and effective numbers as shares of their sum, which are even as long as there are none."""
        known = server["effective"] + (server["effective"].sum() == 0)
        return {"body": server["body"], "head": server["head"], "prior": known / known.sum()}

    def measure(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Send the effective number of each class's examples in a batch, added up over batches."""
        centres = data.class_means(lambda x: task.model.features(shared["body"], x))
        total = data.key.new_zeros(task.num_classes, dtype=torch.float32)
        for batch in data.plain_batches(task.batch_size):
            apart = task.model.features(shared["body"], batch.x).float() - centres[batch.y]
            total = total + effective_numbers(apart, losses.one_hot(batch.y, task.num_classes) * batch.weight[:, None])
        return {"effective": total}, private

    def estimate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Add up what the cohort sent, and one; let the last estimate go slowly."""
        found, last = 1 + uploads.tensor("effective").sum(0), server["effective"]
        believed = found <= ODD
        mean = (found * believed).sum() / believed.sum().clamp(min=1)
        slow = torch.lerp(found, last, INERTIA).clamp(last - STEP, last + STEP)
        return {**server, "effective": torch.where(last.sum() > 0, slow, torch.where(believed, found, mean))}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the shifted cross-entropy of both views + distil · divergence of the second from the first."""
        mine = data.class_counts / data.class_counts.sum().clamp(min=1)
        weight = self.distil * min((task.round + 1) / self.warmup, 1.0)

        def loss(params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
            mixture = torch.lerp(params["stats"]["prior"], mine, self.own)
            shift = (mixture**self.tau + 1e-9).log()
            z = task.model.features(params["body"], batch.x)
            logits = task.model.logits(params["head"], z)
            taught = task.criterion(logits, z, batch, lambda z, batch: losses.cross_entropy(z.float() + shift, batch))
            apart = self_taught(logits.float() + shift, batch, self.temperature)
            following = mixture if self.mixing == "drift" else shared["prior"]
            return taught + weight * apart, {"stats": {"prior": following}}

        start: Tree = {"body": shared["body"], "head": shared["head"], "stats": {"prior": shared["prior"]}}
        model = task.sgd(loss, start, data.batches(task.epochs, views=2))
        return {"body": model["body"], "head": model["head"]}, private


def effective_numbers(apart: Tensor, of_class: Tensor) -> Tensor:
    """Give the inverse of the mean cosine of all pairs of a class, from (B, d) features without their class's mean and
    (B, C) memberships: (C,), 1 for an example by itself, and 0 for none.
    """
    number = of_class.sum(0)
    along = apart / apart.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosine = (of_class.T @ along).square().sum(1) / number.clamp(min=1).square()
    return torch.where(number > 1, 1 / cosine.clamp(min=1e-6), number)


def self_taught(logits: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Give the mean divergence of the second view's softmax from the first's, both (B, C), over images that the first
    takes for what they are: (); 0 where there are none.
    """
    first, second = logits.chunk(2)
    right = (first.argmax(1) == batch.y.chunk(2)[0]) * batch.weight.chunk(2)[0]
    wanted, said = (first.detach() / temperature).log_softmax(1), (second / temperature).log_softmax(1)
    return ((wanted.exp() * (wanted - said)).sum(1) * right).sum() / right.sum().clamp(min=1)
