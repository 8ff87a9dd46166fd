"""FML: each client has a model of its own beside the one that travels, and the two learn from each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu. Federated Mutual Learning. 2020. https://arxiv.org/abs/2006.16765

Server keeps   body, head
Client keeps   body, head
Down           body, head
Up             body, head
Newcomers      the received model, never drawn or held out, the latter with five epochs of the head; when it is first
               drawn its own model starts from the initial one
Departs        all clients have one architecture, and start from one model; models that travel are averaged with the
               setting's weights, as for every algorithm here (paper: uniformly)
Elsewhere      HtFLlib's weights of cross-entropy are both 1, so nothing is distilled (PFLlib: 1 and 0). Both libraries
               leave targets attached, so each loss also trains the other model, and `KLDivLoss()` divides by the number
               of classes too, which makes that term so many times too weak
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.losses import mean
from bench.ranges import Share


@register("fml")
@dataclass(frozen=True, kw_only=True)
class FML(Algorithm):
    """In each step either is taught by what the other says of the same batch, before the step.

    Two that start as one have nothing to say to each other, and labels have half their weight: at one learning rate it
    is slower than Local and FedAvg, at twice that rate it is not.
    """

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"learn": (0.0, 0.9), "teach": (0.0, 0.9)}
    controls: ClassVar[Mapping[str, str]] = {
        "fml(learn=0)": "Local, in its matched budget, is then the own model: what the other teaches it",
        "fml(teach=0)": "FedAvg is then what travels: what the own models teach it",
    }

    learn: Share = 0.5
    """Share of what the other model says in the own one's loss, the rest is cross-entropy's (paper: 1 - alpha)."""
    teach: Share = 0.5
    """Share of what the own model says in the other one's loss (paper: 1 - beta)."""

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train both models on the same batches, as if each were alone with what the other says."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = {name: task.model.features(model["body"], batch.x) for name, model in params.items()}
            logits = {name: task.model.logits(params[name]["head"], z[name]) for name in params}
            total = batch.weight.new_zeros(())
            for name, other, share in (("own", "travelling", self.learn), ("travelling", "own", self.teach)):
                entropy = task.criterion(logits[name], z[name], batch)
                total = total + (1 - share) * entropy + share * mean(divergence(logits[other], logits[name]), batch)
            return total

        both = {"own": private, "travelling": shared}
        model = task.sgd(loss, both, data.batches(task.epochs), clip_apart=("own", "travelling"))
        return model["travelling"], model["own"]

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Take the received model: there is no own one yet."""
        return {"body": shared["body"], "head": shared["head"]}


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Give each row's KL divergence from a teacher's softmax, which has no gradient: (B, C), (B, C) -> (B,)."""
    wanted, said = teacher.detach().float().log_softmax(1), logits.float().log_softmax(1)
    return (wanted.exp() * (wanted - said)).sum(1)
