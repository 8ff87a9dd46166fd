"""Algorithms, parts, datasets and models from elsewhere: by path, by entry point, and written by `bench new`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.command import scaffold
from bench.command.main import main
from bench.plugins.registry import ALGORITHMS, REGISTRIES
from bench.protocol.settings import BadConfig

OFF = ("--ray", "off", "--tracking-uri", "off", "--json")

Bench = Callable[..., tuple[str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Call the command in this process, in an empty folder, and forget the plug-ins afterwards."""
    monkeypatch.chdir(tmp_path)
    known = [dict(registry._classes) for registry in REGISTRIES]

    def call(*words: object, status: int = 0) -> tuple[str, str]:
        forget()  # as a process of its own would not know what an earlier one loaded
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.out, printed.err

    def forget() -> None:
        for registry, classes in zip(REGISTRIES, known, strict=True):
            mine = [name for name, kind in registry._classes.items() if kind.__module__.startswith("bench_plugin_")]
            for name in mine:
                del registry._classes[name]
            registry._classes.update(classes)
        for module in [name for name in sys.modules if name.startswith("bench_plugin_")]:
            del sys.modules[module]

    yield call
    forget()


def digest(out: str) -> str:
    (run,) = json.loads(out)["runs"]
    assert run["status"] == "done"
    return str(run["digest"])


def test_a_new_algorithm_passes_the_check_and_runs_like_fedavg(bench: Bench) -> None:
    out, _ = bench("new", "algorithm", "my-own")
    assert "bench check my_own --plugin my_own.py" in out
    checked, _ = bench("check", "my_own", "--plugin", "my_own.py")
    assert "✗" not in checked and checked.count("✓") >= 12
    run = ("run", "--rounds", "2", *OFF)
    mine, _ = bench(*run, "--algos", "my_own", "--plugin", "my_own.py")
    theirs, _ = bench(*run, "--algos", "fedavg")
    assert digest(mine) == digest(theirs)
    shown, _ = bench("show", "my-own", "--plugin", "my_own.py", "--json")
    assert json.loads(shown)["fields"]["extra_epochs"]["default"] == 0


def test_a_new_dataset_passes_the_check_and_runs(bench: Bench) -> None:
    bench("new", "dataset", "leaves", "--out", "plugins")
    plugin = ("--plugin", "plugins/leaves.py")
    checked, _ = bench("check", "leaves", *plugin)
    assert "✗" not in checked
    out, _ = bench("run", "--dataset", "leaves", "--algos", "fedavg", "--rounds", "2", *OFF, *plugin)
    assert len(digest(out)) == 64


def test_a_new_part_passes_the_check_and_runs_on_any_method(bench: Bench) -> None:
    out, _ = bench("new", "part", "smooth")
    assert "bench run --algos fedavg+smooth --plugin smooth.py" in out
    plugin = ("--plugin", "smooth.py")
    checked, _ = bench("check", "smooth", *plugin)
    assert "✗" not in checked and checked.count("✓") >= 20
    run = ("run", "--rounds", "1", *OFF, *plugin, "--algos")
    mine, theirs, off = (
        bench(*run, f"fedrep(head_epochs=1){part}")[0] for part in ("+smooth", "", "+smooth(smoothing=0)")
    )
    assert digest(mine) != digest(theirs)
    ids = [json.loads(each)["runs"][0]["id"] for each in (mine, theirs, off)]
    assert ids[0] != ids[1] == ids[2]
    stored = json.loads(Path("runs", ids[0], "run.json").read_text())
    assert len(stored["identity"]["algorithm"]["parts"][0]["source"]) == 64
    assert stored["call"] == "FedRep(head_epochs=1, body_epochs=None) + Smooth(smoothing=0.1)"


def test_a_name_of_two_kinds_is_said_to_be_one(bench: Bench, tmp_path: Path) -> None:
    bench("new", "algorithm", "mine")
    (tmp_path / "focal.py").write_text((tmp_path / "mine.py").read_text().replace("mine", "focal"))
    plugin = ("--plugin", "focal.py")
    _, err = bench("check", "focal", *plugin)
    assert err == "focal is also one of the parts: bench check focal --kind parts\n"
    run = ("run", "--rounds", "1", "--dry-run", "--no-probe", *OFF, *plugin, "--algos")
    (row,) = json.loads(bench(*run, "focal+focal")[0])["runs"]
    assert row["call"] == "focal+focal"


