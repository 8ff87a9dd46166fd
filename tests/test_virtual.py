"""The path of a GPU, on a device that tells what CUDA would refuse and what it would wait for (`tests.virtual`).

No client's work may wait for the device, nor may a round but for what the host must know:

    ROUND       whether the server's state is finite
    TRIP        whether the clients' are, and what the uploads weigh: of each exchange
    a group     how many samples were processed: of each group of stacked clients
    a model     what it took the test images for: of each kind of model, in an evaluation
    a tensor    of states that are saved, or whose digest is taken
    SETUP       what a run begins with goes there: a few times, however many clients there are

What is beyond that is in `INSIDE` and `BESIDE`, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, keys, losses, tree
from bench.contract import toy
from bench.optim import Adam, Sgd
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training import checkpoint, evaluation, population, rounds, states
from bench.training import engine as engines
from bench.training.crew import visit_all
from bench.training.population import Population
from bench.training.rounds import Run
from bench.training.visit import Visit
from tests import virtual
from tests.by_hand import SHORT, short

SIZES = (20, 9, 0, 26, 3, 17, 1, 12)
SETTING = replace(toy.SETTING, rounds=2, epochs=1, eval_every=2, unseen=1, weight_decay=1e-3, clip=5.0)
COHORT = SETTING.cohort_size(len(SIZES))
WITH_PARTS = (
    "fedavg+focal+topk+trimmed_mean",
    "fedrep(head_epochs=1)+balanced_softmax(prior='estimated')+tau_norm",
)

SETUP, ROUND, TRIP = 19, 1, 2
INSIDE = {
    "balancefl": ("_linalg_eigh", "the root of a covariance is made of its eigenvectors, and they may not be found"),
    "fedfomo": ("_local_scalar_dense", "how many examples lie aside decides shapes, where clients are not padded"),
    "knnper": ("_local_scalar_dense", "how many examples lie aside decides shapes, where clients are not padded"),
}
"""Once in a client's work: which operation, and why."""
BESIDE = {
    "cfl": (3, "who takes part, from which cluster, and how updates lie decides who parts, on the host"),
    "fed3r": (1, "whom it has asked decides whom it asks"),
    "fedas": (1, "what bodies weigh is what their clients send"),
    "fedgh": (1, "who holds a class decides shapes"),
    "fedmtl": (1, "relations are made of eigenvectors, and they may not be found"),
    "fedpac": (4, "who has examples decides shapes; least squares are scipy's, which has two tensors and gives one"),
    "fedproto": (1 + COHORT, "only what is known is sent: each payload, down and up, is asked how much that is"),
    "ifca": (2, "whose choices weigh in the means of each cluster's body and head"),
    "fpl": (5, "clusters are found on the host, which has three tensors and gives one; those sent are counted"),
    WITH_PARTS[0]: (2, "whose uploads are decoded, and what they weigh in the rule"),
    WITH_PARTS[1]: (1, "whose uploads they are"),
}
"""In a round, of all clients together: how often, and why."""


@dataclass
class Watched:
    """What was seen of clients' work."""

    inside: list[virtual.Wait] = field(default_factory=list)
    """Waits between its begin and its end."""
    verbs: int = 0
    """How often a client, or a group of stacked ones, was at work."""
    groups: int = 0
    """Of stacked clients."""

    def forget(self) -> None:
        self.inside, self.verbs, self.groups = [], 0, 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watch whatever is asked of clients."""
    seen = Watched()

    def watching(here: Any, crew: Any, verb: Any, task: Task, shared: Tree, visits: list[Visit], *probe: Any) -> Any:
        def within(*given: Any) -> Any:
            with virtual.waits() as found:
                result = verb(*given)
            seen.verbs += 1
            seen.inside += found
            return result

        if here.engine.name == "stacked":
            seen.groups += len(here.engine.groups(shared, visits))
        return visit_all(here, crew, within, task, shared, visits, *probe)

    for module in (rounds, evaluation):
        monkeypatch.setattr(module, "visit_all", watching)
    return seen


@pytest.fixture(autouse=True)
def as_wide_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stack as many clients on either device: how many decides on last bits."""
    monkeypatch.setattr(engines, "_width", lambda shared, visits: 128)


