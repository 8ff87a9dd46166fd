"""Every field says which values it takes, and is held to that from the command line, from Python and in an identity;
what means the same is one run.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Interval
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import Batch, LocalData, Loss, Task, Tree, ranges, tree
from bench.contract import checks, datasets, extremes, parts, toy
from bench.contract.promises import ContractBroken
from bench.losses import cross_entropy
from bench.plugins.registry import ALGORITHMS, DATASETS, PARTS
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import label, parse_algorithms, parse_dataset
from bench.ranges import Epochs, Positive, Ranged, Share, checked, shown, words

FROM_0, ABOVE_0 = "a number from 0 to 1,000,000", "a number above 0 and up to 1,000,000"
EPOCHS, STEPS, COUNT = (f"a whole number from {span}" for span in ("0 to 1,000", "0 to 100,000", "1 to 10,000"))
SHARE, SOME, NOT_ALL = "a number from 0 to 1", "a number above 0 and up to 1", "a number from 0 to below 1"
FLAG, TO_100 = "True or False", "a number from 0 to 100"
PRIOR = {
    "prior": "'local', 'global', 'estimated' or 'uniform'",
    "absent": f"'out' or {ABOVE_0}",
}

FIELDS: dict[str, dict[str, str]] = {
    "airbench": {
        "nesterov": FLAG, "bias_scale": ABOVE_0, "smoothing": SHARE, "warmup": SHARE, "start": SHARE, "end": SHARE,
        "lookahead_every": STEPS, "lookahead": SHARE, "views": "1, 2 or 6",
    },
    "apfl": {"alpha": SHARE, "adapt": FLAG},
    "afl": {"dual_lr": FROM_0},
    "balancefl": {
        "balanced": FLAG, "noise": FROM_0, "inherit": FROM_0, "temperature": ABOVE_0, "smooth": FROM_0,
        "missing": "'client' or 'batch'",
    },
    "cfl": {"short": SHARE, "wait": SHARE, "clusters": "a whole number from 1 to 100"},
    "climb": {"dual_lr": FROM_0, "tolerance": FROM_0, "block": COUNT, "largest": ABOVE_0},
    "clip2fl": {
        "distil": FROM_0, "temperature": ABOVE_0, "contrast": FROM_0, "contrast_temperature": ABOVE_0,
        "features_per_class": COUNT, "match_steps": STEPS, "match_lr": FROM_0, "head_epochs": EPOCHS, "head_lr": FROM_0,
    },
    "creff": {
        "features_per_class": COUNT, "match_steps": STEPS, "match_lr": FROM_0, "head_epochs": EPOCHS, "head_lr": FROM_0,
    },
    "deit_lt": {
        "teacher": "'small_cnn', 'resnet8', 'resnet20', 'resnet32' or 'resnet18', or None", "teacher_rounds": SHARE,
        "balanced": FLAG, "rho": FROM_0, "alpha": SHARE, "beta": NOT_ALL, "drw": SHARE, "erased": SHARE,
    },
    "ditto": {"pull": FROM_0},
    "elastic": {"tau": FROM_0, "decay": NOT_ALL},
    "dafos": {"episodes": STEPS, "shots": COUNT, "outlier": FROM_0, "triplet": FROM_0},
    "fat": {
        "objective": "'at' or 'trades'", "steps": STEPS, "beta": FROM_0, "calibration": FROM_0, "scale": ABOVE_0,
    },
    "fed3r": {"ridge": ABOVE_0},
    "fedadagrad": {"server_lr": ABOVE_0, "server_momentum": NOT_ALL, "eps": ABOVE_0},
    "fedadam": {"server_lr": ABOVE_0, "server_momentum": NOT_ALL, "square_momentum": NOT_ALL, "eps": ABOVE_0},
    "fedadmm": {"rho": FROM_0, "server_lr": FROM_0, "previous": "'client' or 'server'"},
    "fedafa": {
        "epochs": EPOCHS, "generate": SHARE, "accept": SHARE, "attack_steps": STEPS, "step_size": FROM_0,
        "seeds": "'majority' or 'release'",
    },
    "fedala": {"merge_lr": FROM_0, "share": SOME, "merge_epochs": EPOCHS, "layers": "a whole number from 1 to 100"},
    "fedamp": {"attention": SHARE, "sigma": ABOVE_0, "pull": FROM_0},
    "fedas": {"align_lr": FROM_0, "fisher": FLAG},
    "fedasam": {"rho": FROM_0, "eta": FROM_0},
    "fedavg_ft": {"finetune_epochs": EPOCHS, "finetune_rate": ABOVE_0},
    "fedavg_prior": {"against": "'global' or 'uniform'"},
    "fedavgm": {"server_momentum": NOT_ALL},
    "fedbabu": {"finetune_epochs": EPOCHS, "finetune_rate": ABOVE_0},
    "fedcac": {"critical_share": SHARE, "narrowing": COUNT},
    "fedcm": {"alpha": SOME, "server_lr": FROM_0},
    "fedcrac": {
        "margin": FROM_0, "scale": ABOVE_0, "steps": STEPS, "features_per_class": COUNT, "distil": SHARE,
        "temperature": ABOVE_0, "start": "'averaged' or 'previous'",
    },
    "fedcp": {"pull": FROM_0},
    "feddbe": {"pull": FROM_0, "feature_momentum": SOME, "personal_bias": FLAG},
    "feddc": {"alpha": FROM_0, "drift": FLAG},
    "feddisco": {"penalty": FROM_0, "offset": FROM_0},
    "feddistill": {"distil": FROM_0},
    "feddyn": {"alpha": FROM_0},
    "fedetf": {
        "projection": f"{COUNT}, or None", "scale": ABOVE_0, "alternations": EPOCHS, "finetune_epochs": EPOCHS,
        "head_lr": ABOVE_0, "projection_lr": ABOVE_0,
    },
    "fedgela": {"temperature": ABOVE_0},
    "fedgh": {"server_epochs": EPOCHS, "server_lr": FROM_0},
    "fedem": {"components": "a whole number from 1 to 100", "newcomer_steps": STEPS},
    "fedfomo": {
        "peers": EPOCHS, "explore": SHARE, "decay": SHARE, "aside": NOT_ALL, "baseline": "'before' or 'trained'",
    },
    "fedgrab": {
        "proportional": FROM_0, "integral": FROM_0, "differential": FROM_0, "slope": ABOVE_0, "limit": ABOVE_0,
        "rest": SHARE,
    },
    "fedic": {
        "steps": STEPS, "batch_size": COUNT, "lr": ABOVE_0, "weight_decay": FROM_0, "distil": SHARE,
        "temperature": ABOVE_0,
    },
    "fediic": {"within": FROM_0, "between": FROM_0, "difficult": FROM_0, "projection": COUNT, "spread_steps": STEPS},
    "fedir": {"virtual_size": f"{COUNT}, or None"},
    "fedlf": {"floor": SOME, "centre": FROM_0, "decorrelate": FROM_0, "margin": FROM_0},
    "fedloge": {
        "sparsity": NOT_ALL, "etf_norm": ABOVE_0, "etf_steps": STEPS, "etf_bias": "'zero' or 'frozen_random'",
        "faithful": FLAG, "scale": ABOVE_0, "generic_bias": "'keep', 'drop' or 'scale'",
        "personal_rule": "'P0', 'P1' or 'P2'", "frame": "'sse_c' or 'random'", "realign": FLAG, "auxiliary": FLAG,
    },
    "fednh": {"smoothing": SHARE, "scale": ABOVE_0},
    "fedmtl": {"pull": FROM_0, "relations": "'learned' or 'mean'"},
    "fedncm": {"finetune": FLAG},
    "fedntd": {"distil": FROM_0, "temperature": ABOVE_0},
    "fedpac": {"align": FROM_0, "head_lr": FROM_0, "combine": FLAG},
    "fedphp": {"transfer": "'mmd' or 'kd'", "weight": SHARE, "temperature": ABOVE_0, "inherit": NOT_ALL},
    "fedproc": {"contrast": SHARE},
    "fedproto": {"pull": FROM_0},
    "fedprox": {"mu": FROM_0},
    "fedrela": {"start": SHARE, "top": SHARE},
    "fedrep": {"head_epochs": EPOCHS, "body_epochs": f"{EPOCHS}, or None"},
    "fedsam": {"rho": FROM_0, "eta": f"{FROM_0}, or None"},
    "fedvls": {"distil": FROM_0, "suppress": FROM_0},
    "fedyogi": {"server_lr": ABOVE_0, "server_momentum": NOT_ALL, "square_momentum": NOT_ALL, "eps": ABOVE_0},
    "fedyoyo": {
        "distil": FROM_0, "temperature": ABOVE_0, "warmup": COUNT, "tau": FROM_0, "own": SHARE,
        "mixing": "'once' or 'drift'",
    },
    "fml": {"learn": SHARE, "teach": SHARE},
    "fpl": {"contrast": FROM_0, "pull": FROM_0, "temperature": ABOVE_0, "most": COUNT},
    "gbme": {"experts": "1 or 3", "prior": "'estimated' or 'uniform'", "together": SHARE, "own": SHARE},
    "ifca": {"clusters": "a whole number from 1 to 100"},
    "gpfl": {"magnitude": FROM_0, "decay": FROM_0},
    "knnper": {
        "neighbours": COUNT, "scale": ABOVE_0, "share": f"{SHARE}, or None", "aside": "a number above 0 and below 1",
    },
    "lg_fedavg": {"shared_layers": "a whole number from 0 to 100"},
    "local": {"budget": "'matched' or 'converged'"},
    "moon": {"mu": FROM_0, "temperature": ABOVE_0},
    "perfedavg": {"order": "'fo' or 'hf'", "inner_rate": FROM_0, "delta": ABOVE_0, "steps": COUNT},
    "pefll": {
        "descriptor_size": f"{COUNT}, or None", "hidden_size": COUNT, "hidden_layers": "a whole number from 1 to 100",
        "server_lr": FROM_0,
    },
    "ltd": {"temperature": ABOVE_0, "steps": STEPS, "beta": FROM_0, "teacher_rounds": SHARE, "personal_teacher": FLAG},
    "pfedfda": {"blend": f"{SHARE}, or None", "ridge": ABOVE_0},
    "mr_mtl": {"pull": FROM_0},
    "pfedhn": {
        "embedding_size": f"{COUNT}, or None", "hidden_size": COUNT, "hidden_layers": "a whole number from 1 to 100",
        "server_lr": FROM_0, "server_momentum": NOT_ALL, "server_decay": FROM_0,
    },
    "qfedavg": {"q": FROM_0},
    "osuda": {"decay": FROM_0, "eta": SHARE, "consistency": FROM_0, "entropy": FROM_0, "epochs": EPOCHS},
    "pfedsim": {"warm_up": SHARE},
    "pfedme": {"pull": FROM_0, "inner_steps": STEPS, "outer_lr": f"{FROM_0}, or None", "server_lr": FROM_0},
    "ratio_loss": {"beta": FROM_0, "rivals": SHARE},
    "redgrape": {"balance": FROM_0, "per_class": COUNT, "attract": FLAG},
    "rucr": {
        "unify": FROM_0, "temperature": ABOVE_0, "last_rounds": STEPS, "mixtures": COUNT, "head_epochs": EPOCHS,
        "head_lr": FROM_0,
    },
    "scaffold": {"server_lr": FROM_0},
    "smoothing": {
        "alpha": SHARE, "scale_standard": ABOVE_0, "scale_robust": ABOVE_0, "adaptive": FLAG,
        "personal": "'head' or 'all'", "steps": STEPS,
    },
    "fedtiny": {
        "density": SOME, "candidates": "a whole number from 1 to 100", "adjust": SHARE,
        "every": "a whole number from 1 to 10,000", "until": SHARE,
        "granularity": "'all', 'quarter', 'block' or 'layer'", "growth": "'batch' or 'all'",
    },
    "unfreeze": {
        "every": "a whole number from 0 to 10,000", "branch_rounds": SHARE, "order": "'last_first' or 'first_last'",
    },
    "balanced_softmax": PRIOR,
    "calibrated": {**PRIOR, "tau": TO_100, "denominator": "'all' or 'others'"},
    "ccvr": {"features": COUNT, "epochs": EPOCHS},
    "class_balanced": {**PRIOR, "beta": NOT_ALL},
    "crt": {"epochs": EPOCHS},
    "dp": {"clip": ABOVE_0, "noise": FROM_0},
    "facility_location": {"weight": FROM_0, "views": "1 or 2"},
    "feddecorr": {"weight": FROM_0, "by_batch": FLAG},
    "fednpc": {"steps": STEPS, "samples": COUNT, "lr": FROM_0},
    "focal": {"gamma": FROM_0, "detach": FLAG},
    "geometric_median": {"steps": "a whole number from 0 to 100,000", "smoothing": ABOVE_0},
    "graph_cut": {
        "weight": FROM_0, "views": "1 or 2", "form": "'information' or 'correlation'", "diversity": FROM_0,
    },
    "krum": {"share": "a number from 0 to below 0.5", "keep": COUNT},
    "label_smoothing": {"smoothing": SHARE},
    "lade": {**PRIOR, "strength": FROM_0, "penalty": FROM_0},
    "ldam": {**PRIOR, "margin": FROM_0, "scale": ABOVE_0, "defer": SHARE, "beta": NOT_ALL},
    "log_determinant": {
        "weight": FROM_0, "views": "1 or 2", "form": "'information' or 'correlation'",
        "ridge": "a number from 0.5 to 1,000,000",
    },
    "logit_adjustment": {**PRIOR, "tau": TO_100},
    "lws": {"epochs": EPOCHS},
    "norm_bound": {"bound": f"{ABOVE_0}, or None"},
    "posthoc_logit_adjustment": {**PRIOR, "tau": FROM_0},
    "qsgd": {"levels": "a whole number from 1 to 32,767"},
    "restricted_softmax": {"alpha": f"'out' or {SHARE}", "graded": FLAG},
    "tau_norm": {"tau": SHARE},
    "topk": {"share": SOME},
    "trimmed_mean": {"share": "a number from 0 to below 0.5"},
}  # fmt: skip
"""What each field takes, in words; methods and parts that are not here have none."""
BUILT_IN = {name: registry[name] for registry in (ALGORITHMS, PARTS) for name in registry}


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_field_of_each_method_and_part_takes_what_it_says(name: str) -> None:
    known = ranges.hints(BUILT_IN[name])
    assert {field: words(hint) for field, hint in known.items()} == FIELDS.get(name, {})


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("value", [-1, 10**9, 10**30, math.nan, math.inf, -math.inf, "1", [1]])
def test_no_field_takes_what_makes_no_sense(name: str, value: object) -> None:
    for field, said in FIELDS.get(name, {}).items():
        call = f"{BUILT_IN[name].__name__}({field}={shown(value)})"
        with pytest.raises(ValueError) as caught:
            BUILT_IN[name](**{field: value})
        assert str(caught.value) == f"{call}: {field} must be {said}"


def test_it_is_said_from_the_command_line_as_it_was_typed() -> None:
    for text, said in (
        ("fedrep(head_epochs=-1)", "fedrep(head_epochs=-1): head_epochs must be a whole number from 0 to 1,000"),
        ("fedrep(Head-Epochs=True)", "fedrep(Head-Epochs=True) is not written as a Python call"),
        ("fedrep(HEAD_EPOCHS=True)", "fedrep(head_epochs=True): head_epochs must be a whole number from 0 to 1,000"),
        ("creff(features_per_class=0)", "creff(features_per_class=0): features_per_class must be a whole number"),
        ("fedavg_ft(finetune_epochs=-3)", "finetune_epochs must be a whole number from 0 to 1,000"),
        ("fedavg+topk(share=0)", "topk(share=0): share must be a number above 0 and up to 1"),
    ):
        with pytest.raises(BadConfig) as caught:
            parse_algorithms(text)
        assert str(caught.value).startswith(said) or said in str(caught.value)
    with pytest.raises(BadConfig, match=r"pixels must be a whole number from 8 to 1,024"):
        parse_dataset("inat(pixels=7)")


# Settings ---------------------------------------------------------------------------------------------------

TOO_MUCH: dict[str, object] = {
    "clients": 100_001, "unseen": 100_000, "participation": 1.01, "lost": 1.0, "rounds": 100_001, "epochs": 1_001,
    "batch_size": 100_001, "lr": 1.1e6, "lr_decay": 1.01, "lr_steps": ((0.5, 1.1e6),), "momentum": 1.0,
    "weight_decay": 1.1e6, "clip": 1.1e6, "imbalance": 1.1e6, "alpha": 1.1e6, "classes_per_client": 100_001,
    "split_seed": 2**32, "eval_every": 100_001, "eval_clients": 100_001, "kappa": 1.01, "server_momentum": 1.01,
    "penalty": 1.1e6, "attack_epsilon": 1.01, "attack_step": 1.01, "attack_steps": 10_001, "attack_images": 100_001,
    "severity": 1.1e6, "unseen_severity": 1.1e6, "open_classes": 100_000, "shots": 1_001, "ways": 100_000,
}  # fmt: skip
"""The nearest that is refused, of every field that has a number."""
TOO_LITTLE: dict[str, object] = dict.fromkeys(TOO_MUCH, 0) | {
    "unseen": -1, "lost": -0.1, "lr_steps": ((0.0, 0.1),), "momentum": -0.1, "weight_decay": -0.1, "imbalance": 0.99,
    "split_seed": -1, "kappa": -0.1, "penalty": -0.1, "attack_epsilon": -0.1, "attack_step": -0.1,
    "severity": -0.1, "unseen_severity": -0.1, "open_classes": -1,
}  # fmt: skip


def test_every_number_of_a_setting_has_two_ends() -> None:
    numeric = {name for name, hint in ranges.hints(Setting).items() if "int" in str(hint) or "float" in str(hint)}
    assert numeric == set(TOO_MUCH) == set(TOO_LITTLE)
    for wrong in (TOO_MUCH, TOO_LITTLE, dict.fromkeys(TOO_MUCH, math.nan), dict.fromkeys(TOO_MUCH, True)):
        for field, value in wrong.items():
            with pytest.raises(BadConfig, match=rf"Setting\({field}=.*\): {field} must be .* number"):
                replace(toy.SETTING, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match=r"unseen = 8: must be in 0\.\.7 \(clients - 1\)"):
        replace(toy.SETTING, unseen=8)


# One value, one spelling ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spelt(Ranged):
    """Of every kind that a value can have."""

    share: Share = 0.5
    free: float = 1.0
    epochs: Epochs | None = None
    widths: tuple[int, ...] = ()
    pairs: tuple[tuple[Share, Positive], ...] = ()
    absent: Literal["out"] | Positive = "out"
    on: bool = True
    called: str = "x"
    other: object = None


@pytest.mark.parametrize(
    ("field", "given", "wanted"),
    [
        ("share", 1, 1.0),
        ("share", np.float64(0.25), 0.25),
        ("share", -0.0, 0.0),
        ("free", 10**16, 1e16),
        ("epochs", np.int32(3), 3),
        ("widths", [1, 2], (1, 2)),
        ("pairs", [[1, 2]], ((1.0, 2.0),)),
        ("pairs", ((-0.0, 2.0),), ((0.0, 2.0),)),
        ("absent", 1, 1.0),
        ("other", [1], [1]),
    ],
)
def test_what_means_the_same_is_spelt_in_one_way(field: str, given: object, wanted: object) -> None:
    value = getattr(Spelt(**{field: given}), field)  # type: ignore[arg-type]
    assert repr(value) == repr(wanted) and type(value) is type(wanted)


@pytest.mark.parametrize("field", [each.name for each in fields(Spelt) if each.name != "other"])
def test_true_is_no_number_and_a_number_is_no_text(field: str) -> None:
    for wrong in (True, 1, 1.5, "1", math.nan, math.inf, [True], [[0.5]], (("1",),), None):
        try:
            value = getattr(Spelt(**{field: wrong}), field)  # type: ignore[arg-type]
        except ValueError as error:
            assert str(error) == f"Spelt({field}={shown(wrong)}): {field} must be {words(ranges.hints(Spelt)[field])}"
        else:
            assert value == wrong and (type(value) is type(wrong) or type(value) is float)


@given(st.floats(min_value=0, max_value=1))
def test_no_bit_of_a_number_is_lost(value: float) -> None:
    assert checked(Share, value).hex() == (value + 0.0).hex()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("fedprox(mu=1)", "fedprox(mu=1.0)"),
        ("fedprox(mu=1)", "fedprox(mu=1e0)"),
        ("fedprox(mu=0.0)", "fedprox(mu=-0.0)"),
        ("fedavg+tau_norm(tau=1)", "fedavg+tau_norm()"),
        ("local(budget='MATCHED')", "local"),
    ],
)
def test_one_run_has_one_label(one: str, other: str) -> None:
    (first,), (second,) = parse_algorithms(one), parse_algorithms(other)
    assert repr(first) == repr(second) and label(first) == label(second)


def test_python_spells_as_the_command_line_does() -> None:
    assert repr(ALGORITHMS["fedprox"](mu=1)) == "FedProx(mu=1.0)"
    assert replace(toy.SETTING, lr_steps=[[0.5, 1]]).lr_steps == ((0.5, 1.0),)  # type: ignore[arg-type]
    assert repr(replace(toy.SETTING, lr=1, clip=5).clip) == "5.0"


# What a class may do besides --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Own(Ranged):
    """Has a check of its own, which does not call that of its base."""

    low: Share = 0.0
    high: Annotated[float, Interval(ge=0, lt=2)] = 1.0

    def __post_init__(self) -> None:
        """See values that are spelt already."""
        assert type(self.low) is float
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass(frozen=True, kw_only=True)
class Below(Own):
    """Adds to it."""

    extra: Epochs = 0

    def __post_init__(self) -> None:
        """Look at the base's as well."""
        super().__post_init__()
        object.__setattr__(self, "extra", self.extra + 1)


