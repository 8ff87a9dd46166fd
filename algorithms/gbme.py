"""GBME: three experts on one trunk, balanced by frequencies that updates give away, each then taught by like clients.

Zeng, Liu, Liu, Shen, Liu, Wu. Global Balanced Experts for Federated Long-Tailed Learning. ICCV 2023, pages 4815-4825.
https://github.com/Spinozaaa/Federated-Long-tailed-Learning

Server keeps   body, head, prior, ranks
Client keeps   nothing
Down           body (experts × body), head (experts × head), prior (C)
Up             body (experts × body), head (experts × head), counts (C)
Passes         E; first E + 1; last experts × E
Departs        each expert has a last block and a linear head (reference: a narrower stage, a normalised head); a client
               itself computes what the server would from its model, once. Models of the first phase are averaged
               (reference: dropped); beyond an expert's third, clients are of those not yet taken (reference: of all)
Elsewhere      authors' code does not average its baselines either: on a GPU the model stays as initialised, on a CPU
               clients train one after the other on one live model. The estimate of counts runs two passes and uses the
               first. Sampling gets a float where a group is too small; NumPy names are those from before 1.24
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partialmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, keys, losses, register, tree
from bench.ranges import Share


@register("gbme")
@dataclass(frozen=True, kw_only=True)
class GBME(Algorithm):
    """In `body` and `head` the parts of expert e lie under its name; the trunk lies beside. Logits are their mean."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"together": (0.2, 1.0), "own": (0.4, 1.0)}

    experts: Literal[1, 3] = 3
    """How many (paper: 3); one alone with the uniform prior is FedAvg."""
    prior: Literal["estimated", "uniform"] = "estimated"
    """By which frequencies the softmax is balanced: those that updates give away (paper), or none."""
    together: Share = 0.6
    """Share of the rounds in which all experts learn together (paper: 3/5)."""
    own: Share = 0.8
    """Share of an expert's clients that are of its own third of all (paper: beta = 0.8)."""

    def init_server(self, task: Task) -> Tree:
        """Give each expert a last block and a head of its own draw, the first those of every method's model."""
        model, last = task.init(), task.model.blocks[-1].keys
        trunk = {key: part for key, part in model["body"].items() if key not in last}
        drawn = [model, *(task.model.init(keys.fold(task.key, "expert", e)) for e in range(1, self.experts))]
        own = {f"expert{e}": {key: each["body"][key] for key in last} for e, each in enumerate(drawn)}
        heads = {f"expert{e}": each["head"] for e, each in enumerate(drawn)}
        flat = torch.ones_like(model["head"]["bias"])
        return {"body": {**trunk, **own}, "head": heads, "prior": flat, "ranks": flat.new_zeros(task.num_clients)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Ask for frequencies once; then train all experts in one trip, and later each in one of its own."""
        first = (Exchange("probe", "estimate", everyone=True),) if task.round == 0 else ()
        if self.experts == 1 or task.round < self.together * task.rounds:
            return (*first, Exchange())
        return (*first, *(Exchange(f"teach{e}", cohort=f"choose{e}") for e in range(3)))

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model and the frequencies; whose clients are how stays at the server."""
        return {key: server[key] for key in ("body", "head", "prior")}

    def probe(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train an epoch by cross-entropy, and read one's class counts from how far the heads' rows went."""

        def loss(w: Tree, batch: Batch) -> Tensor:
            return torch.stack([losses.cross_entropy(z, batch) for z, _ in self._scores(task, w, batch.x)]).sum()

        trained = task.sgd(loss, {"body": shared["body"], "head": shared["head"]}, data.batches(1, "probe"))["head"]
        went = torch.stack([trained[e]["weight"] - shared["head"][e]["weight"] for e in trained]).mean(0).sum(1)
        share = went.clamp(min=1e-5) / went.clamp(min=1e-5).sum()
        return {"counts": (share * data.n).round()}, private

    def estimate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Add up counts, at least five of a class; rank clients by how frequent their classes are."""
        counts = uploads.tensor("counts")
        prior = counts.sum(0).clamp(min=5.0)
        ranks = server["ranks"].index_copy(0, uploads.clients, (counts / counts.sum(1)[:, None].clamp(min=1)) @ prior)
        return {**server, "ranks": ranks, "prior": prior if self.prior == "estimated" else server["prior"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train all experts."""
        return self._teach(None, task, shared, private, data)

    def _teach(self, only: int | None, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the trunk and some experts by balanced softmax; one alone counts as much as all."""
        names = {f"expert{e}" for e in range(3) if only is not None and e != only}
        still, moving = tree.split({key: shared[key] for key in ("body", "head")}, lambda p: p.split("/")[1] in names)

        def balanced(logits: Tensor, batch: Batch) -> Tensor:
            return losses.balanced_softmax(logits, batch, shared["prior"])

        def loss(w: Tree, batch: Batch) -> Tensor:
            of = [task.criterion(logits, z, batch, balanced) for logits, z in self._scores(task, w, batch.x)]
            return torch.stack(of).mean() * self.experts

        return tree.merge(still, task.sgd(loss, moving, data.batches(task.epochs))), private

    def choose(self, expert: int, task: Task, server: Tree, drawn: tuple[int, ...]) -> list[int]:
        """Draw clients for an expert, most of them from its third by rank: the first has the most frequent classes."""
        size, key = len(drawn), task.server_key(f"expert{expert}")
        group = server["ranks"].argsort(descending=True, stable=True).tensor_split(3)[expert]
        mine: list[int] = group[keys.permutation(key, len(group))][: int(self.own * size + 1e-9)].tolist()
        rest = [k for k in keys.permutation(keys.fold(key, "all"), task.num_clients).tolist() if k not in mine]
        return mine + rest[: size - len(mine)]

    teach0, teach1, teach2 = partialmethod(_teach, 0), partialmethod(_teach, 1), partialmethod(_teach, 2)
    choose0, choose1, choose2 = partialmethod(choose, 0), partialmethod(choose, 1), partialmethod(choose, 2)

    def _scores(self, task: Task, model: Tree, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give logits and features of each expert that is there."""
        features = {e: task.model.features({**model["body"], **model["body"].get(e, {})}, x) for e in model["head"]}
        return [(task.model.logits(model["head"][e], z), z) for e, z in features.items()]

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Average the experts' logits."""
        return torch.stack([logits for logits, _ in self._scores(task, model, x)]).mean(0)
