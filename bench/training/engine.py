"""Engines: run one client's verb over many clients, one by one or stacked. Their results agree up to
rounding.

`serial` hands each client its own examples and differentiates with plain autograd. `stacked` pads a group of
clients to a common length and maps the same verb over them with `torch.func.vmap`: for small models, where a
step costs less than calling it, many clients go for the price of one.

In `serial` what a client gets does not depend on who else is visited, to the bit. In `stacked` it does, in the last
bits: kernels sum in another order when a stack is wider or longer. So an engine says who is computed together, and a
crew of several processes (`bench.training.crew`) shares such groups out whole: the bits are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench import keys, tree
from bench.data import Images, LocalData, Meter
from bench.models import Model
from bench.task import Task
from bench.training import compiler
from bench.training.operations import Operations
from bench.training.replay import Recordings
from bench.training.visit import Verb, Visit
from bench.tree import Tree

compiler.leave_out()

ENGINES = ("auto", "serial", "stacked")
TOLERANCE = 2e-4
"""Largest difference of any parameter between the engines after one round on the contract's toy task
(float32).
"""

STACKED_WEIGHTS, STACKED_CONVOLUTIONS = 2**17, 2**14
"""Up to so many weights of a client, "auto" stacks clients; and where some are those of convolutions: see `choose`."""

Share = Callable[[list[list[Visit]]], list[list[tuple[Any, float]]]]
"""Does groups of visits wherever it likes: for each group what `Engine.work` gives."""


_RECORDINGS: WeakKeyDictionary[Images, Recordings] = WeakKeyDictionary()
"""Of each run of this process, as long as its images are there."""


class CannotStack(ValueError):
    """A verb does something that cannot be mapped over stacked clients; the message says what to do."""


class Probe:
    """Counts the floating-point operations of one client's verb, the one with most examples."""

    flops: float = 0.0
    samples: float = 0.0

    def __init__(self) -> None:
        self.counter = Operations()


def counted(work: Callable[[], Tree]) -> tuple[Tree, float]:
    """Do some work and count its floating-point operations: products of matrices and convolutions."""
    with Operations() as done:
        return work(), float(done.total)


@dataclass(frozen=True)
class Engine:
    """Runs a verb for every visit."""

    name: str
    """Key in `BY_NAME`."""
    groups: Callable[[Tree, Sequence[Visit]], list[list[int]]]
    """(shared, visits) -> which visits are computed together; what a group gives does not depend on the others."""
    work: Callable[[Verb, Task, Tree, Images, Sequence[Visit]], list[tuple[Any, float]]]
    """Runs a verb for a group: for each visit the result, and the samples processed."""

    def __call__(
        self,
        verb: Verb,
        task: Task,
        shared: Tree,
        images: Images,
        visits: Sequence[Visit],
        probe: Probe | None = None,
        share: Share | None = None,
    ) -> tuple[list[Any], float]:
        """Run the verb, and where there is a probe count the operations of one visit, the one with most examples.

        Args:
            verb: What to do.
            task: Of the round.
            shared: What every client is sent.
            images: That visits refer to.
            visits: One for each client.
            probe: Told how many operations the largest visit takes.
            share: Who does it; None: this process.

        Returns:
            One result per visit, in order, and the samples processed.
        """
        groups = self.groups(shared, visits)
        done: list[Any] = [None] * len(visits)
        rest = groups
        if probe is not None and visits:
            largest = max(range(len(visits)), key=lambda k: len(visits[k].index))
            with probe.counter:  # padding is no work of the method: one client's own is counted
                ((result, samples),) = serial.work(verb, task, shared, images, [visits[largest]])
            probe.flops, probe.samples = float(probe.counter.total), samples
            if self is serial:
                done[largest], rest = (result, samples), [group for group in groups if group != [largest]]
        parts = [[visits[k] for k in group] for group in rest]
        answers = [self.work(verb, task, shared, images, part) for part in parts] if share is None else share(parts)
        for group, answer in zip(rest, answers, strict=True):
            for k, each in zip(group, answer, strict=True):
                done[k] = each
        total = 0.0
        for group in groups:
            for k in group:
                total += done[k][1]
        return [result for result, _ in done], total


