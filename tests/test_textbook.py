"""Methods that train a body and a head, against their algorithm boxes in plain torch: whole runs, what a client keeps,
and the models that are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from optuna.distributions import FloatDistribution, IntDistribution
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Tree, tree
from bench.contract import checks, toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.presets import PAPER
from bench.training.rounds import Run
from bench.tuning.space import space

SETTING = replace(toy.SETTING, rounds=4, epochs=2, participation=0.4, momentum=0.9, weight_decay=1e-2, lr_decay=0.7)
"""Momentum and weight decay move whatever they can reach."""
SIZES = (60, 44, 33, 17, 9, 0, 26, 20)
EVERYTHING = ("body", "head")

Weights = dict[str, Tensor]
"""By path."""


def descend(w: Weights, moving: tuple[str, ...], batches: Iterable[Batch], lr: float, pull: float = 0.0) -> Weights:
    """Run torch's SGD on what lies below `moving`; the rest stands still. `pull` draws back to the start."""
    start, w = w, {path: leaf.clone() for path, leaf in w.items()}
    leaves = {path: leaf.requires_grad_() for path, leaf in w.items() if path.startswith(moving)}
    optimiser = torch.optim.SGD(leaves.values(), lr, momentum=0.9, weight_decay=1e-2)
    for batch in batches:
        optimiser.zero_grad()
        hidden = torch.relu(batch.x.flatten(1) @ w["body/hidden/weight"].T + w["body/hidden/bias"])
        F.cross_entropy(hidden @ w["head/weight"].T + w["head/bias"], batch.y).backward()
        for path, leaf in leaves.items():
            assert leaf.grad is not None
            leaf.grad += pull * (leaf.detach() - start[path])
        optimiser.step()
    return {path: leaf.detach() for path, leaf in w.items()}


@dataclass
class Client:
    """One client in one round."""

    run: Run
    k: int
    round: int

    def batches(self, epochs: int, salt: str = "") -> list[Batch]:
        population = self.run.population
        visit = population.visit(self.k, self.round, {})
        n = torch.tensor(len(visit.index))
        data = LocalData(population.images, visit.index, n, visit.key, visit.class_counts, SETTING.batch_size)
        return list(data.batches(epochs, salt)) if n else []

    def train(self, w: Weights, moving: tuple[str, ...] = EVERYTHING, epochs: int = 2, pull: float = 0.0) -> Weights:
        return descend(w, moving, self.batches(epochs), 0.05 * 0.7**self.round, pull)

    def tune(self, w: Weights, rate: float) -> Weights:
        """Five epochs of everything, reported after the first too; no schedule lowers the rate."""
        batches = [*self.batches(1, "adapt 0"), *self.batches(4, "adapt 1")]
        return descend(w, EVERYTHING, batches, 0.05 * rate)


@dataclass
class Box:
    """What a paper's algorithm box says."""

    local: Callable[[Client, Weights], Weights]
    """Local work, from the client's model."""
    sent: tuple[str, ...] = EVERYTHING
    kept: tuple[str, ...] = ()
    shared: bool = True
    """Whether there is a model of all."""
    tuned: float | None = None
    """Rate of fine-tuning before the test."""


def in_turn(client: Client, w: Weights, head_epochs: int, body_epochs: int) -> Weights:
    return client.train(client.train(w, ("head",), head_epochs), ("body",), body_epochs)


BOXES: dict[tuple[str, str], Box] = {
    ("fedavg", ""): Box(Client.train),
    ("fedavg_prior", ""): Box(Client.train),
    ("fedprox", "mu=0.7"): Box(lambda client, w: client.train(w, pull=0.7)),
    ("fedavg_ft", ""): Box(Client.train, tuned=1.0),
    ("fedavg_ft", "finetune_rate=0.2"): Box(Client.train, tuned=0.2),
    ("fedper", ""): Box(Client.train, ("body",), ("head",), shared=False),
    ("fedrep", ""): Box(lambda client, w: in_turn(client, w, 10, 2), ("body",), ("head",), shared=False),
    ("fedrep", "head_epochs=3, body_epochs=1"): Box(
        lambda client, w: in_turn(client, w, 3, 1), ("body",), ("head",), shared=False
    ),
    ("fedbabu", ""): Box(lambda client, w: client.train(w, ("body",)), ("body",), tuned=1.0),
    ("fedbabu", "finetune_rate=0.2"): Box(lambda client, w: client.train(w, ("body",)), ("body",), tuned=0.2),
}


