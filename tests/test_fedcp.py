"""FedCP: masks, discrepancy and steps by hand, heads that share one example, and tests without noise."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3)
PLAIN = replace(toy.SETTING, momentum=0.0, epochs=1)


def start(setting: Any = SETTING, engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedcp"](**fields), engine, setting=setting)


def module() -> Any:
    return importlib.import_module("bench.algorithms.fedcp")


def apart(run: Run, client: int = 0) -> Run:
    """Let a client have a head that is another than the received one."""
    head = run.store[client]["head"]
    run.store[client] = {"head": tree.map(lambda w: w + torch.linspace(-0.3, 0.4, w.numel()).reshape(w.shape), head)}
    return run


def share_by_hand(policy: dict[str, Tensor], z: Tensor, own: Tensor, noise: Tensor | None = None) -> Tensor:
    """The mask of the paper: two softmaxes that sum to one, of outputs with Gumbel noise of which `noise` is the
    difference.
    """
    context = own.sum(0) / own.sum(0).norm()
    out = (z * context) @ policy["linear/weight"].T + policy["linear/bias"]
    out = (out - out.mean(1, keepdim=True)) / (out.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    pair = torch.relu(out * policy["norm/weight"] + policy["norm/bias"]).reshape(len(z), 2, -1)
    if noise is not None:
        pair = torch.stack([pair[:, 0] + noise, pair[:, 1]], 1)
    return torch.softmax(pair, 1)[:, 0]


def discrepancy_by_hand(a: Tensor, b: Tensor) -> Tensor:
    return kernels(a, a) + kernels(b, b) - 2 * kernels(a, b)


def kernels(a: Tensor, b: Tensor) -> Tensor:
    """Of every pair, the mean."""
    apart = torch.stack([(p - q).square().sum() for p in a for q in b])
    return torch.stack([torch.exp(-apart / (2 * width)) for width in (10.0, 15.0, 20.0, 50.0)]).sum(0).mean()


def leaves_of(model: Tree) -> dict[str, Tensor]:
    return {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model).items()}


def test_masks_are_a_softmax_over_two_outputs() -> None:
    run = apart(start())
    policy, own = run.progress.server["policy"], run.store[0]["head"]
    policy = {**policy, "norm": {"weight": torch.linspace(0.5, 2, 128), "bias": torch.linspace(-1, 1, 128)}}
    z, noise = torch.rand(7, 64, generator=torch.Generator().manual_seed(1)), torch.linspace(-3, 3, 64).expand(7, 64)
    expected = share_by_hand(tree.flatten(policy), z, own["weight"])
    found = module().mask(policy, z, own, 0.0)
    assert torch.allclose(found, expected, atol=1e-6) and float(found.std()) > 0.1
    noisy = share_by_hand(tree.flatten(policy), z, own["weight"], noise)
    assert torch.allclose(module().mask(policy, z, own, noise), noisy, atol=1e-6)


def test_the_discrepancy_is_a_mean_over_pairs_of_real_examples() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = 3 * torch.rand(5, 8, generator=generator), 3 * torch.rand(5, 8, generator=generator)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    expected = discrepancy_by_hand(a[:3], b[:3])
    assert module().discrepancy(a, b, weight) == pytest.approx(float(expected), rel=1e-4) and float(expected) > 0.1
    assert float(module().discrepancy(a, a, weight)) == pytest.approx(0.0, abs=1e-6)
    assert float(module().discrepancy(a, b, torch.zeros(5))) == 0.0


def test_equal_heads_do_not_see_masks() -> None:
    """W (z m) + W (z (1 - m)) = W z, and the bias is there twice."""
    run = start()
    head, z = run.task.init()["head"], torch.rand(5, 64, generator=torch.Generator().manual_seed(3))
    for share in (torch.zeros(5, 64), torch.rand(5, 64, generator=torch.Generator().manual_seed(4))):
        found = module().parted(run.task, {"head": head, "received": head}, z, share)
        assert torch.allclose(found, run.task.model.logits(head, z) + head["bias"], atol=1e-5)


def test_cross_entropy_moves_heads_and_not_the_sum_of_their_rows() -> None:
    """So the context is that of the initial head, whatever the client."""
    run = toy.finish(start())
    before, after = run.store.initial["head"]["weight"], run.store[0]["head"]["weight"]
    assert float((after - before).abs().max()) > 0.05
    assert torch.allclose(after.sum(0), before.sum(0), atol=1e-5)


@pytest.mark.parametrize("pull", [0.0, 5.0])
def test_a_clients_steps_are_those_of_the_papers_loss(pull: float) -> None:
    """With the noise of each example, and the context, the received head and the received body standing still."""
    run = apart(start(PLAIN, pull=pull))
    received, own = run.progress.server, run.store[0]["head"]
    leaves = leaves_of({"body": received["body"], "head": own, "policy": received["policy"]})
    policy = {path.removeprefix("policy/"): leaf for path, leaf in leaves.items() if path.startswith("policy/")}
    hidden, context = received["body"]["hidden"], own["weight"].clone()
    optimiser = torch.optim.SGD(leaves.values(), run.setting.lr)
    for batch in data_of(run, 0).batches(1):
        x = batch.x.flatten(1)
        z = torch.relu(F.linear(x, leaves["body/hidden/weight"], leaves["body/hidden/bias"]))
        draws = keys.uniform_rows(keys.fold(batch.keys, "mask"), 64).clamp(1e-6, 1 - 1e-6)
        share = share_by_hand(policy, z, context, (draws / (1 - draws)).log())
        logits = F.linear(z * share, leaves["head/weight"], leaves["head/bias"])
        logits = logits + F.linear(z * (1 - share), received["head"]["weight"], received["head"]["bias"])
        still = torch.relu(F.linear(x, hidden["weight"], hidden["bias"]))
        loss = F.cross_entropy(logits, batch.y) + pull * discrepancy_by_hand(z, still)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    w = tree.unflatten({path: leaf.detach() for path, leaf in leaves.items()})
    upload, kept = toy.upload_once(run)
    assert largest_difference(kept, {"head": w["head"]}) < 1e-5
    between = tree.map(lambda a, b: (a + b) / 2, w["head"], received["head"])
    assert largest_difference(upload, {"body": w["body"], "head": between, "policy": w["policy"]}) < 1e-5
    for part in ("body", "head", "policy"):
        before = own if part == "head" else received[part]
        assert largest_difference(w[part], before) > 1e-4, part


def test_the_pull_matters_and_holds_features_to_those_received() -> None:
    moved = []
    for pull in (0.0, 1.0, 5.0):
        run = start(replace(SETTING, rounds=1, lr=0.01), pull=pull)
        body = toy.upload_once(run)[0]["body"]
        x = run.population.images.plain(data_of(run, 0).index)
        old, new = (run.task.model.features(b, x) for b in (run.progress.server["body"], body))
        moved.append(float(module().discrepancy(new, old, torch.ones(60))))
    assert moved[0] > moved[1] > moved[2] and moved[2] < 0.7 * moved[0], moved
    ends = [toy.finish(start(pull=pull)).progress.server for pull in (0.0, 1.0)]
    assert largest_difference(*ends) > 1e-4


def test_personal_scores_are_those_of_both_heads_without_noise() -> None:
    run = apart(toy.finish(start()))
    shared, data, task = toy.received(run, 0, 2), data_of(run, 0, 2), run.task_at(2)
    model = run.algorithm.personal_model(task, shared, run.store[0], data)
    assert model is not None
    x = run.population.images.plain(data.index)
    z = task.model.features(shared["body"], x)
    own, received = run.store[0]["head"], shared["head"]
    assert largest_difference(own, received) > 1e-3
    share = share_by_hand(tree.flatten(shared["policy"]), z, own["weight"])
    expected = F.linear(z * share, own["weight"], own["bias"])
    expected = expected + F.linear(z * (1 - share), received["weight"], received["bias"])
    found = run.algorithm.predict(task, model, x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, run.algorithm.predict(task, model, x))
    assert torch.equal(found[:7], run.algorithm.predict(task, model, x[:7]))


def test_right_after_training_a_client_has_what_it_trained_beside_the_received_head() -> None:
    run = apart(start())
    shared, data = toy.received(run, 0), data_of(run, 0)
    upload, kept = toy.upload_once(run)
    seen, following = run.algorithm.after_training(run.task_at(0), shared, run.store[0], data)
    model = run.algorithm.personal_model(run.task_at(0), seen, following, data)
    assert model is not None and largest_difference(following, kept) == 0.0
    expected = {"body": upload["body"], "head": kept["head"], "policy": upload["policy"], "received": shared["head"]}
    assert largest_difference(model, expected) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_held_out_clients_tune_the_initial_head_beside_the_received_one(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=4, unseen=1, eval_every=4), engine))
    assert measured(run, "unseen") > 0.6


def test_a_policy_travels_besides_a_model() -> None:
    run = start(replace(SETTING, rounds=1))
    size = tree.nbytes(run.task.init()) + 4 * (2 * 64 * 64 + 6 * 64)
    run.step()
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 6 * size


def test_a_client_without_examples_keeps_its_head() -> None:
    run = apart(start(), 6)
    before = run.store[6]
    upload, kept = toy.upload_once(run, 6)
    assert largest_difference(kept, before) == 0.0
    assert largest_difference(upload["body"], run.progress.server["body"]) == 0.0