@pytest.fixture
def device() -> Iterator[str]:
    with virtual.device() as name:
        yield name


def parsed(name: str) -> Algorithm:
    (algorithm,) = [short(name)] if name in SHORT else parse_algorithms(name)
    return algorithm


def begun(algorithm: Algorithm, engine: str = "serial", device: str = "cpu", **more: Any) -> Run:
    return toy.run(algorithm, engine, device=device, **{"setting": SETTING, "sizes": SIZES, **more})


def most_in_a_round(run: Run, name: str = "") -> int:
    """Count how often the host may wait in the next round, groups of stacked clients apart."""
    trips = run.algorithm.exchanges(run.task_at(run.progress.round))
    return ROUND + TRIP * len(trips) + BESIDE.get(name, (0, ""))[0]


def require_few(found: list[virtual.Wait], watched: Watched, most: int, name: str = "") -> None:
    """Require that nothing waits inside a client's work, and little outside."""
    operation, _ = INSIDE.get(name, ("", ""))
    assert [str(wait) for wait in watched.inside if wait.operation != operation] == []
    assert len(watched.inside) <= watched.verbs
    inside = set(map(id, watched.inside))
    beside = [str(wait) for wait in found if id(wait) not in inside]
    assert len(beside) <= most + watched.groups, "\n".join(beside)


# The device ---------------------------------------------------------------------------------------

DONE: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "a number": (lambda x, y: x.sum().item(), 1),
    "a branch": (lambda x, y: bool((x > 1).any()), 1),
    "a length": (lambda x, y: y.new_zeros(int(y.sum())), 1),
    "a list": (lambda x, y: x.tolist(), 1),
    "a copy": (lambda x, y: x.cpu(), 1),
    "a copy back": (lambda x, y: torch.ones(3).to(x.device), 1),
    "a copy back that is not waited for": (lambda x, y: torch.ones(3).to(x.device, non_blocking=True), 0),
    "a list that goes there": (lambda x, y: torch.tensor([1, 2], device=x.device), 1),
    "a list beside": (lambda x, y: x.new_tensor([1, 2]), 1),
    "a number that fills": (lambda x, y: torch.full((), 3, device=x.device), 0),
    "another type": (lambda x, y: x.to(torch.float64), 0),
    "places": (lambda x, y: torch.nonzero(y), 1),
    "a mask": (lambda x, y: x[x > 1], 1),
    "a mask to write a number by": (lambda x, y: x.clone().__setitem__(x > 1, 0.0), 0),
    "a mask to write a tensor by": (lambda x, y: x.clone().__setitem__(x > 2, x[:1, 0]), 1),
    "a mask of the host": (lambda x, y: x[torch.tensor([True, False])], 1),
    "a mask to select by": (lambda x, y: x.masked_select(x > 1), 1),
    "an index": (lambda x, y: x[:, y], 0),
    "an index of the host": (lambda x, y: x[:, torch.tensor([0, 1])], 1),
    "an index to write a number at": (lambda x, y: x.clone().__setitem__((y[:2], y[:2]), 1.0), 1),
    "an index to write tensors at": (lambda x, y: x.index_put((y[:1],), x[:1]), 0),
    "a slice": (lambda x, y: x[0, 1:], 0),
    "different ones": (lambda x, y: y.unique(), 1),
    "counts": (lambda x, y: torch.bincount(y), 1),
    "counts by scattering": (lambda x, y: y.new_zeros(3).scatter_add_(0, y, torch.ones_like(y)), 0),
    "repetition": (lambda x, y: y.repeat_interleave(y), 1),
    "repetition to a known size": (lambda x, y: y.repeat_interleave(y, output_size=3), 0),
    "equality": (lambda x, y: torch.equal(x, x), 1),
    "finiteness": (lambda x, y: x.isfinite().all(), 0),
    "a choice": (lambda x, y: torch.where(x > 1, x, 2.0), 0),
    "a choice of the host's number": (lambda x, y: torch.where(x > 1, x, torch.tensor(2.0)), 1),
    "the host's number": (lambda x, y: torch.tensor(2.0) * x + 1, 0),
    "a filled mask": (lambda x, y: x.masked_fill(x > 1, 0.0), 0),
    "a mask filled with a tensor": (lambda x, y: x.masked_fill(x > 1, x.sum()), 1),
    "a power": (lambda x, y: x ** x.sum(), 0),
    "one-hot rows": (lambda x, y: torch.nn.functional.one_hot(y, 3), 0),
    "one-hot rows of unknown length": (lambda x, y: torch.nn.functional.one_hot(y), 1),
    "an order": (lambda x, y: (x.argsort(stable=True), x.topk(1), x.cumsum(0), y.max(0)), 0),
    "eigenvectors": (lambda x, y: torch.linalg.eigh(x @ x.T), 1),
    "an orthogonal basis": (lambda x, y: torch.linalg.qr(x), 0),
    "a gradient": (lambda x, y: torch.func.grad(lambda w: torch.nn.functional.linear(w, x).relu().sum())(x), 0),
    "clipping": (lambda x, y: torch._foreach_mul_([x.clone()], (1 / x.norm()).clamp(max=1.0)), 0),
}


