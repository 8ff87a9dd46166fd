"""FEDIC: the server calibrates the ensemble of the clients' models on images of its own, and distils it into one.

Shang, Lu, Cheung, Wang. FEDIC: Federated Learning on Non-IID and Long-Tailed Data via Calibrated Distillation.
ICME 2022. https://arxiv.org/abs/2205.00172

Server keeps   body, head, calibrator
Client keeps   nothing
Down           body, head
Up             body, head
Departs        the ensemble teaches on the server's labelled images, in the batches that teach by labels (paper: on
               unlabelled images, in batches of 128); moments of Adam start at zero in each round (reference: they
               survive, though models are new); the gate starts half open (reference: at random)
Elsewhere      authors' code has 10 classes and 8 clients hard-coded, and takes the server's 100 images of each class
               away before it cuts the tail: 12,156 training images of CIFAR-10 at factor 100, not 12,406. The main file
               of hwang52/FedLC, by its name another method, is byte-identical to it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, register, tree
from bench.losses import cross_entropy, mean
from bench.optim import Adam
from bench.ranges import Count, Positive, Share, Steps, Strength
from bench.task import Loss


@register("fedic")
@dataclass(frozen=True, kw_only=True)
class FedIC(Algorithm):
    """Clients do what FedAvg's do; the server trains a tuned model, a calibrator, and the student that is sent."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"auxiliary"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"distil": (0.1, 0.9), "lr": (1e-4, 1e-2)}

    steps: Steps = 100
    """Steps of each of the three trainings in each round (reference: 100)."""
    batch_size: Count = 20
    """Images of a step at the server (reference: 20)."""
    lr: Positive = 1e-3
    """Learning rate of Adam at the server (reference: 0.001)."""
    weight_decay: Strength = 2e-4
    """Of both models, as a part of the gradient (reference: 0.0002)."""
    distil: Share = 0.5
    """Share of the ensemble in the student's loss (reference: 0.5); 0 is FedAvg tuned on the same images."""
    temperature: Positive = 2.0
    """Divides the logits of teacher and student (reference: 2)."""

    def init_server(self, task: Task) -> Tree:
        """Start with a calibrator that leaves classes as they are, and a gate that is half open."""
        classes, zeros = task.num_classes, partial(task.key.new_zeros, dtype=torch.float32)
        calibrator = {
            "clients": {"weight": zeros(classes) + 1, "bias": zeros(())},
            "classes": {"weight": zeros(classes) + 1, "bias": zeros(classes)},
            "gate": {"weight": zeros(task.model.feature_size), "bias": zeros(())},
        }
        return {**task.init(), "calibrator": calibrator}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the student; the calibrator stays at the server."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Tune the average, calibrate the ensemble beside it, and distil both into the average."""
        sent = self.broadcast(task, server)
        average, models = tree.merge(sent, uploads.mean()), [tree.merge(sent, upload) for upload in uploads.trees]
        tuned = self._train(task, task.loss, average, "tune", self.weight_decay)

        def teacher(calibrator: Tree, x: Tensor) -> Tensor:
            with evaluating():
                features = [task.model.features(each["body"], x) for each in models]
                logits = [task.model.logits(each["head"], z) for each, z in zip(models, features, strict=True)]
                return calibrated(calibrator, torch.stack(features), torch.stack(logits), task.logits(tuned, x))

        calibrator = self._train(
            task, lambda c, batch: cross_entropy(teacher(c, batch.x), batch), server["calibrator"], "calibrate", 0.0
        )

        def lesson(student: Tree, batch: Batch) -> Tensor:
            logits = task.logits(student, batch.x).float()
            wanted, said = ((z / self.temperature).log_softmax(1) for z in (teacher(calibrator, batch.x), logits))
            apart = mean((wanted.exp() * (wanted - said)).sum(1), batch)
            return self.distil * apart + (1 - self.distil) * cross_entropy(logits, batch)

        return {**self._train(task, lesson, average, "distil", self.weight_decay), "calibrator": calibrator}

    def _train(self, task: Task, loss: Loss, params: Tree, salt: str, decay: float) -> Tree:
        """Take the steps of one training on the server's images."""
        assert task.auxiliary is not None
        batches = task.auxiliary.batches(steps=self.steps, salt=salt, batch_size=self.batch_size)
        return task.train(
            Adam(self.lr), loss, params, batches, edit=lambda g, w, _: tree.add(g, tree.parameters(w), decay)
        )[0]


def calibrated(calibrator: Tree, features: Tensor, logits: Tensor, tuned: Tensor) -> Tensor:
    """Weigh the clients, rescale the classes, and let the gate mix the ensemble with the tuned model, image by image:
    (K, B, d) features and (K, B, C) logits of the clients, (B, C) tuned logits -> (B, C).
    """
    clients, classes, gate = (calibrator[key] for key in ("clients", "classes", "gate"))
    trust = torch.sigmoid((logits.float() * clients["weight"]).sum(2, keepdim=True) + clients["bias"])
    ensemble = classes["weight"] * (trust * logits).sum(0) / trust.sum(0) + classes["bias"]
    share = torch.sigmoid((features.float().mean(0) * gate["weight"]).sum(1, keepdim=True) + gate["bias"])
    return torch.lerp(tuned.float(), ensemble, share)
