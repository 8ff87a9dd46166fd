"""Networks of timm's as what makes features: their weights, their look at pixels, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from bench import DataMissing
from bench.command.embed import embed_command
from bench.dataset import Dataset
from bench.models import BadModel
from bench.models.weights import BadWeights
from bench.plugins.registry import DATASETS
from bench.preparing import encoders
from bench.preparing.embedding import Embedding
from bench.preparing.encoders import Pretrained
from tests.test_models import Watcher, everything, features

timm = pytest.importorskip("timm")
LITE = "tf_efficientnet_lite0"


def lite(dataset: Dataset, **changed: Any) -> Pretrained:
    return Pretrained(**{"dataset": dataset, "model": LITE, "file": None, "pixels": 64, "device": "cpu", **changed})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    dataset: Dataset = DATASETS["digits"]()
    return dataset


def pictures(dataset: Dataset, n: int = 4) -> Tensor:
    x = dataset.load(Path("not needed")).train_x
    assert isinstance(x, Tensor)
    return x[:n]


def test_the_packages_weights_are_timms_network_by_another_name(digits: Dataset) -> None:
    """What a photograph's classes are is known only with the classifier: the package's own, put in beside."""
    packaged = encoders._packaged(LITE)
    assert packaged is not None
    found = torch.load(packaged, weights_only=True)
    whole = timm.create_model(LITE).eval()
    mine = lite(digits).network.state_dict()
    whole.load_state_dict({**mine, "classifier.weight": found["_fc.weight"], "classifier.bias": found["_fc.bias"]})
    assert torch.equal(mine["blocks.3.1.conv_dw.weight"], found["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(mine["bn2.running_var"], found["_bn1.running_var"])
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = whole(x)
        pooled = lite(digits).network(x)
    torch.testing.assert_close(F.linear(pooled, found["_fc.weight"], found["_fc.bias"]), logits)


def test_pixels_are_scaled_as_the_weights_were_trained(digits: Dataset) -> None:
    encoder, x = lite(digits), pictures(digits)
    assert encoder.feature_size == 1280
    large = F.interpolate(x.float(), (64, 64), mode="bicubic", align_corners=False).expand(-1, 3, -1, -1)
    pixels = large * (255 / digits.scale)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.features(x), encoder.network((pixels - 127) / 128), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(encoder.features(x), encoder.network((pixels - 124) / 58), rtol=1e-2, atol=1e-2)


def test_weights_are_told_by_their_tensors_wherever_they_lie(digits: Dataset, tmp_path: Path) -> None:
    mine, file = lite(digits), tmp_path / "weights.pth"
    torch.save(mine.network.state_dict(), file)
    again = lite(digits, file=file)
    assert again.described() == mine.described() and again.weights_digest == mine.weights_digest
    assert lite(digits, pixels=32).described() != mine.described()
    torch.save({**mine.network.state_dict(), "bn1.bias": torch.zeros(32)}, file)
    assert lite(digits, file=file).described() != mine.described()


@pytest.mark.parametrize("broken", ["fewer", "shape", "order"])
def test_weights_of_another_network_are_refused(digits: Dataset, tmp_path: Path, broken: str) -> None:
    packaged, file = encoders._packaged(LITE), tmp_path / "weights.pth"
    assert packaged is not None
    found = torch.load(packaged, weights_only=True)
    if broken == "fewer":
        del found["_bn0.bias"]
    if broken == "shape":
        found["_bn0.bias"] = torch.zeros(7)
    if broken == "order":
        found = dict(reversed(found.items()))
    torch.save(found, file)
    with pytest.raises(BadWeights, match=f"{file} is not for {LITE}: its tensors are others"):
        lite(digits, file=file).load()


def test_what_cannot_be_is_a_sentence(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadModel, match=r"neither we nor timm have a network called 'tf_efficientnet_light'; like it: "):
        lite(digits, model="tf_efficientnet_light").load()
    store = Embedding(dataset=digits, model="mlp", norm="group", weights=None).make(tmp_path, Watcher())
    with pytest.raises(BadModel, match="takes pictures, and examples of Features are none"):
        lite(features(store.folder)).load()
    with pytest.raises(BadModel, match="--pixels is for networks of timm's"):
        _ = Embedding(dataset=digits, model="mlp", norm="group", weights=None, pixels=32).encoder
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(BadWeights, match=r"timm has no weights of resnet18 \(no network\); name a file"):
        lite(digits, model="resnet18").load()
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(
        BadModel, match=r"no network of ours is called 'resnet18d' .* pip install 'pfl-lt-bench\[features\]'"
    ):
        _ = Embedding(dataset=digits, model="resnet18d", norm="group", weights=None).encoder


def test_features_are_made_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = DATASETS["digits"]().load(Path("not needed"))
    monkeypatch.setattr(DATASETS["digits"], "load", lambda self, root: type(few)(
        few.train_x[:300], few.train_y[:300], few.test_x[:20], few.test_y[:20]))  # fmt: skip
    arguments = ["digits", "--model", LITE, "--pixels", "32", "--data-root", str(tmp_path)]
    done = CliRunner().invoke(embed_command, arguments)
    assert done.exit_code == 0, done.output
    assert "features of 300 training and 20 test images, 1,280 each, in " in done.stdout
    (folder,) = (path for path in (tmp_path / "prepared").iterdir() if path.is_dir())
    splits = features(folder).load(tmp_path)
    with torch.inference_mode():
        wanted = lite(DATASETS["digits"](), pixels=32).features(few.test_x[:20])
    torch.testing.assert_close(everything(splits.test_x)[:, :, 0, 0].float(), wanted, rtol=2e-3, atol=2e-3)
    refused = CliRunner().invoke(embed_command, ["digits", "--model", LITE, "--random-weights"])
    assert refused.exit_code == 2 and f"--random-weights is for networks of ours, and {LITE} is none" in refused.output
    with pytest.raises(DataMissing):
        features(tmp_path / "elsewhere").load(tmp_path)
