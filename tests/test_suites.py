"""Suites: what they run, what belongs to them, and cells that are no full product."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

import bench
from bench.command.main import main
from bench.command.options import Options
from bench.command.run import run_command
from bench.dataset import DataMissing
from bench.face.asked import sweep
from bench.plugins.registry import UnknownPlugin
from bench.protocol import suites
from bench.protocol.settings import BadConfig
from bench.results import records
from bench.results.membership import suites_of
from bench.results.record import Record

SMALL = """
dataset = "digits"
imbalance = "5,20"
alpha = "0.1,0.5"
grid = ["alpha=0.5", "imbalance=20; alpha=0.1"]
seeds = "2"
algos = "fedavg,local"
rounds = 1

[set]
eval_every = 1
unseen = 2

[suite]
version = 1
title = "Small: two rounds."
shows = "Nothing,\\nbut quickly."
hides = "Everything else."
costs = "Seconds."
needs = ["bench data fetch nothing"]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "small.toml").write_text(SMALL)
    monkeypatch.setattr(suites, "FOLDER", folder)
    suites.suite.cache_clear()
    return "small"


def options(*words: str) -> Options:
    context = run_command.make_context("run", list(words), obj={"alone": False})
    return Options(**context.params)


def typed(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def cells(*words: str) -> list[tuple[str, Any, Any, int]]:
    runs = sweep(options("--data-root", "nowhere", *words)).expand()
    return [(run.label, run.setting.imbalance, run.setting.alpha, run.seed) for run in runs]


@pytest.mark.parametrize("name", suites.names())
def test_a_suite_is_told_and_can_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))  # where no features are
    suite = suites.suite(name)
    assert suite.version >= 1 and all((suite.title, suite.shows, suite.hides, suite.costs))
    asked = options("--suite", name)
    if not str(suite.options["dataset"]).startswith("features"):
        assert sweep(replace(asked, device="cpu", data_root=Path("nowhere"))).expand()
    else:
        with pytest.raises(DataMissing, match="'bench data embed cifar10 --model tf_efficientnet_lite0"):
            sweep(replace(asked, device="cpu")).expand()


def test_a_suite_runs_its_cells_and_options_given_beside_it_win(small: str) -> None:
    pairs = [(5.0, 0.5), (20.0, 0.5), (20.0, 0.1)]
    assert cells("--suite", small) == [
        (label, imbalance, alpha, seed)
        for imbalance, alpha in pairs
        for seed in (0, 1)
        for label in ("fedavg", "local")
    ]
    assert cells("--suite", small, "--algos", "ditto", "--seeds", "7,", "--imbalance", "20") == [
        ("ditto", 20.0, 0.5, 7),
        ("ditto", 20.0, 0.1, 7),
    ]
    assert cells("--suite", small, "--algos", "ditto", "--seeds", "1", "--alpha", "0.1") == [("ditto", 20.0, 0.1, 0)]
    with pytest.raises(BadConfig, match="none of its cells has the datasets, imbalances and alphas"):
        cells("--suite", small, "--alpha", "0.7")


def test_grids_may_name_datasets(small: str) -> None:
    words = ["--dataset", "digits,cifar10", "--imbalance", "5,20", "--grid", "dataset=digits; imbalance=5"]
    assert cells(*words) == cells("--imbalance", "5")
    assert len(cells(*words, "--grid", "dataset=cifar10")) == 3 * len(cells("--imbalance", "5"))


