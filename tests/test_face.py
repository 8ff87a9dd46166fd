"""The suite from Python: sweeps, what they left as an object, and plug-ins of a notebook's cells."""

from __future__ import annotations

import base64
import inspect
import linecache
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import bench
from bench import Runs
from bench.command.main import main
from bench.command.options import defaults
from bench.dataset import DataMissing
from bench.face.run import run
from bench.plugins import cells
from bench.plugins.registry import ALGORITHMS, BadPlugin, UnknownPlugin
from bench.protocol.settings import BadConfig
from bench.results import records
from bench.results.kept import NotKept
from bench.sweep import driver

HERE: dict[str, Any] = {"ray": "off", "tracking_uri": "off"}
NOTEBOOK = Path(__file__).parent / "notebooks" / "comparison.ipynb"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Path]:
    """Two algorithms, two factors, two seeds."""
    out = tmp_path_factory.mktemp("runs")
    return run("fedavg, local", imbalance=[2, 10], seeds=[0, 5], rounds=2, clients=6, out=out, **HERE), out


def test_a_sweep_gives_the_runs_that_were_asked_for_as_frames(swept: tuple[Runs, Path]) -> None:
    runs, out = swept
    frame = runs.frame()
    assert len(runs) == len(frame) == 8
    assert sorted({*zip(frame.algorithm, frame.imbalance, frame.seed, strict=True)}) == [
        (name, factor, seed) for name in ("fedavg", "local") for factor in (2.0, 10.0) for seed in (0, 5)
    ]
    assert set(frame.clients) == {6} and set(frame.rounds) == {2} and set(frame.setting) == {"quick"}
    for record, (_, row) in zip(runs, frame.iterrows(), strict=True):
        stored = records.read(out / record.id)
        assert row["id"] == record.id and row["personal"] == stored.metrics["personal"]
        assert row["cost.bytes_up"] == stored.cost["bytes_up"]
    assert frame[frame.algorithm == "local"]["generic"].isna().all(), "absent, and not zero"
    curves, counts = runs.curves(), runs.counts()
    assert len(curves) == 16 and set(curves["round"]) == {1, 2}
    last = curves[curves["round"] == 2].set_index("id")["personal"]
    assert last.to_dict() == frame.set_index("id")["personal"].to_dict()
    one = counts[counts.id == runs[0].id].drop(columns=["id", "algorithm", "dataset", "imbalance", "alpha", "seed"])
    assert one.reset_index(drop=True).equals(runs[0].counts())
    assert set(runs.leaderboard()["algorithm"]) == {"fedavg", "local"}


def test_models_that_were_kept_are_modules_of_torch(tmp_path: Path) -> None:
    runs = run("fedavg, fedrep", rounds=1, clients=4, keep_models=True, out=tmp_path, **HERE)
    images = torch.zeros(3, 1, 8, 8)
    for name, client in (("fedavg", None), ("fedrep", 2)):
        model = runs[name].model("generic" if client is None else "personal", client)
        assert not model.training and model(images).shape == (3, 10)
    with pytest.raises(NotKept):
        runs["fedrep"].model("generic")


def test_runs_are_chosen_by_number_name_and_column(swept: tuple[Runs, Path]) -> None:
    runs, out = swept
    few = runs.where(imbalance=10, seed=[0])
    assert {record.label for record in few} == {"fedavg", "local"} and len(few) == 2
    assert few["fedavg", 0].id == few["fedavg"].id and few["local"].call.startswith("Local(")
    assert [record.id for record in runs[2:4]] == [runs[2].id, runs[3].id]
    assert len(bench.load(out)) == 8 and {each.id for each in bench.load(out)} == {each.id for each in runs}
    with pytest.raises(BadConfig, match="2 runs are of fedavg with seed 0, and differ in imbalance: choose with"):
        runs["fedavg", 0]
    with pytest.raises(BadConfig, match="no run of local with seed 3; there are 0, 5"):
        runs["local", 3]
    with pytest.raises(BadConfig, match="there are no results of fedrep"):
        runs["fedrep", 0]
    with pytest.raises(BadConfig, match="runs have no 'imbalanse'; did you mean imbalance"):
        runs.where(imbalanse=10)
    with pytest.raises(BadConfig, match="nowhere: there is no such folder"):
        bench.load(out / "nowhere")


