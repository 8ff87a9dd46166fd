"""Apple's GPU, as far as it can be tested without one: what is asked of torch, and that nothing there is float64."""

from __future__ import annotations

import ast
from pathlib import Path

import click
import pytest
import torch

from bench import Uploads, keys, tree
from bench.command.embed import embed_command
from bench.command.run import run_command
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig
from bench.sweep.cluster import cores
from bench.sweep.config import resolve_device
from bench.training import memory
from bench.training.rounds import Run

ROOT = Path(__file__).parents[1]


def test_it_is_taken_where_torch_has_it_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for there in (False, True):
        monkeypatch.setattr("torch.backends.mps.is_available", lambda there=there: there)
        assert resolve_device("auto") == "cpu"
        if there:
            assert resolve_device("mps") == "mps"
        else:
            with pytest.raises(BadConfig, match=r"^--device mps: torch finds no Apple GPU here; use --device cpu$"):
                resolve_device("mps")


def test_one_run_at_a_time_computes_there_and_its_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores("mps") == 1
    memory.reset_peak_memory("mps")
    assert memory.peak_memory("mps") is None and memory.peak_memory("cpu")
    waited: list[None] = []
    monkeypatch.setattr("torch.mps.synchronize", lambda: waited.append(None))
    run = toy.run(ALGORITHMS["fedavg"]())
    run.device = "mps"
    Run._synchronise(run)
    assert waited == [None]


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", ["fedavg", "balancefl", "fedpac", "fedavg+trimmed_mean"])
def test_what_is_float64_elsewhere_gives_the_same_numbers(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.protocol.spelling import parse_algorithms

    (algorithm,) = parse_algorithms(name)
    expected = toy.finish(toy.run(algorithm, engine)).outcome()
    monkeypatch.setattr(tree, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    found = toy.finish(toy.run(algorithm, engine)).outcome()
    assert found.digest == expected.digest
    one_by_one = toy.finish(toy.run(algorithm, "serial")).outcome().cost["train_samples"]  # counted in Python's numbers
    assert found.cost["train_samples"] == expected.cost["train_samples"] == pytest.approx(one_by_one, rel=1e-12)


def test_counts_are_of_32_bits_there_and_means_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree.counting("mps") == torch.float32 and tree.counting("cpu") == torch.float64
    leaves = [{"w": torch.tensor([value])} for value in (2.0**24, 1.0, 1.0)]  # in float32, a one changes nothing there
    monkeypatch.setattr(tree, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    uploads = Uploads(leaves, torch.ones(3))
    for total in (uploads.sum()["w"], uploads.sum("w", torch.ones(3, 1))):
        assert total.dtype == torch.float32 and float(total) == 2**24 + 2
    assert keys.weighted(keys.key(0), torch.tensor([0.0, 1.0]), 3).tolist() == [1, 1, 1]


def float64s(file: Path) -> list[int]:
    """Lines of a file that make a tensor one of float64."""
    lines = []
    for node in (each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.expr)):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double"
        named = isinstance(node, ast.Attribute) and node.attr == "float64" and ast.unparse(node.value) == "torch"
        lines += [node.lineno] if called or named else []
    return lines


def test_float64_stands_where_it_is_never_on_a_device() -> None:
    """Whatever a run computes with asks `tree.in_float64`; what is named here is always on the CPU."""
    known = {
        "bench/tree.py": 2, "bench/models/layers.py": 2, "algorithms/cfl.py": 2, "algorithms/fedloge.py": 1,
        "algorithms/fednh.py": 1, "algorithms/fedpac.py": 2, "algorithms/fpl.py": 3, "bench/training/asked.py": 1,
    }  # fmt: skip
    folders = ("algorithms", "bench/data", "bench/models", "bench/parts", "bench/protocol", "bench/training")
    files = [*(ROOT / "bench").glob("*.py"), *(file for each in folders for file in (ROOT / each).glob("*.py"))]
    found = {str(file.relative_to(ROOT)): len(lines) for file in files if (lines := float64s(file))}
    assert found == known


@pytest.mark.parametrize("command", [embed_command, run_command])
def test_the_commands_offer_it(command: click.Command) -> None:
    (option,) = (each for each in command.params if each.name == "device")
    assert isinstance(option.type, click.Choice) and "mps" in option.type.choices
