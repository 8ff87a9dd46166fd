"""`bench speed`: workloads, turns, ratios, peers and growth, all in the small."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import keys
from bench.command import growth as drawn
from bench.command.speed import speed_command
from bench.dataset import Labels
from bench.models import MODELS, build
from bench.plugins.registry import DATASETS
from bench.speed import commands, engines, growth, measure, sides
from bench.speed.federation import job
from bench.speed.module import Module
from bench.speed.peers import driver, loop, work
from bench.speed.turns import Ratio, Side, SideFailed, Taken, Turn, described, take_turns
from bench.speed.workloads import WORKLOADS, Workload, draw
from bench.splits.split import make_split
from bench.training.rounds import Run


def small(workload: Workload) -> Workload:
    """A workload with few clients and examples."""
    few = replace(workload, clients=6, cohort=2, tested=2, rounds=2)
    return few if workload.shape is None else replace(few, largest=200 // workload.classes + 2, imbalance=4.0)


# Workloads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in ("fedloge", "sweep")])
def test_a_workload_builds_and_does_a_round_and_the_bare_loop_its_batches(name: str, tmp_path: Path) -> None:
    workload = small(WORKLOADS[name])
    given = job(workload, tmp_path)
    run = Run(given)
    cohort = run.population.cohort(0)
    assert len(run.population.index) == workload.clients and len(cohort) == workload.cohort
    trained, floor = (side.take() for side in (sides.federated("a", run), sides.bare("b", given, "bf16", 1)))
    images = workload.epochs * float(run.population.sizes(cohort).sum())
    assert trained.images == floor.images == images > 0
    assert run.progress.round == 1 and workload.model == run.task.model.name
    assert sides.evaluation("c", run).take().images is None


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_can_be_dealt_to_unequal_clients(name: str) -> None:
    workload = WORKLOADS[name]
    if workload.shape is None:
        dataset = DATASETS["digits"]()
        labels = dataset.labels(Path())
    else:
        dataset = DATASETS["cifar10"]()  # whose fields differ from those of drawn examples in the tail alone
        y = torch.arange(workload.classes)
        labels = Labels(y.repeat_interleave(torch.tensor(workload.sizes())), y.repeat(workload.tested))
    setting = replace(workload.setting(dataset), imbalance=None)
    sizes = [len(rows) for rows in make_split(labels, workload.classes, setting, 0).clients]
    assert len(sizes) == workload.clients and max(sizes) > 2 * min(sizes)
    assert setting.cohort_size(workload.clients) == workload.cohort
    assert workload.model in MODELS and workload.what


def test_drawn_examples_have_a_long_tail_and_can_be_learnt() -> None:
    found = draw((3, 32, 32), [40, 20, 10], 5)
    assert [(found["train_y"] == c).sum() for c in range(3)] == [40, 20, 10]
    assert found["train_x"].shape == (70, 3, 32, 32) and found["train_x"].dtype == "uint8"
    means = torch.stack(
        [torch.tensor(found["train_x"])[torch.tensor(found["train_y"]) == c].float().mean(0) for c in range(3)]
    )
    nearest = torch.cdist(torch.tensor(found["test_x"]).float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == torch.tensor(found["test_y"])).float().mean() > 0.9
    assert (draw((3, 32, 32), [40, 20, 10], 5)["train_x"] == found["train_x"]).all()


def test_the_command_of_a_workload_splits_as_the_workload(tmp_path: Path) -> None:
    workload = replace(small(WORKLOADS["adapter"]), classes=4, largest=40)
    accuracies: dict[str, float] = {}
    workload.dataset(tmp_path)
    turn = commands.whole_run("whole", workload, tmp_path, "fp32", 1, accuracies).take()
    run = Run(job(workload, tmp_path))
    images = sum(float(run.population.sizes(run.population.cohort(r)).sum()) for r in range(workload.rounds))
    assert turn.images == images * workload.epochs
    for _ in range(workload.rounds):
        run.step()
    measured = run.evaluate(run.task_at(workload.rounds - 1), workload.rounds, True)
    assert accuracies == {"whole": pytest.approx(measured["generic"])}


def test_the_time_to_the_first_round_is_that_of_a_run_which_is_ended_then(tmp_path: Path) -> None:
    workload = WORKLOADS["tiny"]
    turn = commands.first_round("first", workload, tmp_path, 1).take()
    assert turn.images is None and turn.seconds > 0 and not list(tmp_path.iterdir())


def test_a_command_that_ends_early_is_a_side_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "_command", lambda *asked: [sys.executable, "-c", "raise SystemExit('not well')"])
    with pytest.raises(SideFailed, match=r"ended before the first round \(not well\)"):
        commands.first_round("first", WORKLOADS["tiny"], tmp_path, 1).take()
    with pytest.raises(SideFailed, match=r"ended with status 1 \(not well\)"):
        commands.whole_run("whole", WORKLOADS["tiny"], tmp_path, "fp32", 1, {}).take()


# Turns ------------------------------------------------------------------------------------------------------


def recorded(name: str, calls: list[str], *values: float) -> Side:
    """A side that notes its turns, of ten images each."""
    seconds = iter(values)

    def take() -> Turn:
        calls.append(name)
        return Turn(next(seconds), 10.0)

    return Side(name, take)


def test_sides_take_turns_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    taken = take_turns([recorded("a", calls, 9, 1, 2), recorded("b", calls, 9, 2, 8)], 2)
    assert calls == ["a", "b"] * 3
    assert [turn.seconds for turn in taken.turns["b"]] == [2, 8]
    assert take_turns([recorded("a", [], 9, 1)], 2, warm=0).turns["a"][0].seconds == 9


def test_ratios_are_medians_of_the_ratios_of_a_turn() -> None:
    turns = {"a": [Turn(1, 10), Turn(2, 10), Turn(4, 10)], "b": [Turn(3, 10), Turn(2, 10), Turn(2, 10)]}
    found = described(Taken(turns, {}), [Ratio("a", "b"), Ratio("a", "b", "time"), Ratio("a", "absent")])
    speed, time = found["ratios"]
    assert speed == {"of": "a", "to": "b", "by": "speed", "median": 1.0, "least": 0.5, "most": 3.0}
    assert (time["median"], time["least"], time["most"]) == (1.0, pytest.approx(1 / 3), 2.0)
    assert found["sides"]["a"] == {
        "unit": "images/s", "median": 5.0, "least": 2.5, "most": 10.0, "seconds": 2.0, "turns": 3
    }  # fmt: skip


def test_a_side_that_fails_says_why_and_the_others_go_on() -> None:
    def fail() -> Turn:
        raise SideFailed("it is not well")

    calls: list[str] = []
    taken = take_turns([Side("bad", fail), recorded("a", calls, 1, 1, 1)], 2)
    assert taken.failed == {"bad": "it is not well"} and len(calls) == 3
    assert described(taken, [Ratio("a", "bad")]) == {
        "sides": {"a": described(taken, [])["sides"]["a"], "bad": {"failed": "it is not well"}}, "ratios": []
    }  # fmt: skip


# The floor --------------------------------------------------------------------------------------------------


def test_a_module_scores_as_its_network_and_moves_its_statistics_as_torch() -> None:
    model = build("resnet8", 4, (3, 8, 8), "batch")
    params = model.init(keys.key(0))
    module = Module(model, params, torch.channels_last)
    x = keys.normal(keys.key(1), 6, 3, 8, 8)
    module.eval()
    torch.testing.assert_close(module(x), model.logits(params["head"], model.features(params["body"], x)))
    module.train()
    module(x)
    stem = torch.nn.functional.conv2d(x, params["body"]["stem"]["conv"]["weight"], padding=1)
    layer = torch.nn.BatchNorm2d(64)
    layer(stem)
    assert layer.running_mean is not None
    torch.testing.assert_close(module.get_buffer("body_stem_norm_stats_mean"), layer.running_mean)
    assert torch.equal(params["body"]["stem"]["norm"]["stats"]["mean"], torch.zeros(64))


def test_the_bare_loop_sees_each_example_once_an_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    class Counted(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(sides, "Module", Counted)
    workload = replace(WORKLOADS["tiny"], clients=6, cohort=2)
    turn = sides.bare("bare", job(workload, tmp_path), "fp32", 1).take()
    assert sum(seen) == turn.images and max(seen) == workload.batch


# Peers ------------------------------------------------------------------------------------------------------


def test_the_plain_loop_does_the_same_work(tmp_path: Path) -> None:
    workload = replace(WORKLOADS["tiny"], clients=10)
    work.write(tmp_path, job(workload, tmp_path))
    accuracies: dict[str, float] = {}
    turn = driver.whole_run("it", "plain loop", tmp_path, 1, 5, sys.executable, accuracies).take()
    run = Run(job(workload, tmp_path))
    assert turn.images == 5 * 2 * sum(len(rows) for rows in run.population.index)
    for _ in range(5):
        run.step()
    measured = run.evaluate(run.task_at(4), 5, False)["generic"]
    assert measured is not None and abs(accuracies["it"] - measured) < driver.TOLERANCE and measured > 0.7


def test_the_plain_loop_averages_by_sizes_what_was_sent_and_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workload = replace(WORKLOADS["tiny"], clients=6, cohort=2)
    work.write(tmp_path, job(workload, tmp_path))
    given, rounds, last = work.read(tmp_path), iter([True] * 4 + [False]), []

    class Line:
        def may_begin(self) -> bool:
            return next(rounds)

        def answer(self, **said: float) -> None:
            pass

    def train(self: work.Work, module: torch.nn.Module, batches: Any) -> None:
        for leaf in module.parameters():
            leaf.data += len(batches.dataset)

    def accuracy(self: work.Work, module: torch.nn.Module) -> float:
        last.append(module)
        return 0.0

    monkeypatch.setattr(loop, "Line", Line)
    monkeypatch.setattr(work.Work, "train", train)
    monkeypatch.setattr(work.Work, "accuracy", accuracy)
    loop.main(tmp_path, 1)
    moved = 0.0
    for r in range(4):
        sizes = [len(given.clients[k]) for k in given.cohort(r)]
        moved += sum(n * n for n in sizes) / sum(sizes)
    for old, new in zip(given.module.parameters(), last[0].parameters(), strict=True):
        torch.testing.assert_close(new, old + moved)


def someone(folder: Path, *lines: str) -> str:
    """An interpreter that is none."""
    python = folder / "python"
    python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    python.chmod(0o755)
    return str(python)


def test_a_peer_does_a_round_when_it_is_its_turn_and_is_ended(tmp_path: Path) -> None:
    counts = "while read line; do echo x >> $4; echo '{\"images\": 3}'; done; echo '{\"accuracy\": 0.5}'"
    python, counted = someone(tmp_path, counts.replace("$4", str(tmp_path / "rounds"))), tmp_path / "rounds"
    with driver.at_work("Flower", tmp_path, 1, python) as side:
        assert side.name == "Flower" and not counted.exists()
        assert [side.take().images for _ in range(2)] == [3, 3]
        assert counted.read_text() == "x\n" * 2
    accuracies: dict[str, float] = {}
    assert driver.whole_run("it", "Flower", tmp_path, 1, 4, python, accuracies).take().images == 12
    assert accuracies == {"it": 0.5} and counted.read_text() == "x\n" * 6
    driver.side_by_side("two", "Flower", tmp_path, 4, 3, python).take()
    assert counted.read_text() == "x\n" * (6 + 2 * 3 * 4)


def test_a_peer_that_dies_is_a_side_that_failed(tmp_path: Path) -> None:
    python = someone(tmp_path, "echo not well >&2")
    died = pytest.raises(SideFailed, match=r"its process ended \(not well\)")
    with driver.at_work("plain loop", tmp_path, 1, python) as side, died:
        side.take()
    with pytest.raises(SideFailed, match="not well"):
        driver.whole_run("it", "plain loop", tmp_path, 1, 5, python, {}).take()


def test_what_is_not_installed_is_not_there() -> None:
    there = driver.installed()
    assert list(there) == list(driver.PEERS) and there["plain loop"] is not None


# The command ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`bench speed` whose commands and peers take no time."""

    def command(name: str, *more: object) -> Side:
        accuracies = next((each for each in more if isinstance(each, dict)), {})
        accuracies[name] = 0.5 if "loop" in name else 0.6
        return Side(name, lambda: Turn(2.0, 10.0))

    @contextmanager
    def at_work(name: str, *more: object) -> Iterator[Side]:
        yield command(name)

    monkeypatch.setattr(measure, "WORKLOADS", {"tiny": replace(WORKLOADS["tiny"], clients=20, cohort=2)})
    monkeypatch.setattr(driver, "at_work", at_work)
    monkeypatch.setattr(commands, "first_round", command)
    monkeypatch.setattr(commands, "whole_run", command)
    monkeypatch.setattr(driver, "whole_run", command)
    monkeypatch.setattr(driver, "installed", lambda python: {"plain loop": "1", "Flower": None})

    def speed(*words: str) -> Any:
        return CliRunner().invoke(
            speed_command, ["--workload", "tiny", "--repeats", "1", *words], catch_exceptions=False
        )

    return speed


