"""Work that is written down operation by operation, and done again without Python.

Where models are small, mapping a verb over clients costs several times what it computes. But a verb is a pure function
of tensors that branches on no value: where shapes and settings are the same, it does the same operations to other
numbers. Those of one group of clients are written down, and torch's interpreter does them for the groups that follow:
the same operations in the same order, hence the same bits. What cannot be written down is done as ever.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from bench.task import Task

Work = Callable[[Task, Any], Any]
"""(task, nested dicts and tuples of tensors) -> the like. It changes none of them in place."""
Play = Callable[..., Sequence[Tensor]]
"""Tensors, one by one, to those that are made of them."""

WORTH = 15
"""Groups that save what writing down costs: it is done where more of the same shapes are to be expected."""
TIMES = 3
"""That the same shapes must have come again before anything is expected of them."""
_KINDS, _OPERATIONS = 256, 25_000
"""Most that a run remembers, of kinds of work and of operations, which take 4 KB each: where each round is of another
kind, nothing is won.
"""


class Recordings:
    """What one process has written down for one run."""

    def __init__(self) -> None:
        self._known: dict[Any, _Recording] = {}
        self._operations = 0

    def do(self, work: Work, name: object, task: Task, given: Any) -> Any:
        """Do some work, as ever or by a recording; the result is the same to the bit.

        Args:
            work: What to do. Tensors that it reads besides `given` are the same ones in every call.
            name: Says which work it is; nothing is written down where that cannot be pickled.
            task: Of the round.
            given: Nested dicts and tuples of tensors.
        """
        leaves, structure = tree_flatten(given)
        subject = _subject(name, task, leaves, structure)
        if subject is None or (subject not in self._known and len(self._known) == _KINDS):
            return work(task, given)
        mine = self._known.setdefault(subject, _Recording(task.round))
        mine.uses += 1
        if mine.play is not None:
            return mine.again(work, task, given, leaves)
        if mine.refused or self._operations >= _OPERATIONS or not mine.pays(task):
            return work(task, given)
        result = mine.record(work, task, leaves, structure)
        self._operations += mine.operations
        return result


@dataclass
class _Recording:
    """The operations of some work, once they are written down."""

    since: int
    """Round of the first use."""
    uses: int = 0
    operations: int = 0
    refused: bool = False
    tried: bool = False
    """Whether other numbers than those of the recording gave what the work gives."""
    play: Play | None = None
    """Leaves of what is given, and constants, to leaves of the result."""
    constants: list[Tensor] = field(default_factory=list)
    structure: TreeSpec | None = None
    """Of the result."""

    def pays(self, task: Task) -> bool:
        """Tell whether enough uses are to come, if they come as often as so far."""
        again, rounds = self.uses - 1, task.round - self.since
        return again >= TIMES and again * (task.rounds - task.round) > WORTH * max(rounds, 1)

    def record(self, work: Work, task: Task, leaves: list[Tensor], structure: TreeSpec) -> Any:
        """Do the work once more, and write it down unless that cannot be."""
        watched, read = _watched(task)
        own = [leaf.view_as(leaf) for leaf in leaves]  # two leaves may be one tensor here, and two another time
        writer = _Writer(own)
        with writer:
            result = work(watched, tree_unflatten(own, structure))
        answer, self.structure = tree_flatten(result)
        self.operations = len(writer.steps)
        self.refused = bool(read) or writer.unfit
        if not self.refused:
            self._take(writer, leaves, answer)
        return result

    def _take(self, writer: _Writer, leaves: list[Tensor], answer: list[Tensor]) -> None:
        try:
            self.play, self.constants = writer.compiled(leaves, answer), writer.constants
            played = self._played(leaves)
        except (RuntimeError, AttributeError):  # of torch's interpreter, to which some operation may be unknown
            self._refuse()
            return
        if not _same(played, answer):
            self._refuse()

    def again(self, work: Work, task: Task, given: Any, leaves: list[Tensor]) -> Any:
        """Do what was written down; the first time, see that the work itself gives the same."""
        played = self._played(leaves)
        if not self.tried:
            self.tried = True
            result = work(task, given)
            if not _same(played, tree_flatten(result)[0]):
                self._refuse()
            return result
        assert self.structure is not None
        return tree_unflatten(played, self.structure)

    def _played(self, leaves: list[Tensor]) -> list[Tensor]:
        assert self.play is not None
        # Nothing is rearranged: it would take as long as many replays, and might change bits.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return list(self.play(*leaves, *self.constants))

    def _refuse(self) -> None:
        self.refused, self.play, self.constants = True, None, []


def _subject(name: object, task: Task, leaves: list[Tensor], structure: TreeSpec) -> Any:
    """Give all that decides on the operations, besides the round; None where that cannot be said."""
    if task.public is not None or task.auxiliary is not None:  # other batches of them in every round
        return None
    try:
        said = pickle.dumps(name)
    except Exception:  # whatever a plug-in's own pickling raises
        return None
    settings = [getattr(task, each.name) for each in fields(task) if each.name != "round"]
    same = tuple(id(each) if isinstance(each, Tensor | dict) else each for each in settings)
    return said, same, structure, tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)


def _watched(task: Task) -> tuple[Task, list[str]]:
    """Give the same task, and a list that is empty until somebody reads the round."""
    read: list[str] = []

    class Watched(Task):
        def __getattribute__(self, name: str) -> Any:
            if name == "round" and sys._getframe(1).f_globals["__name__"] != "dataclasses":  # `replace` hands it on
                read.append(name)
            return super().__getattribute__(name)

    return Watched(**{each.name: getattr(task, each.name) for each in fields(task)}), read


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in what is written down."""

    number: int


