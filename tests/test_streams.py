"""Where output is not UTF-8, where the working directory is gone, and what `import bench` shows."""

from __future__ import annotations

import importlib
import io
import json
import pydoc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bench
from bench.command.main import main

OFF = ("--ray", "off", "--tracking-uri", "off")


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words), prog_name="bench")
    return int(str(ended.value.code))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small runs."""
    folder = tmp_path_factory.mktemp("streams")
    assert call("run", "--algos", "fedavg,local", "--rounds", "1", *OFF, "--out", str(folder / "runs"), "--json") == 0
    return folder / "runs"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Call a command whose output has an encoding; give its status and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call_in(encoding: str, *words: str) -> tuple[int, str, str]:
        sinks = io.BytesIO(), io.BytesIO()
        streams = [io.TextIOWrapper(sink, encoding=encoding, write_through=True) for sink in sinks]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", streams[0])
            patched.setattr(sys, "stderr", streams[1])
            status = call(*words)
        # To a stream that says it is ASCII click writes UTF-8.
        out, err = (sink.getvalue().decode("utf-8" if encoding == "ascii" else encoding) for sink in sinks)
        return status, out, err

    return call_in


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_no_encoding_ends_a_command(results: Path, written: Callable[..., tuple[int, str, str]], encoding: str) -> None:
    out = str(results)
    for words in (
        ("table", "--out", out),
        ("compare", "--out", out, "--metric", "personal"),
        ("status", "--out", out),
        ("data", "stats", "digits"),
        ("show", "fedloge"),
        ("run", "--algos", "fedavg,local", "--rounds", "1", *OFF, "--out", out),
        ("list",),
    ):
        status, said, err = written(encoding, *words)
        assert status == 0 and said and "Traceback" not in err, words
        assert "?" not in said.replace("---", ""), f"every character has a stand-in: {words}"


def test_a_missing_model_is_a_dash_in_ascii_too(results: Path, written: Callable[..., tuple[int, str, str]]) -> None:
    _, said, _ = written("ascii", "table", "--out", str(results))
    rows = (line.replace("|", " ").split() for line in said.splitlines())
    (cells,) = (row for row in rows if row[:1] == ["local"])
    assert cells[1] == "-" and said.isascii()


def test_a_file_name_that_is_no_text_can_be_said(written: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = written("utf-8", "table", "--out", "no\udcfftext")
    assert status == 2 and r"no\udcfftext: there is no such folder" in err


def test_a_working_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    code = """
import os, pathlib
gone = pathlib.Path("gone")
gone.mkdir()
os.chdir(gone)
os.rmdir(os.getcwd())
from bench.command.main import main
main(["list", "settings"], prog_name="bench")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("bench: the working directory is gone; change to one")


def test_results_of_a_dataset_that_are_not_there_are_answered_with_those_that_are(
    results: Path, written: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = str(results)
    for words in (("table",), ("table", "--format", "json"), ("compare",)):
        status, said, err = written("utf-8", *words, "--out", out, "--dataset", "mnist")
        assert (status, said) == (2, "") and f"no results on 'mnist' in {out}; there are some on digits" in err
    status, said, _ = written("utf-8", "table", "--out", out, "--dataset", "DIGITS", "--format", "json")
    assert status == 0 and len(json.loads(said)["leaderboards"]) == 1
    status, _, err = written("utf-8", "table", "--out", out, "--dataset", "digits,features(path='mine, too')")
    assert status == 2 and f"no results on \"features(path='mine, too')\" in {out}" in err
    (tmp_path / "empty").mkdir()
    status, said, _ = written("utf-8", "table", "--out", "empty", "--dataset", "mnist")
    assert status == 0 and "There are no finished runs" in said


# What `import bench` shows


def test_all_public_names_are_there_and_nothing_else() -> None:
    shown = dir(bench)
    assert {"Algorithm", "Task", "Tree", "register", "keys", "tree", "losses", "optim"} <= set(shown)
    assert not {"TYPE_CHECKING", "annotations", "importlib", "_HOMES"} & set(shown)
    assert all(hasattr(bench, name) for name in shown) and set(bench.__all__) <= set(shown)
    names: dict[str, object] = {}
    exec("from bench import *", names)
    assert names["Task"] is bench.Task and set(bench.__all__) <= set(names)
    helped = pydoc.plain(pydoc.render_doc(bench))
    assert "class Algorithm(" in helped and "class Uploads(" in helped and "local_update(self, task" in helped


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, bench; dir(bench); assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert bench.losses.mean is importlib.import_module("bench.losses").mean


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bench' has no attribute 'nothing'"):
        _ = bench.nothing