def test_json_has_the_machine_and_each_side_and_ratio(quick: Callable[..., Any]) -> None:
    document = json.loads(quick("--json", "--precision", "fp32", "--peers").stdout)
    assert {"machine", "versions", "commit", "threads", "repeats", "peers", "workloads"} == document.keys()
    assert document["peers"] == {"plain loop": "1", "Flower": None}
    (found,) = document["workloads"].values()
    assert set(found["sides"]) == {
        "serial fp32", "stacked fp32", "bare fp32", "evaluation", "first round", "plain loop", "Flower",
        "whole run, fp32", "whole run, plain loop",
    }  # fmt: skip
    assert found["sides"]["Flower"] is None and found["auto"] == "stacked"
    assert {"unit", "median", "least", "most", "seconds", "turns"} == found["sides"]["bare fp32"].keys()
    pairs = {(ratio["of"], ratio["to"]): ratio.get("comparable") for ratio in found["ratios"]}
    assert pairs == {
        ("evaluation", "serial fp32"): None, ("serial fp32", "bare fp32"): None, ("stacked fp32", "bare fp32"): None,
        ("stacked fp32", "serial fp32"): None, ("serial fp32", "plain loop"): False,
        ("stacked fp32", "plain loop"): False, ("whole run, fp32", "whole run, plain loop"): False,
    }  # fmt: skip
    assert found["accuracy"] == {"whole run, fp32": 0.6, "whole run, plain loop": 0.5}


