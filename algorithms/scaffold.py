"""SCAFFOLD: control variates correct the drift of local training.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning. ICML 2020. https://arxiv.org/abs/1910.06378 (Algorithm 1, option II)

Server keeps   body, head, control
Client keeps   control
Down           body, head, control (model)
Up             body, head, control (model)
Newcomers      the generic model; held out, with five epochs of the head
Departs        with momentum rho the K of option II is the sum of the weights that K steps give their
               gradients, (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho): the control stays a mean of
               gradients. Weight decay and clipping enter that mean. Models are averaged with the setting's
               weights, as for every algorithm here (paper: all alike, which is `client_weights = uniform`);
               running statistics are averaged, whatever the step of the server (paper: has none)
Elsewhere      FL-bench never stores a client's control, which stays 0; its `local_epoch` means batches. PFLlib reckons
               with the undecayed rate and ignores shortened local epochs. NIID-Bench starts all controls as one random
               network and corrects buffers too; FedTorch applies the server's update twice
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Strength


@register("scaffold")
@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """The correction is a linear term of the loss: its gradient is c - c_k."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    version: ClassVar[int] = 2

    server_lr: Strength = 1.0
    """Step of the server along the mean update (paper: eta_g = 1)."""

    def init_server(self, task: Task) -> Tree:
        """Start with a control of zero."""
        model = task.init()
        return {**model, "control": tree.zeros_like(tree.parameters(model))}

    def init_client(self, task: Task) -> Tree:
        """Start with a control of zero."""
        return {"control": tree.zeros_like(tree.parameters(task.init()))}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with gradients g - c_k + c, then take the mean gradient as the next c_k."""
        start: Tree = {"body": shared["body"], "head": shared["head"]}
        control, mine = shared["control"], private["control"]
        correction = tree.sub(control, mine)

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + tree.dot(tree.parameters(params), correction)

        trained = task.sgd(loss, start, data.batches(task.epochs))
        moved = tree.sub(trained, start)
        steps, rho = data.steps(task.epochs), task.momentum
        weight = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)  # of K gradients in the displacement
        mean_gradient = tree.scale(tree.parameters(moved), -1.0 / (weight.clamp(min=1.0) * task.lr))
        following = tree.map(  # line 12, option II; an empty client keeps what it has
            lambda c_k, c, g: torch.where(steps > 0, c_k - c + g, c_k), mine, control, mean_gradient
        )
        return {**trained, "control": tree.sub(following, mine)}, {"control": following}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step towards the mean model, take the mean of statistics; move the control by the share that took part."""
        mean = {"body": uploads.mean("body"), "head": uploads.mean("head")}
        statistics, arrived = tree.split(mean, tree.is_statistic)
        model = tree.map(lambda new, old: old + self.server_lr * (new - old), arrived, server)
        control = tree.add(server["control"], uploads.sum("control"), 1 / task.num_clients)
        return tree.merge(server, {**tree.merge(model, statistics), "control": control})
