"""Named sets of algorithms: who is in them, what stands for whom where algorithms are typed, and who is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.algorithm import Algorithm
from bench.command import catalogue
from bench.command.main import main
from bench.command.options import Options, defaults
from bench.command.tune import _studies
from bench.contract.checks import ALGORITHM_PROMISES
from bench.contract.promises import ContractBroken
from bench.plugins.registry import ALGORITHMS, load_plugin
from bench.protocol.presets import Choice, Preset
from bench.protocol.sets import FAMILIES, SETS, members, unfold
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import ask, label, parse_algorithms, parse_datasets
from bench.results.entrants import choose
from bench.results.leaderboard import leaderboards
from bench.sweep.config import Sweep
from tests.test_results import record

Bench = Callable[..., tuple[str, str]]

PAGE = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = {"references": "references", "generic": "generic", "personalised": "pfl", "long-tailed": "fedlt"}
README = {
    ROWS[title]: re.findall(r"`(\w+)`", names)
    for title, names in re.findall(r"^\| ([\w-]+) \| (`.*) \|$", PAGE, re.MULTILINE)
    if title in ROWS
}
"""Which method is in which set, as the front page has it."""
WITH_IMAGES = ("fedic", "ratio_loss")
"""Of the last set, those whose server needs some."""
TAUGHT = ("clip2fl",)
"""And those that need a teacher."""
WITHOUT = sorted({*README["fedlt"]} - {*WITH_IMAGES, *TAUGHT})
MINE = """
from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, register


@register("grown")
@dataclass(frozen=True, kw_only=True)
class Grown(Algorithm):
    family: ClassVar[str] = "fedlt"

    def local_update(self, task, shared, private, data):
        return shared, private
"""


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Call the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, status: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words], prog_name="bench")
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.out, printed.err

    return call


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A plug-in that declares its set."""
    file = tmp_path / "grown.py"
    file.write_text(MINE)
    return file


# Who is in them ---------------------------------------------------------------------------------------------


def test_the_sets_are_those_of_the_front_page() -> None:
    assert {name: sorted(those) for name, those in README.items()} == {name: sorted(members(name)) for name in FAMILIES}
    built_in = [name for name in ALGORITHMS if ALGORITHMS[name].__module__ == f"bench.algorithms.{name}"]
    assert sorted(name for those in README.values() for name in those) == built_in
    assert set(built_in) <= set(members("all")) and set(SETS) == {*FAMILIES, "all"}


def test_what_the_list_reads_without_importing_is_what_the_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {name: ALGORITHMS[name].family for name in ALGORITHMS}
    monkeypatch.setattr(type(ALGORITHMS), "entered", lambda self: {})
    assert {name: catalogue.family(name) for name in said} == said


def test_a_plugin_may_declare_its_set(grown: Path, bench: Bench) -> None:
    load_plugin(grown)
    assert "grown" in members("fedlt") and "grown" in members("all") and "grown" not in members("pfl")
    words = ("run", "--plugin", str(grown), "--algos", "set:fedlt", "--dry-run", "--no-probe", "--json")
    planned = json.loads(bench(*words)[0])["runs"]
    assert [run["algorithm"] for run in planned] == sorted([*WITHOUT, "grown"])


@dataclass(frozen=True, kw_only=True)
class Foreign(Algorithm):
    """From elsewhere."""

    def local_update(self, *_: Any) -> Any:
        """Nothing."""


@pytest.mark.parametrize(
    ("module", "family", "kept"),
    [
        ("elsewhere", None, True),
        ("elsewhere", "pfl", True),
        ("elsewhere", "all", False),
        ("elsewhere", "PFL methods", False),
        ("bench.algorithms.mine", None, False),
        ("bench.algorithms.mine", "generic", True),
    ],
)
def test_the_contract_wants_a_family_that_there_is_and_one_of_ours_to_have_it(
    module: str, family: str | None, kept: bool
) -> None:
    plugin = type("Mine", (Foreign,), {"family": family, "__module__": module})
    promise = ALGORITHM_PROMISES["its family is a named set"]
    if kept:
        promise(plugin)
        return
    with pytest.raises(ContractBroken, match=r"family = .*: must be one of references, generic, pfl, fedlt"):
        promise(plugin)


# What stands for whom ---------------------------------------------------------------------------------------


def test_a_set_is_its_algorithms_each_once() -> None:
    assert [label(each) for each in parse_algorithms("set:references")] == [
        "airbench", "centralised", "fedavg_prior", "local",
    ]  # fmt: skip
    mixed = ask("fedprox(mu=0.5),set:generic,fedavg(),fedavg")
    runs = sweep("fedprox(mu=0.5),set:generic,fedavg(),fedavg").expand()
    assert [label(run.algorithm) for run in runs] == ["fedprox(mu=0.5)", *sorted(README["generic"])]
    assert [label(each) for each in mixed.optional] == sorted({*README["generic"]} - {"fedavg"})
    assert mixed.left_out == ()
    assert unfold("set:references+focal(gamma=1)+topk")[0] == "airbench+focal(gamma=1)+topk"
    assert unfold("fedavg+topk") == ["fedavg+topk"]


