"""Networks of two tokens: torch's own blocks on the same weights, what a head makes of tokens, norm layers, engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Task, Tree, keys, models, tree
from bench.contract import toy
from bench.models import MODELS, BadModel, usual_norm
from bench.models.layers import NORMS
from bench.models.transformers import ViTMini
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_dataset
from bench.sweep.config import Sweep
from bench.training.engine import TOLERANCE
from bench.training.footprint import footprint
from tests.by_hand import done


class Small(ViTMini):
    """Two blocks of width 12."""

    width = 12
    depth = 2


def small(shape: tuple[int, ...] = (3, 12, 8)) -> Small:
    return Small("small", 5, shape, "layer")


def drawn(model: models.Model, seed: int = 1) -> Tree:
    """Weights far from those of the start, where attention is nearly even and tokens nearly alike."""
    return tree.map(lambda leaf: leaf + 0.3 * keys.normal(keys.fold(keys.key(seed), leaf.numel()), *leaf.shape),
                    model.init(keys.key(seed)))  # fmt: skip


def theirs(model: Small, body: Tree, x: Tensor) -> Tensor:
    """The same by torch's convolution and its encoder layer, norm layers first."""
    patch = body["embed"]["patch"]
    kernel = patch["weight"].reshape(model.width, model.shape[0], 4, 4)
    seen = F.conv2d(x, kernel, patch["bias"], stride=4).flatten(2).transpose(1, 2)
    seen = torch.cat([body["embed"]["tokens"].expand(len(x), -1, -1), seen], 1) + body["embed"]["positions"]
    for number in range(1, model.depth + 1):
        attention, dense = body[f"block{number}"]["attention"], body[f"block{number}"]["dense"]
        layer = torch.nn.TransformerEncoderLayer(
            model.width, model.heads, 4 * model.width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        )
        layer.load_state_dict({
            "self_attn.in_proj_weight": attention["inputs"]["weight"],
            "self_attn.in_proj_bias": attention["inputs"]["bias"],
            "self_attn.out_proj.weight": attention["output"]["weight"],
            "self_attn.out_proj.bias": attention["output"]["bias"],
            "linear1.weight": dense["hidden"]["weight"], "linear1.bias": dense["hidden"]["bias"],
            "linear2.weight": dense["output"]["weight"], "linear2.bias": dense["output"]["bias"],
            "norm1.weight": attention["norm"]["weight"], "norm1.bias": attention["norm"]["bias"],
            "norm2.weight": dense["norm"]["weight"], "norm2.bias": dense["norm"]["bias"],
        })  # fmt: skip
        seen = layer(seen)
    last = body["last"]["norm"]
    seen = F.layer_norm(seen, (model.width,), last["weight"], last["bias"], 1e-6)
    return torch.cat([seen[:, 0], seen[:, 1]], 1)


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12, 8), (1, 8, 8), (3, 15, 10)])
def test_features_are_those_of_torchs_own_blocks(shape: tuple[int, ...]) -> None:
    model = small(shape)
    body, x = drawn(model)["body"], keys.normal(keys.key(2), 4, *shape)
    z = model.features(body, x)
    assert z.shape == (4, 24) == (4, model.feature_size)
    torch.testing.assert_close(z, theirs(model, body, x), rtol=1e-5, atol=1e-5)
    assert float((z[:, :12] - z[:, 12:]).abs().mean()) > 0.1, "tokens are two"


def test_every_pixel_of_a_whole_patch_is_seen_and_what_is_left_over_is_not() -> None:
    model = small((3, 15, 10))
    body = drawn(model)["body"]
    x = keys.normal(keys.key(2), 1, *model.shape).requires_grad_()
    (slope,) = torch.autograd.grad(model.features(body, x).square().sum(), x)
    assert bool((slope[:, :, :12, :8] != 0).all()) and not slope[:, :, 12:].any() and not slope[:, :, :, 8:].any()


def test_a_patch_that_moves_is_another_picture() -> None:
    """Without positions attention would not know where a patch lies."""
    model = small((3, 8, 8))
    body, x = drawn(model)["body"], keys.normal(keys.key(2), 2, 3, 8, 8)
    moved = x.roll(4, 3)
    assert float((model.features(body, x) - model.features(body, moved)).abs().max()) > 0.01
    embed = body["embed"]
    blind = {**body, "embed": {**embed, "positions": torch.zeros(embed["positions"].shape)}}
    assert torch.allclose(model.features(blind, x), model.features(blind, moved), atol=1e-5)


def test_parameters_and_work_are_those_of_the_card() -> None:
    for name, parameters, work in (("vit_tiny", 5_361_216, 0.74e9), ("vit_mini", 682_464, 0.098e9)):
        model = models.build(name, 10, (3, 32, 32))
        found = footprint(model)
        assert found.parameters == parameters + 10 * (model.feature_size + 1)
        assert found.flops == pytest.approx(work, rel=0.02)
    assert model.init(keys.key(0, "meta"))["body"]["embed"]["positions"].shape == (66, 96)