@pytest.mark.parametrize("kind", [Own, Below])
def test_a_check_of_ones_own_sees_checked_values(kind: type[Own]) -> None:
    with pytest.raises(ValueError, match=r"low must be a number from 0 to 1"):
        kind(low=2)
    with pytest.raises(ValueError, match="low is above high"):
        kind(low=1, high=0)
    assert repr(kind(low=1).low) == "1.0"
    assert Below(extra=1).extra == 2


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_held_to_their_fields(name: str) -> None:
    assert issubclass(DATASETS[name], Ranged)
    for field, hint in ranges.hints(DATASETS[name]).items():
        if hint is not str:
            with pytest.raises(ValueError, match=f"{field} must be "):
                DATASETS[name](**{field: math.nan})


def test_long_values_are_cut() -> None:
    for value in ("x" * 5000, 10**4000, 10**5000, [[[[[[1]]]]]], list(range(10**5))):
        assert len(shown(value)) < 200


def test_types_are_said_in_words() -> None:
    said: dict[Any, str] = {
        float: "a finite number",
        Annotated[int, Interval(ge=1)]: "a whole number from 1",
        Annotated[int, Interval(lt=4)]: "a whole number below 4",
        str | None: "text, or None",
        tuple[tuple[Share, Positive], ...]: f"a list, each ({SHARE}, {ABOVE_0})",
        dict: "dict",
    }
    assert {hint: words(hint) for hint in said} == said


