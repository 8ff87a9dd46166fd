"""The other processes of a run's crew: Ray actors that do what they are told, and keep nothing but the data.

What one has in hand when it dies is done again by another: the bits are the same, as work is a function of what it is
given. Where work fails at an actor the run's own process does it again, and fails with a trace of its own.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.protocol.settings import BadConfig
from bench.sweep.cluster import (
    MODELS_BYTES,
    Payload,
    RayDied,
    Session,
    WorkersDied,
    import_ray,
    need_ray,
    packed,
    session,
    unpacked,
)
from bench.training.crew import Alone, Answer, Crew, Item, Surroundings
from bench.training.memory import peak_memory
from bench.training.parcel import Memory, Parcel, addresses, pack, unpack
from bench.tree import Tree

Make = Callable[[], Surroundings]
"""Loads the data of a run; it can be pickled."""

DEATHS = 3
"""Actors that may die one after the other, without any work done in between, each in the place of the one before."""
_LOOK_SECONDS = 1.0
"""Between two looks whether Ray lives, while nothing comes."""
_AHEAD = 2
"""Items that an actor is given at once, where there are many: one to do, and one to go on with."""
_KEPT = 2
"""Shared trees that an actor keeps: the newest broadcast, and what else an evaluation needs in between."""


@contextmanager
def hire(size: int, device: str, plugins: Sequence[Path], make: Make) -> Iterator[Crew]:
    """Give a run its crew, and dismiss it in the end, however that comes.

    Inside a task of Ray the actors are started on the same cluster, each with as much of a GPU as the task has;
    elsewhere Ray is started on this machine for as long as they are needed.

    Args:
        size: Processes, the run's own among them; the others load the data while this one goes on.
        device: "cpu" or "cuda".
        plugins: Files that the others must load before anything else can be unpickled.
        make: Gives them what they need to know of the run.

    Raises:
        BadConfig: Ray is not installed, or the cluster has fewer cores.
        RayDied: Ray, which was started here, does not start or did not live until the end.
    """
    if size <= 1:
        yield Alone()
        return
    need_ray(f"--workers-per-run {size}", "leave it out")
    in_task = import_ray().is_initialized()
    # A Ray of our own is for the others alone: it starts a process for each of its cores, wanted or not.
    with session(size - 1, shared_bytes=MODELS_BYTES) as here:
        available = int(here.ray.cluster_resources().get("CPU", 0.0))
        if in_task and available < size:
            raise BadConfig(f"--workers-per-run {size}: the cluster has {available} cores; use at most as many")
        crew = OnActors(here, size, device, in_task=in_task)
        try:
            crew.brief(make, plugins)
            yield crew
        finally:
            crew.dismiss()


class OnActors:
    """A crew of this process and Ray actors of one core each.

    Args:
        cluster: Where.
        size: Processes, this one among them.
        device: "cpu" or "cuda".
        in_task: Whether this process is a task of Ray: it may have a share of a GPU, and each actor gets as much.
    """

    def __init__(self, cluster: Session, size: int, device: str, in_task: bool = False) -> None:
        self.cluster, self.ray, self.size = cluster, cluster.ray, size
        ray = self.ray
        share = 0.0
        cards: list[str] = []
        if device == "cuda":
            share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0) if in_task else 0.0
            cards = [] if share else _cards()
        self.actor = ray.remote(num_cpus=1, num_gpus=share)(_Worker)
        self.briefing: Payload | None = None
        self.workers = [_Handle(cards[k % len(cards)] if cards else None) for k in range(1, size)]
        for worker in self.workers:
            self._start(worker)
        self.shared: deque[_Shared] = deque(maxlen=_KEPT)
        self.count = 0

    def brief(self, make: Make, plugins: Sequence[Path] = ()) -> None:
        """Tell the actors of a run; returns at once, and they load its data meanwhile."""
        self.briefing = packed(plugins, make)
        for worker in self.workers:
            self._brief(worker)

    def join(self, here: Surroundings) -> None:
        """Take in this process, which begins while actors on this machine still load what it has loaded; returns when
        those of a cluster have: their data may be others, and that shows before the first round.

        Raises:
            WorkersDied: They were killed, again and again.
            BadConfig: The data of one are other data. Besides, whatever loading them raises.
        """
        self.here = here
        self.shared.clear()
        for worker in self.workers if self.cluster.home is None else ():
            while not self._is_there(worker, wait=True):
                pass

    def map(
        self,
        work: Callable[[Surroundings, Tree, Item], Answer],
        shared: Tree,
        items: Sequence[Item],
        sizes: Sequence[float],
    ) -> list[Answer]:
        """Apply a function to items, largest first; this process takes the smallest that is left meanwhile.

        Raises:
            WorkersDied: Actors were killed, again and again. Besides, whatever `work` raises.
        """
        if len(items) <= 1:
            return [work(self.here, shared, item) for item in items]
        job, sent = pickle.dumps(work), self._share(shared)
        waiting = deque(sorted(range(len(items)), key=lambda k: -sizes[k]))
        in_hand: dict[Any, tuple[_Handle, int, list[Memory]]] = {}
        answers: dict[int, Answer] = {}
        while waiting or in_hand:
            for worker in filter(self._is_there, self.workers):
                busy = sum(holder is worker for holder, _, _ in in_hand.values())
                while waiting and (not busy or (busy < _AHEAD and len(waiting) > self.size)):
                    k, busy = waiting.popleft(), busy + 1
                    parcel, memory = pack(items[k])
                    in_hand[worker.actor.do.remote(job, sent.number, sent.reference, parcel)] = worker, k, memory
            for reference in self._finished(list(in_hand), wait=not waiting):
                if reference not in in_hand:
                    continue  # its actor died, and it waits again
                worker, k, memory = in_hand.pop(reference)
                found = self._answer(worker, reference)
                if found is None:
                    lost = [other for other, (holder, _, _) in in_hand.items() if holder is worker]
                    waiting.extendleft([k, *(in_hand.pop(other)[1] for other in lost)])
                elif found.parcel is None:
                    answers[k] = work(self.here, shared, items[k])
                else:
                    others = {"fixed": self.here.fixed(), "shared": sent.memory, "item": memory}
                    answers[k] = unpack(found.parcel, others)[0]
            if waiting:
                k = waiting.pop()
                answers[k] = work(self.here, shared, items[k])
        return [answers[k] for k in range(len(items))]

    def peak_memory(self) -> float:
        """Give the sum of the actors' largest memory, in bytes; of those that live now."""
        there = [worker for worker in self.workers if worker.loading is None]  # no other may ever find room
        return sum(self._answer(worker, worker.actor.peak_memory.remote()) or 0.0 for worker in there)

    def dismiss(self) -> None:
        """Stop the actors, unless Ray is dead and they with it."""
        with suppress(RayDied):
            self.cluster.require_alive()
            for worker in self.workers:
                self.ray.kill(worker.actor)

    def _start(self, worker: _Handle) -> None:
        worker.actor = self.actor.remote(worker.card)
        if self.briefing is not None:
            self._brief(worker)

    def _brief(self, worker: _Handle) -> None:
        worker.actor.brief.remote(self.briefing)
        worker.loading = worker.actor.ready.remote()

    def _is_there(self, worker: _Handle, wait: bool = False) -> bool:
        """Tell whether an actor has loaded its data: the others need not wait for it."""
        if worker.loading is None:
            return True
        done = self._finished([worker.loading], wait)
        fingerprint = self._answer(worker, worker.loading) if done else None
        if fingerprint is None:
            return False
        if fingerprint != self.here.fingerprint:
            raise BadConfig(
                f"--workers-per-run: another machine splits its data into {fingerprint}, this one into "
                f"{self.here.fingerprint}; give all machines the same data"
            )
        worker.loading = None
        return True

    def _share(self, shared: Tree) -> _Shared:
        """Put a tree where all actors can read it, unless it is there."""
        for known in self.shared:
            if known.tree is shared:
                return known
        parcel, memory = pack(shared)
        self.count += 1
        self.shared.append(_Shared(shared, self.count, self.ray.put(parcel), memory))
        return self.shared[-1]

    def _finished(self, references: list[Any], wait: bool) -> list[Any]:
        """Give the references that have been answered, at least one if we wait."""
        done: list[Any] = []
        while references and not done:
            many = 1 if wait else len(references)
            done = self.ray.wait(references, num_returns=many, timeout=_LOOK_SECONDS if wait else 0)[0]
            if not wait:
                break
            self.cluster.require_alive()
        return done

    def _answer(self, worker: _Handle, reference: Any) -> Any:
        """Give an actor's answer; None if it has died, and another has taken its place."""
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
            worker.deaths = 0 if isinstance(answer, _Answered) else worker.deaths
            return answer
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            self.cluster.require_alive(error)
            worker.deaths += 1
            if worker.deaths > DEATHS:
                raise WorkersDied(
                    "workers of this run died again and again (killed, or out of memory); the same command goes on, "
                    "and fewer --workers-per-run need less memory"
                ) from error
        self.ray.kill(worker.actor)
        self._start(worker)
        return None


