"""Loss parts: values and slopes are those of their papers' formulas, worked out here in numpy; what is off is
cross-entropy; and each does what its paper is for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Loss, Task, UsesPrior, tree
from bench.contract import toy
from bench.data import Batch
from bench.plugins.registry import PARTS
from bench.protocol.composed import Composed
from bench.protocol.composition import is_neutral
from bench.protocol.presets import PAPER
from bench.protocol.spelling import parse_algorithms
from bench.training import engine as engines
from bench.training.rounds import Run

Array: TypeAlias = Any
"""Of numpy, in double precision."""
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
OURS = [
    "calibrated", "class_balanced", "label_smoothing", "lade", "ldam", "logit_adjustment", "restricted_softmax",
]  # fmt: skip
NEUTRAL = {name: PARTS[name](**PARTS[name].neutral) for name in OURS}

LOGITS, COUNTS = (2.0, 1.0, 0.0), (70.0, 20.0, 10.0)
TAILED = (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)
"""Class counts of CIFAR-10-LT at imbalance 100."""


def part(text: str) -> Loss:
    (method,) = parse_algorithms(f"fedrod+{text}")  # which has a loss of its own: what is off is not left out
    (found,) = method.pieces[1:]
    assert isinstance(found, Loss)
    return found


def task_of(classes: int, **more: Any) -> Task:
    return replace(toy.task(toy.Host()), num_classes=classes, **more)


def loss_of(
    text: str | Loss, logits: Any, y: Any, counts: Any, weight: Any = None, estimated: Any = None, **more: Any
) -> Tensor:
    """The loss of (B, C) logits, by the counts that the part asks for."""
    given, labels = torch.as_tensor(logits, dtype=torch.float32), torch.tensor(y)
    weights = torch.ones(len(labels)) if weight is None else torch.tensor(weight)
    batch = Batch(torch.zeros(len(labels), 1, 1, 1), labels, weights)
    one, task = part(text) if isinstance(text, str) else text, task_of(given.shape[1], **more)
    known = one.counts(
        task, torch.tensor(counts, dtype=torch.float32), None if estimated is None else torch.tensor(estimated)
    )
    assert known is not None
    return one.loss(task, given, None, batch, known)


def value(text: str | Loss, logits: Any = (LOGITS,), y: Any = (2,), counts: Any = COUNTS, **more: Any) -> float:
    return float(loss_of(text, logits, y, counts, **more))


def slope(text: str, logits: Any, y: Any, counts: Any, **more: Any) -> Array:
    """The gradient of the loss: (B, C)."""
    given = torch.tensor(np.asarray(logits), dtype=torch.float32, requires_grad=True)
    (found,) = torch.autograd.grad(loss_of(text, given, y, counts, **more), given)
    return np.asarray(found, dtype=np.float64)


# Values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("focal(gamma=0.5)", 2.296671),
        ("focal(gamma=2)", 1.993605),
        ("balanced_softmax", 4.063197),
        ("logit_adjustment", 4.063197),
        ("logit_adjustment(tau=1.5)", 4.980421),
        ("logit_adjustment(tau=0)", 2.407606),
        ("logit_adjustment(prior='uniform')", 2.407606),
        ("class_balanced(beta=0.99)", 4.213062),
        ("class_balanced(beta=0)", 2.407606),
        ("class_balanced(beta=0.999999999)", 2.407606 * 3 / 10 / (1 / 70 + 1 / 20 + 1 / 10)),  # inverse frequencies
        ("label_smoothing", 0.9 * 2.407606 + 0.1 * (0.407606 + 1.407606 + 2.407606) / 3),
        ("label_smoothing(smoothing=0)", 2.407606),
        ("calibrated", 2.576343),
        ("calibrated(tau=0)", 2.407606),
        ("calibrated(denominator='others')", math.log(math.exp(2 - 0.345721) + math.exp(1 - 0.472871)) + 0.562341),
        ("calibrated(tau=0, denominator='others')", math.log(math.exp(2) + math.exp(1))),
        ("ldam(defer=1)", 2.871539),
        ("ldam(defer=1, scale=30)", 75.0),
        ("ldam(margin=0, defer=1)", 2.407606),
    ],
)
def test_the_loss_of_one_example_is_the_golden_one(text: str, wanted: float) -> None:
    assert value(text) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("restricted_softmax", 2.306356),
        ("restricted_softmax(alpha='out')", 2.126928),
        ("restricted_softmax(alpha=1)", 2.407606),
        ("restricted_softmax(alpha=0)", math.log(math.exp(2) + 1 + 1)),
        ("restricted_softmax(alpha=0.3, graded=True)", math.log(math.exp(2) + math.exp(0.3) + 1)),
    ],
)
def test_the_loss_of_a_client_that_lacks_a_class_is_the_golden_one(text: str, wanted: float) -> None:
    assert value(text, counts=(70.0, 0.0, 10.0)) == pytest.approx(wanted, abs=2e-6)


def each_class(text: str, **more: Any) -> Array:
    """The loss of an example of each of the ten classes of CIFAR-10-LT, all logits equal."""
    return np.array([value(text, np.zeros((1, 10)), (c,), TAILED, **more) for c in range(10)])


def test_constants_of_cifar_10_lt_are_the_known_ones() -> None:
    log_prior = (-0.9087, -1.4206, -1.9326, -2.4440, -2.9567, -3.4675, -3.9792, -4.4915, -5.0071, -5.5139)
    assert -each_class("logit_adjustment") == pytest.approx(log_prior, abs=1e-4)
    weights = (0.0506, 0.0769, 0.1211, 0.1950, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092, 3.9927)
    assert each_class("class_balanced") / math.log(10) == pytest.approx(weights, abs=1e-4)
    margins = np.array((0.1581, 0.1797, 0.2042, 0.2321, 0.2638, 0.2998, 0.3407, 0.3872, 0.4405, 0.5))
    assert each_class("ldam(defer=1)") == pytest.approx(np.log(9 + np.exp(-margins)) + margins, abs=1e-4)


@pytest.mark.parametrize("beta", [0.9, 0.9999, 0.999999999])
def test_weights_keep_their_digits_where_beta_is_near_one(beta: float) -> None:
    number = np.array([-math.expm1(n * math.log(beta)) for n in TAILED])
    wanted = 10 / number / (1 / number).sum()
    assert each_class(f"class_balanced(beta={beta})") / math.log(10) == pytest.approx(wanted, rel=1e-5)


# Slopes -----------------------------------------------------------------------------------------------------

Z = np.array([[0.3, -1.2, 0.8, 0.1], [1.5, 0.2, -0.4, -2.0], [-0.7, 0.9, 0.4, 0.6], [9.0, 9.0, -9.0, 0.0]])
Y, WEIGHT, N = (0, 3, 0, 0), (1.0, 1.0, 1.0, 0.0), np.array([12.0, 5.0, 0.0, 3.0])
"""Three examples and padding, of a client that lacks class 2; the batch lacks class 1, too."""
HERE = N > 0
LABEL = np.eye(4)[list(Y)]
REAL = np.array(WEIGHT)[:, None]


def softmax(z: Array) -> Array:
    raised = np.exp(z - z.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def among(shift: Any) -> Array:
    """Logits of the classes that there are, shifted; others are minus infinity."""
    return np.where(HERE, Z + np.where(HERE, shift, 0), -np.inf)


def inverse(power: float) -> Array:
    return np.where(HERE, np.maximum(N, 1) ** -power, 0.0)


def weights(beta: float) -> Array:
    """Of each example: the class's, whose mean over the three classes is one."""
    one = np.where(HERE, 1 / np.where(HERE, 1 - beta**N, 1), 0)
    return (one * 3 / one.sum())[list(Y)][:, None]