def test_weights_start_as_they_are_said_to() -> None:
    params = models.build("vit_mini", 10, (3, 32, 32)).init(keys.key(0))
    block, embed = params["body"]["block3"], params["body"]["embed"]
    for leaf in (block["attention"]["inputs"], block["attention"]["output"], block["dense"]["hidden"]):
        assert float(leaf["weight"].std()) == pytest.approx(0.02, rel=0.02) and not leaf["bias"].any()
    assert float(embed["positions"].std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(embed["tokens"][0], embed["tokens"][1])
    assert float(embed["patch"]["weight"].abs().max()) == pytest.approx(48**-0.5, rel=0.01)
    leaves = tree.flatten(params)
    weights = [leaf for leaf in leaves.values() if leaf.ndim > 1]
    assert len({float(leaf.flatten()[0]) for leaf in weights}) == len(weights), "each is drawn by itself"


# Tokens and a head ----------------------------------------------------------------------------------------------------


def test_one_head_on_both_tokens_is_the_mean_of_a_head_on_each() -> None:
    model = small()
    params, x = drawn(model), keys.normal(keys.key(2), 4, *model.shape)
    z, weight, bias = model.features(params["body"], x), params["head"]["weight"], params["head"]["bias"]
    cls, dist = (F.linear(half, 2 * part, bias) for half, part in zip(z.chunk(2, 1), weight.chunk(2, 1), strict=True))
    assert torch.allclose(model.logits(params["head"], z), (cls + dist) / 2, atol=1e-6)
    assert float((cls - dist).abs().max()) > 0.01


def test_networks_without_tokens_have_one() -> None:
    sizes = {name: models.build(name, 10, (3, 32, 32)).tokens for name in MODELS}
    assert {name for name, tokens in sizes.items() if tokens != 1} == {"vit_tiny", "vit_mini"}
    assert sizes["vit_tiny"] == sizes["vit_mini"] == 2


# Norm layers ----------------------------------------------------------------------------------------------------------


def sweep(**overrides: Any) -> Sweep:
    return Sweep(
        algorithms=(ALGORITHMS["fedavg"](),), datasets=(parse_dataset("digits"),), overrides=overrides,
        data_root=Path("."),
    )  # fmt: skip


def test_a_network_of_tokens_has_layer_norm_where_nothing_is_said_and_no_other() -> None:
    assert [usual_norm(name) for name in ("resnet8", "vit_mini")] == ["group", "layer"]
    assert usual_norm("resnet8", "batch") == "batch" and usual_norm("vit_mini", "batch") == "layer"
    (run,), (said,) = sweep(model="vit_mini").expand(), sweep(model="vit_mini", norm="layer").expand()
    assert run.id == said.id and run.setting.norm == "layer"
    (usual,) = sweep(model="resnet8").expand()
    assert usual.setting.norm == "group"
    for norm in ("group", "batch"):
        with pytest.raises(BadModel, match=f"^vit_mini has norm = layer, not {norm}; leave it out$"):
            sweep(model="vit_mini", norm=norm).expand()
    assert all(MODELS[name].norms == NORMS for name in MODELS if not name.startswith("vit"))


def test_a_second_network_has_the_norm_of_the_first_if_it_can() -> None:
    def second(model: str, norm: str, name: str) -> str:
        run = toy.run(ALGORITHMS["fedavg"](), setting=replace(toy.SETTING, model=model, norm=norm))
        task: Task = run.task
        return task.network(name).norm

    assert second("vit_mini", "layer", "resnet8") == "layer"
    assert second("mlp", "batch", "vit_mini") == "layer" and second("mlp", "batch", "resnet8") == "batch"
    with pytest.raises(BadModel, match="no model is called 'vit'"):
        second("mlp", "group", "vit")


# Training -------------------------------------------------------------------------------------------------------------


def test_both_engines_train_it_by_adamw_and_it_learns() -> None:
    """A trained step of every leaf: attention, both tokens and positions."""
    setting = replace(
        toy.SETTING, model="vit_mini", norm="layer", optimiser="adamw", momentum=0.0, lr=0.002, rounds=1, epochs=2,
        participation=1.0, batch_size=8,
    )  # fmt: skip
    runs = [
        toy.run(ALGORITHMS["fedavg"](), engine, setting=setting, sizes=(13, 9, 0, 0, 0, 0, 0, 0))
        for engine in ("serial", "stacked")
    ]
    before = runs[0].progress.server
    servers = [done(run).progress.server for run in runs]
    apart = tree.norm(tree.sub(*servers)) / tree.norm(tree.sub(servers[0], before))
    assert float(apart) < 0.02 and TOLERANCE < 1e-3
    moved = tree.flatten(tree.sub(servers[0], before))
    assert min(float(leaf.abs().max()) for leaf in moved.values()) > 1e-3