class _Writer(TorchDispatchMode):
    """Writes down all operations, below differentiation and mapping.

    Args:
        given: Tensors that will be others when the work is done again.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Any, Any, list[_Place]]] = []
        self.constants: list[Tensor] = []
        """What was neither given nor made."""
        self.unfit = False
        """Whether some operation told Python a value, or drew from torch's generator."""
        self._places = WeakTensorKeyDictionary()
        self._count = 0
        self._given = self._new(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.unfit = self.unfit or _depends_on_values(func, args)
        if self.unfit:
            return func(*args, **kwargs)
        operands = _with(Tensor, self._place, (args, kwargs))
        result = func(*args, **kwargs)
        self.steps.append((func, *operands, self._new(_several(result))))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch leave its compiler where it is."""
        return False

    def _new(self, tensors: list[Tensor]) -> list[_Place]:
        places = [_Place(self._count + k) for k in range(len(tensors))]
        self._count += len(tensors)
        for tensor, place in zip(tensors, places, strict=True):
            self._places[tensor] = place
        return places

    def _place(self, tensor: Tensor) -> _Place:
        if tensor not in self._places:
            self.constants.append(tensor)
            self._places[tensor] = _Place(-len(self.constants))
        place: _Place = self._places[tensor]
        return place

    def compiled(self, leaves: list[Tensor], answer: list[Tensor]) -> Play:
        """Make a function of what was written: of leaves and constants, to the answer."""
        ends = [self._place(tensor) for tensor in answer]
        begins = [*self._given, *(_Place(-k) for k in range(1, len(self.constants) + 1))]

        def interpreted(*tensors: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(begins, tensors, strict=True))
            for func, args, kwargs, places in self.steps:
                args, kwargs = _with(_Place, known.__getitem__, (args, kwargs))
                known.update(zip(places, _several(func(*args, **kwargs)), strict=True))
            return tuple(known[place] for place in ends)

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes become constants, which is meant
            # `torch.jit.trace` would enter it in a list that lasts as long as the process.
            graph, _ = torch._C._create_graph_by_tracing(
                interpreted, (*leaves, *self.constants), lambda tensor: "", strict=True, force_outplace=False
            )
        torch._C._jit_pass_constant_pooling(graph)  # type: ignore[attr-defined]
        play: Play = torch._C._create_function_from_graph("play", graph)
        return play


_VARYING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


def _depends_on_values(func: Any, args: Any) -> bool:
    """Tell whether an operation draws, tells Python a value, or gives other shapes for other numbers."""
    if func is torch.ops.aten.index.Tensor:  # is said to, and does only where it is given a mask
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return not _VARYING.isdisjoint(func.tags)


def _with(kind: type, function: Callable[[Any], Any], given: Any) -> Any:
    """Put what a function gives in the place of everything of a kind, in lists, tuples and dictionaries."""
    if isinstance(given, kind):
        return function(given)
    if isinstance(given, list | tuple):
        return type(given)([_with(kind, function, each) for each in given])
    if isinstance(given, dict):
        return {name: _with(kind, function, each) for name, each in given.items()}
    return given


def _several(result: Any) -> list[Tensor]:
    """Give the tensors that an operation made; it says None of a gradient that nobody wants."""
    made = (result,) if isinstance(result, Tensor) else result or ()
    return [each for each in made if each is not None]


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Tell whether tensors have the same shapes, types and bits."""
    return len(some) == len(others) and all(
        (one.shape, one.dtype) == (other.shape, other.dtype) and _bits(one).equal(_bits(other))
        for one, other in zip(some, others, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
