"""Operations that are counted while work is done: the numbers of torch's own counter, without its compiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import keys, models, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training import engine as engines
from bench.training.operations import Operations
from tests.by_hand import short


def torchs() -> FlopCounterMode:
    """Make torch's counter, and teach it products that are added in place."""

    def product(_: torch.Size, a: torch.Size, b: torch.Size, **rest: object) -> int:
        return 2 * math.prod(a) * b[-1]

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def both(work: Callable[[], object]) -> tuple[int, int]:
    """Count the same work by ours and by torch's, which sees what ours hands on."""
    with torchs() as theirs, Operations() as ours:
        work()
    return ours.total, theirs.get_total_flops()


def matches(work: Callable[[], object]) -> int:
    """Require that both count the same."""
    ours, theirs = both(work)
    assert ours == theirs
    return ours


# What networks are made of ----------------------------------------------------------------------------------


def test_a_product_is_a_multiplication_and_an_addition_for_each_term() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert matches(lambda: a @ b) == matches(lambda: F.linear(a, b.T, torch.ones(5))) == 2 * 3 * 4 * 5
    assert matches(lambda: torch.ones(3, 5).addmm_(a, b)) == 2 * 3 * 4 * 5
    many = torch.ones(7, 3, 4), torch.ones(7, 4, 5)
    assert (
        matches(lambda: torch.bmm(*many)) == matches(lambda: torch.einsum("bmk,bkn->bmn", *many)) == 7 * 2 * 3 * 4 * 5
    )
    assert matches(lambda: torch.ones(7, 3, 5).baddbmm(*many)) == 7 * 2 * 3 * 4 * 5
    assert matches(lambda: torch.ones(7, 3, 5).baddbmm_(*many)) == 7 * 2 * 3 * 4 * 5
    assert matches(lambda: a * a + a.exp().sum()) == 0


def test_an_operation_that_comes_whole_is_counted_by_its_parts() -> None:
    a, b = torch.ones(6, 3, 4), torch.ones(4, 5)
    x, kernel = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    usual = matches(lambda: a @ b), matches(lambda: F.conv2d(x, kernel))
    with torch.inference_mode():
        assert (matches(lambda: a @ b), matches(lambda: F.conv2d(x, kernel))) == usual != (0, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}])
@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("slide", [F.conv2d, F.conv_transpose2d])
def test_convolutions_forward_and_backward(
    slide: Callable[..., Tensor], groups: int, how: dict[str, int], frozen: int | None
) -> None:
    x = torch.ones(3, 4, 9, 7, requires_grad=frozen != 0)
    shape = (8, 4 // groups, 3, 2) if slide is F.conv2d else (4, 8 // groups, 3, 2)
    kernel, bias = torch.ones(shape, requires_grad=frozen != 1), torch.ones(8, requires_grad=True)
    out = slide(x, kernel, bias, groups=groups, **how)
    forward = matches(lambda: slide(x, kernel, bias, groups=groups, **how))
    assert matches(lambda: slide(x, kernel, bias, groups=groups, **how).sum().backward()) > forward
    if slide is F.conv2d:
        assert forward == 2 * out.numel() * math.prod(shape[1:])


@pytest.mark.parametrize(("slide", "places"), [(F.conv1d, (9,)), (F.conv3d, (5, 6, 4))])
def test_convolutions_of_other_dimensions(slide: Callable[..., Tensor], places: tuple[int, ...]) -> None:
    x, kernel = torch.ones(2, 3, *places), torch.ones(4, 3, *(2 for _ in places), requires_grad=True)
    assert matches(lambda: slide(x, kernel).sum().backward()) > 0


def test_what_is_mapped_and_what_is_differentiated_twice() -> None:
    x, kernels = torch.ones(5, 2, 3, 8, 8), torch.ones(5, 4, 3, 3, 3)

    def loss(kernel: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, kernel).square().mean()

    assert matches(lambda: torch.func.vmap(torch.func.grad(loss))(kernels, x)) > 0
    steep = torch.func.grad(lambda kernel: torch.func.grad(loss)(kernel, x[0]).square().sum())
    assert matches(lambda: steep(kernels[0])) > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_attention(frozen: bool) -> None:
    query, key, value = torch.ones(2, 4, 6, 8), torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 8)
    for each in (query, key, value):
        each.requires_grad_(not frozen)
    forward = matches(lambda: F.scaled_dot_product_attention(query, key, value))
    assert forward == 2 * 2 * 4 * 6 * 5 * (8 + 8)
    if not frozen:
        both_ways = matches(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
        assert both_ways == forward + 2 * 2 * 4 * 6 * 5 * (3 * 8 + 2 * 8)


# Whole networks, and whole methods --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "device"),
    [
        *((name, models.usual_norm(name), "meta") for name in models.BUILT_IN if name != "frozen"),
        ("resnet8", "batch", "cpu"),
    ],
)
def test_every_network_forward_and_backward(name: str, norm: str, device: str) -> None:
    model = models.build(name, 7, (3, 32, 32), norm)
    weights = model.init(keys.key(0, device))
    tree.map(lambda leaf: leaf.requires_grad_(), tree.parameters(weights))
    x = torch.ones(2, 3, 32, 32, device=device)

    def step() -> None:
        model.logits(weights["head"], model.features(weights["body"], x)).sum().backward()

    assert matches(step) > 0


class Both(Operations):
    """Ours, before torch's."""

    seen: ClassVar[list[tuple[int, int]]] = []
    """What both have counted, each time."""
    depth = 0

    def __enter__(self) -> Self:
        if not self.depth:  # ours goes in again for the parts of an operation
            self.theirs = torchs()
            self.theirs.__enter__()
        self.depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *how: Any) -> None:
        super().__exit__(*how)  # type: ignore[no-untyped-call]
        self.depth -= 1
        if not self.depth:
            self.theirs.__exit__(*how)
            self.seen.append((self.total, self.theirs.get_total_flops()))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_costs_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "Operations", Both)
    monkeypatch.setattr(Both, "seen", [])
    toy.finish(toy.run(short(name), setting=replace(toy.SETTING, rounds=1, epochs=1)))
    assert all(ours == theirs for ours, theirs in Both.seen) and sum(ours for ours, _ in Both.seen) > 0, Both.seen
