"""FedFomo: a client mixes others' models into its own as far as each is better on examples that it sets aside.

Zhang, Sapra, Fidler, Yeung, Alvarez. Personalized Federated Learning with First Order Model Optimization. ICLR 2021.
https://arxiv.org/abs/2012.08565

Server keeps   models, affinity, known
Client keeps   body, head, base
Down           models (peers × model), who (peers)
Up             body, head, scores (peers), who (peers)
Passes         (1 - aside) × E + aside × (peers + 2) / 3; before the test aside × (peers + 2) / 3
Newcomers      mix what they are sent into the initial model; held out, of those that clients like best on average, with
               five epochs of the head
Departs        the baseline is the model that a client last trained (reference: the one before, so that training is
               undone where the few examples set aside speak against it). Distances are Euclidean, as in the paper
               (reference: sums of absolute differences), and without running statistics. Affinity adds up scores
               (reference: divided by the sum of their sizes). A client with too few examples to set any aside goes on
               with its own model. Those set aside are the same in every round, of each class as many as it can spare
Elsewhere      PFLlib's baseline is the previous mixture before training, and the client's own model is no candidate.
               easyFL sends the models of lowest affinity and adds whole models instead of differences, so norms
               explode. FL-bench sets other examples aside at each visit, so they leak into training
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, keys, losses, register, tree
from bench.ranges import Momentum, Share


@register("fedfomo")
@dataclass(frozen=True, kw_only=True)
class FedFomo(Algorithm):
    """The server averages nothing: it knows whose models helped whom, and sends those."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {
        "channel": "what comes down are others' models, of which an upload is no update",
        "aggregation": "each client's model stays apart, and no mean is taken",
    }
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"peers": [2, 4, 9], "explore": (0.0, 1.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "fedfomo(peers=0)": "whether others' models do anything: without any it is local training "
        "on what is not set aside",
    }

    peers: Annotated[int, Interval(ge=0, le=1_000)] = 4
    """How many models a client is sent (reference: M = 4 or 9, besides its own)."""
    explore: Share = 0.3
    """Probability that one of them is drawn, and not the one liked best (reference: 0.3)."""
    decay: Share = 0.05
    """By how much that falls in each round (reference: 0.05)."""
    aside: Momentum = 0.2
    """Share of each class that is set aside to choose by, and not trained on (reference: 0.2)."""
    baseline: Literal["before", "trained"] = "trained"
    """What a model must be better than: the client's own as it last trained it, or as it was before, so that training
    can be undone (reference: before).
    """

    def init_server(self, task: Task) -> Tree:
        """Know no model yet, (N, ...), and nobody's liking, (N, N)."""
        none = task.key.new_zeros(task.num_clients, dtype=torch.float32)
        models = tree.stack([task.init()] * task.num_clients)
        return {"models": models, "affinity": none[:, None] * none, "known": none}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        model = task.init()
        return {**model, "base": model}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send models, (M, ...), and whose they are: (M,) int32, -1 for nobody's."""
        likes = server["affinity"].mean(0) if client is None else server["affinity"][client]
        everybody = torch.arange(len(likes), device=likes.device)
        there = (server["known"] > 0) & (everybody != (-1 if client is None else client))
        explore = 0.0 if client is None else max(0.0, self.explore - self.decay * task.round)
        key = keys.fold(task.server_key("peers"), -1 if client is None else client)
        who = chosen(likes, there, min(self.peers, len(likes)), explore, key)
        return {"models": tree.pick(server["models"], who), "who": torch.where(there[who], who, -1).to(torch.int32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Mix, then train on what is not set aside."""
        rest, aside = data.part(self.aside, "validation")
        start, scores = self.mixed(task, shared, private, aside)
        model = task.sgd(task.loss, start, rest.batches(task.epochs))
        kept = tree.where(data.n > 0, {**model, "base": start}, private)
        return {**model, "scores": scores, "who": shared["who"]}, kept

    def mixed(self, task: Task, shared: Tree, private: Tree, aside: LocalData) -> tuple[Tree, Tensor]:
        """Step from the baseline towards each model that is better, and say how good those were that came: (M,)."""
        own: Tree = {"body": private["body"], "head": private["head"]}
        base: Tree = private["base"] if self.baseline == "before" else own
        others = [tree.pick(shared["models"], m) for m in range(len(shared["who"]))]
        known = [torch.ones_like(aside.n, dtype=torch.bool), *(shared["who"] >= 0)]
        before, scores, apart = cost(task, base, aside), [], []
        for model, there in zip([own, *others], known, strict=True):
            away = tree.sub(model, base)
            gain = (before - cost(task, model, aside)) / tree.dot(*[tree.parameters(away)] * 2).sqrt().clamp(min=1e-12)
            scores.append(torch.where(there, gain, 0.0))
            apart.append(away)
        better = torch.stack(scores).clamp(min=0)
        weights = better / better.sum().clamp(min=1e-30)
        mixture = tree.map(lambda b, *away: b + sum(w * a for w, a in zip(weights, away, strict=True)), base, *apart)
        return tree.where(aside.n > 0, mixture, own), torch.stack(scores)[1:]

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Put the models that arrived in their clients' places, and add up scores."""
        models = tree.stack([{"body": upload["body"], "head": upload["head"]} for upload in uploads.trees])
        who = uploads.tensor("who").long().clamp(min=0)  # nobody's model has a score of 0
        rows = uploads.clients[:, None].expand_as(who)
        return {
            "models": tree.put(server["models"], uploads.clients, models),
            "affinity": server["affinity"].index_put((rows, who), uploads.tensor("scores"), accumulate=True),
            "known": server["known"].index_copy(0, uploads.clients, (uploads.sizes > 0).to(server["known"])),
        }

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give what the client would start from."""
        if self.baseline == "trained" and not len(shared["who"]):
            return {"body": private["body"], "head": private["head"]}
        return self.mixed(task, shared, private, data.part(self.aside, "validation")[1])[0]

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give what was trained, with nobody to mix it with."""
        private = self.local_update(task, shared, private, data)[1]
        return tree.pick(shared, slice(0)), {**private, "base": {"body": private["body"], "head": private["head"]}}


def chosen(likes: Tensor, there: Tensor, count: int, explore: float, key: Tensor) -> Tensor:
    """Choose clients: those liked best, of equals any, but for some that are drawn: (count,) int64.

    Args:
        likes: (N,).
        there: (N,) bool, whose model there is; the others come last.
        count: How many.
        explore: Probability of each to be drawn.
        key: Randomness.
    """
    lot = keys.uniform(key, len(likes))
    order = lot.argsort(stable=True)
    order = order[torch.where(there, likes, -torch.inf)[order].argsort(descending=True, stable=True)]
    place = torch.arange(len(likes), device=likes.device)
    rank = torch.empty_like(place).scatter(0, order, place)
    best = count - (keys.uniform(keys.fold(key, "explore"), count) < explore).sum()
    wanted = torch.where(rank < best, 2.0 * len(likes) - rank, lot)
    return torch.where(there, wanted, -1.0).argsort(descending=True, stable=True)[:count]


def cost(task: Task, model: Tree, data: LocalData) -> Tensor:
    """Give the mean cross-entropy of a model on a client's examples: ()."""
    return data.mean(lambda batch: losses.cross_entropy(task.logits(model, batch.x), batch))
