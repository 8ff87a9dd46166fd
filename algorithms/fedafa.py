"""FedAFA: each client tunes last block and head on features of rare classes, which are made by attacks on others.

Lu, Qian, Huang, Wang. Personalized Federated Learning on Long-Tailed Data via Adversarial Feature Augmentation. ICASSP
2023. https://arxiv.org/abs/2303.15168

Server keeps   body, head
Client keeps   own, done
Down           body, head
Up             body, head
Passes         E; last E + epochs
Newcomers      never drawn, its model of the epilogue, in which all take part; held out, the generic model with five
               epochs of the head
Departs        seeds come from larger classes (release: rather from smaller ones; `seeds`), and a batch without any has
               nothing generated (release: it draws until it has, without end where classes are even). A seed's own
               largest and mid value bound it and centre its noise, whose norm is bounded channel by channel (release:
               those of all seeds of the batch). What stands still is in evaluation mode. A body of one block stands
               still: the head is trained on generated features. The release fails at its first generated feature
Elsewhere      authors' code lacks the `main.py` that its README calls, and a checkpoint. README and code differ in the
               learning rate (0.01 and 0.005). Personal models are tested on the classes that a client holds alone, and
               averaged by class
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Block, Exchange, LocalData, Task, Tree, evaluating, keys, register, tree
from bench.ranges import Epochs, Share, Steps, Strength


@register("fedafa")
@dataclass(frozen=True, kw_only=True)
class FedAFA(Algorithm):
    """FedAvg; after the last round all clients personalise. Without epochs its personal models are FedAvg's too."""

    family: ClassVar[str] = "fedlt"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"generate": (0.1, 1.0), "epochs": (1, 10)}

    epochs: Epochs = 1
    """Passes over class-balanced draws (release: 1)."""
    generate: Share = 0.6
    """Weight of the loss with generated features, beside the plain one (release: c = 0.6)."""
    accept: Share = 0.5
    """Least probability that the global model gives a generated feature's class (release: p = 0.5)."""
    attack_steps: Steps = 10
    """Steps of an attack (release: 10)."""
    step_size: Strength = 0.5
    """Their length (release: 0.5)."""
    seeds: Literal["majority", "release"] = "majority"
    """What makes an example of the batch a likely seed: how much larger its class is, or how little (release)."""

    def init_client(self, task: Task) -> Tree:
        """Have no block and head of one's own yet."""
        return {"own": self.moving(task, task.init()), "done": task.key.new_zeros((), dtype=torch.float32)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Let all clients personalise after the last round."""
        epilogue = (Exchange("personalise", everyone=True),) if task.round == task.rounds - 1 else ()
        return (Exchange(), *epilogue)

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def moving(self, task: Task, model: Tree) -> Tree:
        """Give what is tuned: the head, and the last of several blocks."""
        names = [key for block in task.model.blocks[1:][-1:] for key in block.keys]
        return {"body": {key: model["body"][key] for key in names}, "head": model["head"]}

    def personalise(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Tune on batches in which features of rare classes are generated, and on the same without."""
        still, last = task.model.blocks[:1] + task.model.blocks[1:-1], task.model.blocks[1:][-1:]

        def loss(own: Tree, batch: Batch) -> Tensor:
            with evaluating():
                plain = through(still, shared["body"], batch.x).float()
                made, accepted = self.generated(task, shared, plain, batch, data.class_counts)

            def taught(f: Tensor) -> Tensor:
                z = through(last, own["body"], f)
                return task.criterion(task.model.logits(own["head"], z), z, batch)

            mixed = torch.where(accepted[:, None], made, plain.flatten(1)).reshape(plain.shape)
            return self.generate * taught(mixed) + (1 - self.generate) * taught(plain)

        balanced = (1 / data.class_counts.clamp(min=1))[data.y]
        batches = data.batches(self.epochs, weights=balanced, views=1)  # seeds are drawn by their places in a batch
        own = task.sgd(loss, self.moving(task, shared), batches)
        return {}, {"own": own, "done": torch.ones_like(private["done"])}

    def generated(self, task: Task, model: Tree, f: Tensor, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Attack seeds until the model takes them for the batch's labels.

        Returns:
            Features, (B, n) of `f` flat, and which are to be used, (B,) bool: likelier the rarer the label.
        """
        size, most = counts[batch.y].float(), counts.max().clamp(min=1)
        excess = (size - size[:, None]).clamp(min=0) / most  # of each example's class over that of each label
        likely = (excess if self.seeds == "majority" else 1 - excess) * batch.weight
        draws = keys.uniform_rows(keys.fold(batch.keys, "seeds"), 1 + len(size))
        wanted = (draws[:, 0] < 1 - size / most) & (likely.amax(1) > 0)
        race = -(-draws[:, 1:]).log1p().clamp(max=-1e-12)  # exponential draws, of which the first by weight wins
        seeds = f.flatten(1)[(likely / race).argmax(1)]
        top, least = seeds.amax(1, keepdim=True), seeds.amin(1, keepdim=True)
        noise = keys.uniform_rows(keys.fold(batch.keys, "noise"), seeds.shape[1]) - (top + least) / 2
        channels = noise.reshape(*f.shape[:2], -1)
        noise = (channels / channels.norm(dim=2, keepdim=True).clamp(min=1)).reshape(seeds.shape)

        def entropies(made: Tensor) -> Tensor:
            z = through(task.model.blocks[1:][-1:], model["body"], made.reshape(f.shape))
            return F.cross_entropy(task.model.logits(model["head"], z).float(), batch.y, reduction="none")

        made = (seeds + noise).clamp(min=0).minimum(top)
        for _ in range(self.attack_steps):
            slope = torch.func.grad(lambda made: entropies(made).sum())(made)
            made = (made - self.step_size * F.normalize(slope, eps=1e-10)).clamp(min=0).minimum(top)
        return made, wanted & ((-entropies(made)).exp() >= self.accept)

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own block and head on the received rest; the received model before there are such."""
        model = {"body": shared["body"], "head": shared["head"]}
        return tree.where(private["done"] > 0, tree.merge(model, private["own"]), model)


def through(blocks: tuple[Block, ...], body: Tree, x: Tensor) -> Tensor:
    """Run some blocks one after the other: (B, ...) -> (B, ...)."""
    for block in blocks:
        x = block.run(body, x)
    return x