@pytest.mark.parametrize("work", DONE)
def test_the_device_waits_as_cuda_does_and_gives_what_the_cpu_gives(work: str, device: str) -> None:
    x, y = torch.tensor([[0.5, 2.0, 1.5], [1.0, 3.0, -1.0]]), torch.tensor([0, 1, 2])
    do, times = DONE[work]
    theirs = x.to(device), y.to(device)
    with virtual.waits() as found:
        done = do(*theirs)
    assert len(found) == times, "\n".join(map(str, found))
    assert all(wait.where.startswith("tests/test_virtual.py:") for wait in found)
    expected = do(x, y)
    for one, other in zip(tensors(done), tensors(expected), strict=True):
        assert torch.equal(one.cpu(), other)


def tensors(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for each in x for t in tensors(each)] if isinstance(x, tuple) else []


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is made on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * torch.ones(3)


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a sum": lambda x: x + torch.ones(3),
    "the other way": lambda x: torch.ones(3) + x[0, 0],
    "a sum in its place": lambda x: torch.ones(()).add_(x[0, 0]),
    "a comparison": lambda x: torch.arange(3) < x.sum(),
    "a choice": lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
    "a product": lambda x: x @ torch.ones(3, 3),
    "a layer": lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
    "a stack of numbers": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "rows": lambda x: x.index_select(0, torch.tensor([0])),
    "gathering": lambda x: x.gather(1, torch.tensor([[0], [1]])),
    "a search": lambda x: torch.searchsorted(x[0], torch.tensor([1.0])),
    "several at once": lambda x: torch._foreach_add([x], [torch.ones(2, 3)]),
    "stacked": lambda x: torch.vmap(lambda row: row * torch.ones(3))(x),
    "backward": lambda x: torch.autograd.grad(Backwards.apply(w := x.clone().requires_grad_()).sum(), w),
}


@pytest.mark.parametrize("work", REFUSED)
def test_the_device_refuses_what_cuda_refuses(work: str, device: str) -> None:
    with pytest.raises(
        virtual.Mixed, match=r"^tests/test_virtual.py:\d+: \w+ is given a tensor of .* on the host beside"
    ):
        REFUSED[work](torch.ones(2, 3).to(device))


def test_a_copy_to_the_host_is_refused_that_is_read_before_it_is_there(device: str) -> None:
    with pytest.raises(NotImplementedError):
        torch.ones(2).to(device).to("cpu", non_blocking=True)


def test_the_device_is_no_memory_of_the_host(device: str) -> None:
    x = torch.ones(2).to(device)
    with pytest.raises(TypeError, match="copy the tensor to host memory first"):
        x.numpy()
    assert x.device == torch.device(device, 0) and not torch.cuda.is_initialized()
    view = x[1:]
    view.add_(1)
    assert x.tolist() == [1.0, 2.0] and view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


