"""kNN-Per: FedAvg, and at each client a memory of its own examples that votes beside the model.

Marfoq, Neglia, Kameni, Vidal. Personalized Federated Learning through Local Memorization. ICML 2022.
https://arxiv.org/abs/2111.09360 (Algorithm 1)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E; before the test 2/3
Newcomers      the generic model with a memory of its own examples, like everybody; nothing is tuned
Departs        similarity is exp(-squared distance / (d scale)), as in the reference (paper: exp(-distance)); the part
               aside on which a client chooses the share of the neighbours takes part in FedAvg's training, which
               favours the model, and is in the memory afterwards (reference: a grid of shares on test data); of
               shares that are equally good the one nearest to a half is taken; the memory holds all examples
               (paper: up to a capacity), and is made anew for each test, with the newest features
Elsewhere      FL-bench mixes the neighbours' probabilities with raw logits, applies a ReLU, and compares the capacity
               with the number of batches. Authors' code registers one more forward hook per batch, a leak of memory and
               time. FAISS gives index -1 where k exceeds the capacity
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, register, tree
from bench.ranges import Count, Positive, Share

SHARES = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9, 0.0, 1.0)
"""What a client chooses among; of equals the first one."""
FAR = 1e30
"""Squared distance of what is no neighbour: beside one its similarity is 0, and no difference is undefined."""


@register("knnper")
@dataclass(frozen=True, kw_only=True)
class KNNPer(Algorithm):
    """Training is FedAvg's. A personal model is a body, a head, and `features` (n, d) with their `labels` (n,) and the
    `share` of the neighbours ()."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "neighbours": [1, 3, 5, 7, 10],
        "scale": (0.1, 10.0),
    }

    neighbours: Count = 10
    """Examples that vote; fewer where a client has fewer (paper: k; reference: 7 or 10)."""
    scale: Positive = 1.0
    """Length of the kernel (reference: 1)."""
    share: Share | None = None
    """Weight of the vote (paper: lambda); None: each client chooses, as in the paper."""
    aside: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of each class on which a client chooses."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples, as FedAvg does."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest model, the memory of all examples, and the share that is best on the part aside."""
        model = {"body": shared["body"], "head": shared["head"]}
        whole = {**model, **self._memory(task, model, data)}
        if self.share is not None:
            return {**whole, "share": task.key.new_full((), self.share, dtype=torch.float32)}
        shares = tree.bring(torch.tensor(SHARES), task.key.device)
        rest, aside = data.part(self.aside, "share of neighbours")
        trial, right = {**model, **self._memory(task, model, rest)}, torch.zeros_like(shares)
        for batch in aside.plain_batches():
            scores = self._mixed(task, trial, batch.x, shares[:, None, None])  # (shares, B, C)
            right = right + ((scores.argmax(2) == batch.y) * batch.weight).sum(1)
        return {**whole, "share": shares[right.argmax()[None]][0]}

    def newcomer_adaptation(self, task: Task) -> None:
        """Take no step: a client that never trained remembers as all others do."""
        return None

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score by the mixture, a personal model; by the head, the generic one."""
        return self._mixed(task, model, x, model["share"]) if "share" in model else task.logits(model, x)

    def _memory(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Remember examples: `features` (n, d), and `labels` (n,), -1 for padding and where no label is known."""
        none = task.key.new_zeros(0, task.model.feature_size, dtype=torch.float32)
        features = [task.model.features(model["body"], batch.x).float() for batch in data.plain_batches()]
        return {"features": torch.cat([none, *features]), "labels": torch.where(data.mask > 0, data.y, -1)}

    def _mixed(self, task: Task, model: Tree, x: Tensor, share: Tensor) -> Tensor:
        """Give the logarithm of share · neighbours' votes + (1 - share) · the model's softmax: (..., B, C)."""
        z = task.model.features(model["body"], x).float()
        votes = self._votes(task, z, model)
        own = task.model.logits(model["head"], z).float().log_softmax(1)
        share = torch.where((model["labels"] >= 0).any(), share, 0.0)
        return torch.logaddexp(share.log() + votes.log(), (1 - share).log() + own)

    def _votes(self, task: Task, z: Tensor, model: Tree) -> Tensor:
        """Give the class frequencies among the nearest, weighted by similarity: (B, C); zero where nothing is known."""
        labels, d = model["labels"], z.shape[1]
        exact = "donot_use_mm_for_euclid_dist"  # products would blur the difference of near neighbours
        distance = torch.cdist(z, model["features"], compute_mode=exact).square().masked_fill(labels < 0, FAR)
        near, which = distance.topk(min(self.neighbours, len(labels)), largest=False)
        similarity = ((near[:, :1] - near) / (d * self.scale)).exp()  # of the nearest it is 1
        named = labels[which][:, :, None] == torch.arange(task.num_classes, device=z.device)
        cast: Tensor = (similarity[:, :, None] * named).sum(1)
        return cast / cast.sum(1, keepdim=True).clamp(min=1.0)