def test_tables_and_comparisons_are_those_of_the_command(
    swept: tuple[Runs, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = swept

    def printed(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--out", str(out)], prog_name="bench")
        assert ended.value.code == 0
        return "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())

    assert str(runs) == printed("table")
    assert str(runs.compare(metric="personal")) == printed("compare", "--metric", "personal")
    assert "<table" in runs._repr_html_() and "<pre" in runs.compare(metric="personal")._repr_html_()
    pairs = runs.compare("local", "fedavg", metric="personal").frame()
    assert list(pairs["first"]) == ["local", "local"] and list(pairs["wins"] + pairs["losses"]) == [2, 2]
    with pytest.raises(BadConfig, match="did you mean personal"):
        runs.compare(metric="persona")


def test_pictures_can_be_saved_and_changed(swept: tuple[Runs, Path], tmp_path: Path) -> None:
    picture = swept[0].plot("personal")
    (first, second) = picture.get_axes()
    frame = swept[0].curves()
    chosen = frame[(frame.algorithm == "fedavg") & (frame.imbalance == 2)]
    line = next(line for line in first.get_lines() if line.get_label() == "fedavg")
    assert list(np.asarray(line.get_ydata())) == pytest.approx(list(100 * chosen.groupby("round")["personal"].mean()))
    assert "imbalance 2" in first.get_title() and "imbalance 10" in second.get_title()
    for name in ("new/curves.svg", "again.svg"):
        swept[0].plot("personal").save(tmp_path / name)
    assert (tmp_path / "new/curves.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    with pytest.raises(BadConfig, match="persona: no run has that by round; did you mean personal"):
        swept[0].plot("persona")


def test_what_is_finished_is_not_run_again_and_threads_stay_the_callers(swept: tuple[Runs, Path]) -> None:
    runs, out = swept
    before = {record.id: record.finished for record in runs}
    torch.set_num_threads(2)
    try:
        again = run(
            ["local", ALGORITHMS["fedavg"]], imbalance="2,10", seeds="0,5", rounds=2, clients=6, out=out, **HERE
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert {record.id: record.finished for record in again} == before


def test_options_have_the_commands_names_and_defaults() -> None:
    known = {name: parameter.default for name, parameter in inspect.signature(run).parameters.items()}
    asked = {name: value for name, value in defaults().items() if name not in ("dry_run", "no_probe", "json")}
    assert known.pop("suite") is None  # on the command line it gives others their defaults
    assert known.keys() == asked.keys()
    differ = {name for name in known if known[name] != asked[name]}
    assert differ == {"seeds", "set", "out"}, "1 for '1', None for nothing, text for a path"
    documented = inspect.getdoc(run) or ""
    assert all(f"\n    {name}: " in documented for name in [*known, "suite"])


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"algos": "fedrap"}, UnknownPlugin, "did you mean fedrep"),
        ({"algos": [3]}, BadConfig, "3: a name, an instance or a class of Algorithm is wanted"),
        ({"dataset": "svhn", "data_root": "/nowhere"}, DataMissing, "svhn"),
        ({"set": {"rounds": 3}}, BadConfig, "--set rounds: use --rounds"),
        ({"rounds": 0}, BadConfig, "rounds"),
        ({"seeds": []}, BadConfig, "--seeds"),
        ({"plugin": "nowhere.py"}, BadPlugin, "nowhere.py: no such file"),
    ],
)
def test_what_cannot_be_done_is_an_exception_with_the_commands_sentence(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        run(**{"algos": "fedavg", "out": tmp_path, **HERE, **given})
    assert not list(tmp_path.glob("*/run.json"))


def test_a_failed_run_is_among_the_runs(tmp_path: Path) -> None:
    runs = run("fedavg, fedavg+topk", lr=1e6, set={"weight_decay": 1e6}, rounds=2, out=tmp_path, **HERE)
    assert set(runs.frame()["status"]) == {"failed"} and "finite" in runs.frame()["reason"][0]
    assert len(runs.curves()) == 0 and "failed" in str(runs)


def test_an_interruption_keeps_what_is_done_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really = driver.run

    def interrupted(runs: Any, out: Path, **more: Any) -> None:
        really(runs[:1], out, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("fedavg, local", rounds=1, out=tmp_path, **HERE)
    assert "1 of 2 runs are done and kept" in capsys.readouterr().err


# Plug-ins in cells ------------------------------------------------------------------------------------------

CELL = '''
import bench
from dataclasses import dataclass

STEP = 0.5
OTHER = 1

def toward(old, new):
    return old + STEP * (new - old)

class Averaging:
    def start(self):
        return 1

@dataclass(frozen=True, kw_only=True)
class Halfway(Averaging, bench.Algorithm):
    """FedAvg whose server goes a part of the way."""

    def local_update(self, task, shared, private, data):
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task, server, uploads):
        return bench.tree.map(lambda old, new: toward(old, new), server, uploads.mean())
'''


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Execute text as a notebook does: Python knows its lines, and no file has them."""
    module = ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", module)

    def execute(text: str, name: str = "<cell 1>") -> type:
        lines = text.splitlines(keepends=True)
        monkeypatch.setitem(linecache.cache, name, (len(text), None, lines, name))
        exec(compile(text, name, "exec"), vars(module))
        plugin: type = module.Halfway
        return plugin

    return execute


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("STEP = 0.5", "STEP = 0.25", False),
        ("STEP * (new - old)", "(new - old)", False),
        ("task.sgd(task.loss, shared, data.batches(task.epochs))", "shared", False),
        ("return 1", "return 2", False),
        ("OTHER = 1", "OTHER = 2", True),
        ("import bench\n", "import bench\n\n# a remark\n", True),
    ],
)
def test_a_classs_source_is_its_own_and_what_it_uses(cell: Any, old: str, new: str, same: bool) -> None:
    assert old in CELL
    first, second = (cells.source(cell(text)) for text in (CELL, CELL.replace(old, new, 1)))
    assert (first == second) == same


def test_a_class_whose_source_nobody_knows_is_refused(cell: Any, tmp_path: Path) -> None:
    plugin = cell(CELL)
    linecache.cache.clear()
    with pytest.raises(BadPlugin, match="the source of Halfway is not known"):
        run([plugin], rounds=1, out=tmp_path, **HERE)


def test_a_class_of_a_cell_is_run_and_another_version_of_it_is_another_run(cell: Any, tmp_path: Path) -> None:
    first = run([cell(CELL)()], rounds=1, out=tmp_path, **HERE)
    second = run("halfway", rounds=1, out=tmp_path, **HERE)
    assert first[0].id == second[0].id and first[0].label == "halfway"
    cell(CELL.replace("0.5", "0.25"))
    third = run("halfway", rounds=1, out=tmp_path, **HERE)
    assert third[0].id != first[0].id and third[0].metrics != first[0].metrics


def test_what_is_sent_to_workers_takes_the_class_and_its_version_along(cell: Any, tmp_path: Path) -> None:
    plugin = cell(CELL)
    cells.enter(plugin)
    cells.note_sources()
    content = cells.packed(plugin())
    code = f"""
import sys
from bench.plugins import cells
from bench.plugins.registry import ALGORITHMS, REGISTRIES, label, source_digest
instance = cells.unpacked(open({str(tmp_path / "sent")!r}, "rb").read())
assert type(instance) is ALGORITHMS["halfway"] and "a_notebook" not in sys.modules
print(label(instance), source_digest(type(instance)))
"""
    (tmp_path / "sent").write_bytes(content)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["halfway", cells.source(plugin)]


def test_a_real_notebook(tmp_path: Path) -> None:
    """Every cell, as a person sees it; the class of a cell on Ray's workers as in this process."""
    notebook = nbformat.read(NOTEBOOK, 4)  # type: ignore[no-untyped-call]
    assert not any(each.get("outputs") for each in notebook.cells), "what stands in the repository is not executed"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown: dict[str, list[Any]] = {}
    for each in notebook.cells:
        for output in each.get("outputs", []):
            assert output.output_type != "stream" or output.name == "stderr"
            if output.output_type == "execute_result":
                shown[each.source.splitlines()[-1]] = [output.data]

    def of(last_line: str, kind: str = "text/plain") -> str:
        (data,) = shown[last_line]
        return str(data[kind])

    assert "<table" in of("runs", "text/html") and "fedrep(head_epochs=2)" in of("runs", "text/html")
    assert "\x1b" not in of("runs") and "setting quick" in of("runs")
    picture = base64.b64decode(of('runs.plot("personal")', "image/png"))
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert "damped" in of("own", "text/html")
    same = '[one.document["digest"] for one in own] == [one.document["digest"] for one in here]'
    assert of(same) == "True", "workers got the class"
    first, second = of('first, again["damped", 0].id').strip("()").split(", ")
    assert first != second, "what a method uses is part of its version"