# All algorithms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", [*ALGORITHMS, *WITH_PARTS])
def test_an_algorithm_trains_stops_goes_on_and_is_tested_there(
    name: str, engine: str, watched: Watched, device: str, tmp_path: Path
) -> None:
    algorithm, file = parsed(name), tmp_path / "checkpoint.pt"
    expected = toy.finish(begun(algorithm, engine)).outcome()

    with virtual.waits() as setup:
        first = begun(algorithm, engine, device, checkpoint=file)
    first.saved = math.inf  # not by itself, as it would be where rounds are slow
    assert len(setup) <= SETUP, "\n".join(map(str, setup))
    most = most_in_a_round(first, name)
    watched.forget()
    with virtual.waits() as found:
        first.step()
    require_few(found, watched, most, name)
    tensors = len(tree.flatten(toy.states(first)))
    with virtual.waits() as saved:
        first._save(True)
    assert len(saved) <= tensors

    with virtual.waits() as loaded:
        second = begun(algorithm, engine, device, checkpoint=file)
    assert second.resumed and all(map(virtual.there, tree.flatten(toy.states(second)).values()))
    assert len(loaded) <= len(setup) + tensors
    second.saved, evaluate = math.inf, second.evaluate

    def tested(task: Task, completed: int, last: bool) -> dict[str, float | None]:
        watched.forget()
        with virtual.waits() as found:
            measured = evaluate(task, completed, last)
        kinds = {tally.model.removesuffix(".masked") for tally in second.progress.counts}
        require_few(found, watched, len(kinds), name)
        return measured

    second.evaluate = tested  # type: ignore[method-assign]
    second.step()
    tensors = len(tree.flatten(toy.states(second)))
    with virtual.waits() as summed:
        there = second.outcome()
    assert len(summed) <= tensors + 1  # how many classes clients have
    assert (there.digest, there.metrics) == (expected.digest, expected.metrics)


# The rest of the path -----------------------------------------------------------------------------

PATHS: dict[str, dict[str, Any]] = {
    "half precision": {"precision": "bf16"},
    "convolutions": {"model": "lenet5", "augment": "crop_flip"},
    "own statistics": {"model": "resnet8", "norm": "batch", "statistics": "personal", "augment": "batch_crop_flip"},
    "balanced statistics": {
        "model": "resnet8",
        "norm": "batch",
        "statistics": "balanced",
        "kappa": 0.4,
        "server_momentum": 0.3,
        "balance": True,
        "penalty": 0.1,
    },
    "orientations by passes": {"augment": "altflip"},
    "attacks": {"attack": "pgd", "attack_steps": 2},
    "a last visit": {"final_visit": True, "client_weights": "uniform", "lost": 0.3},
}


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("path", PATHS)
def test_what_a_setting_asks_for_is_done_there(path: str, engine: str, watched: Watched, device: str) -> None:
    fields = dict(PATHS[path])
    more = {"precision": fields.pop("precision", "fp32"), "setting": replace(SETTING, eval_every=1, **fields)}
    if "model" in fields:
        more |= {"dataset": toy.Toy(enlarged=2, test=12), "sizes": (7, 3, 0, 5, 0, 0, 0, 2)}
        more["setting"] = replace(more["setting"], rounds=1)
    expected = toy.finish(begun(parsed("fedper"), engine, **more)).outcome()
    found = toy.finish(begun(parsed("fedper"), engine, device, **more)).outcome()
    assert (found.digest, found.metrics) == (expected.digest, expected.metrics)
    assert watched.verbs and not watched.inside


