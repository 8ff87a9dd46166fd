"""`bench speed` for a network: both engines, and which of them is chosen."""

from __future__ import annotations

import json
from functools import partial

import pytest
from click.testing import CliRunner

from bench.command.plugin import speed_command
from bench.plugins.registry import DATASETS
from bench.speed import throughput


def test_both_engines_are_measured_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "engines", partial(throughput.engines, repeats=1))
    answer = CliRunner().invoke(speed_command, ["--model", "frozen", "--batch-size", "64", "--json"])
    ((of, measured),) = json.loads(answer.output).items()
    assert of == "stacked frozen, 1×8×8, 10 classes, batch 64, against serial"
    assert measured["auto is"] == "stacked"
    speeds = measured["images_per_second"], measured["reference_images_per_second"]
    assert measured["ratio"] == pytest.approx(speeds[0] / speeds[1])


def test_what_excludes_each_other_is_said() -> None:
    answer = CliRunner().invoke(speed_command, ["--model", "mlp", "--scale"])
    assert answer.exit_code == 2 and "--scale and --model exclude each other" in answer.output


def test_images_have_the_dataset_s_shape_and_classes() -> None:
    (of,) = throughput.engines(DATASETS["cifar100"](), "linear", 32, repeats=1)
    assert of == "stacked linear, 3×32×32, 100 classes, batch 32, against serial"
