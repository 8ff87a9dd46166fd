"""DAFOS-Net: FedBN whose clients also play episodes, in which some of their classes stand for unknown ones, and train a
network that tells by distances whether an image is of any known class.

Pal, More, Bhargav, Tamboli, Aggarwal, Banerjee. Domain Adaptive Few-Shot Open-Set Learning. ICCV 2023.
https://arxiv.org/abs/2309.12814

Server keeps   body, head, outlier
Client keeps   body
Down           body, head, outlier
Up             body, head, outlier
Passes         E + episodes * b
Newcomers      never drawn or held out, norm layers of its own, trained under what the server has, as in FedBN
Departs        a client is a domain, and norm layers stay with it. Before episodes come the setting's epochs, for the
               ordinary tests; an episode is a batch of what a client has (paper: 3 known and 3 unknown classes of each
               of two domains), and steps are the setting's (paper: Adam). To the nearest distance of an image the
               network adds what it makes of the three smallest ones, the first and what the next are more (paper: of
               all, in the order of classes), so that names and number of classes do not matter; where there are fewer,
               the last stands for the others. No samples are generated: classes of the client alone stand for unknown
               ones (paper: two generators besides, of near and of far samples). No network tells domains apart, for the
               server must not learn whose image it is, and prototypes of domains are not drawn together, for they would
               have to be sent. Which images make a triple is ours. Classes weigh 1, as cross-entropy
Elsewhere      authors' code counts true negatives as hits, so that chance among four labels is 62.5 %, and compares
               predictions of the target domain with predictions. Its unknown test images are of known classes, its
               norm layers tell domains by the place in a batch, its loss of classes is a negative probability, times
               40, and no gradient reaches its prototypes
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, losses, register, tree
from bench.models import is_norm
from bench.models.layers import apply_linear, linear
from bench.ranges import Count, Steps, Strength

NEAREST = 3
"""Smallest distances that the network sees."""
WIDTHS = (32, 16, 1)
"""Outputs of its layers."""
MARGIN = 0.5
"""By which an image of another class is to lie farther from a prototype (paper)."""
AWAY = 1e4
"""Distance of a prototype that is not there: beyond all others, and its share in a softmax is 0 in float32."""


@register("dafos")
@dataclass(frozen=True, kw_only=True)
class Dafos(Algorithm):
    """Made for the open-set test, `--set open_classes=3 --set unseen=5`; in all others it is a FedBN that sees more."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "episodes": [5, 10, 20],
        "outlier": (0.1, 3.0),
        "triplet": (0.0, 1.0),
    }
    controls: ClassVar[Mapping[str, str]] = {
        "dafos(episodes=0)": "whether episodes do anything: FedBN, which knows unknown classes by the nearest distance",
        "dafos(outlier=0)": "whether the network tells them better than the nearest distance does",
        "dafos(triplet=0)": "whether it helps to draw images to prototypes, away from those of other classes",
    }

    episodes: Steps = 10
    """Of a client in a round, each a batch (ours). 0: it is FedBN."""
    shots: Count = 4
    """Labelled images of a class in an episode, where there are so many and one more (paper: 4 of the source)."""
    outlier: Strength = 0.3
    """Weight of how well unknown images are told (reference: 0.3). 0: the nearest distance tells them."""
    triplet: Strength = 0.1
    """Weight of triples (reference: 0.075 and 0.125 of two domains)."""

    def init_server(self, task: Task) -> Tree:
        """Keep all but the norm layers, and the network, which at first says no more than the nearest distance."""
        model, key = task.init(), task.server_key("outlier")
        sizes = enumerate(zip(WIDTHS, (NEAREST, *WIDTHS), strict=False))
        layers = {str(k): linear(keys.fold(key, k), outputs, inputs) for k, (outputs, inputs) in sizes}
        layers[str(len(layers) - 1)] = tree.map(lambda leaf: leaf.new_zeros(leaf.shape), layers[str(len(layers) - 1)])
        return {"body": tree.split(model["body"], is_norm)[1], "head": model["head"], "outlier": layers}

    def init_client(self, task: Task) -> Tree:
        """Start from the norm layers of the initial model that all algorithms share."""
        return {"body": tree.split(task.init()["body"], is_norm)[0]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the received layers and the client's own, jointly; then body and network in episodes."""
        model = {key: part for key, part in tree.merge(shared, private).items() if key != "outlier"}
        model = task.sgd(task.loss, model, data.batches(task.epochs))
        moving, rule, kept = {"body": model["body"], "outlier": shared["outlier"]}, task.optimiser(), None
        salts = (f"episode {k}" for k in range(self.episodes))
        for batch in (batch for salt in salts for batch in data.batches(steps=1, salt=salt)):
            roles = Roles.of(batch, task.num_classes, self.shots)

            def loss(params: Tree, batch: Batch, roles: Roles = roles) -> Tensor:
                z = task.model.features(params["body"], batch.x)
                return self.played(params["outlier"], z.float(), batch, roles)

            asked = replace(batch, weight=batch.weight * roles.both)
            _, gradient, following = task.gradient(loss, moving, batch)
            following = tree.where(asked.real, following, moving)
            moving, kept = task.step(rule, following, gradient, kept, asked)
        mine, others = tree.split(moving["body"], is_norm)
        return {"body": others, "head": model["head"], "outlier": moving["outlier"]}, {"body": mine}

    def played(self, network: Tree, z: Tensor, batch: Batch, roles: "Roles") -> Tensor:
        """Give the loss of an episode: what class known images are of, whether they are known, and triples.

        Args:
            network: Of distances.
            z: (B, d) float32, features of a batch.
            batch: The batch.
            roles: Whom each image of it plays.
        """
        apart = distances(z, prototypes(z, roles.shot))
        classes = losses.cross_entropy(-apart.masked_fill(~roles.known, AWAY), replace(batch, weight=roles.query))
        found = surprise(network, apart, roles.known)
        told = share(F.softplus(found), roles.query) + share(F.softplus(-found), roles.strange)
        own, rivals = apart.gather(1, batch.y[:, None])[:, 0], apart.masked_fill(roles.strange[:, None] == 0, AWAY)
        triples = share((own - rivals.amin(0)[batch.y] + MARGIN).relu(), roles.query)
        return classes + self.outlier * told / 2 + self.triplet * triples

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no norm layers are shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest layers with the client's own norm layers, and beside them the network."""
        return tree.merge(shared, private)

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Train norm layers for 100 steps, so that nothing is left of the initial running statistics."""
        model = {key: shared[key] for key in ("body", "head")}

        def loss(norms: Tree, batch: Batch) -> Tensor:
            return task.loss(tree.merge(model, norms), batch)

        norms = self.init_client(task)
        return task.sgd(loss, norms, data.batches(steps=100)) if norms["body"] else norms

    def open_set(self, task: Task, model: Tree, z: Tensor, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take an image for the class of the nearest prototype, as surely as the network says."""
        if not (self.episodes and self.outlier):
            return super().open_set(task, model, z, support, labels)
        apart = distances(z, prototypes(support, F.one_hot(labels).float()))
        return apart.argmin(1), -surprise(model["outlier"], apart, torch.ones_like(apart[0], dtype=torch.bool))


@dataclass(frozen=True)
class Roles:
    """Whom each image of a batch plays in an episode."""

    known: Tensor
    """(C,) bool, half of the classes of which there is more than one image, or one more."""
    shot: Tensor
    """(B, C) float32, 1 in the column of its class for a labelled image of a known one."""
    query: Tensor
    """(B,) float32, 1 for another image of a known class."""
    strange: Tensor
    """(B,) float32, 1 for an image of a class that plays an unknown one."""

    @classmethod
    def of(cls, batch: Batch, num_classes: int, shots: int) -> "Roles":
        """Cast an episode: a function of the batch's randomness and labels. Of a known class the first images are its
        shots, and at least one is not.
        """
        images = losses.one_hot(batch.y, num_classes) * batch.weight[:, None]
        several = images.sum(0) > 1
        drawn = keys.permutation(keys.fold(batch.key, "known"), num_classes)
        turn = torch.zeros_like(drawn).scatter(0, drawn, several[drawn].long().cumsum(0))  # 1.. of those with several
        known = several & (2 * turn <= several.sum() + 1)
        mine = images * known
        shot = mine * (mine.cumsum(0) <= (mine.sum(0) - 1).clamp(max=shots))
        return cls(known, shot, (mine - shot).sum(1), (images * ~known).sum(1))

    @property
    def both(self) -> Tensor:
        """1 where there are images of known and of unknown classes, else 0: () float32."""
        return (self.query.amax() * self.strange.amax()).to(self.query)


def prototypes(z: Tensor, shot: Tensor) -> Tensor:
    """Average the features of each class's shots: (B, d) and (B, C) of ones and zeros to (C, d); zeros without any."""
    return shot.T @ z / shot.sum(0).clamp(min=1)[:, None]


def distances(z: Tensor, means: Tensor) -> Tensor:
    """Give mean squared differences: (B, d) and (C, d) to (B, C) float32."""
    squares = z.square().sum(1)[:, None] + means.square().sum(1) - 2 * z @ means.T
    return (squares / z.shape[1]).clamp(min=0)


def surprise(network: Tree, apart: Tensor, known: Tensor) -> Tensor:
    """Score how little an image seems to be of any known class, by its distances alone: (B,), a logit. It is the
    smallest one, and what the network makes of them all.

    Args:
        network: Linear layers by number.
        apart: (B, C), of prototypes.
        known: (C,) bool, which of these there are.
    """
    ascending = (apart.masked_fill(~known, AWAY).sort(1).values + 1e-6).sqrt()
    places = torch.arange(NEAREST, device=apart.device)
    least = ascending[:, torch.minimum(places, (known.sum() - 1).clamp(min=0))]
    first, *others = network.values()
    x = apply_linear(first, torch.cat([least[:, :1], least[:, 1:] - least[:, :-1]], 1))
    for layer in others:
        x = apply_linear(layer, x.relu())
    return least[:, 0] + x[:, 0].float()


def share(values: Tensor, of: Tensor) -> Tensor:
    """Average (B,) values over those of which `of`, (B,), is 1: (); 0 where it never is."""
    return (values * of).sum() / of.sum().clamp(min=1)