def of_ldam(scale: float) -> Array:
    margin = 0.5 * inverse(0.25) / inverse(0.25).max()
    return scale * (softmax(scale * (Z - margin * LABEL)) - LABEL)


def of_lade(strength: float, penalty: float) -> Array:
    share = N / N.sum()
    weight = REAL[:, 0] * 0.25 / share[list(Y)]
    raised = weight[:, None] * np.exp(Z)
    partition = np.log(raised.sum(0) / 3)
    drawn = (LABEL * REAL) / np.maximum((LABEL * REAL).sum(0), 1) - raised / raised.sum(0) * (
        1 + 2 * penalty * partition
    )
    seen = (LABEL * REAL).sum(0) > 0
    balanced = softmax(among(np.log(np.maximum(N, 1)))) - LABEL
    return balanced - strength * 3 * share * seen * drawn  # three examples, over which is averaged below


SLOPES = {
    "logit_adjustment": softmax(among(np.log(np.maximum(N, 1)))) - LABEL,
    "logit_adjustment(tau=2)": softmax(among(2 * np.log(np.maximum(N, 1)))) - LABEL,
    "class_balanced(beta=0.9)": weights(0.9) * (softmax(Z) - LABEL),
    "label_smoothing(smoothing=0.2)": softmax(Z) - 0.8 * LABEL - 0.05,
    "calibrated(tau=2)": softmax(among(-2 * inverse(0.25))) - LABEL,
    "calibrated(tau=2, denominator='others')": (
        softmax(np.where(LABEL > 0, -np.inf, among(-2 * inverse(0.25)))) - LABEL
    ),
    "restricted_softmax(alpha=0.3)": np.where(HERE, 1, 0.3) * (softmax(Z * np.where(HERE, 1, 0.3)) - LABEL),
    "restricted_softmax(alpha='out')": softmax(among(0)) - LABEL,
    "restricted_softmax(alpha=0.3, graded=True)": ((0.3 + 0.7 * N / 12) * (softmax(Z * (0.3 + 0.7 * N / 12)) - LABEL)),
    "ldam(defer=1)": of_ldam(1.0),
    "ldam(defer=1, scale=3)": of_ldam(3.0),
    "ldam(defer=0, beta=0.9)": weights(0.9) * 3 / (weights(0.9) * REAL).sum() * of_ldam(1.0),
    "lade(strength=0.3, penalty=0.2)": of_lade(0.3, 0.2),
    "lade(strength=0)": of_lade(0.0, 0.0),
}


