"""Class mask: classes that a client has no example of leave the prediction of its model.

Not one paper's; FedLoGe, whose personal models are tested so, gains a part of its lead by it: Xiao, Chen, Liu, Feng,
Wu, Liu, Zhou, Yang, Liu. ICLR 2024. https://arxiv.org/abs/2401.08977

Kind           correction
Learns         nothing beyond updates
Departs        absent is what the client cannot train on (FedLoGe's code: what its test lacks); a client without
               examples, or whose labels nobody knows, keeps all classes, and so does the generic model
Elsewhere      FedLoGe's code masks its own method, while in the logs of FedAvg, FedProx, Ditto, Ratio Loss and FedETF
               that line is commented out. It writes -1e10 into rows of the head, which works only for features that are
               not negative. The README's loop overwrites the shared head, client after client
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import Correction, Task, Tree, register

_FAR = 1e9  # no logit gets there, and unlike infinity it stays a number


@register("class_mask")
@dataclass(frozen=True, kw_only=True)
class ClassMask(Correction):
    """By the bias of the head; what separates FedAvg with it from FedAvg is no training."""

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Lower the bias of absent classes."""
        if counts is None:
            return None
        absent = (counts == 0) & (counts.sum() > 0)
        return {"head": {**model["head"], "bias": model["head"]["bias"] - torch.where(absent, _FAR, 0.0)}}
