"""What a part is: a loss, a correction, an aggregation rule or a channel, in a file of its own, for any method.

`fedrep+focal(gamma=1)+topk` is FedRep with another loss and smaller uploads. A part is a frozen, keyword-only dataclass
of pure functions, and sees tensors and trees, never an algorithm. What runs at a client is written for one client: the
stacked engine maps it over many, so it branches on values by `torch.where` only.

An *update* is an upload minus what was sent, over those parameters below `body` and `head` that both have. Running
statistics, counts and whatever else is sent pass as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench import tree
from bench.data import Batch, LocalData, Uploads
from bench.ranges import Positive, Ranged
from bench.task import Task
from bench.tree import Tree


class Part(Ranged, ABC):
    """Base of the four kinds; derive from one of those and register it under its file's name."""

    kind: ClassVar[str]
    """"loss", "channel", "aggregation" or "correction"."""
    version: ClassVar[int] = 1
    """Raised when the same fields give other numbers; part of a run's identity."""
    stackable: ClassVar[bool] = True
    """False: clients are run one by one even in the stacked engine."""
    neutral: ClassVar[Mapping[str, object]] = {}
    """Values at which it changes nothing (a loss: is cross-entropy) and is left out of the row; {}: there are none."""
    paper: ClassVar[Mapping[str, object]] = {}
    """As an algorithm's."""
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = None
    """As an algorithm's."""
    later: ClassVar[Mapping[str, object]] = {}
    """As an algorithm's."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Names that papers have for rows with it, and these as on the command line: {"fedlc": "fedavg+calibrated"}. Where
    one name stands for several parts' rows, one parameter says which: {"score(kind='gc')": "fedavg+graph_cut"}."""

    @property
    def tier(self) -> str:
        """What the server learns or needs, as of an algorithm; a row has the worst of its method and parts."""
        return "S"

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities, as of an algorithm: "body", "prior"."""
        return frozenset()

    def counts(self, task: Task, own: Tensor | None, estimated: Tensor | None) -> Tensor | None:
        """Choose the class counts that it is given: (C,) float32, the client's own; None at the server."""
        return own


class Loss(Part):
    """Takes the place of cross-entropy, or of what the method's paper has there, in local training."""

    kind: ClassVar[str] = "loss"

    @property
    def views(self) -> int:
        """How often a batch has each example, each time augmented anew, wherever a method asks for batches and does not
        say; B of `loss` is then so many times as large. To be overridden by a field.
        """
        return 1

    @abstractmethod
    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Give the mean loss over the batch's real examples: () float32; `bench.losses.mean` leaves padding out.

        Args:
            task: Its `round` is there for losses that begin late.
            logits: (B, C), maybe in a lower precision: take `.float()` first.
            features: (B, d), what the head was given; None where a method has no such thing.
            batch: Labels and weights.
            counts: (C,) float32 ≥ 0, class counts of this client, or what `UsesPrior` says.
        """


class Correction(Part):
    """Changes a trained model before it is tested, after any fine-tuning; nothing of it flows back into training."""

    kind: ClassVar[str] = "correction"
    reads: ClassVar[frozenset[str]] = frozenset({"head"})
    """Keys of the model that it is given."""

    @abstractmethod
    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Give the keys of a model that change, in the same shapes; None where there is nothing to correct.

        Args:
            task: Of the round.
            model: What `reads` names, of the generic or a client's own model.
            counts: (C,) float32, class counts of the client; None at the server where only clients know them.
        """


class LearnedCorrection(Correction):
    """Learns from examples, without moving the body, and then gives another head; it acts after the last round only.

    A client's own model is corrected by what its own examples teach. For the generic one there is an *epilogue*: after
    the exchanges of the last round all training clients are sent it, send what their examples teach, and keep nothing.
    The server pools that, and keeps the head that `correct` makes of it.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"body", "head"})

    @property
    def needs(self) -> frozenset[str]:
        """A body, which stands still."""
        return frozenset({"body"})

    @abstractmethod
    def learn(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Compute at a client what `correct` is given as `model["learnt"]`, in shapes that depend on shapes only.

        Args:
            task: Of the last round.
            model: What `reads` names, of the generic or the client's own model.
            data: Its training examples, with labels. Where there are none, whatever is given counts for nothing.
        """

    def pool(self, task: Task, uploads: Uploads) -> Tree:
        """Make one of what all clients learnt, in the same form; by default the mean by the setting's weights."""
        mean: Tree = uploads.mean()
        return mean


