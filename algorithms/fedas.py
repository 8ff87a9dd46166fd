"""FedAS: the received body is first aligned with what the client's last one made of its examples.

Yang, Huang, Ye. FedAS: Bridging Inconsistency in Personalized Federated Learning. CVPR 2024.
https://openaccess.thecvf.com/content/CVPR2024/html/Yang_FedAS_Bridging_Inconsistency_in_Personalized_Federated_Learning_CVPR_2024_paper.html

Server keeps   body
Client keeps   body, head, trained
Down           body
Up             body, trace (1)
Passes         E + 7/3
Newcomers      use the newest body under the initial head (reference: the initial model)
Departs        the body is aligned with the setting's batches, momentum and decay (reference: batches of 16, plain SGD),
               in evaluation mode, as prototypes are taken; a client's first time there is nothing to align with. The
               trace is that of gradients of a batch's mean, summed over batches, as in the reference (paper: of the
               Fisher information). Each client aligns a copy of its own (reference: the server's model, one after
               the other). The head is not sent (reference: it is, and nobody uses it)
Elsewhere      FL-bench averages the head among all clients and aligns the mean feature of a batch. Authors' code
               reckons the Fisher trace on all clients in every round, tests before the broadcast, and leaves a client
               not yet drawn with the whole initial model
Reproduced     by xiyuanyang45/FedAS@1a4f5fd (each aligns a copy, and nobody the first time): models 1e-04 apart
               (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, losses, register, tree
from bench.ranges import Strength


@register("fedas")
@dataclass(frozen=True, kw_only=True)
class FedAS(Algorithm):
    """FedPer with two cares: for clients that come back after a while, and for those that trained too little."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"align_lr": (0.001, 0.1)}
    controls: ClassVar[Mapping[str, str]] = {
        "fedas(align_lr=0)": "whether alignment does anything",
        "fedas(fisher=False)": "whether weights by information do: bodies count by the setting's",
        "fedper": "what is left without both: its bodies bit for bit",
    }

    align_lr: Strength = 0.01
    """Learning rate of the one epoch in which the body is aligned (reference: 0.01)."""
    fisher: bool = True
    """Whether a body counts by the trace of its Fisher information; else by the setting's weights."""

    def init_server(self, task: Task) -> Tree:
        """Keep the body only."""
        return {"body": task.init()["body"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share, not yet trained."""
        return {**task.init(), "trained": task.key.new_zeros((), dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Align the body, train it with the head, and see how much it learnt."""
        body = tree.where(private["trained"] > 0, self.aligned(task, shared, private, data), shared["body"])
        model = task.sgd(task.loss, {"body": body, "head": private["head"]}, data.batches(task.epochs))
        kept = {**model, "trained": torch.ones_like(private["trained"])}
        return {"body": model["body"], "trace": self.trace(task, model, data)}, tree.where(data.n > 0, kept, private)

    def aligned(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        """Train the received body so that features come to the means that classes have under the client's own body."""
        prototypes = data.class_means(lambda x: task.model.features(private["body"], x))

        def loss(body: Tree, batch: Batch) -> Tensor:
            with evaluating():
                z = task.model.features(body, batch.x)
            alike = losses.one_hot(batch.y, task.num_classes) * batch.weight[:, None]
            share = batch.weight / alike.sum(0)[batch.y].clamp(min=1)  # of an example in its class's mean
            return (share * (z - prototypes[batch.y]).square().mean(1)).sum()

        return task.sgd(loss, shared["body"], data.batches(1, "align"), self.align_lr)

    def trace(self, task: Task, model: Tree, data: LocalData) -> Tensor:
        """Add up the squared norms of a batch's gradient of the log-likelihood: ()."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            with evaluating():
                return losses.cross_entropy(task.logits(params, batch.x), batch)

        total = task.key.new_zeros((), dtype=torch.float32)
        for batch in data.batches(1, "trace"):
            _, gradient, _ = task.gradient(loss, model, batch)
            total = total + torch.where(batch.real, tree.dot(gradient, gradient), 0.0)
        return total

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average bodies by what they learnt."""
        return {"body": uploads.mean("body", uploads.tensor("trace") if self.fisher else None)}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model, as it last left it."""
        body = tree.where(private["trained"] > 0, private["body"], shared["body"])
        return {"body": body, "head": private["head"]}