def test_a_peer_that_is_missing_is_a_dash_and_how_to_install_it(quick: Callable[..., Any]) -> None:
    lines = quick("--precision", "fp32", "--peers").stdout.splitlines()
    assert next(line for line in lines if line.startswith("Flower ")).split() == ["Flower", "–", "–", "–"]
    assert 'Flower is not installed: pip install "flwr[simulation]"' in lines
    assert any("whole run, plain loop is not comparable" in line for line in lines)
    assert ", plain loop 1, 1 turns" in lines[0]


def test_without_peers_nobody_looks_for_them(quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "installed", None)
    found = json.loads(quick("--json", "--precision", "fp32").stdout)
    assert found["peers"] is None and "Flower" not in found["workloads"]["tiny"]["sides"]


def test_accuracies_within_the_tolerance_are_comparable(
    quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "TOLERANCE", 0.11)
    found = json.loads(quick("--json", "--precision", "fp32", "--peers").stdout)["workloads"]["tiny"]
    assert {ratio["comparable"] for ratio in found["ratios"] if "comparable" in ratio} == {True}


def test_personal_heads_are_beside_a_generic_model(tmp_path: Path) -> None:
    found = measure.of_workload(small(WORKLOADS["personal"]), tmp_path, measure.Asked(repeats=1), {})
    assert list(found["sides"]) == ["generic evaluation", "6 heads"]
    assert [(ratio["of"], ratio["by"]) for ratio in found["ratios"]] == [("6 heads", "time")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "mlp", "--scale"], "--scale and --model exclude each other"),
        (["--growth", "--scale"], "--growth and --scale exclude each other"),
        (["--workload", "cn"], "--workload: none is called 'cn'; did you mean cnn?"),
        (["--workload", ""], "--workload is empty; there are tiny, "),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], said: str) -> None:
    answer = CliRunner().invoke(speed_command, words)
    assert answer.exit_code == 2 and said in answer.output


