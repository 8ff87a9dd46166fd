"""FedTiny: a network is pruned before it is trained, by what clients' images say of several prunings, and while it is
trained the mask moves, a part of the network at a time. What is pruned is neither trained nor sent.

Huang, Zhang, Sun, Fang, Yuan, Wu. Distributed Pruning Towards Tiny Neural Networks in Federated Learning. ICDCS 2023.
https://arxiv.org/abs/2212.01977

Server keeps   body, head, mask, statistics, losses
Client keeps   nothing
Down           body (density × body // 1), head, mask ((weights + 7) // 8), statistics
Up             body (density × body // 1), head, losses (candidates), statistics,
               growth (2 × (adjust × (density × body // 1 - (body - weights)) // 1))
Passes         E; first E + b + candidates / 3
Departs        density is of the body: its biases and norm layers stay and are counted, the head stays and is not (as
               FedRTS of the same authors), and of each weight at least one entry stays. The mask holds while clients
               train, and goes down in every round, for they keep nothing. Candidates are the largest weights of each
               layer at densities by Erdős-Rényi kernels, to powers from 0 to 2, of which the first is 1 (paper: drawn,
               how is not known here); the first cohort looks at them (paper: all). Of a network without batch norm
               there is nothing to measure, and with one layer of weights nothing to choose. What grows has the largest
               gradient after local training. Layers move by quarters, from the output down (paper: by blocks). Rates
               are the code's where the paper's are not known. What is zero is computed with: no kernel is sparse
Elsewhere      authors' library, main branch: no selection; masks act in the forward pass only, so that what is pruned
               takes the last step and is averaged, and grown weights begin there; what is sent is dense; a mask is sent
               in the round after it moved, and who is not there then never has it. Its dev branch: statistics are not
               measured, candidates differ by initial weights, losses are not weighted, and places among what is pruned
               are taken for places in the layer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.models import Model, block_of, is_norm
from bench.ranges import Share, SomeShare
from bench.sparse import Weights, counts, largest, mask_bits, mask_of, packed, ranks, weights_of

Granularity: TypeAlias = Literal["all", "quarter", "block", "layer"]
_MILLIONTHS = 1_000_000
"""Shares are whole numbers of these, of which Python and any device make the same whole number of weights."""


@register("fedtiny")
@dataclass(frozen=True, kw_only=True)
class FedTiny(Algorithm):
    """At density 1 nothing is pruned: it is FedAvg."""

    family: ClassVar[str] = "generic"
    stackable: ClassVar[bool] = False
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "adjust": (0.05, 0.5),
        "every": [1, 2, 5, 10],
        "until": (0.2, 1.0),
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedavg": "what a dense model reaches; at equal bytes by the metric generic@5MB or another number",
        "fedtiny(adjust=0)": "whether it does anything that the mask moves",
        "fedtiny(candidates=1)": "whether the choice among prunings does",
        "fedtiny(adjust=0, candidates=1)": "what the largest initial weights are worth by themselves",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "memory": "what a client has not sent waits by its place, and the mask moves places"
    }

    density: SomeShare = 0.1
    """Of the body's parameters, the share that stays (paper: not known here; code 0.1 and 0.2)."""
    candidates: Annotated[int, Interval(ge=1, le=100)] = 5
    """Prunings that clients look at before the first round (code's command: 5). 1: there is no choice."""
    adjust: Share = 0.2
    """Of a layer's weights that stay, twice the share that goes, and comes, on average over the rounds in which it is
    the layer's turn: all of it at first, none at the end (code: 0.2; FedRTS calls 0.4 usual). 0: masks stand still."""
    every: Annotated[int, Interval(ge=1, le=10_000)] = 10
    """Rounds from one move of the mask to the next (code: 10)."""
    until: Share = 0.6
    """Share of the rounds after which the mask stands still (code: 300 of 500)."""
    granularity: Granularity = "quarter"
    """What moves at a time, by turns from the output to the input: all layers, a quarter of them (ours), a block of the
    network (paper, by another's table), or a layer."""
    growth: Literal["batch", "all"] = "batch"
    """Of how many examples a client takes the gradient by which weights grow: a batch (code), or all."""

    # What is pruned, and when -------------------------------------------------------------------------

    def plan(self, task: Task) -> Plan:
        """Give what follows from the network and the fields."""
        return planned(task.model, self.density, self.candidates, self.granularity)

    def share(self, task: Task) -> int:
        """Give the share of a layer's kept weights that moves in this round, if it is its turn, in millionths."""
        return 0 if task.round % self.every else moving(self.adjust, task.round, self.until * task.rounds)

    def turn(self, task: Task) -> tuple[int, ...]:
        """Give the layers whose turn it is in this round, by their places; none where the mask stands still."""
        turns = self.plan(task).turns
        return turns[task.round // self.every % len(turns)] if turns and self.share(task) else ()

    def grown(self, task: Task) -> int:
        """Count the weights that a client names for growth in this round: so many as any candidate's mask moves."""
        plan, turn, share = self.plan(task), self.turn(task), self.share(task)
        sizes = plan.weights.sizes
        return max(sum(min(kept[k] * share // _MILLIONTHS, sizes[k] - kept[k]) for k in turn) for kept in plan.kept)

    def measures(self, task: Task) -> bool:
        """Tell whether candidates have running statistics of their own."""
        return self.candidates > 1 and bool(self.plan(task).statistics) and not task.frozen_statistics

    # The server ---------------------------------------------------------------------------------------

    def init_server(self, task: Task) -> Tree:
        """Start with the first candidate's mask, and what is known of no candidate yet."""
        model = task.init()
        norms = tree.split(model["body"], _is_norm_statistic)[0] if self.measures(task) else {}
        return {
            **model,
            "mask": self.plan(task).masks(model["body"], task.key.device)[0],
            "statistics": tree.map(lambda leaf: torch.stack([leaf] * self.candidates), norms),
            "losses": torch.zeros(self.candidates, device=task.key.device),
        }

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Have candidates measured and judged before the first round, where there is a choice."""
        layers = " ".join(self.plan(task).weights.paths[k] for k in self.turn(task))
        usual = Exchange(phase=f"growth of {layers}") if self.grown(task) else Exchange()
        if task.round or self.candidates == 1 or not self.plan(task).turns:
            return (usual,)
        measure = (Exchange("measure", "collect", broadcast="offer"),) if self.measures(task) else ()
        return (*measure, Exchange("judge", "choose", broadcast="offer_measured"), usual)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send what the mask keeps, and the mask."""
        return self.masked(task, server, server["mask"], self.plan(task).count)

    def offer(self, task: Task, server: Tree) -> Tree:
        """Send what any candidate keeps: of each layer the largest weights, of which candidates are the first few."""
        plan = self.plan(task)
        return self.masked(task, server, plan.masks(server["body"], task.key.device).any(0), plan.widest)

    def offer_measured(self, task: Task, server: Tree) -> Tree:
        """Send the same, with the statistics of each candidate."""
        return {**self.offer(task, server), "statistics": server["statistics"]}

    def masked(self, task: Task, server: Tree, mask: Tensor, count: int) -> Tree:
        """Pack a model by a mask that keeps so many weights."""
        body = self.plan(task).weights.pack(server["body"], mask, count)
        return {"body": body, "head": server["head"], "mask": mask_bits(mask)}

    def collect(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the statistics that clients measured."""
        return {**server, "statistics": uploads.mean("statistics")}

    def choose(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Take the candidate of the least mean loss, of equals the first, with its statistics."""
        losses = uploads.mean("losses")
        best = losses.argsort(stable=True)[:1]
        norms = tree.map(lambda leaf: leaf[best][0], server["statistics"])
        mask = self.plan(task).masks(server["body"], task.key.device)[best][0]
        return {**server, "body": tree.merge(server["body"], norms), "mask": mask, "losses": losses}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average what was kept, and move the mask where it is its turn."""
        weights, mask = self.plan(task).weights, server["mask"]
        body = weights.unpack(uploads.mean("body"), mask, server["body"])
        if self.grown(task):
            row = weights.row(body, task.key.device)
            mask = self.moved(task, row, scattered(uploads, weights.total), mask)
            body = tree.merge(body, weights.leaves(torch.where(mask, row, 0.0)))
        return {**server, "body": body, "head": uploads.mean("head"), "mask": mask}

    def moved(self, task: Task, row: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
        """Prune of each layer whose turn it is the smallest weights, and grow as many where the gradient is largest.

        Args:
            task: Of the round.
            row: (n,) weights; 0 where they are pruned, so that what grows begins there.
            slope: (n,) gradient of what is pruned, as far as clients named it.
            mask: (n,) bool, what was kept so far.

        Returns:
            (n,) bool. Each layer keeps as many as it did.
        """
        sizes = self.plan(task).weights.sizes
        parts, rows, slopes = list(mask.split(sizes)), row.abs().split(sizes), slope.abs().split(sizes)
        for k in self.turn(task):
            count = moves(parts[k], self.share(task))
            gone, come = largest(-rows[k], parts[k], count), largest(slopes[k], ~parts[k], count)
            parts[k] = (parts[k] & ~gone) | come
        return torch.cat(parts)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the model with zeros where it is pruned."""
        weights = self.plan(task).weights
        kept = torch.where(server["mask"], weights.row(server["body"], task.key.device), 0.0)
        return {"body": tree.merge(server["body"], weights.leaves(kept)), "head": server["head"]}

    # The clients --------------------------------------------------------------------------------------

    def unpacked(self, task: Task, shared: Tree) -> tuple[Tree, Tensor]:
        """Give the model that was sent, with zeros where it is pruned, and its mask, (n,) bool."""
        plan = self.plan(task)
        mask = mask_of(shared["mask"], plan.weights.total)
        return {"body": plan.weights.unpack(shared["body"], mask, plan.body), "head": shared["head"]}, mask

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the generic model, which everybody has."""
        return self.unpacked(task, shared)[0]

    def offered(self, task: Task, shared: Tree) -> list[Tree]:
        """Make each candidate's model of what was offered."""
        (model, _), plan = self.unpacked(task, shared), self.plan(task)
        row, masks = plan.weights.row(model["body"], task.key.device), plan.masks(model["body"], task.key.device)
        return [tree.merge(model, {"body": plan.weights.leaves(torch.where(mask, row, 0.0))}) for mask in masks]

    def measure(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Measure, with each candidate, what its norm layers are given of the client's examples."""
        found = []
        for model in self.offered(task, shared):
            total = tree.scale(tree.split(model["body"], _is_norm_statistic)[0], 0.0)
            for batch in data.plain_batches():
                seen = tree.split(task.batch_statistics(model, batch)["body"], _is_norm_statistic)[0]
                total = tree.add(total, seen, batch.weight.sum() / data.n)
            found.append(total)
        return {"statistics": tree.stack(found)}, private

    def judge(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Tell the mean loss of each candidate, with the statistics that all clients measured together."""
        models = self.offered(task, shared)
        if shared["statistics"]:
            each = zip(models, tree.unstack(shared["statistics"]), strict=True)
            models = [tree.merge(model, {"body": norms}) for model, norms in each]

        def lost(model: Tree) -> Tensor:
            return data.mean(lambda batch: task.loss(model, batch))

        with torch.no_grad():
            return {"losses": torch.stack([lost(model) for model in models]), "statistics": {}}, private

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train what is kept, and name in its turn what is worth growing."""
        plan = self.plan(task)
        model, mask = self.unpacked(task, shared)
        kept = {"body": plan.weights.leaves(mask)}

        def of_the_kept(gradient: Tree, w: Tree, batch: Batch) -> Tree:
            of_weights, _ = tree.split(gradient, tree.flatten(kept).__contains__)
            return tree.merge(gradient, tree.map(torch.mul, of_weights, kept))

        model = task.sgd(task.loss, model, data.batches(task.epochs), edit=of_the_kept)
        upload = {"body": plan.weights.pack(model["body"], mask, plan.count), "head": model["head"]}
        return upload | ({"growth": self.named(task, model, mask, data)} if self.grown(task) else {}), private

    def named(self, task: Task, model: Tree, mask: Tensor, data: LocalData) -> Tree:
        """Name the pruned weights with the largest gradients of the layers whose turn it is.

        Returns:
            `place` (k,) int32, in a row, and `gradient` (k,): of places that are left over, one of zero.
        """
        weights, turn = self.plan(task).weights, self.turn(task)
        moving, still = tree.split(model, {f"body/{weights.paths[k]}" for k in turn}.__contains__)
        total, whole = tree.scale(moving, 0.0), self.growth == "all"
        for batch in data.batches(1, "growth") if whole else data.batches(steps=1, salt="growth"):
            _, slope, _ = task.gradient(lambda w, batch: task.loss(tree.merge(still, w), batch), moving, batch)
            total = tree.add(total, slope, batch.weight.sum() / data.n if whole else 1.0)
        # Of layers whose turn it is not there is a gradient of zero, and nothing is chosen.
        leaves, parts = tree.flatten(total["body"]), mask.split(weights.sizes)
        none = {k: torch.zeros(len(part), device=mask.device) for k, part in enumerate(parts) if k not in turn}
        slopes = [none[k] if k in none else leaves[weights.paths[k]].flatten() for k in range(len(parts))]
        chosen = [
            none[k].bool() if k in none else largest(slopes[k].abs(), ~parts[k], moves(parts[k], self.share(task)))
            for k in range(len(parts))
        ]
        places, marks = torch.arange(weights.total, dtype=torch.int32, device=mask.device), torch.cat(chosen)
        count = self.grown(task)
        return {"place": packed(places, marks, count), "gradient": packed(torch.cat(slopes), marks, count)}


@dataclass(frozen=True)
class Plan:
    """What follows from a network and the method's fields."""

    body: Tree
    """Of the network, whose values say nothing."""
    weights: Weights
    """That a mask is of: none at density 1."""
    kept: tuple[tuple[int, ...], ...]
    """By candidate, how many each layer keeps; they add up to the same number."""
    turns: tuple[tuple[int, ...], ...]
    """Layers that move together, by their places, in the order of their turns."""

    @property
    def count(self) -> int:
        """How many weights a mask keeps."""
        return sum(self.kept[0])

    @property
    def widest(self) -> int:
        """How many weights any candidate keeps."""
        return sum(max(of_layer) for of_layer in zip(*self.kept, strict=True))

    @property
    def statistics(self) -> bool:
        """Whether the network has running statistics of norm layers."""
        return any(map(_is_norm_statistic, tree.flatten(self.body)))

    def masks(self, body: Tree, device: torch.device) -> Tensor:
        """Give the candidates' masks: (candidates, n) bool, the largest weights of each layer."""
        row = self.weights.row(body, device)
        places = [ranks(part.abs()) for part in row.split(self.weights.sizes)]
        none = torch.zeros(0, dtype=torch.bool, device=device)
        return torch.stack(
            [torch.cat([none, *(place < k for place, k in zip(places, kept, strict=True))]) for kept in self.kept]
        )


@lru_cache(maxsize=64)
def planned(model: Model, density: float, candidates: int, granularity: Granularity) -> Plan:
    """Make the plan for a network: see the fields of the method."""
    body = model.init(keys.key(0, "meta"))["body"]
    weights = weights_of(body) if density < 1 else Weights((), ())
    parameters = sum(leaf.numel() for path, leaf in tree.flatten(body).items() if not tree.is_statistic(path))
    total = int(density * parameters + 1e-6) - (parameters - weights.total)  # 28.999999 is 29
    kept = tuple(counts(weights.shapes, total, power) for power in powers(candidates))
    return Plan(body, weights, kept, turns(model, weights, granularity))


def powers(candidates: int) -> list[float]:
    """Give the power of each candidate's densities: 1; 0 and 2; what lies half-way, and so on."""
    found, step = [1.0, 0.0, 2.0], 0.5
    while len(found) < candidates:
        found += [step * k for k in range(1, round(2 / step), 2)]
        step /= 2
    return found[:candidates]


def turns(model: Model, weights: Weights, granularity: Granularity) -> tuple[tuple[int, ...], ...]:
    """Group layers by what moves together, from the output of a network to its input."""
    layers = range(len(weights.paths))[::-1]
    if granularity == "block":
        blocks = [block_of(model, f"body/{path}") for path in weights.paths]
        names = dict.fromkeys(blocks[k] for k in layers)
        return tuple(tuple(k for k in layers if blocks[k] == name) for name in names)
    parts = min({"all": 1, "quarter": 4, "layer": len(layers)}[granularity], len(layers))
    ends = [k * len(layers) // parts for k in range(parts + 1)] if parts else []
    return tuple(tuple(layers[a:b]) for a, b in itertools.pairwise(ends))


def moving(adjust: float, round: int, end: float) -> int:
    """Give the share of kept weights that moves in a round, adjust / 2 · (1 + cos(π round / end)), in millionths; none
    from the end on.
    """
    return 0 if round >= end else int(_MILLIONTHS * adjust / 2 * (1 + math.cos(math.pi * round / end)) + 0.5)


def moves(mask: Tensor, share: int) -> Tensor:
    """Count the weights of a layer that go, and come: () int64, a share of those kept, in millionths, and no more than
    are pruned.

    Args:
        mask: (n,) bool, of the layer.
        share: 0 to 1,000,000.
    """
    return torch.minimum(mask.sum() * share // _MILLIONTHS, (~mask).sum())


def scattered(uploads: Uploads, n: int) -> Tensor:
    """Average the gradients that clients named, by the setting's weights: (n,) float32."""
    weights = tree.in_float64(uploads.weights)
    total = weights.new_zeros(n)
    for weight, upload in zip(torch.where(weights.sum() > 0, weights, 1.0), uploads.trees, strict=True):
        place, gradient = (upload["growth"][key].to(total.device) for key in ("place", "gradient"))
        total = total.scatter_add(0, place.long(), weight * gradient.to(total))
    return total.to(uploads.weights.device, torch.float32)


def _is_norm_statistic(path: str) -> bool:
    return is_norm(path) and tree.is_statistic(path)
