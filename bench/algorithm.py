"""What an algorithm plug-in is: a server's half, a client's half, and nothing that remembers by itself.

An algorithm is a frozen dataclass whose fields are what its paper adds over FedAvg. Its methods are pure
functions of trees (nested dictionaries of tensors), written for one client; the engine runs them over a
cohort, one by one or stacked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import tree
from bench.data import LocalData, Uploads
from bench.part import Part
from bench.ranges import Ranged
from bench.task import Task
from bench.tree import Tree


@dataclass(frozen=True)
class Exchange:
    """One trip from the server to clients and back, within a round."""

    client: str = "local_update"
    """Method run at each client: (task, shared, private, data) -> (upload, private)."""
    server: str = "aggregate"
    """Method that takes the uploads: (task, server, uploads) -> server."""
    everyone: bool = False
    """Whether all training clients take part instead of the round's cohort."""
    cohort: str | None = None
    """Method that chooses who takes part instead: (task, server, drawn) -> client ids, of which () means no trip;
    `drawn` are those of the round's cohort, ascending."""
    broadcast: str = "broadcast"
    """Method that chooses what is sent to all alike: (task, server) -> Tree."""
    phase: str = ""
    """Which of several it is, where clients do otherwise under one name in other rounds, such as train fewer layers:
    what they compute is counted anew for each."""
    aside: bool = False
    """Whether parts ask it of clients besides (`bench.protocol.composed`): these are sent nothing else, and keep
    nothing of it. No method has such."""


@dataclass(frozen=True)
class Adaptation:
    """One stage of how a personal model is tuned on the client's training data before it is tested, as data.

    Every client takes the same path, whether it is drawn in every round or never; those held out of training may take
    another (`newcomer_adaptation`). A stage starts with momentum zero. Norm layers of what does not move are in
    evaluation mode, and keep their running statistics.
    """

    epochs: int = 0
    """Passes over the client's examples."""
    steps: int | None = None
    """Instead of epochs: so many batches, for a client of any size; ≥ 1."""
    parts: tuple[str, ...] = ("body", "head")
    """Keys of the model that move; the others are fixed. `head` is whatever is not the body where no key is called so.
    """
    curve: tuple[int, ...] = (0, 1, 5, 10)
    """Epochs after which the model is reported besides, as far as they lie below the budget; 0 is the model before
    adaptation. Of several stages the first one's counts, in epochs over all; stages of steps are reported at their end.
    """
    lr_factor: float = 1.0
    """Learning rate, as a multiple of the setting's, which no schedule lowers."""
    lr: float | None = None
    """Instead of a multiple: the learning rate itself."""
    loss: str | None = None
    """Name of a method to be minimised, (task, model, data, batch) -> (); None: cross-entropy of the algorithm's own
    `predict`."""
    labels: bool = True
    """False: what the loss sees has no labels; y is -1 and class counts are 0."""
    by: str | None = None
    """Name of a method that does the stage itself, by steps of its own: (task, model, data) -> model, of the same keys,
    `task.lr` being the stage's learning rate. `epochs` then says how often it goes over the examples with a gradient,
    and of the curve 0 alone counts; what moves is the method's choice, and norm layers move as in training."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value, least = getattr(self, name), 1 if name == "steps" else 0
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: a stage has at least {least}")
        if self.epochs and self.steps is not None:
            raise ValueError(f"epochs = {self.epochs} and steps = {self.steps}: a stage has one of them; leave one out")
        if self.lr is not None and self.lr_factor != 1.0:
            raise ValueError(f"lr_factor = {self.lr_factor} and lr = {self.lr}: a stage has one of them; leave one out")
        if self.by is not None and (self.loss is not None or self.steps is not None):
            raise ValueError(f"by = {self.by!r}: what the method does is its own; leave loss and steps out")
        if not self.labels and self.loss is None and self.by is None:
            raise ValueError("labels = False: cross-entropy needs labels; name a loss of your own that does not")

    def __str__(self) -> str:
        """Say in words what is done: `5 epochs of body and head at 1 × lr`."""
        amount, unit = (self.epochs, "epoch") if self.steps is None else (self.steps, "step")
        rate = f"{self.lr_factor:g} × lr" if self.lr is None else f"lr {self.lr:g}"
        own = self.loss if self.by is None else self.by
        how = "" if own is None else f" by {own}"
        known = "" if self.labels else " without labels"
        return f"{amount} {unit}{'s' * (amount != 1)} of {' and '.join(self.parts)} at {rate}{how}{known}"


Stages: TypeAlias = Adaptation | tuple[Adaptation, ...] | None
"""One stage, several in order, or none."""

HEAD_EPOCHS = Adaptation(epochs=5, parts=("head",), curve=())
"""What clients held out of training do where an algorithm says nothing of its own."""


def stages(adaptation: Stages) -> tuple[Adaptation, ...]:
    """Give the stages of an adaptation, in order; none where there is none."""
    if isinstance(adaptation, Adaptation):
        return (adaptation,)
    return adaptation or ()


MODEL = ("body", "head")
"""Keys of a model in what is sent."""


class Misnamed(ValueError):
    """An algorithm names a part of a model or a method that is not there; the message says which."""


def method_of(algorithm: Algorithm, name: str) -> Callable[..., Tensor]:
    """Find a method that an algorithm gives by its name, as data: a predictor, or the loss of a stage.

    Raises:
        Misnamed: It has no such method.
    """
    method = algorithm.pieces[0]
    found = getattr(method, name, None)
    if not callable(found):
        called = type(method).__name__
        raise Misnamed(f"{called} names the method {name!r}, and has none that is called so; write it, or name another")
    scorer: Callable[..., Tensor] = found
    return scorer


def is_usual(verb: Callable[..., object], usual: Callable[..., object]) -> bool:
    """Tell whether an instance's method is the default one of `Algorithm`, whatever else stands around the instance."""
    return getattr(verb, "__func__", None) is usual


