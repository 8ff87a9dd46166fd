"""The attack whose steps adapt: when they are halved, what they are halved for, and on which losses it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.training import apgd, robustness
from tests.test_attacks import KEYS, ball, network


def test_checkpoints_lie_at_22_percent_and_then_in_spans_that_shrink_to_6() -> None:
    assert apgd.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd.checkpoints(3) == [1, 2] and apgd.checkpoints(1) == []


def test_dlr_is_the_difference_of_two_logits_over_the_spread_of_the_first_and_the_third() -> None:
    logits = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0]])
    found = apgd.dlr(logits, torch.tensor([0]), torch.tensor([1]))
    assert float(found) == pytest.approx(-(5 - 3) / (5 - (2 + 1) / 2))
    assert float(apgd.dlr(10 * logits + 4, torch.tensor([0]), torch.tensor([1]))) == pytest.approx(float(found))


def test_it_breaks_what_pgd_breaks_and_more_and_steps_of_any_size_do() -> None:
    score, x, y = network()
    plain = robustness.by_pgd(score, x, y, ball(0.06, 0.03), 4, KEYS)
    adapted = apgd.worst(score, x, y, ball(0.06), 30, KEYS)
    assert int((adapted == y).sum()) < int((plain == y).sum()) <= 40
    assert not ((adapted == y) & (plain != y)).any()


@pytest.mark.parametrize("target", [-0.0271, 0.0137, 0.0533])
def test_its_steps_are_halved_until_they_meet_what_lies_between(target: float) -> None:
    """Steps of one size go from end to end of the ball, and meet few such strips, 0.004 wide, by chance."""

    def peak(x: Tensor) -> Tensor:
        at = x.flatten(1)[:, :1]
        return torch.cat([torch.zeros_like(at), 0.002 - (at - target).abs()], 1)

    x, y = torch.zeros(40, 1, 1, 1), torch.zeros(40, dtype=torch.int64)
    assert apgd.worst(peak, x, y, ball(0.1), 30, KEYS).tolist() == 40 * [1]


def rare(step: int) -> float:
    """Falls 21 times, and then leads."""
    return 100.0 if step == 22 else -float(step)


@pytest.mark.parametrize(
    ("worth", "halved"),
    [
        (float, ()),
        (rare, (22, 41)),
        (lambda step: float(step if step <= 22 else step - 100), (41,)),
        (lambda step: rare(step) if step <= 22 else float(step), (22,)),
        (lambda step: 200.0 if step == 41 else float(step if step <= 22 else -step), (41,)),
    ],
    ids=["all gain", "rare gains", "most gain and none leads", "the same after a halving", "rare gains later"],
)  # fmt: skip
def test_steps_are_halved_where_gains_are_rare_or_none_leads_and_go_on_from_the_best_point(
    worth: Callable[[int], float], halved: tuple[int, ...]
) -> None:
    """What a point is worth is told by its step, up to the second checkpoint; slopes go up and down by turns."""
    points: list[float] = []

    def loss(left: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        step, at = len(points), logits[:, 0]
        points.append(float(at.detach()))
        sign = 1.0 if step % 2 == 0 else -1.0
        return worth(step) + sign * (at - at.detach())

    nothing = torch.zeros(1, dtype=torch.int64)
    apgd._run(lambda x: x.flatten(1), torch.zeros(1, 1, 1, 1), nothing, ball(1.0), 100, KEYS[:1], nothing, loss)
    size = 2.0
    for checkpoint in (22, 41):
        best = max(range(checkpoint + 1), key=worth)
        expected = {}
        for shorter in (False, True):
            at, of = (points[best], best) if shorter else (points[checkpoint], checkpoint)
            ahead = min(max(at + (size / 2 if shorter else size) * (-1) ** of, -1.0), 1.0)
            expected[shorter] = at + 0.75 * (ahead - at) + 0.25 * (at - points[checkpoint - 1])
        found = checkpoint in halved
        assert points[checkpoint + 1] == pytest.approx(min(max(expected[found], -1.0), 1.0), abs=1e-6)
        assert abs(expected[True] - expected[False]) > 0.05
        size = size / 2 if found else size


def test_targets_are_tried_where_there_are_four_classes_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for classes, runs in ((3, 1), (4, 4), (12, 10)):
        seen: list[int] = []

        def noted(*given: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(1)
            return given[2][given[6]]  # nothing is broken

        monkeypatch.setattr(apgd, "_run", noted)
        score, x, y = network(classes)
        apgd.worst(score, x, y, ball(0.1), 5, KEYS)
        assert len(seen) == runs
