"""A network from elsewhere: its contract, and how it travels and is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Block, Network, Tree, keys
from bench.command import scaffold
from bench.contract import networks
from bench.models import BUILT_IN, MODELS, build, layers
from bench.plugins.registry import ALGORITHMS, DATASETS, BadPlugin, load_plugin, register
from bench.protocol.settings import BadConfig
from bench.sweep.cluster import packed, unpacked
from bench.sweep.config import Sweep
from bench.sweep.run import Run
from tests.test_plugins import OFF, Bench, bench, digest

__all__ = ["bench"]

# The contract -----------------------------------------------------------------------------------------------


class Good(Network):
    """Keeps every promise."""

    feature_size: ClassVar[int] = 16

    @property
    def filters(self) -> layers.NormedConvolution:
        return layers.NormedConvolution("conv", self.norm, self.shape[0], 32, 3)

    def init_body(self, key: Tensor) -> Tree:
        return {
            "conv": self.filters.init(keys.fold(key, 1)),
            "hidden": layers.linear(keys.fold(key, 2), 16, 32),
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        return Block("conv", ("conv",), self.convolve), Block("hidden", ("hidden",), self.hide)

    def convolve(self, body: Tree, x: Tensor) -> Tensor:
        return F.relu(self.filters(body, x)).mean((2, 3))

    def hide(self, body: Tree, x: Tensor) -> Tensor:
        return F.relu(layers.apply_linear(body["hidden"], x))


class Misshapen(Good):
    feature_size: ClassVar[int] = 17


class Random(Good):
    def init_body(self, key: Tensor) -> Tree:
        return {**super().init_body(key), "hidden": layers.linear(torch.randint(9, ()), 16, 32)}


class Fixed(Good):
    def init(self, key: Tensor) -> Tree:
        return super().init(keys.key(3, key.device))


class Here(Good):
    def init_body(self, key: Tensor) -> Tree:
        return {**super().init_body(key), "hidden": layers.linear(keys.key(2), 16, 32)}


class Greedy(Good):
    @property
    def blocks(self) -> tuple[Block, ...]:
        return Block("all", ("conv",), lambda body, x: self.hide(body, self.convolve(body, x))), Block(
            "none", ("hidden",), lambda body, x: x
        )


class Short(Good):
    @property
    def blocks(self) -> tuple[Block, ...]:
        return (Block("conv", ("conv",), self.convolve),)

    def features(self, body: Tree, x: Tensor) -> Tensor:
        return self.hide(body, self.convolve(body, x))


class Twisted(Good):
    def features(self, body: Tree, x: Tensor) -> Tensor:
        return 2 * super().features(body, x)


class Still(Good):
    def convolve(self, body: Tree, x: Tensor) -> Tensor:
        y = layers.convolve(body["conv"]["conv"], x, padding=1)
        if self.norm != "batch":
            return F.relu(layers.norm(self.norm, body["conv"]["norm"], y)).mean((2, 3))
        scale, stats = body["conv"]["norm"], body["conv"]["norm"]["stats"]
        return F.relu(F.batch_norm(y, stats["mean"], stats["var"], scale["weight"], scale["bias"])).mean((2, 3))


class Deaf(Good):
    def convolve(self, body: Tree, x: Tensor) -> Tensor:
        kind = "batch" if self.norm == "batch" else "group"
        return F.relu(self.filters._replace(norm=kind)(body, x)).mean((2, 3))


class Unasked(Good):
    def init_body(self, key: Tensor) -> Tree:
        conv = self.filters._replace(norm="batch").init(keys.fold(key, 1))
        return {**super().init_body(key), "conv": conv}


class Mixing(Good):
    def hide(self, body: Tree, x: Tensor) -> Tensor:
        return super().hide(body, x - x.mean(0))


class Idle(Good):
    def hide(self, body: Tree, x: Tensor) -> Tensor:
        return super().hide(body, x.detach())


class Branching(Good):
    def hide(self, body: Tree, x: Tensor) -> Tensor:
        return super().hide(body, x if x.mean() > 0 else -x)


class Heavy(Good):
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "weights": list(range(1000))}


class Noisy(Good):
    drawn: ClassVar[list[int]] = []

    def init_body(self, key: Tensor) -> Tree:
        self.drawn.append(1)
        return super().init_body(keys.fold(key, len(self.drawn) if key.device.type == "cpu" else 0))


@pytest.fixture
def known(request: pytest.FixtureRequest) -> type[Network]:
    """Enter a class as the network of this file."""
    plugin: type[Network] = request.param
    register("test_model_plugins")(plugin)
    return plugin


BROKEN: dict[type[Network], set[str]] = {
    Misshapen: {"shapes fit", "gradients are everywhere", "engines agree", "stop and resume equals one go"},
    Random: {"the key decides, and nothing else"},
    Fixed: {"the key decides, and nothing else"},
    Here: {"the key decides, and nothing else"},
    Greedy: {"blocks are the body, a head is on top"},
    Short: {"blocks are the body, a head is on top"},
    Twisted: {"blocks are the body, a head is on top"},
    Still: {"norm layers are explicit"},
    Deaf: {"norm layers are explicit"},
    Unasked: {"norm layers are explicit"},
    Mixing: {"images are apart"},
    Idle: {"gradients are everywhere"},
    Branching: {"engines agree", "clients stack"},
    Heavy: {"it is a value: equal, repr evaluates back, pickles small"},
    Noisy: {"the key decides, and nothing else", "stop and resume equals one go"},
}


def broken(network: type[Network]) -> dict[str, str]:
    return {found.promise: found.problem for found in networks.check(network) if found.problem is not None}


@pytest.mark.parametrize("known", [Good, *BROKEN], indirect=True)
def test_a_broken_promise_is_found(known: type[Network]) -> None:
    found = broken(known)
    wanted = BROKEN.get(known, set())
    assert wanted <= set(found), found
    assert bool(found) == bool(wanted), found


@pytest.mark.parametrize("name", ["linear", "lenet5", "light_cnn", "adapter", "vit_mini"])
def test_built_in_networks_keep_the_contract(name: str) -> None:
    assert broken(MODELS[name]) == {}


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2"])
def test_clients_of_larger_networks_stack(name: str) -> None:
    networks.clients_stack(MODELS[name])


def test_a_name_of_a_built_in_network_is_taken(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="a model called 'resnet8' already"):
        scaffold.write("model", "resnet8", tmp_path)
    file = scaffold.write("model", "eight", tmp_path)
    file.write_text(file.read_text().replace('"eight"', '"resnet8"'))
    with pytest.raises(BadPlugin, match=r"two models are called 'resnet8': .*; rename one"):
        load_plugin(file)
    assert MODELS["resnet8"] is BUILT_IN["resnet8"]


# The way of a plug-in ---------------------------------------------------------------------------------------


def test_a_new_model_passes_the_check_is_shown_and_runs(bench: Bench) -> None:
    out, _ = bench("new", "model", "mine")
    assert "bench run --model mine --plugin mine.py" in out
    plugin = ("--plugin", "mine.py")
    checked, _ = bench("check", "mine", *plugin)
    assert "✗" not in checked and checked.count("✓") == len(networks.PROMISES)
    shown = json.loads(bench("show", "mine", *plugin, "--json")[0])
    assert shown["parameters"]["total"] == 3 * 32 * 9 + 64 + 64 * 513 + 650 and shown["version"] == 1
    run = ("run", "--algos", "fedrep(head_epochs=1)", "--model", "mine", "--rounds", "1")
    first = digest(bench(*run, *OFF, *plugin)[0])
    (folder,) = Path("runs").glob("*/run.json")
    identity = json.loads(folder.read_text())["identity"]
    assert identity["model"] == {"name": "mine", "version": 1, "source": identity["model"]["source"]}
    # from another process, which is given the file: a probe, and a run shared by two
    (row,) = json.loads(bench(*run, "--force", "--dry-run", "--json", *plugin)[0])["runs"]
    assert row["forecast"] is not None and row["id"] == folder.parent.name
    # published, and run again
    _, again = bench("validate", "runs", "--rerun", "1", *plugin)
    assert "run again, it gives the same states, counts and metrics to the bit" in again
    unknown, _ = bench("validate", "runs", status=1)
    assert "identity.model.name" in unknown and "a file is named with --plugin" in unknown
    # edited, it is another network
    file = Path("mine.py")
    file.write_text(file.read_text() + "\n# edited\n")
    (edited,) = json.loads(bench(*run, "--dry-run", "--no-probe", "--json", *plugin)[0])["runs"]
    assert edited["status"] == "to do" and len(first) == 64
    _, err = bench(*run, *OFF, status=2)
    assert "no model is called 'mine'" in err


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], Run]:
    """Give a run of a network that was loaded from a file."""
    file = scaffold.write("model", "mine", tmp_path)
    load_plugin(file)

    def run(model: str) -> Run:
        (one,) = Sweep(
            algorithms=(ALGORITHMS["fedavg"](),),
            datasets=(DATASETS["digits"](),),
            overrides={"model": model},
            data_root=tmp_path,
            plugins=(file,),
        ).expand()
        return one

    return run


def test_only_a_network_from_elsewhere_is_told_by_its_source(mine: Callable[[str], Run]) -> None:
    own, ours = mine("mine"), mine("mlp")
    assert "model" not in ours.identity() and own.identity()["model"]["name"] == "mine"
    assert own.protocol != ours.protocol


def test_a_worker_is_given_the_file_of_a_network(mine: Callable[[str], Run]) -> None:
    run, usual = mine("mine"), mine("mlp")
    payload = packed(run.plugins, run)
    del MODELS._classes["mine"], sys.modules["bench_plugin_mine"]  # as it is in a worker
    with pytest.raises(BadConfig, match="model = 'mine': must be one of"):
        replace(usual.setting, model="mine")
    with unpacked(payload) as there:
        assert there.id == run.id and build("mine", 10, (1, 8, 8)).feature_size == 64