class Server:
    """The half that runs where no data lives."""

    def init_server(self, task: Task) -> Tree:
        """Make the server's state before the first round; by default the initial model."""
        return task.init()

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """List what happens in round `task.round`, in order; by default one local update and its aggregation.

        A prologue is an exchange listed in round 0 before the usual one, an epilogue one listed after it in
        the last round.
        """
        return (Exchange(),)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Choose what is sent to all clients alike; by default all of the server's state."""
        return server

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Choose what is sent to one client besides; by default nothing.

        It is made when that client's turn comes, and the client finds it in `shared`, beside the broadcast.

        Args:
            task: Of the round.
            server: The server's state.
            client: 0..num_clients-1; None for one held out of training. The keys are the same for all, and none is
                the broadcast's.
        """
        return {}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Make the next server state; by default the uploads' mean, by the setting's weights, replaces what it
        names. It is not called where no upload arrived.
        """
        return tree.merge(server, uploads.mean())

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the one generic model that is tested, or None where the method has none; by default body and
        head.
        """
        return {"body": server["body"], "head": server["head"]}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give further generic models to be tested and reported beside, by name; none ranks."""
        return {}

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count the bytes of what is sent, up or down; by default those of its tensors. To be overridden where it would
        be packed on its way: `tree.packed_nbytes`.
        """
        return tree.nbytes(payload)


class Client(ABC):
    """The half that runs where the data lives. It sees one client: its shapes have no client axis."""

    def init_client(self, task: Task) -> Tree:
        """Make a client's private state before it first takes part; the same for every client. By default
        nothing.
        """
        return {}

    @abstractmethod
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Do the client's work of a round.

        Args:
            task: What is the same for every algorithm; `task.sgd` is local training.
            shared: What the server sent, to all and to this client. Not to be changed in place.
            private: What this client kept. Not to be changed in place.
            data: Its training examples.

        Returns:
            The upload, and the next private state (same keys, shapes and dtypes as before).
        """

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the model this client would use, or None; by default the shared body and head.

        `data` is the client's *training* data.
        """
        return {"body": shared["body"], "head": shared["head"]}

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give what a client has right after its local work, for the view `personal:after`: what it was sent, with what
        it trained in its place, and its next private state. To be overridden where an upload is no model.
        """
        upload, private = self.local_update(task, shared, private, data)
        return tree.merge(shared, {key: upload[key] for key in MODEL if key in shared and key in upload}), private

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Give further personal models to be tested and reported beside, by name; none ranks."""
        return {}

    def adaptation(self, task: Task) -> Stages:
        """Say how the personal model is tuned before it is tested, in stages; by default not at all."""
        return None

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Make the private state of a client that has not taken part, never drawn or held out of training, anew for
        each test; by default the initial one.

        `data` is its *training* data, and `shared` is not to be changed in place.
        """
        return self.init_client(task)

    def newcomer_adaptation(self, task: Task) -> Stages:
        """Say how the model of a client held out of training is tuned; by default like everybody's, or if they do
        nothing, five epochs of the head. None: not at all.
        """
        return self.adaptation(task) or HEAD_EPOCHS

    def open_set(self, task: Task, model: Tree, z: Tensor, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Say of images which of a few classes each is of, and how surely it is of any: by how near it lies, among the
        features of `model`, to the mean of a class's labelled shots.

        Args:
            task: Of the last round.
            model: A client's, not tuned.
            z: (B, d) float32, features of images.
            support: (S, d) float32, features of labelled images.
            labels: (S,) int64, their classes, 0..n-1, each of which is there.

        Returns:
            (B,) int64 classes, 0..n-1, and (B,) float32, larger is surer; of each image by itself.
        """
        of_class = F.one_hot(labels).to(support.dtype)
        means = of_class.T @ support / of_class.sum(0)[:, None]
        nearest = torch.cdist(z, means, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        return nearest.indices, -nearest.values

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score images: (B, C), larger is likelier. To be overridden only where a model is not a body and a
        head; `predictors` names another one for a variant.
        """
        return task.logits(model, x)


class Algorithm(Client, Server, Ranged):
    """Base of all algorithms. Subclass it as a frozen, keyword-only dataclass and register it under its
    file's name.
    """

    constant: ClassVar[frozenset[str]] = frozenset()
    """Keys of the broadcast that never change: a client is sent them once, when it first takes part."""
    version: ClassVar[int] = 1
    """Raised when the same fields give other numbers; part of a run's identity."""
    stackable: ClassVar[bool] = True
    """False: clients are run one by one even in the stacked engine."""
    tier: ClassVar[str] = "S"
    """What the server learns or needs: S nothing beyond models, L label statistics, A its own data, V
    pre-trained models.
    """
    family: ClassVar[str | None] = None
    """The named set that it belongs to, as in `--algos set:pfl`: "references", "generic", "pfl" or "fedlt"; None: only
    to "all".
    """
    paper: ClassVar[Mapping[str, object]] = {}
    """Fields whose default is not the paper's value, with that value: the preset `paper`."""
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = None
    """What `bench tune` chooses among, by field: (lowest, highest) or a list of values; None: around the defaults."""
    controls: ClassVar[Mapping[str, str]] = {}
    """Rows that it must be compared with before it is believed, as on the command line, and what each answers:
    {"mine(pull=0)": "whether the pull does anything"}."""
    later: ClassVar[Mapping[str, object]] = {}
    """Fields that came when results were stored already, with their defaults, which are what runs did before. With
    these values they are left out of a run's identity and call, so that a run of then and the same of now are one."""
    trains_another: ClassVar[bool] = False
    """Whether clients train a network that is not the run's by itself, such as a smaller teacher: a sample then takes
    less than a look at it by the run's, which validation would take for a forged cost."""
    predictors: ClassVar[Mapping[str, str]] = {}
    """Variants, global or personal, that are scored in another way than by `predict`: name of the variant to name of a
    method with its arguments and result."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities: "body" (a model with a body and a head), "pixels" (examples that are made of such, which an attack
    moves within `task.ball`), "prior" (`task.prior`, the global class frequencies), "pooled" (one pseudo-client holds
    the union of all training data: the centralised reference), "sgd" (steps that follow the gradient, with which the
    method reckons), "auxiliary" (`task.auxiliary`, labelled images at the server), "public" (`task.public`, unlabelled
    ones that everybody has), "teacher" (`task.teacher` and `data.teacher`, what a model that stands still makes of
    classes and of training images)."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Kinds of parts that make no sense on it, each with the reason: {"channel": "nothing is sent"}; "memory" are those
    channels that keep what was not sent."""
    own_loss: ClassVar[bool] = False
    """True: its paper has a loss other than cross-entropy, which `task.criterion` is given as `usual`."""

    # What a row with parts answers for its method (`bench.protocol.composition`); no method does so itself.

    @property
    def pieces(self) -> tuple[Algorithm, *tuple[Part, ...]]:
        """The method, and the parts it is composed with."""
        return (self,)

    def client_verb(self, name: str) -> Callable[[Task, Tree, Tree, LocalData], Any]:
        """Find a method of the client half, as an exchange names it; it can be pickled."""
        found: Callable[[Task, Tree, Tree, LocalData], Any] = getattr(self, name)
        return found

    def server_verb(self, name: str) -> Callable[[Task, Tree, Uploads], Tree]:
        """Find a method of the server half, as an exchange names it."""
        found: Callable[[Task, Tree, Uploads], Tree] = getattr(self, name)
        return found

    def sends(self, exchange: Exchange, task: Task, server: Tree, clients: Sequence[int]) -> tuple[Tree, list[Tree]]:
        """Give what an exchange sends: to all alike, and to each client besides."""
        shared: Tree = getattr(self, exchange.broadcast)(task, server)
        return shared, [self.send(task, server, client) for client in clients]

    @property
    def corrects(self) -> frozenset[str]:
        """Keys of a trained model that parts read before they change it for the test; empty: nobody does."""
        return frozenset()

    @property
    def learns(self) -> bool:
        """Whether a part learns before it corrects: models are then corrected after the last round only."""
        return False

    def corrected(self, task: Task, shared: Tree, model: Tree, data: LocalData | None) -> Tree | None:
        """Give the keys of a trained model that parts change: at a client, or (`data` None) at the server, whose state
        is `shared` there; None where there is nothing to correct, or not yet.
        """
        return None