@pytest.mark.parametrize("text", SLOPES)
def test_slopes_are_those_of_the_formula(text: str) -> None:
    assert slope(text, Z, Y, N, weight=WEIGHT) == pytest.approx(SLOPES[text] * REAL / 3, abs=2e-6)


@pytest.mark.parametrize("text", SLOPES)
def test_values_go_with_their_slopes(text: str) -> None:
    """A step against the slope lowers the loss by what it says: a slope of something else would not."""
    step = 0.01 * slope(text, Z, Y, N, weight=WEIGHT)
    change = value(text, Z + step, Y, N, weight=WEIGHT) - value(text, Z - step, Y, N, weight=WEIGHT)
    assert change == pytest.approx(2 * (step * SLOPES[text] * REAL / 3).sum(), rel=1e-2)


def test_the_value_of_lade_is_that_of_its_bound() -> None:
    share, real = N / N.sum(), Z[:3]
    weight = 0.25 / share[list(Y[:3])]
    partition = np.log((weight[:, None] * np.exp(real)).sum(0) / 3)
    bound = {
        y: real[[i for i in range(3) if Y[i] == y], y].mean() - partition[y] - 0.2 * partition[y] ** 2 for y in (0, 3)
    }
    balanced = np.mean([-math.log(softmax(among(np.log(np.maximum(N, 1))))[i, y]) for i, y in enumerate(Y[:3])])
    wanted = balanced - 0.3 * sum(share[y] * bound[y] for y in bound)
    assert value("lade(strength=0.3, penalty=0.2)", Z, Y, N, weight=WEIGHT) == pytest.approx(wanted, abs=1e-5)


# Classes that are not there ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["logit_adjustment", "calibrated", "calibrated(tau=0.01)", "restricted_softmax(alpha='out')", "lade"]
)
def test_a_class_that_is_out_is_neither_seen_nor_moved(text: str) -> None:
    other = Z.copy()
    other[:, 2] = 7.0
    assert value(text, Z, Y, N, weight=WEIGHT) == value(text, other, Y, N, weight=WEIGHT)
    assert not slope(text, Z, Y, N, weight=WEIGHT)[:, 2].any()


@pytest.mark.parametrize("text", ["logit_adjustment", "calibrated", "restricted_softmax(alpha='out')"])
def test_a_client_of_one_class_has_nothing_to_learn(text: str) -> None:
    assert value(text, counts=(0.0, 0.0, 9.0)) == 0.0


