"""FedEM: each client's distribution is a mixture of a few that all share, each of which has a model.

Marfoq, Neglia, Bellet, Kameni, Vidal. Federated Multi-Task Learning under a Mixture of Distributions. NeurIPS 2021.
https://arxiv.org/abs/2108.10252 (Algorithm 1)

Server keeps   body, head
Client keeps   mixture
Down           body (components × body), head (components × head)
Up             body (components × body), head (components × head)
Passes         components × (E + 1/3); before the test components / 3
Newcomers      never drawn or held out, the weights to which expectation and maximisation lead from equal ones on their
               training data while models stand still (reference: one step); nothing is tuned. Without labels equal ones
Departs        responsibilities are those of images as they are, not augmented; for the test a client takes one more
               step of its weights with the newest models. The first component starts as everybody's model, the others
               each from its own draw (reference: from seeds of their own, all of them)
Elsewhere      FL-bench looks responsibilities up by `isin`, which gives sorted positions, so each example of a shuffled
               batch gets another one's weights; and it mixes logits, not probabilities. What authors' code calls its
               validation iterator is the training data
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, losses, register
from bench.ranges import Steps


@register("fedem")
@dataclass(frozen=True, kw_only=True)
class FedEM(Algorithm):
    """In `body` and `head` the parts of component m lie under its name; a model has its `mixture` (M,) besides."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"components": [2, 3, 4, 6]}
    controls: ClassVar[Mapping[str, str]] = {
        "fedem(components=1)": "whether a mixture does anything: one component is FedAvg bit for bit",
    }

    components: Annotated[int, Interval(ge=1, le=100)] = 3
    """How many distributions there are (paper: M = 3); at first each model learns at an M-th of the learning rate."""
    newcomer_steps: Steps = 10
    """Steps of a newcomer's weights; each takes as much as an addition (paper: until they stand still)."""

    @property
    def names(self) -> list[str]:
        """Give the components' names, in their order."""
        return [f"component{m}" for m in range(self.components)]

    def init_server(self, task: Task) -> Tree:
        """Start the first component from the initial model that all algorithms share, the others each from its own."""
        seeds = [task.key, *(keys.fold(task.key, "component", m) for m in range(1, self.components))]
        drawn = {name: replace(task, key=key).init() for name, key in zip(self.names, seeds, strict=True)}
        return {part: {name: model[part] for name, model in drawn.items()} for part in ("body", "head")}

    def init_client(self, task: Task) -> Tree:
        """Start with equal weights."""
        return {"mixture": task.key.new_full((self.components,), 1 / self.components, dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Find who is responsible for each example, then train each component on what is its own."""
        costs = self.costs(task, shared, data)
        share = responsibilities(costs, private["mixture"])

        def loss(own: Tensor, w: Tree, batch: Batch) -> Tensor:
            weight = batch.weight * own[batch.example]
            all_of_it, mine = batch.weight.sum().clamp(min=1), weight.sum().clamp(min=1e-30)
            scaled = replace(batch, weight=weight * (batch.weight.sum() / mine))  # a mean divides by their sum
            return task.loss(w, scaled) * (weight.sum() / all_of_it)

        trained = {}
        for name, own in zip(self.names, share.unbind(1), strict=True):
            start = component(shared, name)
            trained[name] = task.sgd(partial(loss, own), start, data.batches(task.epochs))
        sent = {part: {name: model[part] for name, model in trained.items()} for part in ("body", "head")}
        return sent, {"mixture": maximised(share, private["mixture"], data)}

    def costs(self, task: Task, shared: Tree, data: LocalData) -> Tensor:
        """Give the cross-entropy of each example under each component: (L, M) float32; 0 where no label is known."""
        columns = []
        for name in self.names:
            column = [task.key.new_zeros(0, dtype=torch.float32)]
            for batch in data.plain_batches():
                scores = task.logits(component(shared, name), batch.x).float().log_softmax(1)
                column.append(-(scores * losses.one_hot(batch.y, task.num_classes)).sum(1))
            columns.append(torch.cat(column))
        return torch.stack(columns, 1)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: who knows no client knows no mixture."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest components, mixed by what is responsible for the client's training data."""
        share = responsibilities(self.costs(task, shared, data), private["mixture"])
        mixture = maximised(share, private["mixture"], data)
        return {"body": shared["body"], "head": shared["head"], "mixture": mixture}

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Take steps of the weights alone, from equal ones."""
        costs, mixture = self.costs(task, shared, data), self.init_client(task)["mixture"]
        for _ in range(self.newcomer_steps):
            mixture = maximised(responsibilities(costs, mixture), mixture, data)
        return {"mixture": mixture}

    def newcomer_adaptation(self, task: Task) -> None:
        """Take no step: a newcomer finds its weights, and no model is trained."""
        return None

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Give the logarithm of the mixture of what components think likely: (B, C)."""
        each = [task.logits(component(model, name), x).float().log_softmax(1) for name in self.names]
        return torch.logsumexp(torch.stack(each) + logarithm(model["mixture"])[:, None, None], 0)


def component(models: Tree, name: str) -> Tree:
    """Give the model of a component."""
    return {part: models[part][name] for part in ("body", "head")}


def logarithm(mixture: Tensor) -> Tensor:
    """Give the logarithm, finite where a weight is 0."""
    return mixture.clamp(min=1e-30).log()


def responsibilities(costs: Tensor, mixture: Tensor) -> Tensor:
    """Say how likely it is that an example comes of each component, in proportion to pi exp(-cost): (L, M)."""
    return (logarithm(mixture) - costs).softmax(1)


def maximised(share: Tensor, mixture: Tensor, data: LocalData) -> Tensor:
    """Average responsibilities over the client's examples: (M,); without any the weights stay."""
    mean = (share * data.mask[:, None]).sum(0) / data.n.clamp(min=1)
    return torch.where(data.n > 0, mean, mixture)