def _alone(shared: Tree, visits: Sequence[Visit]) -> list[list[int]]:
    return [[k] for k in range(len(visits))]


def _one_by_one(
    verb: Verb, task: Task, shared: Tree, images: Images, visits: Sequence[Visit]
) -> list[tuple[Any, float]]:
    answers = []
    for visit in visits:
        n = torch.full((), len(visit.index), device=visit.index.device)
        data = LocalData(
            images, visit.index, n, visit.key, visit.class_counts, task.batch_size, Meter(), visit.client_key,
            passes=visit.passes,
        )  # fmt: skip
        here = task.at_client()
        result = verb(here, {**shared, **visit.sent}, visit.private, data)
        answers.append((result, float(data.samples() + here.samples())))
    return answers


def _stacks(shared: Tree, visits: Sequence[Visit]) -> list[list[int]]:
    """Part visits into groups of similar size."""
    order = sorted(range(len(visits)), key=lambda k: (len(visits[k].index), k))
    width = _width(shared, visits)
    return [order[start : start + width] for start in range(0, len(order), width)]


def _all_at_once(
    verb: Verb, task: Task, shared: Tree, images: Images, visits: Sequence[Visit]
) -> list[tuple[Any, float]]:
    stack, samples = _run_group(verb, replace(task.at_client(), stacked=True), shared, images, visits)
    rows = [None] * len(visits) if stack is None else _rows(stack, len(visits))
    return list(zip(rows, samples, strict=True))


serial = Engine("serial", _alone, _one_by_one)
"""Clients one after the other."""
stacked = Engine("stacked", _stacks, _all_at_once)
"""Clients in groups of similar size, mapped over a leading axis."""


def _rows(stack: Any, count: int) -> list[Any]:
    """Give each client's part of what `vmap` returned: nested dicts and tuples of tensors."""
    if isinstance(stack, dict):
        parts = [_rows(value, count) for value in stack.values()]
        return [dict(zip(stack, own, strict=True)) for own in zip(*parts, strict=True)] if parts else [{}] * count
    if isinstance(stack, tuple):
        return list(zip(*(_rows(value, count) for value in stack), strict=True)) if stack else [()] * count
    rows: list[Any] = list(stack.unbind())
    return rows