@pytest.mark.parametrize("text", ["imbalance", "lr=0.1", "imbalance=5; imbalance=6", "imbalance=5, alpha=0.5", ""])
def test_cells_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"--grid|--imbalance"):
        cells("--grid", text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "smaller"], "no suite is called 'smaller'; did you mean small"),
        (["--suite", "small", "--from", "own.toml"], "--suite and --from exclude each other"),
    ],
)
def test_a_suite_that_is_none_is_a_sentence(small: str, words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(SMALL)
    with pytest.raises(click.BadParameter, match=said):
        options(*[str(tmp_path / each) if each == "own.toml" else each for each in words])


def test_ones_own_suite_is_a_file(small: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(SMALL)
    assert cells("--from", str(tmp_path / "own.toml")) == cells("--suite", small)


def test_rows_of_a_suite_are_tuned_in_a_cell_of_it(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "runs"), "--ray", "off"]
    tuned = ["tune", "--suite", small, "--imbalance", "20", "--algos", "fedavg", "--seeds", "1", "--trials", "2", *out]
    assert typed(*tuned) == 2
    assert "one alpha are wanted" in capsys.readouterr().err
    assert typed(*tuned, "--alpha", "0.1", "--json") == 0
    preset = json.loads(capsys.readouterr().out)["preset"]
    cell = ["--suite", small, "--alpha", "0.1", "--algos", "fedavg", "--preset", preset, "--tracking-uri", "off"]
    assert typed("run", *cell, *out) == 0
    assert [suites_of(record) for record in records.read_all(tmp_path / "runs")[0]] == [["small"], ["small"]]


def test_a_result_is_of_a_suite_by_its_protocol(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    common = ["--out", str(out), "--ray", "off", "--tracking-uri", "off"]
    assert typed("run", "--suite", small, "--alpha", "0.1", "--algos", "fedavg", *common) == 0
    by_hand = ["--imbalance", "20", "--alpha", "0.1", "--rounds", "1", "--set", "unseen=2"]
    others = [["--seeds", "2,"], ["--lr", "0.01"], ["--set", "lost=0.1"], ["--clients", "10"], ["--imbalance", "5"]]
    for more in ([], *others):
        assert typed("run", "--algos", "local", *by_hand, *more, *common) == 0
    found = {(record.algorithm, *told(record)): suites_of(record) for record in records.read_all(out)[0]}
    assert [key for key, member in found.items() if member == ["small"]] == [
        key for key in found if key in {("fedavg", 0, 20.0), ("fedavg", 1, 20.0), ("local", 0, 20.0)}
    ]
    assert sum(member == ["small"] for member in found.values()) == 3 and len(found) == 8
    capsys.readouterr()
    assert typed("table", "--suite", small, "--out", str(out), "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "fedavg" in lines[1] + lines[2] and "local" in lines[1] + lines[2]
    assert typed("compare", "--suite", small, "--out", str(out)) == 0
    compared = capsys.readouterr().out
    assert "imbalance 20" in compared and "imbalance 5" not in compared and "lr = 0.01" not in compared
    assert typed("compare", "--suite", "users", "--out", str(out)) == 2
    assert "no suite is called 'users'; there are small" in capsys.readouterr().err
    site = tmp_path / "site"
    assert typed("site", "--out", str(out), "--to", str(site)) == 0
    page = (site / "suites" / "small.html").read_text()
    for said in (
        "Nothing, but quickly.",
        "bench data fetch nothing",
        "bench run --suite small",
        "../methods/local.html",
    ):
        assert said in page
    assert 'href="suites/small.html"' in (site / "index.html").read_text()


def told(record: Record) -> tuple[Any, ...]:
    usual = {"unseen", "rounds", "imbalance", "alpha"}
    return (record.seed, record.imbalance, *sorted(set(record.overrides) - usual))


def test_suites_are_listed_and_shown(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("list", "suites") == 0
    assert "small  Small: two rounds." in capsys.readouterr().out
    assert typed("show", "small") == 0
    shown = capsys.readouterr().out
    for said in (
        "small (suite)",
        "grid",
        "alpha=0.5 | imbalance=20; alpha=0.1",
        "eval_every=1, unseen=2",
        "Everything else.",
    ):
        assert said in shown


def test_python_has_suites_and_grids_too(small: str, tmp_path: Path) -> None:
    found = bench.run("local", suite=small, alpha=0.1, seeds=[1],
        out=tmp_path / "suite", ray="off", tracking_uri="off")  # fmt: skip
    (record,) = records.read_all(tmp_path / "suite")[0]
    assert (record.imbalance, record.alpha, record.seed, len(found)) == (20.0, 0.1, 1, 1)
    assert suites_of(record) == [small]
    with pytest.raises(UnknownPlugin, match="no suite is called 'smaller'; did you mean small"):
        bench.run(suite="smaller")
    found = bench.run("local", imbalance=[5, 20], alpha=[0.1, 0.5], grid="imbalance=5; alpha=0.1", rounds=1,
        out=tmp_path, ray="off", tracking_uri="off")  # fmt: skip
    assert len(found) == 1


def test_membership_needs_no_torch() -> None:
    code = "import sys, bench.results.membership; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
