"""The setting's optimiser: SGD as it was, AdamW as torch has it, in both engines, and what neither can stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Batch, Tree, tree
from bench.contract import toy
from bench.models import is_norm
from bench.optim import Adam, Sgd, clipped
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import LATER, BadConfig
from bench.protocol.spelling import parse_algorithms, parse_dataset
from bench.sweep.config import Sweep
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, done, mean_by_size

PLAIN = replace(toy.SETTING, momentum=0.0, rounds=2)
ADAMW = replace(PLAIN, optimiser="adamw", lr=0.01, weight_decay=0.3, clip=0.2)
"""A decay and a clip that a step shows."""


def start(setting: Any = ADAMW, name: str = "fedavg", engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def by_torch(setting: Any, params: Tree, batches: Iterable[Batch], kept: dict[str, Any] | None = None) -> Tree:
    """torch's AdamW on cross-entropy, all leaves of the toy's network in their order; `kept` goes on, and is filled."""
    w = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in tree.flatten(params).items()}
    vectors, others = ([leaf for leaf in w.values() if (leaf.ndim < 2) is flat] for flat in (True, False))
    decays = {"all": setting.weight_decay, "weights": 0.0}[setting.decayed]
    groups = [{"params": vectors, "weight_decay": decays}, {"params": others, "weight_decay": setting.weight_decay}]
    optimiser = torch.optim.AdamW(groups, setting.lr, (0.9, 0.999), 1e-8)
    if kept:
        optimiser.load_state_dict(kept)
    for batch in batches:
        optimiser.zero_grad()
        F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *params_of(w)[:2])), *params_of(w)[2:]),
                        batch.y).backward()  # fmt: skip
        if setting.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(w.values()), setting.clip)
        optimiser.step()
    if kept is not None:
        kept.update(optimiser.state_dict())
    return tree.unflatten({path: leaf.detach() for path, leaf in w.items()})


def params_of(w: dict[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return list(w.values())


# A step ---------------------------------------------------------------------------------------------------------------


def test_a_step_of_adamw_is_the_one_worked_out_by_hand() -> None:
    """w 2 and gradient 0.5: the first step is lr · g/(|g| + eps), after a decay of lr · 0.1 · w; the second has moments
    0.9 · 0.05 - 0.1 · 0.1 and 0.999 · 0.00025 + 0.001 · 0.01, over 0.19 and 0.001999."""
    rule = Adam(0.1, weight_decay=0.1)
    w, kept = rule.step({"w": torch.tensor([[2.0]])}, {"w": torch.tensor([[0.5]])}, rule.start({"w": torch.ones(1, 1)}))
    assert float(w["w"]) == pytest.approx(2 - 0.1 * 0.1 * 2 - 0.1, abs=1e-6)
    after, _ = rule.step(w, {"w": torch.tensor([[-0.1]])}, kept)
    towards = (0.035 / 0.19) / ((0.00025975 / 0.001999) ** 0.5)
    assert float(after["w"]) == pytest.approx(1.88 * 0.99 - 0.1 * towards, abs=3e-6)


@pytest.mark.parametrize("rule", [Sgd(0.1, 0.9, 1e-2), Adam(0.1, weight_decay=1e-2)], ids=["sgd", "adamw"])
def test_clipping_shortens_what_any_rule_is_given_and_groups_apart(rule: Sgd | Adam) -> None:
    w: Tree = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.3])}
    slopes: Tree = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}
    short = clipped(slopes, 1.0, ("b",))
    assert torch.allclose(short["a"], torch.tensor([0.6, 0.8]), atol=1e-6) and float(short["b"]) == 0.5
    together = clipped(slopes, 1.0)
    assert float(tree.norm(together)) == pytest.approx(1.0, abs=1e-5) and list(together) == ["a", "b"]
    moved = replace(rule, clip=1.0, clip_apart=("b",)).step(w, slopes, rule.start(w))[1]
    expected = rule.step(w, short, rule.start(w))[1]
    assert largest_difference(moved, expected) == 0.0
    assert largest_difference(moved, replace(rule, clip=1.0).step(w, slopes, rule.start(w))[1]) > 1e-5


def test_without_clipping_and_with_decay_of_all_adam_is_the_rule_that_servers_had() -> None:
    w: Tree = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor([2.0])}
    slopes = tree.map(torch.sin, w)
    rules = Adam(0.01), Adam(0.01, clip=1e9), Adam(0.01, decay_vectors=False)
    moved = [rule.step(w, slopes, rule.start(w))[0] for rule in rules]
    assert largest_difference(moved[0], moved[1]) == largest_difference(moved[0], moved[2]) == 0.0


def apart(found: Tree, expected: Tree, before: Tree) -> float:
    """How far models are apart, over how far they went: a first step makes a whole one of a slope that is rounding."""
    return float(tree.norm(tree.sub(found, expected)) / tree.norm(tree.sub(expected, before)))


# A client's training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("changes", [{}, {"decayed": "weights"}, {"clip": None, "weight_decay": 0.0}])
def test_a_round_is_torchs_adamw_at_every_client(engine: str, changes: dict[str, Any]) -> None:
    setting = replace(ADAMW, rounds=1, **changes)
    run = start(setting, engine=engine)
    before, cohort = run.progress.server, [int(k) for k in run.population.cohort(0)]
    filled = [k for k in cohort if len(run.population.index[k])]
    expected = mean_by_size(run, filled, [by_torch(setting, before, data_of(run, k).batches(2)) for k in filled])
    assert apart(done(run).progress.server, expected, before) < 1e-3


def test_moments_start_at_zero_in_each_round() -> None:
    """One client with a batch a round: steps of AdamW from new moments, which are others than those of moments kept."""
    setting = replace(ADAMW, clients=1, participation=1.0, epochs=1, batch_size=60, rounds=3)
    run = toy.run(ALGORITHMS["fedavg"](), setting=setting, sizes=(60,))
    before = anew = going_on = run.progress.server
    kept: dict[str, Any] = {}
    for round in range(3):
        batches = list(data_of(run, 0, round).batches(1))
        anew, going_on = by_torch(setting, anew, batches), by_torch(setting, going_on, batches, kept)
    server = done(run).progress.server
    assert apart(server, anew, before) < 1e-2 < 0.1 < apart(server, going_on, before)


@pytest.mark.parametrize("name", ["fedavg", "fedrep", "fedrod", "fedsam", "ditto"])
def test_both_engines_agree(name: str) -> None:
    """A client that has run out of batches stays where it is: decay would move it."""
    serial, stacked = (done(start(name=name, engine=engine)) for engine in ("serial", "stacked"))
    assert largest_difference(serial.progress.server, stacked.progress.server) < TOLERANCE


def test_a_network_with_batch_norm_keeps_its_running_statistics_out_of_it() -> None:
    setting = replace(ADAMW, model="resnet8", norm="batch", epochs=1, rounds=1, weight_decay=0.9, lr=1e-9)
    run = toy.run(ALGORITHMS["fedavg"](), setting=setting, sizes=(9, 5, 0, 0, 0, 0, 0, 0))
    before = run.progress.server
    moved = tree.flatten(tree.sub(done(run).progress.server, before))
    assert all(float(leaf.abs().max()) < 1e-6 for path, leaf in moved.items() if not tree.is_statistic(path))
    assert all(float(leaf.abs().max()) > 1e-4 for path, leaf in moved.items() if is_norm(path) and "stats/mean" in path)


def test_tuning_before_the_test_is_by_the_same_rule() -> None:
    run = start(replace(ADAMW, rounds=1), "fedavg_ft")
    task, server = run.task_at(0), run.progress.server
    assert isinstance(task.optimiser(), Adam) and not task.momentum
    data = data_of(run, 0)
    still = replace(task, still=True)
    tuned, kept = still.resume_sgd(task.loss, server, data.batches(1), None)
    assert apart(tuned, by_torch(ADAMW, server, data.batches(1)), server) < 1e-3
    assert float(kept["steps"]) == 4.0
    on = still.resume_sgd(task.loss, tuned, data.batches(1, "more"), kept)[1]
    assert float(on["steps"]) == 8.0


# What is said of it ---------------------------------------------------------------------------------------------------


def sweep(algos: str = "fedavg", optional: str = "", **overrides: Any) -> Sweep:
    return Sweep(
        algorithms=tuple(parse_algorithms(algos)), datasets=(parse_dataset("digits"),), overrides=overrides,
        data_root=Path("."),
    )  # fmt: skip


@pytest.mark.equivalence
def test_sgd_is_what_there_was_and_no_run_has_another_name_for_it() -> None:
    (usual,), (said,) = sweep().expand(), sweep(optimiser="sgd").expand()
    assert usual.id == said.id and usual.setting.momentum == 0.5
    assert "optimiser" not in usual.identity()["setting"] and LATER["optimiser"] == "sgd"
    run = start(replace(toy.SETTING, momentum=0.9, weight_decay=1e-2))
    assert run.task.optimiser() == Sgd(0.05, 0.9, 1e-2) and run.task.optimiser(0.1, ("head",)).lr == 0.1


def test_adamw_has_a_name_a_rate_and_no_momentum() -> None:
    (run,), (usual,) = sweep(optimiser="AdamW").expand(), sweep().expand()
    assert (run.setting.optimiser, run.setting.momentum, run.setting.lr) == ("adamw", 0.0, 0.001)
    assert run.id != usual.id and run.identity()["setting"]["optimiser"] == "adamw"
    (chosen,) = sweep(optimiser="adamw", lr=0.01, momentum=0.0).expand()
    assert (chosen.setting.lr, chosen.setting.momentum) == (0.01, 0.0)
    assert start().task.optimiser(0.3, ("head",)) == Adam(0.3, weight_decay=0.3, clip=0.2, clip_apart=("head",))
    said = "momentum = 0.9: optimiser = adamw has moments of its own and reads none; leave it out"
    with pytest.raises(BadConfig) as caught:
        sweep(optimiser="adamw", momentum=0.9).expand()
    assert str(caught.value) == said
    with pytest.raises(BadConfig, match="optimiser = 'adam': must be one of sgd, adamw"):
        sweep(optimiser="adam").expand()


RECKON = {"airbench", "fedcm", "feddc", "fednova", "osuda", "perfedavg", "qfedavg", "redgrape", "scaffold"}
"""Those that take an update for so many gradients, or follow a gradient beside steps of the setting's."""