def _width(shared: Tree, visits: Sequence[Visit]) -> int:
    """Choose how many clients are stacked, at most 128: so many whose state stays in a CPU's cache, or takes a quarter
    of a gibibyte elsewhere.
    """
    size = tree.nbytes(shared) + max(
        (tree.nbytes(visit.private) + tree.nbytes(visit.sent) for visit in visits), default=0
    )
    most = 2**23 if visits and visits[0].index.device.type == "cpu" else 2**28
    return max(1, min(128, most // max(size, 1)))


def _padded(rows: Sequence[Tensor], batch_size: int) -> Tensor:
    """Pad rows to a common length: (clients, L) int64. From a batch on it is one of whole batches, so that cohorts have
    few shapes, and what is done with one is soon written down.
    """
    longest = max(map(len, rows))
    length = -(-longest // batch_size) * batch_size if longest > batch_size else longest
    return F.pad(pad_sequence(list(rows), batch_first=True), (0, length - longest))


def _run_group(verb: Verb, task: Task, shared: Tree, images: Images, group: Sequence[Visit]) -> tuple[Any, list[float]]:
    rows = [visit.index for visit in group]
    images, index = images.gather(_padded(rows, task.batch_size))
    clients: Tree = {
        "sent": tree.stack([visit.sent for visit in group]),
        "private": tree.stack([visit.private for visit in group]),
        "index": index,
        "n": tree.bring(torch.tensor([len(each) for each in rows]), index.device),
        "key": torch.stack([visit.key for visit in group]),
        "client_key": torch.stack([visit.client_key for visit in group]),
        "counts": torch.stack([visit.class_counts for visit in group]),
    }
    passes = [visit.passes for visit in group if visit.passes is not None]
    if passes:
        clients["passes"] = _padded(passes, task.batch_size)

    def mapped(task: Task, given: Tree) -> tuple[Any, Tensor]:
        def one(client: Tree) -> tuple[Any, Tensor]:
            of, n, key = client["index"], client["n"], client["key"]
            data = LocalData(
                images, of, n, key, client["counts"], task.batch_size, Meter(), client["client_key"], padded=True,
                passes=client.get("passes"),
            )  # fmt: skip
            result = verb(task, {**given["shared"], **client["sent"]}, client["private"], data)
            samples = data.samples() + task.samples()
            assert isinstance(samples, Tensor)  # vmap must be given at least one tensor back
            return (() if result is None else (result,)), samples

        results: tuple[Any, Tensor] = torch.func.vmap(one, in_dims=(0,), randomness="error")(given["clients"])
        return results

    try:
        recordings = _RECORDINGS.setdefault(images, Recordings())
        (*stack,), samples = recordings.do(mapped, verb, task, {"shared": shared, "clients": clients})
    except RuntimeError as error:
        inner: Any = verb
        while isinstance(inner, partial):  # what stands around it is not the author's
            inner = inner.args[-1]
        name = getattr(inner, "__qualname__", repr(inner))
        if "data-dependent control flow" in str(error) or ".item()" in str(error):
            raise CannotStack(
                f"{name} branches on a tensor's value, so clients cannot be stacked; "
                "use torch.where, or set stackable = False"
            ) from error
        if "randomness" in str(error):
            raise CannotStack(
                f"{name} draws from torch's global generator; derive randomness from data.key with bench.keys"
            ) from error
        raise
    return (stack[0] if stack else None), samples.tolist()


def choose(engine: str, model: Model, batch_size: int, device: str) -> str:
    """Resolve "auto": stacked for models of at most `STACKED_WEIGHTS` weights, of twice as many from 32 images a batch,
    of `STACKED_CONVOLUTIONS` if there are convolutions; else serial.

    The engine is part of a run's identity, so this is a rule, and no timing at the time of the run. The rule follows
    measurements such as those of `bench speed --model`, on one core of a CPU: how many times as fast as serial is
    stacked, when its work has been written down, by weights of a client, images of a batch, and clients of a cohort.

                    weights    batch 10     batch 32-64
        dense         4,810         4.5             6.3     8-32 clients
                     50,890     1.6-1.7         2.3-2.4     8-128
                     85,386         1.3             1.8     8-32
                    130,506         1.1         1.3-1.4     8-128
                    197,322     0.8-0.9         1.1-1.3     8-128
                    307,300         0.5             1.0        16
                    353,636           –             0.4         8
        convolutions 13,706         2.3             1.8     16-64, 8×8 pixels
                     23,946         1.6             1.0        16, 12×12
                     44,426     1.1-1.2             0.8     16-64, 28×28
                    105,866         0.6             0.5        16, 28×28

    A step costs its calls, which a stack shares, and reading and writing weights, gradients and momentum several times,
    which in a stack do not stay in the cache; and `vmap` turns convolutions into grouped ones. On a GPU the same rule
    holds until a benchmark there says otherwise.
    """
    if engine != "auto":
        return engine
    convolutions, weights = _made_of(model)
    most = STACKED_CONVOLUTIONS if convolutions else STACKED_WEIGHTS * (2 if batch_size >= 32 else 1)
    return "stacked" if weights <= most else "serial"


@lru_cache(maxsize=64)
def _made_of(model: Model) -> tuple[bool, int]:
    """Tell whether a model has convolutions, and count its weights."""
    leaves = tree.flatten(tree.parameters(model.init(keys.key(0, "meta")))).values()  # shapes only: nothing is drawn
    return any(leaf.ndim > 2 for leaf in leaves), sum(leaf.numel() for leaf in leaves)


BY_NAME = {engine.name: engine for engine in (serial, stacked)}
