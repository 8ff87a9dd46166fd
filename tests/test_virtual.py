"""The path of a GPU, on a device that tells what CUDA would refuse and what it would wait for (`tests.virtual`).

No client's work may wait for the device, nor may a round but for what the host must know:

    ROUND       whether the server's state is finite
    TRIP        whether the clients' are, and what the uploads weigh: of each exchange
    a group     how many samples were processed: of each group of stacked clients
    a model     what it took the test images for: of each kind of model, in an evaluation

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
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, keys, losses, tree
from bench.contract import toy
from bench.optim import Sgd
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training import checkpoint, evaluation, rounds, states
from bench.training.crew import visit_all
from bench.training.population import Population
from bench.training.rounds import Run
from bench.training.visit import Visit
from tests import virtual

SIZES = (20, 9, 0, 26, 3, 17, 1, 12)
SETTING = replace(toy.SETTING, rounds=2, epochs=1, eval_every=2, unseen=1, weight_decay=1e-3, clip=5.0)
SHORTER = {
    "creff": "creff(match_steps=2, head_epochs=1)",
    "fedic": "fedic(steps=2)",
    "fedloge": "fedloge(etf_steps=2)",
    "fedrep": "fedrep(head_epochs=1)",
}
WITH_PARTS = (
    "fedavg+focal+topk+trimmed_mean",
    "fedrep(head_epochs=1)+balanced_softmax(prior='estimated')+tau_norm",
)

ROUND, TRIP = 1, 2
INSIDE = {
    "balancefl": ("_linalg_eigh", "the root of a covariance is made of its eigenvectors, and they may not be found"),
    "knnper": ("_local_scalar_dense", "how many examples lie aside decides shapes, where clients are not padded"),
}
"""Once in a client's work: which operation, and why."""
BESIDE = {
    "fedpac": (4, "the server's least squares are scipy's, on the host; who has examples decides shapes"),
    "fedproto": (1 + len(SIZES), "what is sent is only what is known: each payload is asked for its size"),
    WITH_PARTS[0]: (3, "whose uploads are decoded, and the weights of the rule in the mean's place"),
    WITH_PARTS[1]: (1, "whose uploads they are"),
}
"""In a round at most, of all clients together: how often, and why."""


@dataclass
class Watched:
    """What was seen of clients' work."""

    inside: list[virtual.Wait] = field(default_factory=list)
    """Waits between its begin and its end."""
    verbs: int = 0
    """How often something was asked of a client, or a group of them."""
    groups: int = 0
    """Of stacked clients."""


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

        if here.engine.name == "stacked" and visits:
            seen.groups += len(here.engine.groups(shared, visits))
        return visit_all(here, crew, within, task, shared, visits, *probe)

    for module in (rounds, evaluation):
        monkeypatch.setattr(module, "visit_all", watching)
    return seen


@pytest.fixture
def device() -> Iterator[str]:
    with virtual.device() as name:
        yield name


def parsed(name: str) -> Algorithm:
    (algorithm,) = parse_algorithms(SHORTER.get(name, name))
    return algorithm


def require_few(name: str, found: list[virtual.Wait], watched: Watched, most: int) -> None:
    """Require that nothing waits inside a client's work, and little outside."""
    operation, _ = INSIDE.get(name, ("", ""))
    assert not [str(wait) for wait in watched.inside if wait.operation != operation]
    assert len(watched.inside) <= watched.verbs
    beside = [str(wait) for wait in found if wait not in watched.inside]
    assert len(beside) <= most + watched.groups, "\n".join(beside)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", [*ALGORITHMS, *WITH_PARTS])
def test_an_algorithm_runs_there(name: str, engine: str, watched: Watched, device: str, tmp_path: Path) -> None:
    algorithm = parsed(name)

    def begun(device: str, file: Path | None) -> Run:
        return toy.run(algorithm, engine, setting=SETTING, sizes=SIZES, device=device, checkpoint=file)

    expected = toy.finish(begun("cpu", None)).outcome()
    first = begun(device, tmp_path / "checkpoint.pt")
    watched.__init__()
    with virtual.waits() as found:
        first.step()
    trips = len(first.algorithm.exchanges(first.task_at(0)))
    require_few(name, found, watched, ROUND + TRIP * trips + BESIDE.get(name, (0, ""))[0])
    first._save(True)

    second = begun(device, tmp_path / "checkpoint.pt")
    assert second.resumed and all(map(virtual.there, tree.flatten(toy.states(second)).values()))
    second.setting = second.setting
    evaluate = second.evaluate
    watched.__init__()

    def tested(*given: Any) -> Any:
        watched.__init__()
        with virtual.waits() as found:
            measured = evaluate(*given)
        kinds = {tally.model.removesuffix(".masked") for tally in second.progress.counts}
        require_few(name, found, watched, len(kinds))
        return measured

    second.evaluate = tested
    second.step()
    there = second.outcome()
    assert (there.digest, there.metrics) == (expected.digest, expected.metrics)
