"""FedCAC: who meets whom by hand, FedAvg where nothing is critical, what is counted, and clients without examples."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, method, trained

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
ALL = replace(toy.SETTING, rounds=2, participation=1.0)


def start(setting: Any = SETTING, engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedcac"](**fields), engine, setting=setting)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def overlaps(marks: list[list[float]]) -> Tensor:
    found: Tensor = importlib.import_module("bench.algorithms.fedcac").overlaps(torch.tensor(marks))
    return found


def companions(overlap: list[list[float]], full: list[bool], progress: float) -> list[list[float]]:
    weigh = importlib.import_module("bench.algorithms.fedcac").companions
    found: list[list[float]] = weigh(torch.tensor(overlap), torch.tensor(full), progress).tolist()
    return found


# Who meets whom -----------------------------------------------------------------------------------------------------


def test_overlaps_have_their_values_by_hand() -> None:
    """1 - |m_i - m_j| / (2 |m_i|): of two marks one in common, both, none."""
    found = overlaps([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    expected = [[1, 0.5, 1, 0], [0.5, 1, 0.5, 0.5], [1, 0.5, 1, 0], [0, 0.5, 0, 1]]
    assert found.tolist() == expected
    assert torch.equal(found, found.T)


def test_companions_reach_a_threshold_that_rises() -> None:
    """Pairs overlap by 0.2, 0.4 and 0.9: their mean is 0.5, the largest 0.9, and 0.1 lies as far below."""
    overlap = [[1.0, 0.2, 0.9], [0.2, 1.0, 0.4], [0.9, 0.4, 1.0]]
    third = pytest.approx([1 / 3] * 3)
    assert companions(overlap, [True] * 3, -1.0) == [third] * 3
    assert companions(overlap, [True] * 3, 0.0) == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    assert companions(overlap, [True] * 3, 0.99) == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    assert companions(overlap, [True] * 3, 1.1) == torch.eye(3).tolist()
    assert companions(overlap, [True, True, False], 0.0) == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_the_threshold_lies_between_mean_and_largest() -> None:
    """Of 0.6, 0.5 and 0.1 the mean is 0.4: halfway to 0.6 are 0.6 and 0.5, after that 0.6 alone."""
    overlap = [[1.0, 0.6, 0.5], [0.6, 1.0, 0.1], [0.5, 0.1, 1.0]]
    third = pytest.approx([1 / 3] * 3)
    assert companions(overlap, [True] * 3, 0.4) == [third, [0.5, 0.5, 0], [0.5, 0, 0.5]]
    assert companions(overlap, [True] * 3, 0.6) == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_a_single_client_has_nobody_to_meet() -> None:
    assert companions([[1.0]], [True], 0.5) == [[1.0]]


# Clients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_what_mattered_is_the_product_of_weight_and_change(share: float) -> None:
    """|w (w - w_before)|: 0.5, 0, 4, 3, 0.01, 2, 0, 1 of eight; equal ones by place."""
    after = torch.tensor([[1.0, 5.0, -2.0, 3.0], [0.1, 1.0, 0.0, -1.0]])
    before = torch.tensor([[0.5, 5.0, -4.0, 2.0], [0.0, -1.0, 7.0, 0.0]])
    marks = method(start(critical_share=share)).critical(after, before)
    order = [2, 3, 5, 7, 0, 4, 1, 6]
    assert sorted(torch.nonzero(marks.flatten())[:, 0].tolist()) == sorted(order[: int(8 * share)])
    assert marks.shape == after.shape


def test_a_client_trains_customised_and_global_parameters_put_together() -> None:
    run = start(replace(toy.SETTING, epochs=1))
    run.progress.server["customised"] = tree.map(lambda leaf: leaf + 0.1, run.progress.server["customised"])
    critical = tree.map(lambda leaf: leaf > 0, tree.parameters(model(run)))
    run.store[0] = {"critical": critical}
    begin = tree.map(lambda leaf, mark: leaf + 0.1 * mark, model(run), critical)
    personal = run.algorithm.personal_model(run.task, toy.received(run, 0), run.store[0], data_of(run, 0))
    assert personal is not None and largest_difference(personal, begin) < 1e-6
    upload, kept = toy.upload_once(run)
    expected = trained(run, begin, data_of(run, 0).batches(1))
    assert largest_difference({key: upload[key] for key in ("body", "head")}, expected) < 1e-5
    marks = tree.map(method(run).critical, {key: upload[key] for key in ("body", "head")}, begin)
    assert largest_difference(marks, kept["critical"]) == 0.0
    assert largest_difference(kept["critical"], upload["critical"]) == 0.0


# Rounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_without_critical_parameters_it_is_fedavg(engine: str) -> None:
    run, fedavg = start(engine=engine, critical_share=0.0), toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING)
    assert largest_difference(model(toy.finish(run)), model(toy.finish(fedavg))) == 0.0
    personal = run.algorithm.personal_model(run.task_at(2), toy.received(run, 0, 2), run.store[0], data_of(run, 0))
    assert personal is not None and largest_difference(personal, model(fedavg)) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_with_them_it_is_not(engine: str) -> None:
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING))
    assert largest_difference(model(toy.finish(start(engine=engine))), model(fedavg)) > 1e-4


def test_after_the_last_narrowing_a_client_hears_itself_alone() -> None:
    run = start(ALL, narrowing=1)
    run.step()
    sent = [toy.upload_once(run, k, run.task_at(1))[0] for k in range(8)]
    run.step()
    for k, upload in enumerate(sent):
        own = {key: upload[key] for key in ("body", "head")}
        assert largest_difference(tree.pick(run.progress.server["customised"], k), own) < 1e-6


def test_customised_models_are_means_of_those_alike() -> None:
    run = start(ALL)
    before = tree.clone(run.progress.server["customised"])
    sent = [toy.upload_once(run, k)[0] for k in range(8)]
    run.step()
    module = importlib.import_module("bench.algorithms.fedcac")
    marks = torch.stack([torch.cat([m.flatten() for m in tree.flatten(s["critical"]).values()]).float() for s in sent])
    weights = module.companions(module.overlaps(marks), torch.tensor(toy.SIZES) > 0, 1 / 100)
    assert 0 < int((weights > 0).sum()) - 8 < 42  # some pairs, not all
    for k in (0, 3, 7):
        mean = tree.map(
            lambda *w, k=k: sum(a * b for a, b in zip(weights[k], w, strict=True)),
            *({key: s[key] for key in ("body", "head")} for s in sent),
        )
        assert largest_difference(tree.pick(run.progress.server["customised"], k), mean) < 1e-6
        assert largest_difference(tree.pick(before, k), mean) > 1e-4


def test_those_that_are_not_drawn_keep_their_customised_models() -> None:
    run = start(replace(toy.SETTING, participation=0.25))
    before = tree.clone(run.progress.server["customised"])
    run.step()
    drawn = run.store.clients()
    for k in range(8):
        moved = largest_difference(tree.pick(before, k), tree.pick(run.progress.server["customised"], k))
        assert (moved > 0) == (k in drawn and toy.SIZES[k] > 0)


def test_two_models_go_down_one_and_its_marks_come_up() -> None:
    run = start(ALL)
    run.step()
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == 8 * 2 * 4 * parameters
    assert run.progress.cost["bytes_up"] == 8 * (4 * parameters + -(-parameters // 8))


def test_whoever_never_took_part_uses_the_global_model() -> None:
    run = toy.finish(start(replace(toy.SETTING, unseen=1)))
    shared = run.algorithm.broadcast(run.task, run.progress.server)
    shared |= run.algorithm.send(run.task, run.progress.server, None)
    fresh = run.algorithm.newcomer(run.task, shared, data_of(run, 7))
    personal = run.algorithm.personal_model(run.task, shared, fresh, data_of(run, 7))
    assert personal is not None and largest_difference(personal, model(run)) == 0.0