def test_where_a_label_is_compared_with_others_only_its_own_logit_is_pushed_alone() -> None:
    found = slope("calibrated(denominator='others')", [LOGITS], (2,), (0.0, 0.0, 9.0))
    assert found[0] == pytest.approx([*softmax(np.array([LOGITS[:2]]))[0], -1.0], abs=1e-3)  # of numbers of 1e4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("logit_adjustment(absent=0.1)", math.log(70 * math.exp(2) + 0.1 * math.e + 10) - math.log(10)),
        (
            "calibrated(absent=1e-8)",
            math.log(math.exp(2 - 70**-0.25) + math.exp(1 - 100) + math.exp(-(10**-0.25))) + 10**-0.25,
        ),
        (
            "class_balanced(beta=0.999999999, absent=0.1)",
            2.407606 * 3 / 10 / (1 / 70 + 10 + 1 / 10),
        ),
        # the class that is not there has the largest margin, and those of the others shrink
        (
            "ldam(defer=1, absent=0.1)",
            math.log(math.exp(2) + math.e + math.exp(-0.5 * 0.01**0.25)) + 0.5 * 0.01**0.25,
        ),
        ("ldam(defer=1)", math.log(math.exp(2) + math.e + math.exp(-0.5)) + 0.5),
    ],
)
def test_a_count_may_stand_for_none(text: str, wanted: float) -> None:
    assert value(text, counts=(70.0, 0.0, 10.0)) == pytest.approx(wanted, rel=1e-5)


# Whose counts -----------------------------------------------------------------------------------------------

PRIORS: dict[str, dict[str, Any]] = {
    "logit_adjustment": {},
    "class_balanced": {"beta": 0.99},
    "calibrated": {},
    "ldam": {"defer": 1.0},
    "lade": {},
}


@pytest.mark.parametrize("name", PRIORS)
def test_counts_are_those_of_the_prior(name: str) -> None:
    """Frequencies of all clients, as if this client's hundred examples had them."""

    def by(whose: str, **more: Any) -> float:
        one = PARTS[name](prior=whose, **PRIORS[name])
        assert isinstance(one, Loss)
        return value(one, **more)

    own, wanted = (20.0, 30.0, 50.0), by("local")
    assert by("global", counts=own, prior=torch.tensor([0.7, 0.2, 0.1])) == pytest.approx(wanted, rel=1e-6)
    assert by("estimated", counts=own, estimated=[1400.0, 400.0, 200.0]) == pytest.approx(wanted, rel=1e-6)
    assert abs(by("local", counts=own) - wanted) > 1e-3


def test_those_that_use_frequencies_say_so() -> None:
    users = {name for name in OURS if issubclass(PARTS[name], UsesPrior)}
    assert users == set(PRIORS)
    assert {name: PARTS[name](prior="estimated").tier for name in users} == dict.fromkeys(users, "L")


# What equals what -------------------------------------------------------------------------------------------


def run_of(algorithm: Any, engine: str = "serial", **setting: Any) -> Run:
    one = parse_algorithms(algorithm)[0] if isinstance(algorithm, str) else algorithm
    return toy.finish(toy.run(one, engine, setting=replace(toy.SETTING, **{"rounds": 2, "unseen": 1, **setting})))


def apart(one: Run, other: Run) -> float:
    return tree.largest_difference(
        *({key: run.progress.server[key] for key in ("body", "head")} for run in (one, other))
    )


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("name", OURS)
def test_off_by_hand_is_fedavg(name: str, engine: str) -> None:
    assert is_neutral(NEUTRAL[name])
    (plain,) = parse_algorithms("fedavg")
    difference = apart(run_of(Composed(plain, (NEUTRAL[name],)), engine), run_of(plain, engine))
    # Bit for bit one by one; for stacked clients torch's own cross-entropy is put together otherwise. LADE's balanced
    # softmax adds a constant.
    assert difference == 0.0 if engine == "serial" and name != "lade" else difference <= engines.TOLERANCE


@pytest.mark.equivalence
@pytest.mark.parametrize("text", ["logit_adjustment(tau=3)", "class_balanced", "calibrated", "restricted_softmax"])
def test_equal_counts_are_cross_entropy(text: str) -> None:
    assert value(text, counts=(5.0, 5.0, 5.0)) == pytest.approx(2.407606, abs=1e-5)


