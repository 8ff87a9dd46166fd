"""Airbench: the recipe of a record, on the union of all clients' training data. With its setting and network it says
how good a trainer this engine is.

Jordan. 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. 2024. https://arxiv.org/abs/2404.00498 (section 3)

Server keeps   body, head
Client keeps   velocity, slow, steps
Down           body, head
Up             body, head
Newcomers      have the one model like everybody; five epochs of its head
Departs        from federated learning: the data are pooled, nothing is sent, and bytes are not counted. Rates and decay
               are the setting's, of a mean over a batch (code: of a sum, so its rate is 1024 times smaller and its
               decay larger); `--setting airbench` has them. The last batch of an epoch is not dropped, so ten epochs of
               CIFAR-10 are 490 steps (code: 9.9 epochs, 476). Whitening's bias is trained to the end (code: for three
               epochs). The setting's own schedule of the rate has no part in it; its clipping has (code: none)
Elsewhere      the front page of the code's repository is about a later method (Muon, 8 epochs, batch 2000); this one is
               its legacy/airbench94.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, losses, register, tree
from bench.models import is_norm
from bench.ranges import Positive, Share, Steps


@register("airbench")
@dataclass(frozen=True, kw_only=True)
class Airbench(Algorithm):
    """SGD with Nesterov's momentum, biases of norm layers at a larger rate, label smoothing, a triangular schedule and
    Lookahead; six views of each image at the test.
    """

    family: ClassVar[str] = "references"
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"pooled", "sgd"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "bias_scale": (1.0, 256.0),
        "smoothing": [0.0, 0.1, 0.2, 0.3],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "centralised": "whether the recipe is better than plain SGD on the same batches",
        "airbench(lookahead_every=0)": "whether Lookahead does anything",
        "airbench(views=1)": "what the views at the test are worth",
    }

    nesterov: bool = True
    """Whether a step looks ahead along its momentum (paper: yes)."""
    bias_scale: Positive = 64.0
    """Rate of norm layers' biases, over that of all else; what decay takes of them a step is the same (paper: 64)."""
    smoothing: Share = 0.2
    """Of the label, what all classes have alike (paper: 0.2)."""
    warmup: Share = 0.23
    """Share of all steps, in whole ones, over which the rate rises (paper: 0.23)."""
    start: Share = 0.2
    """Rate of the first step, over the setting's (paper: 0.2)."""
    end: Share = 0.07
    """Rate after the last step, over the setting's (paper: 0.07)."""
    lookahead_every: Steps = 5
    """Steps after which the slow model follows, and is gone on from; 0: there is none (paper: 5)."""
    lookahead: Share = 0.95
    """Decay a step of the slow model, times the cube of the share of steps that are done (paper: 0.95)."""
    views: Literal[1, 2, 6] = 6
    """Of each test image: itself, with its mirror image, and both shifted along the diagonal either way (paper: 6)."""

    def init_client(self, task: Task) -> Tree:
        """Start with no velocity, the initial model as the slow one, and no step."""
        model = task.init()
        return {
            "velocity": tree.zeros_like(tree.parameters(model)),
            "slow": model,
            "steps": torch.zeros((), device=task.key.device),
        }

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take the round's steps on the pooled examples; after the very last one the slow model is the result."""
        total = task.rounds * data.steps(task.epochs)
        state: Tree = {**private, "model": {key: shared[key] for key in ("body", "head")}}
        for batch in data.batches(task.epochs):
            state = tree.where(batch.real, self.stepped(task, state, batch, total), state)
        model = state.pop("model")
        if self.lookahead_every:
            model = tree.where(state["steps"] >= total, state["slow"], model)
        return model, state

    def stepped(self, task: Task, state: Tree, batch: Batch, total: Tensor) -> Tree:
        """Take one of `total` steps, and have the slow model follow where it is due."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            return task.criterion(task.model.logits(params["head"], z), z, batch, self.smoothed)

        _, gradient, model = task.gradient(loss, state["model"], batch)
        rate = self.factor(state["steps"], total) * (task.lr if task.initial_lr is None else task.initial_lr)
        moved, velocity = self.descended(task, tree.parameters(model), gradient, state["velocity"], rate)
        model, steps, slow = tree.merge(model, moved), state["steps"] + 1, state["slow"]
        if self.lookahead_every:
            due, follow = steps % self.lookahead_every == 0, 1 - self.kept(steps, total)
            slow = tree.where(due, tree.map(lambda s, w: torch.lerp(s, w, follow), slow, model), slow)
            model = tree.where(due, slow, model)
        return {"velocity": velocity, "slow": slow, "steps": steps, "model": model}

    def smoothed(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy with 1 - smoothing of the label and smoothing / C of every class."""
        alike = losses.mean(-torch.log_softmax(logits.float(), 1).mean(1), batch)
        return (1 - self.smoothing) * losses.cross_entropy(logits, batch) + self.smoothing * alike

    def factor(self, step: Tensor, total: Tensor) -> Tensor:
        """Give the rate of a step, 0..total-1, over the setting's: up in a line, and down in another."""
        peak = (self.warmup * total + 1e-4).floor()  # 28.999999 is 29 that met floating-point arithmetic
        rising = self.start + (1 - self.start) * step / peak.clamp(min=1)
        falling = 1 + (self.end - 1) * ((step - peak) / (total - peak).clamp(min=1)).clamp(max=1)
        return torch.where(step < peak, rising, falling)

    def kept(self, steps: Tensor, total: Tensor) -> Tensor:
        """Give the share of itself that the slow model keeps after so many steps: decay^every · (steps / total)³."""
        return self.lookahead**self.lookahead_every * (steps / total.clamp(min=1)).clamp(max=1) ** 3

    def descended(self, task: Task, params: Tree, gradient: Tree, velocity: Tree, rate: Tensor) -> tuple[Tree, Tree]:
        """Take a step of SGD: the next parameters, and their velocity.

        Biases of norm layers have a rate `bias_scale` times as large, and a decay as much smaller: what a step takes of
        a weight, the product of the two, is the same for all.
        """
        if task.clip is not None:
            gradient = tree.shortened(gradient, task.clip)
        rule, slopes, fast = task.optimiser(), tree.flatten(gradient), tree.flatten(velocity)
        moved = tree.flatten(params)
        for path, w in moved.items():
            scale = self.bias_scale if is_norm(path) and path.endswith("/bias") else 1.0
            slope = slopes[path] + (task.weight_decay / scale * w if rule.decays(w) else 0.0)
            fast[path] = task.momentum * fast[path] + slope
            ahead = slope + task.momentum * fast[path] if self.nesterov else fast[path]
            moved[path] = w - scale * rate * ahead
        return tree.merge(params, tree.unflatten(moved)), tree.merge(velocity, tree.unflatten(fast))

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Average the logits of views: an image and its mirror image count half, those shifted by a pixel, down and to
        the right and up and to the left, with a reflected border, the other half.
        """

        def both(x: Tensor) -> Tensor:
            return (task.logits(model, x) + task.logits(model, x.flip(3))) / 2

        if self.views == 1 or x.ndim != 4 or min(x.shape[2:]) < 2:
            return task.logits(model, x)
        if self.views == 2:
            return both(x)
        height, width = x.shape[2:]
        bordered = F.pad(x, (1, 1, 1, 1), mode="reflect")
        shifted = both(bordered[:, :, :height, :width]) + both(bordered[:, :, 2:, 2:])
        return both(x) / 2 + shifted / 4