@dataclass
class _Handle:
    """One actor, and the next one in its place."""

    card: str | None
    """Number of the GPU that it computes on; None: what Ray gives it, or none."""
    actor: Any = None
    loading: Any = None
    """Answered when the actor has loaded the run's data; None: it has."""
    deaths: int = 0
    """Since one of them last did any work."""


@dataclass(frozen=True)
class _Shared:
    """A tree that the actors can read."""

    tree: Tree
    number: int
    reference: Any
    memory: list[Memory]


@dataclass(frozen=True)
class _Answered:
    """What an actor gives back."""

    parcel: Parcel | None
    """None: the work failed."""


@dataclass
class _Worker:
    """What an actor is."""

    card: str | None
    here: Surroundings | None = None
    error: Exception | None = None
    shared: dict[int, tuple[Tree, list[Memory]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        if self.card is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.card  # before CUDA is used

    def brief(self, payload: Payload) -> None:
        """Load the data of a run; what goes wrong is said when somebody waits for it."""
        self.here, self.error = None, None
        self.shared.clear()
        try:
            with unpacked(payload) as make:
                self.here = make()
        except Exception as error:  # a plug-in may raise anything; it is said where it is asked for
            self.error = error

    def ready(self) -> str:
        """Say which split this actor has."""
        return self._surroundings().fingerprint

    def do(self, work: bytes, number: int, shared: Parcel, item: Parcel) -> _Answered:
        """Apply a function to an item."""
        here = self._surroundings()
        if number not in self.shared:
            self.shared[number] = unpack(shared)
            while len(self.shared) > _KEPT:
                del self.shared[min(self.shared)]
        value, memory = unpack(item)
        tree, common = self.shared[number]
        try:
            answer = pickle.loads(work)(here, tree, value)
        except Exception:  # the run's own process does it again, and shows the author's trace
            return _Answered(None)
        return _Answered(pack(answer, addresses(fixed=here.fixed(), shared=common, item=memory))[0])

    def peak_memory(self) -> float:
        """Give the largest memory of this process or, with a GPU, of its tensors there, in bytes."""
        here = self._surroundings()
        return peak_memory(here.population.device) or 0.0

    def _surroundings(self) -> Surroundings:
        if self.error is not None:
            raise self.error
        assert self.here is not None
        return self.here


def _cards() -> list[str]:
    """List the GPUs that this process sees, as CUDA numbers them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(k) for k in range(torch.cuda.device_count())]