def test_an_edited_plugin_file_is_another_run(bench: Bench, tmp_path: Path) -> None:
    bench("new", "algorithm", "mine")
    run = ("run", "--algos", "mine", "--plugin", "mine.py", "--dry-run", "--no-probe", "--json")
    before, _ = bench(*run)
    file = tmp_path / "mine.py"
    file.write_text(file.read_text() + "\n# edited\n")
    after, _ = bench(*run)
    assert json.loads(before)["runs"][0]["id"] != json.loads(after)["runs"][0]["id"]


def test_a_plugin_that_fails_fails_its_run_only(bench: Bench, tmp_path: Path) -> None:
    bench("new", "algorithm", "broken")
    file = tmp_path / "broken.py"
    file.write_text(file.read_text().replace("        return task.sgd", "        1 / 0\n        return task.sgd"))
    words = ("run", "--algos", "broken,fedavg", "--plugin", "broken.py", "--rounds", "1", *OFF)
    out, err = bench(*words, status=1)
    broken, fedavg = json.loads(out)["runs"]
    assert (broken["status"], fedavg["status"]) == ("failed", "done")
    assert broken["reason"].startswith("ZeroDivisionError: division by zero (broken.py, line ")
    assert "Traceback" not in err
    stored = json.loads((tmp_path / "runs" / broken["id"] / "run.json").read_text())
    assert stored["status"] == "failed" and "ZeroDivisionError" in stored["traceback"]
    checked, _ = bench("check", "broken", "--plugin", "broken.py", status=1)
    assert "✗" in checked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_that_name", "fails when imported: ModuleNotFoundError"),
        ("x = 1", "registers nothing"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_plugin_file_that_cannot_be_used_is_named(bench: Bench, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    _, err = bench("run", "--plugin", "bad.py", *OFF, status=2)
    assert said in err and "bad.py" in err and "Traceback" not in err


def test_an_entry_point_of_another_distribution_is_found(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "third-1.0.dist-info").mkdir(parents=True)
    assert scaffold.write("algorithm", "third", site) == site / "third.py"
    (site / "third-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    assert scaffold.write("part", "fourth", site) == site / "fourth.py"
    assert scaffold.write("model", "fifth", site) == site / "fifth.py"
    (site / "third-1.0.dist-info" / "entry_points.txt").write_text(
        "[bench.algorithms]\nthird = third:Third\n[bench.parts]\nfourth = fourth:Fourth\n"
        "[bench.models]\nfifth = fifth:Fifth\n"
    )

    def answer(*words: str) -> object:
        done = subprocess.run(
            [sys.executable, "-m", "bench", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    listed = answer("list", "algorithms", "--json")
    assert isinstance(listed, list) and "third" in [each["name"] for each in listed] and "third" not in list(ALGORITHMS)
    document = answer("run", "--algos", "third(extra_epochs=1)+fourth", "--model", "fifth", "--rounds", "1", *OFF)
    assert isinstance(document, dict) and len(digest(json.dumps(document))) == 64


def test_new_never_overwrites_and_refuses_names_that_cannot_be(tmp_path: Path) -> None:
    file = scaffold.write("algorithm", "mine", tmp_path)
    before = file.read_text()
    for kind, name, said in (
        ("dataset", "mine", "is there already"),
        ("algorithm", "fedavg", "already; choose another name"),
        ("part", "focal", "already; choose another name"),
        ("dataset", "digits", "already; choose another name"),
        ("algorithm", "class", "cannot name"),
        ("algorithm", "1st", "cannot name"),
        ("algorithm", "a/b", "cannot name"),
        ("algorithm", "Mine", "cannot name"),
    ):
        with pytest.raises(BadConfig, match=said):
            scaffold.write(kind, name, tmp_path)
    assert file.read_text() == before
    with pytest.raises(BadConfig, match="cannot be written"):
        scaffold.write("algorithm", "other", file / "below")


@pytest.mark.parametrize("kind", ["algorithm", "part", "dataset", "model"])
def test_what_new_writes_passes_the_linter_of_this_repository(tmp_path: Path, kind: str) -> None:
    file = scaffold.write(kind, "mine", tmp_path)
    configuration = Path(__file__).parents[1] / "pyproject.toml"
    for words in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        command = [sys.executable, "-m", "ruff", *words, "--config", str(configuration), str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
