"""FAT: clients attack each batch by the model as it is, and train on what comes of it.

Zizzo, Rawat, Sinn, Buesser. FAT: Federated Adversarial Training. 2020. https://arxiv.org/abs/2012.01791
Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan. Theoretically Principled Trade-off between Robustness and Accuracy. ICML 2019.
https://arxiv.org/abs/1901.08573 (eq. 5: objective = trades)
Chen, Liu, Ma, Lyu. CalFAT: Calibrated Federated Adversarial Training with Label Skewness. NeurIPS 2022.
https://arxiv.org/abs/2205.14926 (calibration, scale)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        epsilon and the step are the setting's, of its attack on tests, so that both agree; the attack is on
               cross-entropy of calibrated logits (CalFAT's code: on the divergence from what images as they are give),
               and starts anywhere in the ball. Every image is attacked (FAT: a share of them); clients are averaged
               with the setting's weights (CalFAT's code: uniformly). A model that is attacked is in evaluation mode.
               Running statistics of batch norm move with attacked images; with trades, where a step looks at both,
               with images as they are (code: with both, one after the other)
Elsewhere      CalFAT's code has the decay of CIFAR-10 on CIFAR-100 too, by a test of substrings. Where an attack runs
               in training mode, as in much public code, each of its steps moves the running statistics, and batch norm
               lets images of a batch hang together
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, losses, register
from bench.attacks import attacked, divergences, frozen
from bench.ranges import Positive, Steps, Strength


@register("fat")
@dataclass(frozen=True, kw_only=True)
class FAT(Algorithm):
    """FedAvg but for the images of a step, for which an epoch costs `steps` more.

    A loss part stands in the place of cross-entropy in the loss, not in the attack. The sign of a slope makes a pixel
    of what is rounding elsewhere, so clients are not stacked.
    """

    family: ClassVar[str] = "generic"
    stackable: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "objective": ["at", "trades"],
        "beta": (1.0, 12.0),
        "calibration": [0.0, 0.1, 1.0],
        "scale": [1.0, 10.0],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fat(steps=0)": "FedAvg bit for bit: what robustness costs, on the tail too",
        "fat(calibration=0.1, scale=10)": "whether it matters that a client knows how often each class occurs there",
    }

    objective: Literal["at", "trades"] = "at"
    """Cross-entropy of attacked images (Madry et al. 2018), or of images as they are, and `beta` times how far attacked
    ones are from that."""
    steps: Steps = 10
    """Of the attack on each batch (TRADES, CalFAT: 10). 0: there is none, and it is FedAvg."""
    beta: Strength = 6.0
    """Of trades (TRADES: 6). With 0 it is FedAvg."""
    calibration: Strength = 0.0
    """Times the logarithm of the client's class counts is added to logits, in attack and loss (CalFAT's code: 0.1)."""
    scale: Positive = 1.0
    """Of these logits in cross-entropy, not in the attack (CalFAT's code: 10)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train on attacked batches."""
        shift = self.calibration * (data.class_counts + 1e-7).log()

        def loss(params: Tree, batch: Batch) -> Tensor:
            return self.attacked_loss(task, params, batch, shift)

        return task.sgd(loss, shared, data.batches(task.epochs)), private

    def attacked_loss(self, task: Task, params: Tree, batch: Batch, shift: Tensor) -> Tensor:
        """Attack a batch by the model as it is, and give the loss: (), where (C,) shifts are added to logits."""
        hard = self.attacked(task, frozen(params), batch, shift)
        if self.objective == "at":
            return self.fitted(task, params, batch, hard, shift)[0]
        if not (self.beta and self.steps):
            return self.fitted(task, params, batch, batch.x, shift)[0]
        under = task.logits(params, hard) + shift
        fit, plain = self.fitted(task, params, batch, batch.x, shift)
        return fit + self.beta * losses.mean(divergences(plain, under), batch)

    def fitted(self, task: Task, params: Tree, batch: Batch, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Give the cross-entropy of images with a batch's labels, (), and their calibrated logits, (B, C)."""

        def scaled(logits: Tensor, batch: Batch) -> Tensor:
            return losses.cross_entropy(self.scale * logits, batch)

        z = task.model.features(params["body"], x)
        logits = task.model.logits(params["head"], z) + shift
        return task.criterion(logits, z, batch, scaled), logits

    def attacked(self, task: Task, model: Tree, batch: Batch, shift: Tensor) -> Tensor:
        """Give the images of a batch after an attack on a model that stands still: of the form of `batch.x`."""
        if self.objective == "at":
            return attacked(
                task.ball, lambda x: losses.cross_entropy(task.logits(model, x) + shift, batch), batch, self.steps
            )
        if not (self.beta and self.steps):
            return batch.x
        with evaluating():
            plain = task.logits(model, batch.x) + shift
        return attacked(
            task.ball,
            lambda x: losses.mean(divergences(plain, task.logits(model, x) + shift), batch),
            batch, self.steps, beside=True,
        )  # fmt: skip
