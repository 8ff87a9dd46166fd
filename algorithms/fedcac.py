"""FedCAC: parameters that matter to a client are averaged with those of clients to which the same ones matter.

Wu, Liu, Niu, Zhu, Tang. Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
Cautiously Aggressive Collaboration. ICCV 2023. https://arxiv.org/abs/2309.11103

Server keeps   body, head, customised
Client keeps   critical
Down           body, head, customised (model)
Up             body, head, critical (model)
Newcomers      have no critical parameters yet, and use the global model
Departs        not all clients take part in a round (paper: all): who meets whom is decided among those that do, and
               the others' customised models stay as they are. Models are averaged with the setting's weights where
               all are (paper: all alike), and alike among those that are alike. Running statistics are those of the
               global model, and no parameters. Clients without examples stay out
Elsewhere      PFLlib's default `beta` of 0 fails an assertion. It needs all clients in each round, for masks are None
               otherwise, and it customises by the round's cohort only but applies that to all clients
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Count, Share


@register("fedcac")
@dataclass(frozen=True, kw_only=True)
class FedCAC(Algorithm):
    """Critical parameters come of few clients, ever fewer from round to round; the others of all."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "critical_share": (0.1, 0.9),
        "narrowing": [10, 30, 100, 300],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedcac(critical_share=0)": "whether critical parameters do anything: without any it is FedAvg bit for bit",
        "fedcac(narrowing=1)": "whether collaboration does: a client's critical parameters are all but its own",
    }

    critical_share: Share = 0.5
    """Share of each tensor's parameters that are critical (paper: tau = 0.5)."""
    narrowing: Count = 100
    """Rounds after which no pair is alike enough any more (paper: beta = 100)."""

    def init_server(self, task: Task) -> Tree:
        """Start with the initial parameters for each client: (N, ...)."""
        model = task.init()
        return {**model, "customised": tree.stack([tree.parameters(model)] * task.num_clients)}

    def init_client(self, task: Task) -> Tree:
        """Have no critical parameters: bool, of their shapes."""
        none = tree.map(lambda leaf: torch.zeros_like(leaf, dtype=torch.bool), tree.parameters(task.init()))
        return {"critical": none}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the global model to all."""
        return {"body": server["body"], "head": server["head"]}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send each client its customised parameters; the global ones to one held out of training."""
        if client is None:
            return {"customised": tree.parameters({"body": server["body"], "head": server["head"]})}
        return {"customised": tree.pick(server["customised"], client)}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give critical parameters as they are customised, and the others as they are everywhere."""
        model: Tree = {"body": shared["body"], "head": shared["head"]}
        parameters = tree.parameters(model)
        return tree.merge(model, tree.map(torch.where, private["critical"], shared["customised"], parameters))

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train what is put together; see what mattered."""
        start = self.personal_model(task, shared, private, data)
        assert start is not None
        model = task.sgd(task.loss, start, data.batches(task.epochs))
        found = tree.map(self.critical, tree.parameters(model), tree.parameters(start))
        critical = tree.where(data.n > 0, found, private["critical"])
        return {**model, "critical": critical}, {"critical": critical}

    def critical(self, after: Tensor, before: Tensor) -> Tensor:
        """Mark the entries of a tensor with the largest |w (w - w_before)|."""
        sensitivity = (after * (after - before)).abs().flatten()
        order = sensitivity.argsort(descending=True, stable=True)  # equal ones by place, in either engine
        rank = torch.arange(len(order), device=order.device)
        first = rank < int(len(order) * self.critical_share + 1e-6)
        return torch.zeros_like(first).scatter(0, order, first).reshape(after.shape)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average all models, and for each client those of its like."""
        marks = torch.cat([leaf.flatten(1).float() for leaf in tree.flatten(uploads["critical"]).values()], 1)
        weights = companions(overlaps(marks), uploads.sizes > 0, (task.round + 1) / self.narrowing)
        sent = tree.parameters({"body": uploads["body"], "head": uploads["head"]})
        mixtures = tree.map(lambda leaf: torch.tensordot(weights, leaf, 1), sent)
        customised = tree.put(server["customised"], uploads.clients, mixtures)
        return {"body": uploads.mean("body"), "head": uploads.mean("head"), "customised": customised}

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count a bit for each mark."""
        marks = {"critical": payload["critical"]} if "critical" in payload else {}
        return tree.nbytes({key: part for key, part in payload.items() if key not in marks}) + -(
            -sum(leaf.numel() for leaf in tree.flatten(marks).values()) // 8
        )


def overlaps(marks: Tensor) -> Tensor:
    """Give the share of marks that two clients have in common, 1 - |m_i - m_j| / (2 |m_i|): (K, K) of (K, P)."""
    number = marks.sum(1)
    apart = number[:, None] + number - 2 * marks @ marks.T
    return 1 - apart / (2 * number[:, None]).clamp(min=1)


def companions(overlap: Tensor, full: Tensor, progress: Tensor | float) -> Tensor:
    """Give equal weights to each client itself and to those whose overlap with it reaches the threshold, which goes
    from the mean of all pairs to the largest, and beyond: (K, K), each row of sum one.

    Args:
        overlap: (K, K).
        full: (K,) bool, who has examples; the others stay by themselves.
        progress: 0 at the mean, 1 at the largest.
    """
    itself = torch.eye(len(overlap), dtype=torch.bool, device=overlap.device)
    pairs = full[:, None] & full & ~itself
    mean = (overlap * pairs).sum() / pairs.sum().clamp(min=1)
    largest = torch.where(pairs, overlap, -1.0).max()
    chosen = (itself | (pairs & (overlap >= mean + progress * (largest - mean)))).to(overlap)
    return chosen / chosen.sum(1, keepdim=True)
