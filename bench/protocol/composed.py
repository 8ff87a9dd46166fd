"""A method and its parts as one algorithm: for what runs, stores and tests it nothing else has changed.

What parts keep and send lies under the key `parts` of the server's state, of the broadcast, of uploads and of private
states; the method never sees it. A client's verb is: the loss bound to this client's counts, the method's verb, the
channels in order. A server's verb is: the channels in reverse, `Uploads` whose mean is the rule, the method's verb.

A correction that learns has an exchange of its own after those of the last round, which neither method nor channel nor
rule sees. All that goes up and down in it is below `parts`; what comes of it the server keeps in `parts/learnt`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import keys, tree
from bench.algorithm import MODEL, Algorithm, Exchange, Stages
from bench.data import LocalData, Uploads
from bench.part import Aggregation, Channel, Correction, LearnedCorrection, Loss, Part, UsesPrior
from bench.protocol.settings import BadConfig
from bench.task import Task
from bench.tree import Tree

PARTS = "parts"
"""Key of what belongs to parts."""
_EPILOGUE = "epilogue of part "
"""Begins the name of the exchange of a correction that learns; its place among the parts follows."""


@dataclass(frozen=True, repr=False)
class Composed(Algorithm):
    """A method with parts; `bench.protocol.composition.compose` makes it, and says what cannot be."""

    method: Algorithm
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.pieces))

    @property
    def pieces(self) -> tuple[Algorithm, *tuple[Part, ...]]:
        """The method, and its parts in order."""
        return (self.method, *self.parts)

    @property
    def stackable(self) -> bool:  # type: ignore[override]
        """Whether all pieces are."""
        return all(piece.stackable for piece in self.pieces)

    @property
    def tier(self) -> str:  # type: ignore[override]
        """The worst of all pieces."""
        return max((piece.tier for piece in self.pieces), key="SLAV".index)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any piece needs."""
        return frozenset[str]().union(*(piece.needs for piece in self.pieces))

    @property
    def constant(self) -> frozenset[str]:  # type: ignore[override]
        """The method's."""
        return self.method.constant

    @property
    def predictors(self) -> Mapping[str, str]:  # type: ignore[override]
        """The method's."""
        return self.method.predictors

    @property
    def _channels(self) -> list[Channel]:
        return [part for part in self.parts if isinstance(part, Channel)]

    @property
    def _estimates(self) -> bool:
        return any(isinstance(part, UsesPrior) and part.prior == "estimated" for part in self.parts)

    @property
    def _learned(self) -> dict[int, LearnedCorrection]:
        return {place: part for place, part in enumerate(self.parts) if isinstance(part, LearnedCorrection)}

    def init_server(self, task: Task) -> Tree:
        """Add the sum of the class counts that clients sent, where a part asks for it, and room for what is learnt."""
        kept: Tree = {"counts": torch.zeros(task.num_classes, device=task.key.device)} if self._estimates else {}
        if self._learned:
            nothing = {"head": tree.zeros_like(task.init()["head"]), "times": torch.zeros((), device=task.key.device)}
            kept["learnt"] = {f"{place}": nothing for place in self._learned}
        return _join(self.method.init_server(task), kept)

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """List the method's, and in the last round an epilogue for each correction that learns."""
        own = self.method.exchanges(task)
        if task.round + 1 < task.rounds:
            return own
        names = [f"{_EPILOGUE}{place}" for place in self._learned]
        return own + tuple(Exchange(client=name, server=name, everyone=True, aside=True) for name in names)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send what the method sends, and the sum of class counts."""
        return self._broadcast("broadcast", task, server)

    def _broadcast(self, verb: str, task: Task, server: Tree) -> Tree:
        own, kept = _part(server)
        shared = getattr(self.method, verb)(task, own)
        return _join(shared, {key: kept[key] for key in kept if key == "counts"})

    def sends(self, exchange: Exchange, task: Task, server: Tree, clients: Sequence[int]) -> tuple[Tree, list[Tree]]:
        """Send the generic model in an epilogue, and else what the method sends."""
        if not exchange.aside:
            sent = [self.send(task, server, client) for client in clients]
            return self._broadcast(exchange.broadcast, task, server), sent
        return _join({}, self._generic(_place(exchange.client), task, server)), [{} for _ in clients]

    def _generic(self, place: int, task: Task, server: Tree) -> Tree:
        """Give the generic model as those corrections leave it that come before a place; empty where there is none."""
        own, kept = _part(server)
        model = self.method.global_model(task, own)
        if model is None:
            return {}
        model = {**model, **self._through(task, kept, model, None, place)}
        return {key: model[key] for key in sorted(self._learned[place].reads)}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send what the method sends."""
        return self.method.send(task, _part(server)[0], client)

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count the method's part as it says, that of parts by its tensors."""
        own, sent = _part(payload)
        return (self.method.payload_bytes(task, own) if own else 0) + tree.nbytes(sent)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Do what an exchange that names `aggregate` does."""
        return self._take("aggregate", task, server, uploads)

    def server_verb(self, name: str) -> Callable[[Task, Tree, Uploads], Tree]:
        """Put decoding and the rule before the method's verb."""
        return partial(self._keep if name.startswith(_EPILOGUE) else self._take, name)

    def _keep(self, name: str, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Have what clients learnt correct the generic model."""
        (own, kept), place = _part(server), _place(name)
        model, part = self._generic(place, task, server), self._learned[place]
        if not model:
            return server
        received = copy.copy(uploads)
        received.trees = [_part(upload)[1] for upload in uploads.trees]
        counts = part.counts(task, None, kept.get("counts"))
        changed = part.correct(task, {**model, "learnt": part.pool(task, received)}, counts) or model
        learnt = {"head": changed["head"], "times": kept["learnt"][f"{place}"]["times"] + 1}
        return _join(own, {**kept, "learnt": {**kept["learnt"], f"{place}": learnt}})

    def _take(self, verb: str, task: Task, server: Tree, uploads: Uploads) -> Tree:
        own, kept = _part(server)
        sends = {each.server: each.broadcast for each in self.method.exchanges(task)}
        shared = getattr(self.method, sends.get(verb, "broadcast"))(task, own)
        opened = [_part(upload) for upload in uploads.trees]
        received = copy.copy(uploads)
        received.trees = [
            self._decode(task, {**shared, **self.method.send(task, own, client)}, upload, sent["update"])
            if "update" in sent
            else upload
            for client, (upload, sent) in zip(uploads.clients.tolist(), opened, strict=True)
        ]
        for part in self.parts:
            if isinstance(part, Aggregation):
                if part.noisy:
                    self._require_nothing_else(task, shared, received.trees[0])
                received = _Combined(received, part, task, shared)
        following = self.method.server_verb(verb)(task, own, received)
        if isinstance(received, _Combined) and not received.known and len(self.method.exchanges(task)) == 1:
            raise BadConfig(f"{self}: nothing is combined, as no mean of a body or head that was sent is asked for")
        if self._estimates:
            kept = {**kept, "counts": torch.stack([kept["counts"], *(sent["counts"] for _, sent in opened)]).sum(0)}
        return _join(following, kept)

    def _require_nothing_else(self, task: Task, shared: Tree, upload: Tree) -> None:
        """Refuse a method whose clients send what noise does not hide."""
        hidden, frozen = _moves(shared), task.frozen_statistics
        besides = [leaf for leaf in tree.flatten(upload) if not (hidden(leaf) or (frozen and tree.is_statistic(leaf)))]
        besides += ["class counts"] * self._estimates + ["a second update"] * (len(self.method.exchanges(task)) > 1)
        if besides:
            hides = "noise hides one update of body and head a round"
            raise BadConfig(f"{self}: {hides}, and {besides[0]} would be sent in the clear; take a method without it")

    def _decode(self, task: Task, shared: Tree, upload: Tree, update: Tree) -> Tree:
        """Put into an upload what its channels carried."""
        like = _there(tree.split(upload, _moves(shared))[0], shared)
        for channel, shape in reversed(list(zip(self._channels, self._shapes(task, like), strict=True))):
            update = channel.receive(task, update, shape)
        return tree.merge(upload, tree.add(like, update))

    def _shapes(self, task: Task, update: Tree) -> list[Tree]:
        """Give what each channel is given for an update of these shapes."""
        shapes = [update]
        for channel in self._channels[:-1]:
            shapes.append(channel.send(task, shapes[-1], channel.init(task, shapes[-1]), task.key)[0])
        return shapes

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the method's."""
        return self.method.global_model(task, _part(server)[0])

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the method's."""
        return self.method.global_variants(task, _part(server)[0])

    def init_client(self, task: Task) -> Tree:
        """Add what channels keep, for all that the method may send back."""
        if not self._channels:
            return self.method.init_client(task)
        server = self.method.init_server(task)
        shared = {**self.method.broadcast(task, server), **self.method.send(task, server, None)}
        shapes = self._shapes(task, tree.split(shared, _moves(shared))[0])
        kept = [channel.init(task, shape) for channel, shape in zip(self._channels, shapes, strict=True)]
        return _join(self.method.init_client(task), {f"{place}": state for place, state in enumerate(kept) if state})

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Do what an exchange that names `local_update` does."""
        return _do("local_update", self, task, shared, private, data)

    def client_verb(self, name: str) -> Callable[[Task, Tree, Tree, LocalData], Any]:
        """Put the loss before the method's verb, and the channels after it."""
        return partial(_learn if name.startswith(_EPILOGUE) else _do, name, self)

    def _bind(self, task: Task, given: Tree, data: LocalData) -> tuple[Task, LocalData]:
        """Have `task.criterion` give the loss part, with this client's counts, and batches the views that it wants."""
        for part in (each for each in self.parts if isinstance(each, Loss)):
            counts = part.counts(task, data.class_counts.float(), given.get("counts"))
            assert counts is not None  # only the server has none
            objective = partial(part.loss, task, counts=counts)
            task, data = replace(task, objective=objective), replace(data, views=part.views)
        return task, data

    def _encode(self, task: Task, shared: Tree, upload: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree, Tree]:
        """Send an update through the channels: the upload without it, what travels, and what is kept."""
        update, _ = tree.split(upload, _moves(shared))
        if not update:
            if len(self.method.exchanges(task)) == 1:
                raise BadConfig(f"{self}: nothing is carried, as no body or head comes back that was sent")
            return upload, {}, kept
        # Of what travels otherwise the upload still says that it is there, in no byte.
        upload = tree.merge(upload, tree.map(lambda leaf: leaf.new_empty(0), update))
        update = tree.sub(update, shared)
        for place, channel in enumerate(self._channels):
            before = kept.get(f"{place}", {})
            update, after = channel.send(task, update, before, keys.fold(key, place))
            kept = {**kept, f"{place}": tree.merge(before, after)} if after else kept
        return upload, {"update": update}, kept

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the method's."""
        return self.method.personal_model(task, _part(shared)[0], _part(private)[0], data)

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give the method's, by the loss of its part; nothing passes a channel."""
        (own, given), (kept, parts) = _part(shared), _part(private)
        task, data = self._bind(task, given, data)
        seen, following = self.method.after_training(task, own, kept, data)
        return _join(seen, given), _join(following, parts)

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Give the method's."""
        return self.method.personal_variants(task, _part(shared)[0], _part(private)[0], data)

    def adaptation(self, task: Task) -> Stages:
        """Give the method's: a loss part has no say in it, or two effects would stand in one column."""
        return self.method.adaptation(task)

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Make the method's, by the loss of its part if labels are known; its channels have carried nothing yet."""
        (own, given), kept = _part(shared), _part(self.init_client(task))[1]
        task, data = self._bind(task, given, data) if data.labelled else (task, data)
        return _join(self.method.newcomer(task, own, data), kept)

    def newcomer_adaptation(self, task: Task) -> Stages:
        """Give the method's."""
        return self.method.newcomer_adaptation(task)

    def open_set(self, task: Task, model: Tree, z: Tensor, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Say what the method says."""
        return self.method.open_set(task, model, z, support, labels)

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score as the method does."""
        return self.method.predict(task, model, x)

    @property
    def corrects(self) -> frozenset[str]:
        """What corrections read."""
        return frozenset[str]().union(*(part.reads for part in self.parts if isinstance(part, Correction)))

    @property
    def learns(self) -> bool:
        """Whether a correction does."""
        return bool(self._learned)

    def corrected(self, task: Task, shared: Tree, model: Tree, data: LocalData | None) -> Tree | None:
        """Let corrections change a trained model, one after the other."""
        kept = _part(shared)[1]
        if data is None and not all(float(each["times"]) for each in kept.get("learnt", {}).values()):
            return None
        return self._through(task, kept, model, data, len(self.parts)) or None

    def _through(self, task: Task, kept: Tree, model: Tree, data: LocalData | None, end: int) -> Tree:
        """Give what those corrections change of a model that come before a place among the parts."""
        changed: Tree = {}
        for place, part in enumerate(self.parts[:end]):
            if isinstance(part, Correction):
                if missing := part.reads - model.keys():
                    raise BadConfig(f"{self}: the correction reads {', '.join(sorted(missing))}, which the model lacks")
                seen = {key: {**model, **changed}[key] for key in sorted(part.reads)}
                changed |= self._by(place, part, task, kept, seen, data) or {}
        return changed

    def _by(
        self, place: int, part: Correction, task: Task, kept: Tree, model: Tree, data: LocalData | None
    ) -> Tree | None:
        """Give what one correction changes."""
        counts = part.counts(task, None if data is None else data.class_counts.float(), kept.get("counts"))
        if not isinstance(part, LearnedCorrection):
            return part.correct(task, model, counts)
        if data is None:
            learnt = kept["learnt"][f"{place}"]
            return {"head": tree.where(learnt["times"] > 0, learnt["head"], model["head"])}
        if not data.labelled:
            return None
        changed = part.correct(task, {**model, "learnt": part.learn(task, model, data)}, counts) or {}
        return tree.where(data.n > 0, changed, {key: model[key] for key in changed})


def _do(verb: str, composed: Composed, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
    """Do the client's work of an exchange."""
    (shared, given), (private, kept) = _part(shared), _part(private)
    bound, data = composed._bind(task, given, data)
    upload, private = composed.method.client_verb(verb)(bound, shared, private, data)
    sent: Tree = {"counts": data.class_counts.float()} if composed._estimates else {}
    if composed._channels:
        key = keys.fold(data.key, "channel", verb)
        upload, update, kept = composed._encode(task, shared, upload, kept, key)
        sent |= update
    return _join(upload, sent), _join(private, kept)


def _learn(
    name: str, composed: Composed, task: Task, shared: Tree, private: Tree, data: LocalData
) -> tuple[Tree, Tree]:
    """Do the client's work of an epilogue; there is none where there is no generic model."""
    model = _part(shared)[1]
    return _join({}, composed._learned[_place(name)].learn(task, model, data) if model else {}), private


def _place(name: str) -> int:
    return int(name.removeprefix(_EPILOGUE))


class _Combined(Uploads):
    """Uploads whose mean of body and head is a rule's, of both together whoever asks for one of them."""

    def __init__(self, uploads: Uploads, rule: Aggregation, task: Task, shared: Tree) -> None:
        vars(self).update(vars(uploads))
        self.rule, self.task, self.shared = rule, task, shared
        self.known: dict[tuple[float, ...], Tree] = {}
        """By weights, the combined model."""

    def mean(self, key: str | None = None, weights: Tensor | Tree | None = None) -> Any:
        """Give the rule's result where it is one of models, and the plain mean of all else."""
        plain = super().mean(key, weights)
        weights = self.weights if weights is None else weights
        if isinstance(weights, dict) or weights.ndim > 1 or key not in (None, *MODEL):
            return plain
        weights = tree.in_float64(weights)
        models = [tree.split(upload, _moves(self.shared))[0] for upload in self.trees]
        known = tuple(weights.tolist())
        if models[0] and known not in self.known:
            start = _there(models[0], self.shared)
            shares = weights / weights.sum() if any(known) else torch.full_like(weights, 1 / len(weights))
            update = self.rule.combine(self.task, [tree.sub(model, start) for model in models], shares)
            self.known[known] = tree.add(start, update)
        combined = self.known.get(known, {})
        moved = combined if key is None else combined.get(key, plain)
        return tree.merge(plain, moved) if isinstance(plain, dict) else moved


def _part(values: Tree) -> tuple[Tree, Tree]:
    """Take apart what is the method's and what belongs to parts."""
    return {key: value for key, value in values.items() if key != PARTS}, values.get(PARTS, {})


def _join(own: Tree, parts: Tree) -> Tree:
    return {**own, PARTS: parts} if parts else own


def _moves(shared: Tree) -> Callable[[str], bool]:
    """Tell paths of what updates are of: parameters below body and head that were sent."""
    models = {key: shared[key] for key in MODEL if key in shared}
    return {path for path in tree.flatten(models) if not tree.is_statistic(path)}.__contains__


def _there(some: Tree, shared: Tree) -> Tree:
    """Give what was sent, for the leaves of a tree."""
    return tree.map(lambda _, leaf: leaf, some, shared)
