"""Channels that send less: the card's numbers, what arrives in the end or in the mean, and bytes by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Channel, Task, Tree, bits, keys, tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.plugins.registry import PARTS
from bench.protocol.composed import Composed
from bench.protocol.spelling import parse_algorithms
from bench.training import engine as engines
from bench.training import rounds
from tests import virtual

ENGINES = ("serial", "stacked")


def made(text: str) -> Algorithm:
    (algorithm,) = parse_algorithms(text)
    return algorithm


def channel(name: str, **fields: Any) -> Channel:
    part = PARTS[name](**fields)
    assert isinstance(part, Channel)
    return part


@cache
def a_task() -> Task:
    return toy.task(toy.Host())


def carried(part: Channel, values: Any, key: Tensor | None = None) -> tuple[Tree, np.ndarray[Any, Any]]:
    """What is sent of one tensor, and what arrives of it."""
    update = {"body": {"w": torch.as_tensor(np.asarray(values), dtype=torch.float32)}}
    key = keys.key(3) if key is None else key
    sent, _ = part.send(a_task(), update, part.init(a_task(), update), key)
    arrived = part.receive(a_task(), sent, tree.zeros_like(update))["body"]["w"]
    assert arrived.shape == update["body"]["w"].shape and arrived.dtype == torch.float32
    return sent["body"]["w"], arrived.double().numpy()


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_numbers_of_few_bits_take_them_and_come_back(width: int, n: int) -> None:
    numbers = torch.from_numpy(np.random.default_rng(n).integers(0, 2**width, n).astype(np.int32))
    packed = bits.pack(numbers, width)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(n * width / 8)
    assert torch.equal(bits.unpack(packed, width, n), numbers)
    wanted = "".join(f"{number:0{width}b}"[::-1] for number in numbers.tolist())
    assert packed.tolist() == [int(wanted[k : k + 8][::-1], 2) for k in range(0, len(wanted), 8)]


def test_bits_are_those_of_one_where_many_are_stacked() -> None:
    numbers = torch.arange(3 * 5, dtype=torch.int32).reshape(3, 5)
    packed = torch.vmap(lambda row: bits.pack(row, 4))(numbers)
    assert torch.equal(packed, torch.stack([bits.pack(row, 4) for row in numbers]))
    assert torch.equal(torch.vmap(lambda row: bits.unpack(row, 4, 5))(packed), numbers)


# Sign -----------------------------------------------------------------------------------------------------------


def test_signs_have_the_mean_size_of_a_tensor() -> None:
    sent, arrived = carried(channel("sign"), np.tile([1.0, -2.0, 3.0, 0.0], 64))
    assert float(sent["size"]) == 1.5
    assert arrived.tolist() == [1.5, -1.5, 1.5, 1.5] * 64  # a bit has no zero
    values = noise(20, 30)
    _, arrived = carried(channel("sign"), values)
    assert arrived == pytest.approx(np.abs(values).mean() * np.sign(values), rel=1e-5)


def test_each_tensor_has_a_size_of_its_own_and_a_small_one_is_sent_whole() -> None:
    update: Tree = {"body": {"a": torch.full((256,), 2.0), "b": torch.full((16, 16), -0.5), "c": torch.arange(255.0)}}
    part = channel("sign")
    sent, kept = part.send(a_task(), update, tree.zeros_like(update), keys.key(0))
    assert tree.nbytes(sent) == 2 * (4 + 32) + 4 * 255
    assert tree.largest_difference(part.receive(a_task(), sent, update), update) == 0.0
    assert tree.largest_difference(kept, tree.zeros_like(update)) == 0.0


def after(rounds: int, part: Channel, updates: Sequence[Tree], forgets: bool = False) -> tuple[Tree, Tree]:
    """Send updates one after the other: what arrived in all, and what is left."""
    kept = part.init(a_task(), updates[0])
    arrived = tree.zeros_like(updates[0])
    for r in range(rounds):
        sent, following = part.send(a_task(), updates[r % len(updates)], kept, keys.key(r))
        arrived = tree.add(arrived, part.receive(a_task(), sent, updates[0]))
        kept = kept if forgets else following
    return arrived, kept


@pytest.mark.parametrize("name", ["sign", "topk"])
def test_in_the_end_everything_arrives(name: str) -> None:
    updates = [{"body": {"w": torch.from_numpy(noise(400, seed=k))}} for k in range(20)]
    arrived, kept = after(20, channel(name), updates)
    total = torch.stack([each["body"]["w"] for each in updates]).sum(0)
    assert torch.allclose(arrived["body"]["w"] + kept["body"]["w"], total, atol=1e-4)


def test_what_is_small_is_lost_without_a_memory_and_not_with_it() -> None:
    values = torch.cat([torch.full((100,), 1.0), torch.full((300,), 0.01)])  # signs alone make them equal
    update = [{"body": {"w": values}}]
    arrived, kept = after(400, channel("sign"), update)
    assert torch.allclose(arrived["body"]["w"] / 400, values, atol=0.03)
    assert float(kept["body"]["w"].norm()) < 40 * float(values.norm())  # it does not grow for ever
    forgotten, _ = after(400, channel("sign"), update, forgets=True)
    assert float((forgotten["body"]["w"] / 400 - values).abs().min()) > 0.2


# QSGD -----------------------------------------------------------------------------------------------------------


def padded(*values: float) -> np.ndarray[Any, Any]:
    """A tensor that is not small, of the same norm."""
    return np.array([*values, *[0.0] * (300 - len(values))])


def test_levels_of_the_card() -> None:
    part, seen = channel("qsgd", levels=4), []
    for k in range(2000):
        sent, arrived = carried(part, padded(3, -4, 0), keys.fold(keys.key(0), k))
        assert float(sent["norm"]) == 5.0 and not arrived[2:].any()
        seen.append(arrived[:2])
    found = np.array(seen)
    assert {*found[:, 0]} == {2.5, 3.75} and {*found[:, 1]} == {-3.75, -5.0}  # levels 2 and 3, 3 and 4 of 4
    assert found.mean(0) == pytest.approx([3, -4], abs=0.05)
    assert found.var(0).sum() == pytest.approx(0.625, rel=0.07)


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_what_arrives_is_the_update_in_the_mean(levels: int) -> None:
    values, part = noise(300), channel("qsgd", levels=levels)
    seen = np.array([carried(part, values, keys.key(k))[1] for k in range(400)])
    step = np.linalg.norm(values) / levels
    down = np.floor(np.abs(values) / step)
    share = np.abs(values) / step - down  # of the draws that are rounded up
    allowed = 5 * step * np.sqrt(np.maximum(share * (1 - share), 1e-3) / 400)
    assert (np.abs(seen.mean(0) - values) < allowed).all()
    assert seen.var(0).sum() == pytest.approx((step**2 * share * (1 - share)).sum(), rel=0.05)
    assert (np.abs(np.abs(seen / step) - down).round(4) <= 1).all()  # no further than to the next level


def test_the_coins_are_of_entry_tensor_and_key() -> None:
    part, update = channel("qsgd", levels=1), {"body": {"a": torch.ones(400), "b": torch.ones(400)}}
    sent = [part.send(a_task(), update, {}, keys.key(k))[0]["body"] for k in (0, 0, 1)]
    assert tree.largest_difference(sent[0], sent[1]) == 0.0
    assert not torch.equal(sent[0]["a"]["levels"], sent[0]["b"]["levels"])
    assert not torch.equal(sent[0]["a"]["levels"], sent[2]["a"]["levels"])
    assert len(set(sent[0]["a"]["levels"].tolist())) > 1


@pytest.mark.parametrize("values", [padded(), padded(1e-3), padded(-7), padded(*[1.0] * 300), padded(1e-30, 1e15)])
def test_levels_end_at_the_norm(values: Any) -> None:
    for levels in (1, 127):
        _, arrived = carried(channel("qsgd", levels=levels), values)
        assert np.isfinite(arrived).all()
        assert np.abs(arrived).max() <= np.linalg.norm(values.astype(np.float64)) * (1 + 1e-5)
        if np.count_nonzero(values) == 1:
            assert arrived == pytest.approx(values)


def test_rounding_makes_no_level_above_the_last_and_nothing_is_level_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "uniform", lambda key, *shape: torch.zeros(shape))  # the least remainder is rounded up
    value = torch.tensor(0.6404226422309875)
    assert float(127 * value / value) > 127
    _, arrived = carried(channel("qsgd"), padded(float(value)))
    assert float(np.float32(arrived[0])) == float(value)
    sent, _ = carried(channel("qsgd"), padded())
    assert sent["levels"].tolist() == [127] * 300


@pytest.mark.parametrize(
    ("levels", "width"), [(1, 2), (3, 3), (4, 4), (7, 4), (8, 5), (127, 8), (128, 9), (32_767, 16)]
)
def test_an_entry_takes_a_bit_and_those_of_its_level(levels: int, width: int) -> None:
    assert width == 1 + math.ceil(math.log2(levels + 1))
    sent, _ = carried(channel("qsgd", levels=levels), noise(25, 41))
    assert tree.nbytes(sent) == 4 + math.ceil(25 * 41 * width / 8)


# On a method ----------------------------------------------------------------------------------------------------


def ran(algorithm: Algorithm, engine: str = "serial", **setting: Any) -> rounds.Run:
    return toy.finish(toy.run(algorithm, engine, setting=replace(toy.SETTING, rounds=2, **setting)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedbabu"])
@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("sign", lambda n: 4 + math.ceil(n / 8)),
        ("qsgd", lambda n: 4 + n),
        ("qsgd(levels=4)", lambda n: 4 + math.ceil(n * 4 / 8)),
    ],
)
def test_bytes_are_those_of_the_formula(text: str, of: Any, method: str, engine: str) -> None:
    run, plain = ran(made(f"{method}+{text}"), engine), ran(made(method), engine)
    sent = run.task.init() if method == "fedavg" else {"body": run.task.init()["body"]}
    sizes = [leaf.numel() for leaf in tree.flatten(sent).values()]
    each = sum(4 * n if n < 256 else of(n) for n in sizes)
    visits = sum(len(run.population.cohort(r)) for r in range(2))
    assert run.progress.cost["bytes_up"] == each * visits < plain.progress.cost["bytes_up"]
    assert plain.progress.cost["bytes_up"] == 4 * sum(sizes) * visits
    assert run.progress.cost["bytes_down"] == plain.progress.cost["bytes_down"]


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_very_many_levels_are_the_method_and_few_are_not(engine: str) -> None:
    plain = ran(made("fedavg"), engine).progress.server
    apart = [
        tree.largest_difference(ran(made(f"fedavg+qsgd(levels={levels})"), engine).progress.server, plain)
        for levels in (32_767, 127, 1)
    ]
    assert apart[0] <= engines.TOLERANCE < apart[1] < apart[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_over_a_run_what_moved_the_server_and_what_waits_is_what_was_learnt(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client with examples, so that the server moves by what arrives of it."""
    setting = replace(toy.SETTING, rounds=3, participation=1.0)
    run = toy.run(made("fedavg+sign"), engine, setting=setting, sizes=(60, 0, 0, 0, 0, 0, 0, 0))
    total = tree.zeros_like(run.progress.server)
    start = run.progress.server
    for _ in range(3):
        server = run.progress.server
        plain = toy.run(made("fedavg"), setting=setting, sizes=(60, 0, 0, 0, 0, 0, 0, 0))
        plain.progress.server = server
        trained, _ = toy.upload_once(plain, 0, run.task_at(run.progress.round))
        total = tree.add(total, tree.sub(trained, server))
        run.step()
    waiting = run.store[0]["parts"]["0"]
    assert float(tree.norm(waiting)) > 0.01
    found = tree.map(torch.add, tree.sub(run.progress.server, start), waiting)
    assert tree.largest_difference(found, total) < 5e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["sign", "qsgd"])