def made(name: str, fields: str = "") -> Algorithm:
    algorithm: Algorithm = ALGORITHMS[name](**eval(f"dict({fields})"))
    return algorithm


def below(w: Weights, keys: tuple[str, ...]) -> Weights:
    return {path: leaf for path, leaf in w.items() if path.startswith(keys)} if keys else {}


def alike(found: Tree, expected: Weights) -> bool:
    leaves = tree.flatten(found)
    return leaves.keys() == expected.keys() and all(torch.allclose(leaves[p], expected[p], atol=2e-5) for p in leaves)


@pytest.mark.equivalence
@pytest.mark.parametrize("weights", ["size", "uniform"])
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize(("name", "fields"), list(BOXES))
def test_a_run_is_its_papers_algorithm_box(name: str, fields: str, engine: str, weights: str) -> None:
    box, setting = BOXES[name, fields], replace(SETTING, client_weights=weights)
    run = toy.run(made(name, fields), engine, setting=setting, sizes=SIZES)
    first = tree.flatten(tree.clone(run.task.init()))
    server, own = dict(first), {k: below(first, box.kept) for k in range(len(SIZES))}
    drawn: list[int] = []
    for round in range(SETTING.rounds):
        cohort = run.population.cohort(round)
        drawn += cohort
        models = {k: box.local(Client(run, k, round), {**server, **own[k]}) for k in cohort}
        own |= {k: below(model, box.kept) for k, model in models.items()}
        counts = {k: SIZES[k] if weights == "size" else float(SIZES[k] > 0) for k in cohort}
        for path in below(server, box.sent):
            server[path] = sum((counts[k] * models[k][path] for k in cohort), torch.zeros(())) / sum(counts.values())
    assert len(set(drawn)) < min(len(drawn), len(SIZES))  # some come back, and some never come
    toy.finish(run)
    assert alike(run.progress.server, below(server, EVERYTHING if box.shared else box.sent))
    generic = run.algorithm.global_model(run.task, run.progress.server)
    assert generic is None if not box.shared else alike(generic or {}, server)
    for k in range(len(SIZES)):
        assert alike(run.store[k], own[k])
        tested = checks.tested_models(run, k)
        model = {**server, **own[k]}
        if box.tuned is not None:
            assert alike(tested["personal:0 epochs"], model)
            model = Client(run, k, SETTING.rounds - 1).tune(model, box.tuned)
        if name != "fedavg_prior":
            assert alike(tested["personal"], model)


TUNED = pytest.mark.parametrize("name", ["fedavg_ft", "fedbabu"])


@TUNED
def test_fine_tuning_has_a_rate_to_be_tuned_by_its_order_of_magnitude(name: str) -> None:
    found = space(made(name), 0.1)
    assert found["finetune_rate"] == FloatDistribution(0.003, 1.0, log=True)
    assert found["finetune_epochs"] == IntDistribution(1, 10, log=True)
    with pytest.raises(ValueError, match=r"finetune_rate must be a number above 0"):
        made(name, "finetune_rate=0")


def test_fedbabus_authors_tune_at_a_hundredth_of_the_rate_of_training() -> None:
    assert PAPER.choose(made("fedbabu"))[0] == made("fedbabu", "finetune_rate=1e-3 / 0.1")


def test_fedbabus_head_is_sent_once_to_each_client_and_never_back() -> None:
    run = toy.finish(toy.run(made("fedbabu"), setting=replace(SETTING, rounds=3, participation=1.0)))
    body, head = (tree.nbytes(run.progress.server[key]) for key in EVERYTHING)
    cost = run.outcome().cost
    assert cost["bytes_down"] == len(SIZES) * (3 * body + head)
    assert cost["bytes_up"] == len(SIZES) * 3 * body


@pytest.mark.parametrize("epochs", [1, 3])
def test_fedreps_body_is_trained_as_long_as_the_setting_says(epochs: int) -> None:
    setting = replace(SETTING, epochs=epochs, eval_every=SETTING.rounds)
    usual, said = (
        toy.finish(toy.run(made("fedrep", fields), setting=setting)) for fields in ("", f"body_epochs={epochs}")
    )
    assert usual.outcome().digest == said.outcome().digest
    assert usual.outcome().cost["train_samples"] == said.outcome().cost["train_samples"]