def test_states_in_a_file_and_kept_models_come_from_there(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    outcomes = []
    for where in ("cpu", device):
        run = begun(parsed("fedper"), device=where, checkpoint=tmp_path / where / "checkpoint.pt")
        run.models = tmp_path / where / "models"
        run.step()
        run._save(True)
        again = begun(parsed("fedper"), device=where, checkpoint=tmp_path / where / "checkpoint.pt")
        again.models = run.models
        outcomes.append(toy.finish(again).outcome())
    assert outcomes[0].digest == outcomes[1].digest
    assert outcomes[0].models == outcomes[1].models != {}


@dataclass(frozen=True)
class InAFile:
    """Images that are read when they are asked for, with the rows on the host."""

    x: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        assert not virtual.there(rows)
        return self.x[rows]

    def prefetch(self, rows: Tensor) -> None:
        assert not virtual.there(rows)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_images_in_a_file_are_waited_for_once_a_batch_at_most(
    engine: str, watched: Watched, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device draws which they are, and the host reads them: for stacked clients all at once, before they begin."""
    monkeypatch.setattr(population, "RESIDENT", 0)  # so few would be read into memory
    job = begun(parsed("fedavg"), engine, setting=replace(SETTING, rounds=3, eval_every=3)).job
    assert isinstance(job.splits.train_x, Tensor)
    streamed = replace(job, splits=replace(job.splits, train_x=InAFile(job.splits.train_x)))
    expected = toy.finish(Run(job)).outcome().digest
    run = Run(replace(streamed, device=device))
    run.step()  # one client's operations are counted in the first round, and that client is not stacked
    watched.forget()
    run.step()
    batches = sum(-(-SIZES[k] // SETTING.batch_size) for k in run.population.cohort(1))
    assert len(watched.inside) == (batches if engine == "serial" else 0)
    assert {wait.operation for wait in watched.inside} <= {"copy_"}
    assert toy.finish(run).outcome().digest == expected


# Planted faults: in a plug-in ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sound(Algorithm):
    """FedAvg, whose logits something is done to."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        def loss(params: Tree, batch: Batch) -> Tensor:
            return losses.cross_entropy(self.changed(task.logits(params, batch.x), data, batch), batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits


class HostTensor(Sound):
    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits + torch.linspace(0, 1, logits.shape[1])


class HostTarget(Sound):
    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits - logits @ torch.eye(logits.shape[1])


class HostMask(Sound):
    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return torch.where(torch.arange(logits.shape[1]) < 5, logits, -1e4)


class HostMaskAsIndex(Sound):
    stackable = False

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits[torch.ones(len(logits), dtype=torch.bool)]


class MaskAsIndex(Sound):
    stackable = False

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits[batch.weight > 0]


class Item(Sound):
    stackable = False

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits / max(logits.detach().abs().max().item(), 1.0)


class Branch(Sound):
    stackable = False

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits if (batch.weight > 0).any() else 0 * logits


class MadeOnHost(Sound):
    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits + torch.tensor([0.1] * logits.shape[1], device=logits.device)


class Offered(Sound):
    """No fault: what `Task`, `LocalData`, `keys` and `tree` offer a local update waits for nothing."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        means = data.class_means(lambda x: task.model.features(shared["body"], x))
        weights = (1 / data.class_counts.clamp(min=1))[data.y]

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            noise = keys.normal_rows(batch.keys, z.shape[1]) * means.std()
            with evaluating():
                apart = (z - means[batch.y] + noise).square().mean(1)
            logits = task.model.logits(params["head"], z) + losses.one_hot(batch.y, task.num_classes)
            return losses.balanced_softmax(logits, batch, data.class_counts) + losses.mean(apart, batch)

        model = task.sgd(loss, shared, data.batches(steps=3, weights=weights, views=2))
        model, momentum = task.resume_sgd(loss, model, data.batches(1, "again"), None)
        model, _ = task.resume_sgd(loss, model, data.batches(steps=2), momentum)
        model, _ = task.train(
            Adam(1e-3), loss, model, data.batches(steps=2), edit=lambda g, w, batch: tree.scale(g, 0.5)
        )
        for batch in data.batches(steps=1, batch_size=4):
            _, gradient, model = task.gradient(loss, model, batch)
            model, _ = task.step(task.optimiser(), model, gradient, None, batch)
        return tree.where(data.steps(1) > 0, model, shared), private


class NumberOnHost(Sound):
    """No fault: CUDA takes a number from the host into an elementwise operation, and nobody waits."""

    def changed(self, logits: Tensor, data: LocalData, batch: Batch) -> Tensor:
        return logits * torch.tensor(2.0)


MIXED = (HostTensor, HostTarget, HostMask)
WAITED_FOR = {
    HostMaskAsIndex: "index",
    MaskAsIndex: "index",
    Item: "_local_scalar_dense",
    Branch: "_local_scalar_dense",
}


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("plugin", MIXED)
def test_a_host_tensor_in_a_local_update_is_refused(plugin: type[Sound], engine: str, device: str) -> None:
    told = r"^tests/test_virtual.py:\d+: \w+ is given a tensor of \(6.*\) on the host beside one on the device; make it"
    with pytest.raises(virtual.Mixed, match=told):
        begun(plugin(), engine, device).step()


@pytest.mark.parametrize("plugin", [*WAITED_FOR, MadeOnHost])
def test_a_wait_in_a_local_update_is_told(plugin: type[Sound], watched: Watched, device: str) -> None:
    run = begun(plugin(), device=device)
    with virtual.waits() as found:
        run.step()
    forward = [wait for wait in watched.inside if wait.operation != "_index_put_impl_"]  # backward of an index
    assert {wait.operation for wait in forward} == {WAITED_FOR.get(plugin, "copy_")}
    assert all(wait.where.startswith("tests/test_virtual.py:") for wait in forward)
    with pytest.raises(AssertionError, match=r"tests/test_virtual\.py:"):
        require_few(found, watched, most_in_a_round(run))


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("plugin", [Sound, Offered, NumberOnHost])
def test_what_is_sound_is_not_told(plugin: type[Sound], engine: str, watched: Watched, device: str) -> None:
    run = begun(plugin(), engine, device)
    with virtual.waits() as found:
        run.step()
    require_few(found, watched, most_in_a_round(run))


# Planted faults: in the core ----------------------------------------------------------------------


def keys_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Population, "visit", _then(Population.visit, lambda visit: replace(visit, key=visit.key.cpu())))


def examples_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Population, "visit", _then(Population.visit, lambda visit: replace(visit, index=visit.index.cpu())))


def mask_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalData, "mask", property(lambda data: (torch.arange(len(data.index)) < data.n).float()))


def momentum_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sgd, "start", lambda self, params: tree.map(lambda leaf: torch.zeros(leaf.shape), params))


def states_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states, "_keep", lambda leaf: leaf.detach().cpu())


def resumed_on_the_host(patch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load
    patch.setattr(checkpoint, "load", lambda file, device: load(file, "cpu"))


def copied_while_the_host_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tree, "bring", lambda x, device: x.to(device))


def counted_by_the_largest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Population, "_counted", lambda self, y: torch.bincount(y, minlength=self.num_classes))


def weighed_leaf_by_leaf(patch: pytest.MonkeyPatch) -> None:
    usual = Uploads._combine

    def combine(self: Uploads, key: str | None, weights: Any) -> Any:
        sent = self.trees if key is None else [upload[key] for upload in self.trees]
        leaves = [tree.flatten(each) for each in sent]
        combined = {path: [leaf[path] for leaf in leaves] for path in leaves[0]}
        there = torch.tensor(weights, dtype=torch.float64).to(self.sizes.device, non_blocking=True)
        one_by_one = (Uploads([{"": leaf} for leaf in each], self.sizes) for each in combined.values())
        return tree.unflatten(dict(zip(combined, (usual(each, "", there) for each in one_by_one), strict=True)))

    patch.setattr(Uploads, "_combine", combine)


def looked_at_leaf_by_leaf(patch: pytest.MonkeyPatch) -> None:
    def is_finite(*trees: Tree) -> bool:
        return all(bool(leaf.isfinite().all()) for each in trees for leaf in tree.flatten(each).values())

    patch.setattr(tree, "is_finite", is_finite)


def _then(method: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *given: change(method(*given))


def stop_and_go_on(engine: str, device: str, file: Path, watched: Watched) -> None:
    """Require of two rounds, with a checkpoint between them, that nothing is mixed and few things are waited for."""
    for resumed in (False, True):
        run = begun(parsed("fedper"), engine, device, checkpoint=file, setting=replace(SETTING, rounds=3, eval_every=3))
        assert run.resumed is resumed
        run.saved = math.inf
        most = most_in_a_round(run)
        watched.forget()
        with virtual.waits() as found:
            run.step()
        require_few(found, watched, most)
        run._save(True)


FAULTS: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    keys_on_the_host, examples_on_the_host, mask_on_the_host, momentum_on_the_host, states_on_the_host,
    resumed_on_the_host, copied_while_the_host_waits, counted_by_the_largest, weighed_leaf_by_leaf,
    looked_at_leaf_by_leaf,
)  # fmt: skip


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_core_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    engine: str,
    watched: Watched,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_and_go_on(engine, device, tmp_path / "sound.pt", watched)
    fault(monkeypatch)
    with pytest.raises((virtual.Mixed, AssertionError)):
        stop_and_go_on(engine, device, tmp_path / "faulty.pt", watched)