@pytest.mark.equivalence
@ENGINES
def test_logit_adjustment_at_one_is_balanced_softmax(engine: str) -> None:
    mine = run_of("fedavg+logit_adjustment", engine)
    assert mine.outcome().metrics == run_of("fedavg+balanced_softmax", engine).outcome().metrics
    for theirs in ("fedavg+balanced_softmax", "fedrod"):  # whose generic half it is
        assert apart(mine, run_of(theirs, engine)) == 0.0
    assert apart(mine, run_of("fedavg+logit_adjustment(tau=1.5)", engine)) > engines.TOLERANCE
    assert value("lade(strength=0)") == value("logit_adjustment") == value("balanced_softmax")


@pytest.mark.equivalence
def test_late_ldam_without_margins_is_the_class_balanced_loss_by_the_weights_of_its_batch() -> None:
    text, mean = "(beta=0.9)", float((weights(0.9) * REAL).sum() / 3)
    balanced = value(f"class_balanced{text}", Z, Y, N, weight=WEIGHT)
    late = value("ldam(margin=0, defer=0, beta=0.9)", Z, Y, N, weight=WEIGHT)
    assert late == pytest.approx(balanced / mean, rel=1e-6)


# When -------------------------------------------------------------------------------------------------------


def test_ldam_weighs_classes_from_a_share_of_the_rounds_on() -> None:
    def weighs(defer: float, round: int, rounds: int) -> bool:
        text, more = f"ldam(defer={defer}, beta=0.9)", {"round": round, "rounds": rounds}
        found = value(text, Z, Y, N, weight=WEIGHT, **more)
        early, late = (value(f"ldam(defer={d}, beta=0.9)", Z, Y, N, weight=WEIGHT) for d in (1, 0))
        assert early != late and found in (early, late)
        return found == late

    assert [weighs(0.8, r, 200) for r in (0, 159, 160, 199)] == [False, False, True, True]
    assert [weighs(0.07, r, 100) for r in (6, 7)] == [False, True]  # not one later by rounding
    assert not weighs(1.0, 99, 100) and weighs(0.0, 0, 100)


@pytest.mark.equivalence
@ENGINES
def test_a_run_is_that_without_weights_until_then(engine: str) -> None:
    (never, late), setting = ([f"fedavg+ldam(defer={d})" for d in (1, 0.75)], replace(toy.SETTING, rounds=4))
    runs = [toy.run(parse_algorithms(text)[0], engine, setting=setting) for text in (never, late)]
    differences = []
    for _ in range(4):
        for run in runs:
            run.step()
        differences.append(apart(*runs))
    assert differences[:3] == [0.0] * 3 and differences[3] > engines.TOLERANCE


# What they are for ------------------------------------------------------------------------------------------


def pull(text: str, counts: tuple[int, ...], logits: Any = None, **more: Any) -> Array:
    """The slope of all of a client's examples together, at logits that are alike for all: (C,)."""
    y = [c for c, n in enumerate(counts) for _ in range(n)]
    z = np.zeros(len(counts)) if logits is None else np.asarray(logits)
    found: Array = slope(text, np.tile(z, (len(y), 1)), y, counts, **more).sum(0)
    return found


@pytest.mark.parametrize(
    "text",
    ["logit_adjustment", "class_balanced(beta=0.999999999)", "ldam(margin=0, defer=0, beta=0.999999999)", "lade"],
)
def test_a_model_that_knows_nothing_is_not_taught_frequencies(text: str) -> None:
    """Where images tell nothing, the best model of these losses is even; that of cross-entropy has the frequencies."""
    counts = (14, 4, 2)
    assert pull(text, counts) == pytest.approx(0, abs=1e-6)
    assert pull("cross_entropy", counts, np.log(counts)) == pytest.approx(0, abs=1e-6)
    assert pull("cross_entropy", counts)[0] < -0.3 and pull("cross_entropy", counts)[2] > 0.2


