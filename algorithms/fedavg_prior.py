"""FedAvg-Prior: FedAvg, whose head's bias each client shifts by how often it has each class.

Not one paper's; the control that every personalised method has to beat where clients are tested on their own label
frequencies, for nothing personal is trained. By Bayes' rule a classifier of one label distribution scores another by
adding the log of their ratio: Saerens, Latinne, Decaestecker. Adjusting the Outputs of a Classifier to New a Priori
Probabilities. Neural Computation 2002. https://doi.org/10.1162/089976602753284446; in training the same shift is
balanced softmax, https://arxiv.org/abs/2007.10740

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Newcomers      the generic model, shifted like everybody's by the client's own frequencies; nothing is tuned
Departs        the frequencies are counted on the client's training data, not estimated from unlabelled ones
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bench import Algorithm, LocalData, Task, Tree, register

ABSENT = -1e4
"""Shift of a class that the client lacks: no logit makes up for it, and the model stays finite."""


@register("fedavg_prior")
@dataclass(frozen=True, kw_only=True)
class FedAvgPrior(Algorithm):
    """FedAvg's training; the personal model is the global one, shifted by log (client's / global frequency)."""

    family: ClassVar[str] = "references"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {}

    against: Literal["global", "uniform"] = "global"
    """Label frequencies that the global model is taken to have learnt: the true ones of all clients, which the server
    then knows, or all alike.
    """

    @property
    def tier(self) -> str:  # type: ignore[override]  # a field decides what is a constant elsewhere
        """L where the server knows the global frequencies, S otherwise."""
        return "L" if self.against == "global" else "S"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # likewise
        """The global frequencies, where they are asked for."""
        return frozenset({"prior"}) if self.against == "global" else frozenset()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Shift the head's bias; without labelled examples the model is the generic one."""
        counts, head = data.class_counts.float(), shared["head"]
        shift = counts.log() - counts.sum().log()
        if self.against == "global":
            assert task.prior is not None  # it is needed
            shift = shift - task.prior.log()
        shift = torch.where(counts > 0, shift, ABSENT)
        bias = torch.where(counts.sum() > 0, head["bias"] + shift, head["bias"])
        return {"body": shared["body"], "head": {**head, "bias": bias}}

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing: the shift is all that a client held out of training needs."""
        return None