# What `bench check` finds of others' plug-ins ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Repeats(toy.Host):
    """Trains so many times."""

    times: Annotated[int, Interval(le=100)] = 1

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        for _ in range(self.times):
            shared = task.sgd(task.loss, shared, data.batches(1))
        return shared, private


@dataclass(frozen=True, kw_only=True)
class Boundless(Repeats):
    """Says nothing of what it takes."""

    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Divides(Repeats):
    """Fails on 0, in its own way."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(steps=4 // abs(self.times))), private


@dataclass(frozen=True, kw_only=True)
class CountsDown(Repeats):
    """Never ends from -1 on."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        left = self.times
        while left and not threading.main_thread().name.startswith("over"):
            left -= 1
            time.sleep(0.001)
        return super().local_update(task, shared, private, data)


@dataclass(frozen=True, kw_only=True)
class Asserts(Repeats):
    """Has a check of its own that is no sentence."""

    def __post_init__(self) -> None:
        assert self.times >= 0


@dataclass(frozen=True, kw_only=True)
class Silent(Repeats):
    """Refuses without a word."""

    def __post_init__(self) -> None:
        if self.times < 0:
            raise ValueError


@dataclass(frozen=True, kw_only=True)
class Diverges(Repeats):
    """Ends in what the suite says in a sentence."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return tree.scale(shared, math.nan if self.times <= 0 else 1.0), private


PROMISE = "numbers out of any sense are refused, or do no harm"
BROKEN: dict[type[Repeats], str] = {
    Boundless: "times = 1,000,000,000 is taken; say its range by its type: one of bench.ranges, as in times: Steps",
    Divides: "times = 0 is taken and ends in ZeroDivisionError: ",
    CountsDown: "times = -1 is taken and does not end within 0.5 seconds; refuse it: say its range",
    Asserts: "times = -1 ends in AssertionError: ",
    Silent: "times = -1 is refused without a word",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_check_finds_fields_that_take_too_much(kind: type[Repeats], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extremes, "_SECONDS", 0.5 if kind is CountsDown else 60.0)
    with pytest.raises(ContractBroken) as caught:
        checks.ALGORITHM_PROMISES[PROMISE](kind)
    monkeypatch.setattr(threading.main_thread(), "name", "over")  # ends what does not end
    assert str(caught.value).startswith(BROKEN[kind])


@pytest.mark.parametrize("kind", [Repeats, Diverges])
def test_a_check_lets_a_field_take_what_does_no_harm(kind: type[Repeats]) -> None:
    checks.ALGORITHM_PROMISES[PROMISE](kind)


@dataclass(frozen=True, kw_only=True)
class Pictures(toy.Toy):
    """Has as many classes as it is told, one at least."""

    enlarged: Annotated[int, Interval(ge=1, le=16)] = 1
    train: Annotated[int, Interval(ge=0, le=10_000)] = 480
    test: Annotated[int, Interval(ge=0, le=10_000)] = 180

    @property
    def groups(self) -> str:
        return "thirds" if 100 / self.train > 1 else "count"


def test_parts_and_datasets_are_asked_as_well() -> None:
    with pytest.raises(ContractBroken, match="train = 0 is taken and ends in ZeroDivisionError"):
        datasets.PROMISES[PROMISE](Pictures)

    @dataclass(frozen=True, kw_only=True)
    class Times(Loss):
        factor: float = 2.0

        def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
            return self.factor * cross_entropy(logits, batch)

    with pytest.raises(ContractBroken, match=r"factor = 1,000,000,000 is taken; .* as in factor: Strength, or"):
        parts.PROMISES[PROMISE](Times)