def test_a_larger_tau_pulls_towards_rare_classes() -> None:
    rare = [pull(f"logit_adjustment(tau={tau})", (14, 4, 2))[2] for tau in (0, 0.5, 1, 1.5, 2)]
    assert rare == sorted(rare, reverse=True) and rare[1] > 1e-3 > -1e-3 > rare[3]  # a slope below 0 raises the logit


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("calibrated", 1 - 81**-0.25),
        ("calibrated(tau=3)", 3 * (1 - 81**-0.25)),
        ("logit_adjustment", math.log(81)),
        ("cross_entropy", 0.0),
    ],
)
def test_classes_tie_where_the_rare_one_is_ahead_by_its_margin(text: str, ahead: float) -> None:
    for label in (0, 1):
        assert value(text, [[0.0, ahead]], (label,), (81, 1)) == pytest.approx(math.log(2), abs=1e-5)


def test_ldam_asks_for_a_margin_of_whichever_class_is_the_label() -> None:
    frequent, rare = 0.5 * 81**-0.25, 0.5
    assert value("ldam(defer=1)", [[frequent, 0.0]], (0,), (81, 1)) == pytest.approx(math.log(2), abs=1e-6)
    assert value("ldam(defer=1)", [[0.0, rare]], (1,), (81, 1)) == pytest.approx(math.log(2), abs=1e-6)


def test_restricted_softmax_moves_classes_that_a_client_lacks_less() -> None:
    def moved(alpha: object) -> Array:
        return pull(f"restricted_softmax(alpha={alpha!r})", (5, 3, 0, 0))

    whole = moved(1.0)
    for alpha in (0.0, 0.1, 0.5):  # all logits are 0: probabilities are those of cross-entropy
        assert moved(alpha) == pytest.approx(whole * np.array([1, 1, alpha, alpha]), abs=1e-6)
    assert whole[2] == pytest.approx(0.25, abs=1e-6) and not moved("out")[2:].any()


def test_the_best_of_a_smoothed_label_is_not_to_be_sure() -> None:
    wanted = np.array([0.9 + 0.1 / 4, *[0.1 / 4] * 3])
    assert slope("label_smoothing", [np.log(wanted)], (0,), (1, 1, 1, 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_lade_is_content_with_the_log_ratio_of_densities(penalty: float) -> None:
    """Three pictures, three classes: at log p(x | y) / p(x), as it would be if classes were equal, nothing moves."""
    often = np.array([[6, 2, 4], [1, 3, 0], [1, 1, 2]])  # of picture x with label y
    examples = [(x, y) for x in range(3) for y in range(3) for _ in range(often[x, y])]
    counts = often.sum(0)
    within = often / counts  # p(x | y)
    ratio = np.log(np.maximum(within, 1e-9) / within.mean(1, keepdims=True))
    rows, y = np.array([ratio[x] for x, _ in examples]), [y for _, y in examples]

    def moved(text: str, logits: Array) -> Array:
        each = slope(text, logits, y, counts)
        return np.array([each[[x == k for x, _ in examples]].sum(0) for k in range(3)])

    text = f"lade(strength=2, penalty={penalty})"
    assert moved(text, rows) == pytest.approx(0, abs=1e-6)
    assert abs(moved(text, rows + np.array([1.0, 0, 0]))).max() > 1e-2
    raised = rows + np.array([[1.0] * 3 if x == 0 else [0.0] * 3 for x, _ in examples])
    assert abs(moved("balanced_softmax", raised)).max() < 1e-6 < 1e-2 < abs(moved(text, raised)).max()


# Fields -----------------------------------------------------------------------------------------------------


def test_what_is_graded_must_be_a_number() -> None:
    with pytest.raises(ValueError, match=r"alpha = 'out' and graded = True: nothing is graded there; give alpha a"):
        PARTS["restricted_softmax"](alpha="out", graded=True)
    assert PARTS["restricted_softmax"](alpha=1).alpha == 1.0


def test_papers_values_are_those_of_the_papers() -> None:
    said: dict[str, dict[str, Any]] = {"ldam": {"scale": 30.0}, "calibrated": {"denominator": "others"}}
    assert {name: dict(PARTS[name].paper) for name in OURS if PARTS[name].paper} == said
    for name in said:
        chosen, _ = PAPER.choose(parse_algorithms(f"fedavg+{name}")[0])
        assert chosen.pieces[1:] == (PARTS[name](**said[name]),)
