"""What goes by before the first round: modules that are loaded, and things that are waited for."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, keys, losses
from bench.command.main import main
from bench.plugins import registry
from bench.plugins.registry import DATASETS
from bench.system import collector
from bench.training import compiler

HEAVY = {
    "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torch.fx.experimental.symbolic_shapes", "sympy",
    "sklearn", "scipy.stats", "pandas", "pyarrow", "matplotlib", "PIL.Image", "torchvision", "mlflow", "ray",
}  # fmt: skip
"""Modules that cost a tenth of a second or more each, and that nobody needs to train."""
FIRST_ROUND = """
import gc, sys
loaded, searched = [], []

def look(event, words):
    if event == "open" and str(words[0]).endswith("progress.jsonl") and not loaded:
        loaded.extend(sys.modules)
        assert gc.isenabled() and gc.get_freeze_count()

def search(phase, about):
    if "torch" in sys.modules and not hasattr(sys.modules.get("bench.face.sweeping"), "perform"):
        searched.append(about)

sys.addaudithook(look)
gc.callbacks.append(search)
from bench.command.main import main
try:
    sys.argv[1:1] = ["run", "--rounds", "1", "--ray", "off", "--tracking-uri", "off"]
    main(prog_name="bench")
except SystemExit as ended:
    assert ended.code == 0
assert not searched, "garbage is looked for while modules are loaded"
print(*loaded)
"""


def python(code: str, *words: str, cwd: Path) -> str:
    """Run code in a process of its own, and give the last line that it prints."""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("engine", ["stacked", "serial"])
def test_the_first_round_is_done_before_anything_heavy_is_loaded(engine: str, tmp_path: Path) -> None:
    loaded = set(python(FIRST_ROUND, "--algos", "fedavg", "--engine", engine, cwd=tmp_path).split())
    assert "bench.training.rounds" in loaded and not HEAVY & loaded, HEAVY & loaded


SIZES = """
import sys
from bench import keys, models
for name, shape in {**dict.fromkeys(models.BUILT_IN, (3, 32, 32)), "frozen": (64,)}.items():
    models.build(name, 10, shape).init(keys.key(0, "meta"))
    models.build(name, 10, shape, models.usual_norm(name, "batch")).init(keys.key(0, "meta"))
print(*sys.modules)
"""


def test_the_sizes_of_networks_are_told_without_the_compiler(tmp_path: Path) -> None:
    assert not HEAVY & set(python(SIZES, cwd=tmp_path).split())


def test_a_key_without_numbers_gives_the_shapes_of_one_with_numbers() -> None:
    real, shape = keys.key(5), keys.key(5, "meta")
    draws: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda key: keys.fold(key, "a", 3),
        lambda key: keys.fold(key, torch.arange(4, device=key.device)),
        lambda key: keys.fold_each(key, ["a", "b"]),
        lambda key: keys.uniform(key, 2, 3),
        lambda key: keys.normal(key, 2, 3),
        lambda key: keys.uniform_rows(keys.fold_each(key, ["a", "b"]), 5),
        lambda key: keys.normal_rows(keys.fold_each(key, ["a", "b"]), 5),
    )
    for draw in draws:
        assert (draw(shape).shape, draw(shape).dtype) == (draw(real).shape, draw(real).dtype) and draw(shape).is_meta


def test_in_a_process_of_others_nothing_is_kept_from_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = gc.get_freeze_count()
    with pytest.raises(SystemExit):
        main(["run", "--algos", "fedavg", "--dry-run"], prog_name="bench")
    assert gc.get_freeze_count() == before


# torch's compiler -------------------------------------------------------------------------------------------

STAND_IN = """
import sys, torch
from bench.training import compiler
compiler.leave_out()
assert torch.func.grad(torch.sin)(torch.zeros(())) == 1 and "torch._dynamo" not in sys.modules
doubled = torch.compile(lambda x: 2 * x, backend="eager")
assert doubled(torch.ones(())) == 2 and "torch._dynamo" in sys.modules
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch.func.grad(torch.sin)(torch.zeros(())) == 1
compiler.leave_out()
assert torch._dynamo is sys.modules["torch._dynamo"]
print("done")
"""


def test_the_compiler_comes_when_it_is_used(tmp_path: Path) -> None:
    assert python(STAND_IN, cwd=tmp_path) == "done"


def test_whatever_else_the_stand_in_is_asked_the_compiler_answers() -> None:
    assert compiler._Absent().reset is importlib.import_module("torch._dynamo").reset


# The same numbers -------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    scans, read = load_digits(), DATASETS["digits"]().load(Path())
    pixels, labels = torch.cat([read.train_x, read.test_x]), torch.cat([read.train_y, read.test_y])
    place = [*range(len(scans.target))]
    tested = [k for k in place if (scans.target[:k] == scans.target[k]).sum() < 50]
    order = [k for k in place if k not in set(tested)] + tested
    assert torch.equal(pixels, torch.from_numpy(scans.images[order]).to(torch.uint8)[:, None])
    assert torch.equal(labels, torch.from_numpy(scans.target[order]).long())


def test_cross_entropy_of_stacked_clients_has_the_bits_of_torchs_own() -> None:
    logits, y = 5 * keys.normal(keys.key(1), 4, 6, 10), keys.integers(keys.key(2), 10, 4, 6)
    y[:, 1] = -1  # not known
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]).expand(4, 6)

    def ours(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return losses.cross_entropy(logits, Batch(logits, y, weight))

    def torchs(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        apart = F.cross_entropy(logits, y, reduction="none", ignore_index=-1)
        return (apart * weight).sum() / weight.sum().clamp(min=1.0)

    found, expected = (torch.func.vmap(torch.func.grad_and_value(loss))(logits, y, weight) for loss in (ours, torchs))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    alone = [ours(*client) for client in zip(logits, y, weight, strict=True)]
    assert torch.equal(torch.stack(alone), expected[1])


# Plug-ins of other packages ---------------------------------------------------------------------------------


def test_packages_are_asked_for_plugins_once_and_again_when_one_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read() -> Any:
        asked.append(1)
        return entry_points()

    monkeypatch.setattr(registry, "entry_points", read)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    before = list(registry.ALGORITHMS)
    assert list(registry.ALGORITHMS) == before and len(registry.DATASETS) and len(asked) == 1
    folder = tmp_path / "late-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[bench.algorithms]\nlate = late:Late\n[other]\nelse = late:Late\n")
    assert list(registry.ALGORITHMS) == sorted([*before, "late"]) and len(asked) == 2
    assert "else" not in [*registry.ALGORITHMS, *registry.DATASETS]


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_and_is_as_before_afterwards_though_something_fails(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), collector.paused():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