def test_whole_numbers_are_carried_as_they_are(name: str, engine: str) -> None:
    """Of a channel that stands before: places of the largest entries, and packed levels."""
    update: Tree = {"index": torch.arange(300, dtype=torch.int32), "code": torch.arange(300).to(torch.uint8)}
    part = channel(name)

    def twice(key: Tensor) -> tuple[Tree, Tree]:
        sent, kept = part.send(a_task(), update, part.init(a_task(), update), key)
        sent, kept = part.send(a_task(), update, kept, key)
        return part.receive(a_task(), sent, update), kept

    key = keys.key(0)
    arrived, kept = twice(key) if engine == "serial" else torch.vmap(twice)(key[None])
    arrived = arrived if engine == "serial" else tree.pick(arrived, 0)
    assert tree.largest_difference(arrived, update) == 0.0
    assert {path: leaf.dtype for path, leaf in tree.flatten(arrived).items()} == {
        "index": torch.int32,
        "code": torch.uint8,
    }
    assert all(not leaf.any() for leaf in tree.flatten(kept).values())


@pytest.mark.parametrize("engine", ENGINES)
def test_levels_of_the_largest_entries_are_sent_and_the_largest_of_levels_are_not(engine: str) -> None:
    of = PARTS["topk"](share=0.25), PARTS["qsgd"]()
    both, other = (ran(Composed(made("fedavg"), parts), engine) for parts in (of, of[::-1]))
    alone = ran(made("fedavg+qsgd"), engine)
    assert tree.largest_difference(other.progress.server, alone.progress.server) <= engines.TOLERANCE
    visits = sum(len(both.population.cohort(r)) for r in range(2))
    bytes_up = 0
    for n in (leaf.numel() for leaf in tree.flatten(both.task.init()).values()):
        k = math.ceil(0.25 * n)
        bytes_up += 4 * n if n < 256 else 4 * k + (4 + k if k >= 256 else 4 * k)
    assert both.progress.cost["bytes_up"] == bytes_up * visits


@pytest.mark.parametrize("name", ["sign", "qsgd"])
def test_nobody_waits_for_a_device(name: str) -> None:
    """The path of a GPU, on a device that tells what CUDA would refuse and what it would wait for."""
    part, update = channel(name), {"body": {"w": torch.from_numpy(noise(20, 20)), "b": torch.ones(3)}}
    expected, left = part.send(a_task(), update, part.init(a_task(), update), keys.key(0))
    arrived = part.receive(a_task(), expected, update)
    with virtual.device() as device:
        there, key = tree.to(update, device), keys.key(0, device)
        task = a_task()
        with virtual.waits() as found:
            sent, kept = part.send(task, there, part.init(task, there), key)
            came = part.receive(task, sent, there)
        assert [str(wait) for wait in found] == []
        for one, other in ((sent, expected), (kept, left), (came, arrived)):
            assert tree.largest_difference(tree.to(one, "cpu"), other) == 0.0