def test_methods_that_reckon_with_steps_of_sgd_are_refused_by_name() -> None:
    assert {name for name, kind in ALGORITHMS.items() if "sgd" in kind().needs} == RECKON
    for name in RECKON:
        with pytest.raises(BadConfig) as caught:
            sweep(f"fedavg,{name}", optimiser="adamw").expand()
        reckons = "reckons with steps of SGD, which follow the gradient, and optimiser = adamw takes others"
        assert str(caught.value) == f"{name} {reckons}; leave one of both out"
        assert sweep(f"fedavg,{name}").expand()
    (fedavg,) = replace(sweep("fedavg,scaffold", optimiser="adamw"), optional=(ALGORITHMS["scaffold"](),)).expand()
    assert repr(fedavg.algorithm) == "FedAvg()"
    with pytest.raises(BadConfig, match=r"scaffold\+focal reckons"):
        sweep("scaffold+focal", optimiser="adamw").expand()


def test_whoever_reads_momentum_or_divides_by_the_rate_says_so() -> None:
    reads = re.compile(r"task\.momentum|/ task\.lr|/ \(.*\* task\.lr\)|task\.lr \* loss")
    for file in sorted(Path(__file__).parents[1].joinpath("algorithms").glob("*.py")):
        if reads.search(file.read_text()):
            assert file.stem in RECKON, f"{file.stem} reckons with steps of SGD; declare needs = {{'sgd'}}"
