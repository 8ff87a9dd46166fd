"""Engines: run one client's verb over many clients, one by one or stacked. Their results agree up to
rounding.

`serial` hands each client its own examples and differentiates with plain autograd. `stacked` pads a group of
clients to a common length and maps the same verb over them with `torch.func.vmap`: for small models, where a
step costs less than calling it, many clients go for the price of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import tree
from bench.data import Images, LocalData, Meter
from bench.models import Model, is_convolutional
from bench.task import Task
from bench.tree import Tree

Verb = Callable[[Task, Tree, Tree, LocalData], Any]
"""A method of an algorithm's client half: (task, shared, private, data) -> nested dicts and tuples of
tensors, or None.
"""

ENGINES = ("auto", "serial", "stacked")
TOLERANCE = 2e-4
"""Largest difference of any parameter between the engines after one round on the contract's toy task
(float32).
"""


class CannotStack(ValueError):
    """A verb does something that cannot be mapped over stacked clients; the message says what to do."""


@dataclass(frozen=True)
class Visit:
    """What one client brings to a verb."""

    private: Tree
    index: Tensor
    """(n,) int64, rows of the resident images."""
    key: Tensor
    """() int64."""
    class_counts: Tensor
    """(C,) int64."""
    own: Tree | None = None
    """This client's row of what the broadcast holds under `each`."""


class Probe:
    """Counts the floating-point operations of one client's verb, the one with most examples."""

    flops: float = 0.0
    samples: float = 0.0

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)


class Engine(Protocol):
    """Run `verb` for every visit; one result per visit, in order, and the samples processed."""

    def __call__(
        self,
        verb: Verb,
        task: Task,
        shared: Tree,
        images: Images,
        visits: Sequence[Visit],
        probe: Probe | None = None,
    ) -> tuple[list[Any], float]:
        """Run the verb, and where there is a probe count its operations."""


def serial(
    verb: Verb,
    task: Task,
    shared: Tree,
    images: Images,
    visits: Sequence[Visit],
    probe: Probe | None = None,
) -> tuple[list[Any], float]:
    """Run clients one after the other."""
    results, samples = [], 0.0
    largest = max(range(len(visits)), key=lambda k: len(visits[k].index), default=0)
    for k, visit in enumerate(visits):
        n = torch.tensor(len(visit.index), device=visit.index.device)
        data = LocalData(images, visit.index, n, visit.key, visit.class_counts, task.batch_size, Meter())
        mine = shared if visit.own is None else {**shared, "each": visit.own}
        probed = probe is not None and k == largest
        with probe.counter if probe is not None and probed else nullcontext():
            results.append(verb(task, mine, visit.private, data))
        samples += len(visit.index) * data.meter.epochs
        if probe is not None and probed:
            probe.flops, probe.samples = (
                float(probe.counter.get_total_flops()),
                len(visit.index) * data.meter.epochs,
            )
    return results, samples


def stacked(
    verb: Verb,
    task: Task,
    shared: Tree,
    images: Images,
    visits: Sequence[Visit],
    probe: Probe | None = None,
) -> tuple[list[Any], float]:
    """Run clients in groups of similar size, mapped over a leading axis."""
    if probe is not None and visits:  # padding is no work of the method: count one client's own
        serial(verb, task, shared, images, [max(visits, key=lambda visit: len(visit.index))], probe)
    task = replace(task, stacked=True)
    order = sorted(range(len(visits)), key=lambda k: (len(visits[k].index), k))
    results: list[Any] = [None] * len(visits)
    samples = 0.0
    width = _width(shared, visits)
    for start in range(0, len(order), width):
        group = order[start : start + width]
        stack, epochs = _run_group(verb, task, shared, images, [visits[k] for k in group])
        for position, k in enumerate(group):
            results[k] = None if stack is None else _row(stack, position)
            samples += len(visits[k].index) * epochs
    return results, samples


def _row(stack: Any, position: int) -> Any:
    """Give one client's part of what `vmap` returned: nested dicts and tuples of tensors."""
    if isinstance(stack, dict):
        return {key: _row(value, position) for key, value in stack.items()}
    if isinstance(stack, tuple):
        return tuple(_row(value, position) for value in stack)
    return stack[position]


def _width(shared: Tree, visits: Sequence[Visit]) -> int:
    """Choose how many clients are stacked: a quarter of a gibibyte of state, at most 128."""
    size = tree.nbytes(shared) + max((tree.nbytes(visit.private) for visit in visits), default=0)
    return max(1, min(128, 2**28 // max(size, 1)))


def _run_group(verb: Verb, task: Task, shared: Tree, images: Images, group: Sequence[Visit]) -> tuple[Any, float]:
    length = max(len(visit.index) for visit in group)
    device = group[0].key.device
    index = torch.zeros(len(group), length, dtype=torch.int64, device=device)
    for row, visit in zip(index, group, strict=True):
        row[: len(visit.index)] = visit.index
    images, index = images.gather(index)
    n = torch.tensor([len(visit.index) for visit in group], device=device)
    meter = Meter()
    absent = False

    def one(own: Tree, private: Tree, index: Tensor, n: Tensor, key: Tensor, counts: Tensor) -> Any:
        nonlocal absent
        data = LocalData(images, index, n, key, counts, task.batch_size, meter)
        result = verb(task, {**shared, "each": own} if own else shared, private, data)
        absent = result is None
        # vmap must be given at least one tensor back
        return ({} if absent else result), torch.zeros((), device=device)

    try:
        stack, _ = torch.func.vmap(one, in_dims=0, randomness="error")(
            tree.stack([visit.own or {} for visit in group]),
            tree.stack([visit.private for visit in group]),
            index,
            n,
            torch.stack([visit.key for visit in group]),
            torch.stack([visit.class_counts for visit in group]),
        )
    except RuntimeError as error:
        name = getattr(verb, "__qualname__", repr(verb))
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
    return (None if absent else stack), meter.epochs


def choose(engine: str, model: Model, device: str) -> str:
    """Resolve "auto": stacked for models without convolutions, serial otherwise.

    On a CPU `vmap` turns convolutions into grouped ones that are 2-4 times slower than a client loop (`bench
    speed`), while small dense models gain an order of magnitude. On a GPU the same rule holds until a
    benchmark there says otherwise.
    """
    if engine != "auto":
        return engine
    return "serial" if is_convolutional(model) else "stacked"


BY_NAME: dict[str, Engine] = {"serial": serial, "stacked": stacked}
