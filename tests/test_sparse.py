"""Weights of which a mask keeps a part: packed and unpacked, in bits, and how many each layer keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench import keys, models, sparse, tree

LAYERS = [(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)]


def some_mask(seed: int, n: int, share: float = 0.3) -> Tensor:
    return keys.uniform(keys.key(seed), n) < share


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_what_a_mask_keeps_comes_back_in_its_place_and_all_else_is_zero(n: int, share: float) -> None:
    row, mask = keys.normal(keys.key(1), n), some_mask(2, n, share)
    count = int(mask.sum())
    values = sparse.packed(row, mask, count)
    assert torch.equal(values, row[mask]) and values.dtype == row.dtype
    assert torch.equal(sparse.unpacked(values, mask), torch.where(mask, row, 0.0))


def test_with_room_to_spare_zeros_stand_behind() -> None:
    mask = torch.tensor([False, True, True, False])
    assert sparse.packed(torch.tensor([5, 6, 7, 8], dtype=torch.int32), mask, 4).tolist() == [6, 7, 0, 0]


@pytest.mark.parametrize("n", [0, 1, 8, 9, 1000])
def test_a_mask_travels_as_a_bit_an_entry(n: int) -> None:
    mask = some_mask(3, n)
    sent = sparse.mask_bits(mask)
    assert sent.dtype == torch.uint8 and len(sent) == math.ceil(n / 8)
    assert torch.equal(sparse.mask_of(sent, n), mask)


def test_the_largest_are_marked_of_equals_the_first_and_none_that_may_not_be() -> None:
    values, everywhere = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), torch.ones(5, dtype=torch.bool)
    assert sparse.ranks(values).tolist() == [3, 0, 1, 4, 2]
    assert sparse.largest(values, everywhere, 2).tolist() == [False, True, True, False, False]
    among = torch.tensor([True, False, True, True, False])
    assert sparse.largest(values, among, torch.tensor(2)).tolist() == [True, False, True, False, False]
    assert sparse.largest(-values, among, 1).tolist() == [False, False, False, True, False]
    assert not sparse.largest(values, everywhere, 0).any()


@pytest.mark.parametrize("name", ["resnet20", "airbench94", "mlp", "linear"])
def test_a_body_is_packed_but_for_what_is_no_weight_and_comes_back(name: str) -> None:
    model = models.build(name, 5, (3, 25, 25), "batch")
    body, like = (model.init(key)["body"] for key in (keys.key(1), keys.key(0, "meta")))
    weights = sparse.weights_of(like)
    numbers = {path: leaf.numel() for path, leaf in tree.flatten(body).items()}
    dense = {path for path in numbers if tree.flatten(body)[path].ndim < 2 or tree.is_statistic(path)}
    assert {*weights.paths} == {*numbers} - dense
    assert weights.total == sum(numbers[path] for path in weights.paths)
    mask = some_mask(5, weights.total)
    count = int(mask.sum())
    sent = weights.pack(body, mask, count)
    assert {*tree.flatten(sent)} == {*dense, "kept"} and sent["kept"].shape == (count,)
    assert tree.nbytes(sent) == 4 * (count + sum(numbers[path] for path in dense))
    found = tree.flatten(weights.unpack(sent, mask, like))
    assert list(found) == list(numbers)
    marks = tree.flatten(weights.leaves(mask))
    for path, leaf in tree.flatten(body).items():
        assert torch.equal(found[path], leaf * marks[path] if path in marks else leaf), path
    whole = weights.unpack(weights.pack(body, torch.ones_like(mask), weights.total), torch.ones_like(mask), like)
    assert tree.largest_difference(whole, body) == 0.0


def test_densities_are_the_published_ones() -> None:
    assert sparse.densities(LAYERS, 1961) == pytest.approx([0.294816, 0.025367, 0.806906], abs=1e-6)
    assert sparse.densities(LAYERS, 3922) == pytest.approx([0.669803, 0.057633, 1.0], abs=1e-6)
    assert sparse.densities(LAYERS, 1961, 0.0) == pytest.approx(3 * [1961 / 39232])
    assert sparse.densities(LAYERS, 39232) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("total", [0, 3, 4, 50, 1961, 3922, 30000, 39232, 10**6])
def test_layers_keep_whole_numbers_that_add_up(total: int, power: float) -> None:
    found = sparse.counts(LAYERS, total, power)
    sizes = [math.prod(shape) for shape in LAYERS]
    assert sum(found) == min(max(total, 3), sum(sizes))
    assert all(1 <= k <= n for k, n in zip(found, sizes, strict=True))
    if total >= 50:
        exact = [p * n for p, n in zip(sparse.densities(LAYERS, sum(found), power), sizes, strict=True)]
        assert all(abs(k - of) <= 1 for k, of in zip(found, exact, strict=True))