# Both engines of a network ----------------------------------------------------------------------------------


def test_both_engines_are_measured_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "compare", partial(engines.compare, repeats=1))
    answer = CliRunner().invoke(speed_command, ["--model", "frozen", "--batch-size", "64", "--json"])
    ((of, measured),) = json.loads(answer.output).items()
    assert of == "stacked frozen, 1×8×8, 10 classes, batch 64, against serial"
    assert measured["auto is"] == "stacked"
    speeds = measured["images_per_second"], measured["reference_images_per_second"]
    assert measured["ratio"] == pytest.approx(speeds[0] / speeds[1])


def test_images_have_the_dataset_s_shape_and_classes() -> None:
    (of,) = engines.compare(DATASETS["cifar100"](), "linear", 32, repeats=1)
    assert of == "stacked linear, 3×32×32, 100 classes, batch 32, against serial"


# Growth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_an_exponent_is_the_slope_of_logarithms(power: float) -> None:
    values = [10, 40, 160, 640]
    assert growth.exponent(values, [3e-3 * value**power for value in values]) == pytest.approx(power)


def test_the_exponent_of_noise_is_the_best_line_s() -> None:
    assert growth.exponent([1, 10, 100], [1, 100, 100]) == pytest.approx(1.0)


def test_weights_are_those_of_the_network() -> None:
    for weights, workload in growth.AXES["weights"].items():
        assert workload.shape is not None
        model = build(workload.model, workload.classes, workload.shape)
        assert sum(leaf.numel() for leaf in Module(model, model.init(keys.key(0))).parameters()) == weights


def test_growth_is_written_as_a_table_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {"cohort": {n: replace(growth.AXES["cohort"][4], cohort=n, clients=8, largest=20, tested=2) for n in (2, 8)}}
    monkeypatch.setattr(growth, "measure", partial(growth.measure, axes=few))
    words = ["--growth", "--to", str(tmp_path / "new"), "--repeats", "1", "--json"]
    found = json.loads(CliRunner().invoke(speed_command, words, catch_exceptions=False).stdout)["axes"]["cohort"]
    assert found["values"] == [2, 8] and set(found) == {"values", *growth.QUANTITIES}
    medians = [each["median"] for each in found["round"]["seconds"]]
    assert found["round"]["exponent"] == pytest.approx(growth.exponent([2, 8], medians))
    assert (tmp_path / "new" / drawn.PICTURE).read_bytes().startswith(b"\x89PNG")
    *_, two, eight, last = (tmp_path / "new" / drawn.TABLE).read_text().splitlines()
    assert two.split()[1] == "2" and eight.split()[3] == f"{1000 * found['start']['seconds'][1]['median']:,.1f}"
    assert last.split()[1::2] == ["exponent", *(f"{found[each]['exponent']:.2f}" for each in growth.QUANTITIES)]