class Aggregation(Part):
    """Takes the place of the mean of body and head, whichever weights a method asks for."""

    kind: ClassVar[str] = "aggregation"
    noisy: ClassVar[bool] = False
    """True: noise hides a client, who then may send nothing but one update a round."""

    @abstractmethod
    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Make one update of K ≥ 1, body and head together.

        Args:
            task: `task.server_key` is the server's randomness.
            updates: All of one structure, in the order of the clients' ids. Not to be changed in place.
            weights: (K,) float64 ≥ 0, those of the mean in its place; they sum to one.
        """


class Channel(Part):
    """What happens to an update on its way to the server: `send` at the client, `receive` at the server.

    Bytes are counted on what `send` gives. Of two channels the later one is given what the earlier one sends.
    """

    kind: ClassVar[str] = "channel"

    def init(self, task: Task, update: Tree) -> Tree:
        """Make what a client keeps from round to round, from an update's shapes; by default nothing."""
        return {}

    @abstractmethod
    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Encode the update of one client.

        Args:
            task: Of the round.
            update: It lacks leaves that `init` was shown where a method does not send them back.
            kept: Of the last time. Leaves that are not given back stay as they are.
            key: () int64, randomness of this client in this round.

        Returns:
            What travels, in shapes that depend on shapes only, and what is kept.
        """

    @abstractmethod
    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Decode what `send` gave: an update of the shapes and dtypes of `like`, whose values say nothing."""


class Compression(Channel):
    """A channel that encodes each tensor by itself; those below 256 entries, and whole numbers, are sent whole."""

    remembers: ClassVar[bool] = False
    """Whether a client keeps what it has not sent, and adds it to the next update: in the end everything arrives."""

    @abstractmethod
    def encode(self, path: str, entries: Tensor, key: Tensor) -> Tree:
        """Write the entries of a tensor, (n,) floating, as tensors of shapes that depend on n only.

        Args:
            path: Of the tensor in the update; folded into `key` it makes draws that are of this tensor alone.
            entries: In their order.
            key: () int64, as of `send`.
        """

    @abstractmethod
    def decode(self, sent: Tree, like: Tensor) -> Tensor:
        """Read what `encode` gave: (n,) like some entries, whose values say nothing."""

    def init(self, task: Task, update: Tree) -> Tree:
        """Start with nothing left over."""
        return tree.zeros_like(update) if self.remembers else {}

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Encode the update, and what was left over if that is kept."""
        due = tree.map(torch.add, update, kept) if self.remembers else update

        def written(path: str, leaf: Tensor) -> Any:
            return self.encode(path, leaf.flatten(), key) if _is_large(leaf) else {"whole": leaf}

        sent = tree.map_paths(written, due)
        return sent, tree.sub(due, self.receive(task, sent, due)) if self.remembers else {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Decode each tensor."""

        def read(leaf: Tensor, sent: Tree) -> Tensor:
            whole: Tensor | None = sent.get("whole")
            return self.decode(sent, leaf.flatten()).reshape(leaf.shape) if whole is None else whole

        return tree.map(read, like, sent)


def _is_large(leaf: Tensor) -> bool:
    return leaf.numel() >= 256 and leaf.is_floating_point()


@dataclass(frozen=True, kw_only=True)
class UsesPrior(Part):
    """Base, before `Loss` or `Correction`, of what shifts by class frequencies: whose they are is then a choice."""

    prior: Literal["local", "global", "estimated", "uniform"] = "local"
    """Whose: the client's; all clients' true ones; all clients' as counts add up at the server, for 4 C bytes; none."""
    absent: Literal["out"] | Positive = "out"
    """Count that stands for 0; or "out": such a class leaves the softmax."""
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {}
    """Nothing: a prior is what the server may know, and no number to be tuned."""

    @property
    def tier(self) -> str:
        """L where the server learns counts, S otherwise."""
        return "L" if self.prior in ("global", "estimated") else "S"

    @property
    def needs(self) -> frozenset[str]:
        """The true frequencies, where they are asked for."""
        return frozenset({"prior"}) if self.prior == "global" else frozenset()

    def counts(self, task: Task, own: Tensor | None, estimated: Tensor | None) -> Tensor | None:
        """Give counts in examples of this client, whatever their source; at the server with a mean of one."""
        if self.prior == "local":
            counts = own
        else:
            known = {"global": task.prior, "estimated": estimated}.get(self.prior)
            even = torch.ones(task.num_classes, device=task.key.device)
            known = even if known is None else torch.where(known.sum() > 0, known, even)
            counts = known / known.sum() * (task.num_classes if own is None else own.sum())
        if counts is None or self.absent == "out":
            return counts
        return torch.where(counts > 0, counts, self.absent)
