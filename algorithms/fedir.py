"""FedIR: each example weighs what its class is in all clients' data over what it is in the client's.

Hsu, Qi, Brown. Federated Visual Classification with Real-World Data Distribution. ECCV 2020.
https://arxiv.org/abs/2003.08082 (FedIR, and FedVC as a field)

Server keeps   body, head, target, sizes
Client keeps   nothing
Down           body, head, target (C)
Up             counts (C), body, head
Departs        `counts` are sent once, by all clients before the first round, `body` and `head` in each round; a virtual
               client's epochs are one after the other out of the client's examples, shuffled anew when all have come
               (paper: passes over one draw of them), and a client stands for one virtual client in a round at most; the
               server follows the mean (paper, in its main results: with momentum); without virtual clients means are
               weighted by the setting
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.ranges import Count


@register("fedir")
@dataclass(frozen=True, kw_only=True)
class FedIR(Algorithm):
    """`target`, (C,), adds up to one; where it is the client's own distribution, all weigh 1 and it is FedAvg."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {}

    virtual_size: Count | None = None
    """Examples of a virtual client, which makes it FedIR with FedVC: every client trains on so many, takes part the
    more often the more it has, and counts like any other; None: clients as they are."""

    def init_server(self, task: Task) -> Tree:
        """Know nothing: all classes and clients are alike."""
        ones = [task.key.new_ones(n, dtype=torch.float32) for n in (task.num_classes, task.num_clients)]
        return {**task.init(), "target": ones[0] / task.num_classes, "sizes": ones[1]}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Count the classes of all clients before the first round."""
        training = Exchange() if self.virtual_size is None else Exchange(cohort="by_size")
        return (Exchange("count", "know", everyone=True), training) if task.round == 0 else (training,)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model and the target; sizes stay at the server."""
        return {key: server[key] for key in ("body", "head", "target")}

    def count(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Send the client's class counts."""
        return {"counts": data.class_counts.float()}, private

    def know(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Take the distribution of all examples together as the target, for good."""
        counts = uploads.tensor("counts").sum(0)
        target = torch.where(counts.sum() > 0, counts / counts.sum().clamp(min=1), server["target"])
        sizes = server["sizes"].index_copy(0, uploads.clients, uploads.sizes.to(server["sizes"]))
        return {**server, "target": target, "sizes": sizes}

    def by_size(self, task: Task, server: Tree, drawn: Sequence[int]) -> list[int]:
        """Draw as many clients as the setting does, without replacement, each time by their share of what is left."""
        uniform = keys.uniform(task.server_key("virtual clients"), task.num_clients)
        first = server["sizes"].log() - (-(uniform + 2.0**-25).log()).log()  # the largest of such is drawn by its size
        return [int(k) for k in first.topk(len(drawn)).indices.tolist()]

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the mean loss of examples weighted by target / own distribution, by weights of mean 1 in a batch."""
        own = data.class_counts / data.class_counts.sum().clamp(min=1)
        ratio = torch.where(own > 0, shared["target"] / own.clamp(min=1e-12), 1.0)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            return task.criterion(task.model.logits(params["head"], z), z, weighted(batch, ratio))

        start: Tree = {"body": shared["body"], "head": shared["head"]}
        if self.virtual_size is None:
            return task.sgd(loss, start, data.batches(task.epochs)), private
        steps = task.epochs * -(-self.virtual_size // task.batch_size)
        return task.sgd(loss, start, data.batches(steps=steps)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average by the setting's weights, virtual clients all alike."""
        alike = None if self.virtual_size is None else (uploads.sizes > 0).to(uploads.sizes)
        return tree.merge(server, uploads.mean(weights=alike))


def weighted(batch: Batch, ratio: Tensor) -> Batch:
    """Weigh examples by their class's ratio, (C,), with a mean of 1 over the batch."""
    weight = batch.weight * ratio[batch.y.clamp(min=0)]
    return replace(batch, weight=weight * (batch.weight.sum() / weight.sum().clamp(min=1e-12)))
