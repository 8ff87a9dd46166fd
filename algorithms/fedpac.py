"""FedPAC: features are drawn to the prototypes of all clients, and heads combined as far as it helps each client.

Xu, Tong, Huang. Personalized Federated Learning with Feature Alignment and Classifier Collaboration. ICLR 2023.
https://arxiv.org/abs/2306.11867 (Algorithm 1)

Server keeps   body, heads, prototypes
Client keeps   nothing
Down           body, head, prototypes (C, d)
Up             body, head, prototypes (C, d), counts (C), average (C, d), variance (1)
Passes         E + 5/3
Newcomers      never drawn, the common initial head on the server's body; held out, the mean of all heads, with five
               epochs of the head
Departs        the programmes are solved exactly (reference: by cvxpy, weights below 1e-3 set to 0), and clients without
               examples stay out of them. A class that a round's clients lack keeps its prototype (reference: has none).
               The moving part is in training mode (reference: a test before leaves all in evaluation mode)
Elsewhere      PFLlib averages prototypes without weights, gives new heads to the cohort only, and where the programme
               fails takes a head by client number instead of position in the cohort. FL-bench takes the head's epoch
               out of E. Authors' `torch.eig` is gone from newer PyTorch
Reproduced     by JianXu95/FedPAC@5770f4f (as published): models 6e-04 apart (results/studies/agreement.md)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, register, tree
from bench.losses import mean
from bench.ranges import Strength


@register("fedpac")
@dataclass(frozen=True, kw_only=True)
class FedPAC(Algorithm):
    """One body for all and a head for each; statistics of features say whose heads help whom."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    align: Strength = 1.0
    """Strength of the pull of features to prototypes, a mean squared difference over d (reference: lambda = 1)."""
    head_lr: Strength = 0.1
    """Learning rate of the head, which is trained for one epoch before the body moves (reference: 0.1)."""
    combine: bool = True
    """Whether heads are combined; else each client keeps its own."""

    def init_server(self, task: Task) -> Tree:
        """Start with the initial head for each client: (N, ...), and no prototypes: (C, d), zero for an unknown one."""
        model = task.init()
        heads, prototypes = tree.stack([model["head"]] * task.num_clients), torch.zeros_like(model["head"]["weight"])
        return {"body": model["body"], "heads": heads, "prototypes": prototypes}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send body and prototypes to all."""
        return {"body": server["body"], "prototypes": server["prototypes"]}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send each client its own head."""
        heads = server["heads"]
        return {"head": tree.map(lambda leaf: leaf.mean(0), heads) if client is None else tree.pick(heads, client)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take statistics; train the head, then the body towards the prototypes; take its prototypes."""
        features, logits, n = task.model.features, task.model.logits, data.n.clamp(min=1)
        body, head = shared["body"], shared["head"]
        known: Tensor = shared["prototypes"].any(1, keepdim=True)

        centres, squares = data.class_means(lambda x: torch.cat([z := features(body, x), z.square()], 1)).chunk(2, 1)
        share = data.class_counts[:, None] / n
        average = share * centres  # over all examples, of their features in their class's row
        variance = ((share * squares).sum() - average.square().sum()).clamp(min=0) / n  # of that average
        target = torch.where(known, shared["prototypes"], centres)
        align = self.align * known.any().float()  # not in the first round

        def fit(h: Tree, batch: Batch) -> Tensor:
            with evaluating():
                z = features(body, batch.x)
            return task.criterion(logits(h, z), z, batch)

        def fit_and_align(b: Tree, batch: Batch) -> Tensor:
            z = features(b, batch.x)
            apart = (z - target[batch.y]).square().mean(1)
            return task.criterion(logits(head, z), z, batch) + align * mean(apart, batch)

        head = task.sgd(fit, head, data.batches(1), self.head_lr)
        trained = task.sgd(fit_and_align, body, data.batches(task.epochs))
        prototypes = data.class_means(lambda x: features(trained, x))
        sent = {"prototypes": prototypes, "counts": data.class_counts, "average": average, "variance": variance}
        return {"body": trained, "head": head, **sent}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average bodies, and prototypes by class counts; combine the heads anew for each client."""
        counts, full = uploads.tensor("counts"), torch.nonzero(uploads.sizes)[:, 0]
        known, prototypes = counts.sum(0)[:, None] > 0, uploads.mean("prototypes", counts)
        heads = tree.pick(uploads["head"], full)
        if self.combine:
            weights = combination(uploads.tensor("average")[full], uploads.tensor("variance")[full])
            heads = tree.map(lambda leaf: torch.tensordot(weights, leaf, 1), heads)
        heads = tree.put(server["heads"], uploads.clients[full], heads)
        prototypes = torch.where(known, prototypes, server["prototypes"])
        return tree.merge(server, {"body": uploads.mean("body"), "heads": heads, "prototypes": prototypes})

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None


def combination(average: Tensor, variance: Tensor) -> Tensor:
    """Give each client's weights of all heads: those a >= 0 of sum one with the least a^T (diag V + B) a, where
    B_jk = <average_i - average_j, average_i - average_k>: (K, K) float32 of (K, C, d) averages and (K,) variances.

    That is the squared length of a mixture of points, least by non-negative least squares (Lawson, Hanson, 1974, 23).
    """
    from scipy.optimize import nnls

    along = torch.linalg.qr(average.cpu().double().flatten(1).T, mode="r").R.T  # in the space that they span
    spread = variance.cpu().double().sqrt().diag()
    weights, goal = torch.zeros_like(spread), [0.0] * (along.shape[1] + len(spread)) + [1.0]
    for i, own in enumerate(along):
        points = torch.cat([own - along, spread, torch.ones(len(spread), 1)], 1)
        weights[i] = torch.from_numpy(nnls(points.T.numpy(), goal)[0])
    return (weights / weights.sum(1, keepdim=True)).to(average)
