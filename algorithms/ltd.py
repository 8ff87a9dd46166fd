"""LTD: a teacher that the federation trained first softens the labels on which clients then train against attacks.

Chen, Lee. LTD: Low Temperature Distillation for Robust Adversarial Training. 2021. https://arxiv.org/abs/2111.02331

Server keeps   body, head, teacher
Client keeps   nothing
Down           body, head, teacher
Up             body, head, teacher
Departs        a federation trains the teacher, by FedAvg on images as they are, in the first rounds (paper: a network
               trained before, in one place), and it is the run's network. The temperature is recalled and was not
               checked; the student's is 1 (paper: fixed, of a value that was not checked). A divergence may be added as
               in TRADES (paper: combined with that and others, by weights that were not checked). Epsilon and the step
               are the setting's, of its attack on tests; the attack starts anywhere in the ball, on a student in
               evaluation mode. Running statistics of batch norm move with attacked images; with beta, where a step
               looks at both, with images as they are. Down goes all in each round, for clients keep nothing; no byte
               of what stands still goes up. With a personal teacher, whoever is first drawn when teachers stand still
               is taught by a head as it was drawn
Elsewhere      the authors' repository has results and no code. Where a student's logits are divided by a temperature in
               training alone, its slopes are small in a test, and weak attacks are misled
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, evaluating, losses, register, tree
from bench.attacks import attacked, divergences, frozen
from bench.ranges import Positive, Share, Steps, Strength


@register("ltd")
@dataclass(frozen=True, kw_only=True)
class LTD(Algorithm):
    """First FedAvg of the teacher, then adversarial training of the student, by what the teacher makes of images as
    they are. The temperature is in the labels alone: student, attack and test have none.

    A loss part stands in the place of both cross-entropies, not in the attack. Clients are not stacked, as of FAT: the
    sign of a slope makes a pixel of what is rounding elsewhere.
    """

    family: ClassVar[str] = "generic"
    stackable: ClassVar[bool] = False
    own_loss: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "temperature": (0.5, 10.0),
        "teacher_rounds": (0.2, 0.6),
        "beta": [0.0, 1.0, 6.0],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fat": "whether softened labels are better than hard ones, in as many rounds",
        "ltd(steps=0)": "what distilling does without an attack",
        "ltd(temperature=1)": "whether it matters how soft labels are",
    }

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("channel", "aggregation"),
        "in the first rounds a teacher travels, and no body or head of the model that is tested",
    )

    temperature: Positive = 5.0
    """That the teacher's logits are divided by (recalled of the paper's CIFAR-10, not checked: 5)."""
    steps: Steps = 10
    """Of the attack on each batch (ours). 0: there is none."""
    beta: Strength = 0.0
    """Times the divergence of attacked images from images as they are is added (ours: not at all)."""
    teacher_rounds: Share = 0.4
    """Share of the rounds in which the teacher trains, and nothing else (ours)."""
    personal_teacher: bool = False
    """Whether the teacher's head is each client's own, kept there, so that soft labels follow the client (ours)."""

    def begins(self, task: Task) -> int:
        """Give the round in which the student begins to train, and the teacher stands still."""
        return math.ceil(self.teacher_rounds * task.rounds - 1e-9)

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Name the phase: a client of the second one computes many times as much."""
        return (Exchange(phase="teacher" if task.round < self.begins(task) else "student"),)

    def init_server(self, task: Task) -> Tree:
        """Start student and teacher from the initial model."""
        model, teacher = task.init(), task.init()
        return {**model, "teacher": {"body": teacher["body"]} if self.personal_teacher else teacher}

    def init_client(self, task: Task) -> Tree:
        """Keep nothing, or the teacher's head."""
        return {"teacher": {"head": task.init()["head"]}} if self.personal_teacher else {}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the teacher on images as they are, or the student by a teacher that stands still."""
        teacher, student = self.teacher(shared, private), {key: shared[key] for key in ("body", "head")}
        if task.round < self.begins(task):
            trained = task.sgd(task.loss, teacher, data.batches(task.epochs))
            kept = {"teacher": {"head": trained["head"]}} if self.personal_teacher else private
            return {"body": {}, "head": {}, "teacher": {key: trained[key] for key in shared["teacher"]}}, kept

        def loss(params: Tree, batch: Batch) -> Tensor:
            return self.distilled(task, params, batch, self.softened(task, teacher, batch.x))

        return {**task.sgd(loss, student, data.batches(task.epochs)), "teacher": {}}, private

    def teacher(self, shared: Tree, private: Tree) -> Tree:
        """Give a client's teacher: a body and a head, of which the head may be its own."""
        return tree.merge(shared["teacher"], private.get("teacher", {}))

    def softened(self, task: Task, teacher: Tree, x: Tensor) -> Tensor:
        """Give a teacher's soft labels of (B, channels, height, width) images: (B, C) float32, rows of sum 1."""
        with evaluating():
            return (task.logits(frozen(teacher), x).float() / self.temperature).softmax(1)

    def distilled(self, task: Task, params: Tree, batch: Batch, soft: Tensor) -> Tensor:
        """Attack a batch, and give the cross-entropy of (B, C) soft labels with what the student makes of it: ()."""
        hard = self.attacked(task, frozen(params), batch, soft)
        z = task.model.features(params["body"], hard)
        under = task.model.logits(params["head"], z)
        fit = task.criterion(under, z, batch, partial(soft_entropy, soft))
        if not (self.beta and self.steps):
            return fit
        return fit + self.beta * losses.mean(divergences(task.logits(params, batch.x), under), batch)

    def attacked(self, task: Task, model: Tree, batch: Batch, soft: Tensor) -> Tensor:
        """Give the images of a batch after an attack on a student that stands still: of the form of `batch.x`."""
        return attacked(task.ball, lambda x: soft_entropy(soft, task.logits(model, x), batch), batch, self.steps)

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Report the teacher beside, the accurate and fragile end, where it is one for all."""
        return {} if self.personal_teacher else {"teacher": server["teacher"]}

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Report each client's teacher beside, where it has one of its own."""
        return {"teacher": self.teacher(shared, private)} if self.personal_teacher else {}


def soft_entropy(soft: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """Give the mean cross-entropy of (B, C) soft labels with (B, C) logits: ()."""
    return losses.mean(-(soft * logits.float().log_softmax(1)).sum(1), batch)
