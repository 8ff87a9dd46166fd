"""Fed-GraB: at each client a controller for each class holds the pushes up and down of its logit in balance.

Xiao, Chen, Liu, Wang, Feng, Hao, Zhou, Wu, Yang, Liu. Fed-GraB: Federated Long-tailed Learning with Self-Adjusting
Gradient Balancer. NeurIPS 2023. https://arxiv.org/abs/2310.07587

Server keeps   body, head, mass, tail
Client keeps   gap, before, earlier, control
Down           body, head, tail (C)
Up             body, head
Newcomers      the generic model; held out, with five epochs of the head
Departs        the head is trained (release: never, all start from random ones). Which classes are tail is read from row
               norms of the averaged head after each round (release: written into the code); before the first average no
               controller is open. Norms less their minimum have the shares that their z-scores become. A closed class
               goes on adding up its gap. Output is bounded (release: the clamp does nothing), and no class is let off
               at random (release: by its index). Where a loss part acts, its gradient is weighed and added up
Elsewhere      authors' code averages models with weights of a randomly permuted client list, in each round anew, seeds
               the partition alone, and implements only CIFAR-10 of the data sets in its README. It trains all clients
               in each round. Its two logs end at 1.0 % and 7.8 % accuracy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Positive, Share, Strength


@register("fedgrab")
@dataclass(frozen=True, kw_only=True)
class FedGraB(Algorithm):
    """Without controllers (all three gains 0) it is FedAvg with a sigmoid for each class."""

    family: ClassVar[str] = "fedlt"
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"proportional": (0.1, 100.0)}

    proportional: Strength = 10.0
    """Gain of a change of the error (release: K_P = 10)."""
    integral: Strength = 0.01
    """Gain of the error (release: K_I = 0.01; an earlier version: 0)."""
    differential: Strength = 0.1
    """Gain of a change of the change (release: K_D = 0.1; an earlier version: 0)."""
    slope: Positive = 0.5
    """Of the logistic curve that makes weights of the output (release: zeta = 0.5; an earlier version: 0.01)."""
    limit: Positive = 100.0
    """Largest output of a controller (release: 100, which is not enforced)."""
    rest: Share = 0.95
    """Share of the estimated examples that head and middle hold (paper: 95 %); at 0 all classes are tail (release)."""

    def init_server(self, task: Task) -> Tree:
        """Know nothing of frequencies yet."""
        mass = task.key.new_zeros(task.num_classes, dtype=torch.float32)
        return {**task.init(), "mass": mass, "tail": self._tail(mass)}

    def init_client(self, task: Task) -> Tree:
        """Start in balance: the gap (C,) of now, of one step ago and of two, and the controllers' output."""
        return dict.fromkeys(("gap", "before", "earlier", "control"), self.init_server(task)["mass"])

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model, and which classes are tail; the estimate stays at the server."""
        return {key: server[key] for key in ("body", "head", "tail")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Weigh the gradient of each logit by its controller, and add up what came of it."""

        def loss(w: Tree, batch: Batch) -> tuple[Tensor, Tree]:
            z = task.model.features(w["body"], batch.x)
            logits, own = task.model.logits(w["head"], z).float(), losses.one_hot(batch.y, task.num_classes)
            state, still = w["balancer"]["stats"], logits.detach()
            control = self.control(state, shared["tail"])
            weight = torch.where(own > 0, self.weight(control), self.weight(-control))

            def entropy(logits: Tensor) -> Tensor:
                return task.criterion(logits, z.detach(), batch, sigmoid_entropy)

            pushed = (weight * torch.func.grad(entropy)(still)).abs()
            gap = state["gap"] + (pushed * (2 * own - 1)).sum(0)  # of a class's own examples, less that of others
            following = {"gap": gap, "before": state["gap"], "earlier": state["before"], "control": control}
            weighed = still + weight * (logits - still)  # the same values, and weighed gradients
            return task.criterion(weighed, z, batch, sigmoid_entropy), {"balancer": {"stats": following}}

        w = {"body": shared["body"], "head": shared["head"], "balancer": {"stats": private}}
        w = task.sgd(loss, w, data.batches(task.epochs))
        return {"body": w["body"], "head": w["head"]}, w["balancer"]["stats"]

    def control(self, state: Tree, tail: Tensor) -> Tensor:
        """Give the controllers' next output, (C,), in increments; the error is minus the gap."""
        change, last = state["before"] - state["gap"], state["earlier"] - state["before"]
        step = self.proportional * change - self.integral * state["gap"] + self.differential * (change - last)
        return torch.where(tail > 0, (state["control"] + step).clamp(-self.limit, self.limit), 0.0)

    def weight(self, control: Tensor) -> Tensor:
        """Give the weights of an output: between 0 and 10, and 1 at 0."""
        return 10 / (1 + 9 * (-self.slope * control).exp())

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models, and add what the head's rows say of frequencies to what they said before."""
        server = tree.merge(server, uploads.mean())
        mass = server["mass"] + estimated_shares(server["head"]["weight"])
        return {**server, "mass": mass, "tail": self._tail(mass)}

    def _tail(self, mass: Tensor) -> Tensor:
        """Mark those classes before which, by falling frequency, the others hold the share `rest`: (C,) 0 or 1."""
        order = mass.argsort(descending=True, stable=True)
        before, total = mass[order].cumsum(0) - mass[order], mass.sum()
        late = (before >= self.rest * total * (1 - 1e-6)) & (total > 0)  # rounding must not save the last one
        return torch.zeros_like(mass).scatter(0, order, late.float())


def estimated_shares(weight: Tensor) -> Tensor:
    """Estimate the classes' shares of all examples from the row norms of a head: (C, d) -> (C,), of sum one or zero."""
    above: Tensor = weight.norm(dim=1) - weight.norm(dim=1).min()
    return above.div(above.sum().clamp(min=1e-12))


def sigmoid_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of each logit, added up over classes: (B, C) -> ()."""
    own = losses.one_hot(batch.y, logits.shape[1])
    return losses.mean(F.binary_cross_entropy_with_logits(logits, own, reduction="none").sum(1), batch)
