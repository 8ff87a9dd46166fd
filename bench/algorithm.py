"""What an algorithm plug-in is: a server's half, a client's half, and nothing that remembers by itself.

An algorithm is a frozen dataclass whose fields are what its paper adds over FedAvg. Its methods are pure
functions of trees (nested dictionaries of tensors), written for one client; the engine runs them over a
cohort, one by one or stacked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import tree
from bench.data import LocalData, Uploads
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


@dataclass(frozen=True)
class Adaptation:
    """How a personal model is fine-tuned on the client's training data before it is tested, as data.

    Every client takes the same path: trained in every round, never sampled, or unseen.
    """

    epochs: int
    """The budget whose model counts as `personal`."""
    parts: tuple[str, ...] = ("body", "head")
    """Keys of the model that move; the others are fixed."""
    curve: tuple[int, ...] = (0, 1, 5, 10)
    """Budgets reported besides, as far as they lie below `epochs`; 0 is the model before adaptation."""
    lr_factor: float = 1.0
    """Learning rate, as a multiple of the round's."""

    def budgets(self) -> tuple[int, ...]:
        """Give the budgets that are evaluated, ascending."""
        return tuple(sorted({*(budget for budget in self.curve if budget < self.epochs), self.epochs}))


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
        """Make the next server state; by default the uploads' mean, weighted by client size, replaces what it
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

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Give further personal models to be tested and reported beside, by name; none ranks."""
        return {}

    def adaptation(self, task: Task) -> Adaptation | None:
        """Say how the personal model is fine-tuned before it is tested; by default not at all."""
        return None

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score images: (B, C), larger is likelier. To be overridden only where a model is not a body and a
        head.
        """
        return task.logits(model, x)


class Algorithm(Client, Server):
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
    paper: ClassVar[Mapping[str, object]] = {}
    """Fields whose default is not the paper's value, with that value: the preset `paper`."""
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = None
    """What `bench tune` chooses among, by field: (lowest, highest) or a list of values; None: around the defaults."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities: "body" (a model with a body and a head), "prior" (`task.prior`, the global class
    frequencies), "pooled" (one pseudo-client holds the union of all training data: the centralised
    reference), "auxiliary" (`task.auxiliary`, labelled images at the server), "public" (`task.public`, unlabelled ones
    that everybody has)."""