def test_members_on_which_a_part_makes_no_sense_are_left_out_of_a_set_alone() -> None:
    asked = ask("set:references+topk")
    assert [label(each) for each in asked.algorithms] == ["fedavg_prior+topk"]
    assert [sentence.partition(": topk is")[0] for sentence in asked.left_out] == [
        "left out of set:references+topk: airbench+topk", "left out of set:references+topk: centralised+topk",
        "left out of set:references+topk: local+topk",
    ]  # fmt: skip
    with pytest.raises(BadConfig, match=r"local\+topk: topk is of the kind channel"):
        ask("set:references+topk,local+topk")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set:pfi", "set:pfi: no set is called 'pfi'; did you mean pfl?"),
        ("set:", "no set is called ''; there are references, generic, pfl, fedlt, all"),
        ("set:pfl(mu=1)", "did you mean pfl?"),
        ("set:pfl+focal(gamm=1)", "no such parameter; focal takes gamma"),
    ],
)
def test_a_set_that_cannot_be_is_answered_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse_algorithms(text)
    assert said in str(caught.value)


# Who is left out --------------------------------------------------------------------------------------------


def sweep(algos: str, **options: Any) -> Sweep:
    asked = ask(algos)
    return Sweep(
        algorithms=asked.algorithms, optional=asked.optional, datasets=tuple(parse_datasets("digits")),
        engine="serial", data_root=Path(), **options,
    )  # fmt: skip


def test_what_cannot_run_is_left_out_of_a_set_with_its_reason_and_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking, teacher = sweep("set:fedlt"), tmp_path / "clip.safetensors"
    teacher.touch()
    assert [label(run.algorithm) for run in lacking.expand()] == WITHOUT
    said = [sentence.partition(";")[0] for sentence in lacking.left_out()]
    wanted = {name: "images at the server (auxiliary)" for name in WITH_IMAGES}
    wanted |= {name: "a teacher's features of all training images and classes" for name in TAUGHT}
    assert said == [f"left out of the set: {name} needs {what}" for name, what in sorted(wanted.items())]
    full = sweep("set:fedlt", overrides={"auxiliary": "own:1"}, teacher=teacher)
    assert [label(run.algorithm) for run in full.expand()] == members("fedlt") and full.left_out() == []
    with pytest.raises(BadConfig, match="fedic needs images at the server"):
        sweep("set:fedlt,fedic").expand()
    bodiless = sweep("set:all", overrides={"model": "linear"}, seeds=(0, 1))
    runs = bodiless.expand()
    assert all("body" not in run.algorithm.needs for run in runs) and len(runs) % 2 == 0
    left = {sentence.split(": ")[1].split()[0] for sentence in bodiless.left_out()}
    assert left | {label(run.algorithm) for run in runs} == set(ALGORITHMS)
    assert len(left) == len(bodiless.left_out())  # each said once
    for name in members("fedlt"):
        monkeypatch.setattr(ALGORITHMS[name], "needs", frozenset({"body"}))
    with pytest.raises(BadConfig, match="balancefl needs a model with a body"):
        sweep("set:fedlt", overrides={"model": "linear"}).expand()  # nothing is left


def test_a_set_has_what_a_preset_has_of_it() -> None:
    tuned = Preset(name="tuned", algorithms={"local": Choice(call="local", lr=0.1)})
    asked = sweep("set:references", presets=(tuned,))
    assert [run.label for run in asked.expand()] == ["local [tuned, lr 0.1]"]
    said = [sentence.partition(";")[0] for sentence in asked.left_out()]
    assert said == [
        f"left out of the set: preset tuned has no {name}" for name in ("airbench", "centralised", "fedavg_prior")
    ]


# The commands -----------------------------------------------------------------------------------------------


def test_run_and_tune_take_sets_and_say_what_they_leave_out(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = bench("run", "--algos", "set:fedlt,fedavg", "--dry-run", "--no-probe")
    assert [line.split()[5] for line in out.splitlines()[: len(WITHOUT) + 1]] == [*WITHOUT, "fedavg"]
    assert err.count("left out of the set: fedic") == 1
    studies = _studies(Options(**{**defaults(), "algos": "set:fedlt+topk,local,local"}), "balanced", None, 0.2)
    found = [label(study.run.algorithm) for study in studies]
    assert found == [*(f"{name}+topk" for name in WITHOUT if name != "deit_lt"), "local"]
    said = capsys.readouterr().err
    assert said.count("left out of the set: fedic+topk") == said.count("left out of set:fedlt+topk: deit_lt+topk") == 1


def test_list_and_show_tell_of_sets(bench: Bench) -> None:
    assert [each["name"] for each in json.loads(bench("list", "sets", "--json")[0])] == [f"set:{name}" for name in SETS]
    listed = bench("list", "sets")[0]
    assert "set:fedlt       Long-tailed" in listed and f"{', '.join(members('fedlt'))}\n" in listed
    rows = {line.split()[0]: line.split()[1] for line in bench("list", "algorithms")[0].splitlines() if line}
    assert (rows["fedper"], rows["fedavg"], rows["local"]) == ("pfl", "generic", "references")
    shown = " ".join(bench("show", "set:fedlt")[0].split())
    assert f"algorithms {', '.join(members('fedlt'))}" in shown
    assert "family         pfl" in bench("show", "fedper")[0]
    assert "one algorithm is wanted here" in bench("show", "set:pfl+focal", status=2)[1]


def test_compare_takes_what_there_is_of_a_set() -> None:
    rows = ("fedavg", None), ("fedrep", None), ("fedrep", {"head_epochs": 5}), ("ditto", None)
    boards = leaderboards([record(*row) for row in rows])
    assert choose(boards, ["set:pfl"]) == ["ditto", "fedrep", "fedrep(head_epochs=5)"]
    strange = leaderboards([record("fedavg"), record("nobody_knows")])
    assert choose(strange, ["set:all"]) == ["fedavg", "nobody_knows"]
    with pytest.raises(BadConfig, match="there are no results of set:fedlt; there are some of"):
        choose(boards, ["set:fedlt"])
