"""OSUDA: FedAvg whose clients held out of training adapt its norm layers to their images, of which no label is known.

Liu, Xing, Yang, El Fakhri, Woo. Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation. MICCAI
2021. https://arxiv.org/abs/2106.12497; extended in https://arxiv.org/abs/2209.07910

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Newcomers      never drawn, the generic model; held out, the same with running statistics that went to the client's and
               weights and biases of norm layers trained for so many epochs, without labels (paper: the target)
Departs        classes of images (paper: of pixels). Statistics of the target are those of all the client's images
               (paper: of a batch), and glide over the epochs (paper: over iterations, in which they are there after
               five). Weights and biases are drawn back by the proximal step of their absolute differences, so that what
               the entropy does not move stays where it was (paper: gradients, which swing about it), and by no decay;
               nothing else is trained. Decay, epochs and learning rate are ours. On a network without running
               statistics nothing is adapted. Of the paper the abstract was read, of the extension a summary: the
               entropy's weights and the terms of the consistency are from there, the discrepancy and the scale of the
               transferability recalled
Elsewhere      no code of the authors is known
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, losses, register, tree
from bench.models.layers import evaluating, is_norm, is_norm_statistic
from bench.ranges import Epochs, Share, Strength


@register("osuda")
@dataclass(frozen=True, kw_only=True)
class Osuda(Algorithm):
    """Means and variances glide to the client's; weights and biases stay near the model's, where channels look alike
    most, and make its answers surer. With `--set unseen=5`; before and after stand beside each other.
    """

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "decay": (0.0, 20.0),
        "eta": (0.0, 1.0),
        "consistency": [0.0, 0.01, 0.1, 1.0],
        "entropy": [0.0, 0.1, 1.0, 10.0],
        "epochs": [1, 5, 10],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "osuda(epochs=0)": "whether any adaptation does anything: the generic model itself",
        "osuda(eta=0, entropy=0)": "whether anything does beyond the client's statistics (AdaBN)",
        "osuda(eta=0, consistency=0)": "whether the glide and the consistency do beyond statistics and entropy (Tent)",
    }

    decay: Strength = 5.0
    """How fast statistics glide: what is left of the model's in the end is e^-decay (ours)."""
    eta: Share = 1.0
    """What there is of the model's statistics at first. 0: the client's, from the beginning."""
    consistency: Strength = 1.0
    """Weight of the absolute differences from the model's weights and biases (paper). 0: nothing holds them."""
    entropy: Strength = 10.0
    """Weight of the entropy of answers, which falls linearly to 0 (from the extension). 0: weights and biases stay."""
    epochs: Epochs = 5
    """Passes over the client's images (ours). 0: nothing is adapted, statistics neither."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def newcomer_adaptation(self, task: Task) -> Adaptation | None:
        """Adapt the body of clients held out of training, whether their labels are known or not."""
        if not self.epochs:
            return None
        return Adaptation(epochs=self.epochs, parts=("body",), curve=(0,), labels=False, by="adapted")

    def adapted(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Adapt a model to a client's images."""
        source, rest = tree.split(model["body"], is_norm_statistic)
        if not source:
            return model
        target = task.statistics_of(model, data)["body"]
        start = tree.split(rest, is_affine)[0]
        held = beside(start, transferability(source, target))
        affine, kept = start, None
        rule = replace(task.optimiser(), weight_decay=0.0)
        # What momentum does to the slope of the entropy, it does to the pull.
        pull = self.consistency * task.lr / (1 - task.momentum)
        for step, batch in enumerate(data.batches(self.epochs, "adapt") if self.entropy else ()):
            progress = (step / data.steps(self.epochs).clamp(min=1)).clamp(max=1)
            seen = tree.merge(model, {"body": self.glided(source, target, progress)})

            def loss(params: Tree, batch: Batch, seen: Tree = seen, progress: Tensor = progress) -> Tensor:
                with evaluating():
                    logits = task.logits(tree.merge(seen, {"body": params}), batch.x)
                return self.entropy * (1 - progress) * losses.mean(entropies(logits), batch)

            _, gradient, _ = task.gradient(loss, affine, batch)
            moved, kept = task.step(rule, affine, gradient, kept, batch)
            affine = tree.where(batch.real, drawn_back(moved, start, held, pull), affine)
        end = self.glided(source, target, data.n.new_ones((), dtype=torch.float32))
        return tree.merge(tree.merge(model, {"body": end}), {"body": affine})

    def glided(self, source: Tree, target: Tree, progress: Tensor) -> Tree:
        """Give statistics on the way from the source's to the target's, at a () progress in 0..1."""
        left = self.eta * torch.exp(-self.decay * progress)
        return tree.map(lambda s, t: (1 - left) * t + left * s, source, target)


def is_affine(path: str) -> bool:
    """Tell whether a leaf is the weight or the bias of a norm layer."""
    return is_norm(path) and path.rpartition("/")[2] in ("weight", "bias")


def entropies(logits: Tensor) -> Tensor:
    """Give the entropy of each answer: (B, C) -> (B,) nats."""
    log = logits.float().log_softmax(1)
    return -(log.exp() * log).sum(1)


def transferability(source: Tree, target: Tree, eps: float = 1e-5) -> dict[str, Tensor]:
    """Say how alike each channel looks in two sets of statistics: (c,) by the path of its layer, 1 on the average over
    all channels of all layers, by 1 / (1 + |difference of mean over standard deviation|).
    """
    ours, theirs = tree.flatten(source), tree.flatten(target)
    layers = [path.removesuffix("/stats/mean") for path in ours if path.endswith("/stats/mean")]

    def standing(leaves: Mapping[str, Tensor], layer: str) -> Tensor:
        return leaves[f"{layer}/stats/mean"] / (leaves[f"{layer}/stats/var"] + eps).sqrt()

    alike = {layer: 1 / (1 + (standing(ours, layer) - standing(theirs, layer)).abs()) for layer in layers}
    mean = torch.cat(list(alike.values())).mean()
    return {layer: each / mean for layer, each in alike.items()}


def beside(affine: Tree, alike: Mapping[str, Tensor]) -> Tree:
    """Give 1 + a of its channel for each weight and bias; those of layers without statistics are held by 1."""
    return tree.map_paths(lambda path, leaf: 1 + alike.get(path.rpartition("/")[0], torch.zeros_like(leaf)), affine)


def drawn_back(params: Tree, start: Tree, held: Tree, pull: float) -> Tree:
    """Draw parameters back to where they started, by pull times how they are held, and no further: the proximal step
    of absolute differences.
    """

    def back(x: Tensor, s: Tensor, h: Tensor) -> Tensor:
        apart = x - s
        return s + apart.sign() * (apart.abs() - pull * h).clamp(min=0)

    return tree.map(back, params, start, held) if pull else params
