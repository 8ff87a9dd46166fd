"""How commands end where something around them is wrong: a sentence, the right exit status, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.command.main import main
from bench.command.streams import terminable

OFF = ("--ray", "off", "--tracking-uri", "off")


def bench(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command here; give its exit status and what it says on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([*words], prog_name="bench")
    return int(ended.value.code or 0), capsys.readouterr().err


LONG = "9" * 5000
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a plug-in of another kind": (("run", "--plugin", "notes.txt"), "with a name that ends in .py"),
    "another to be validated with": (("validate", ".", "--plugin", "notes.txt"), "with a name that ends in .py"),
    "another to be checked": (("check", "fedavg", "--plugin", "notes.txt"), "with a name that ends in .py"),
    "a plug-in that quits": (("run", "--plugin", "quits.py"), "fails when imported: SystemExit: 3 (quits.py, line 2)"),
    "an error of two lines": (("run", "--plugin", "two.py"), "RuntimeError: one (two.py, line 1)"),
    "too many clients": (("run", "--clients", "5000"), "use fewer clients"),
    "too small an alpha": (("run", "--alpha", "1e-6", "--clients", "250"), "images"),
    "no such weights": (("run", "--weights", "none.pth"), "cannot be read"),
    "too long a tail": (("run", "--imbalance", "900", "--clients", "200"), "use fewer clients"),
    "a field given twice": (
        ("run", "--algos", "fedrep(head_epochs=1,head_epochs=2)"),
        "fedrep(head_epochs=1,head_epochs=2): head_epochs is given twice",
    ),
    "more workers than cores": (("run", "--workers-per-run", "1000"), "--workers-per-run 1000: this machine has "),
    "a cluster that is none": (("run", "--ray", "127.0.0.1:1"), "--ray 127.0.0.1:1: nobody answers there"),
    "a client of none": (("run", "--ray", "ray://127.0.0.1:1"), "--ray ray://127.0.0.1:1: nobody answers there"),
    "no such port": (("run", "--ray", "127.0.0.1:99999"), "--ray 127.0.0.1:99999: nobody answers there"),
    "a long number": (("run", "--rounds", LONG), "is not a valid integer"),
    "a long field": (("run", "--algos", f"fedrep(head_epochs={LONG})"), "is not written as a Python call"),
    "a long value": (("run", "--algos", f"fedrep(head_epochs={LONG[:4000]})"), "a whole number from 0 to 1,000"),
    "many brackets": (("run", "--algos", f"fedrep(head_epochs={'[' * 300 + ']' * 300})"), "as a Python call"),
    "an endless budget": (("run", "--time-budget", "9" * 50 + "h"), "ten years at most"),
    "nested brackets": (("run", "--algos", f"fedrep(head_epochs={'-' * 3000}1)"), "is not written as a Python call"),
    "images without number": (("run", "--auxiliary", f"own:{LONG}"), "own:N, DATASET or DATASET:N is wanted"),
    "a sweep that is a device": (("run", "--from", "/dev/zero"), "/dev/zero: it is a pipe or a device, and no file"),
    "a sweep of brackets": (("run", "--from", "nested.toml"), "nested.toml: too many brackets in each other"),
    "no run to test": (("eval", "ffff"), "runs: there is no such folder"),
    "no MLflow to show": (("track", ".", "--tracking-uri", ""), "it is empty; the address of an MLflow server"),
    "endless weights": (("run", "--weights", "endless.pth"), "it has more than 4,294,967,296 bytes"),
    "no Ray": (("run", "--ray", "", "--dry-run"), "--ray is empty; local, off or the address"),
    "no MLflow": (("run", "--tracking-uri", "", "--dry-run"), "--tracking-uri is empty"),
    "no folder": (("run", "--out", "", "--dry-run"), "it is empty; a file or folder is wanted"),
    "no folder of results": (("table", "--out", ""), "it is empty; a file or folder is wanted"),
    "a file that hides torch": (("new", "algorithm", "torch"), "torch.py would hide the package torch from this suite"),
    "a file that hides Python's": (("new", "part", "os"), "os.py would hide the package os from this suite"),
    "a file that hides this suite": (("new", "model", "bench"), "bench.py would hide the package bench"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_a_sentence_and_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x = 1\n")
    Path("quits.py").write_text("import sys\nsys.exit(3)\n")
    Path("two.py").write_text("raise RuntimeError('one\\ntwo')\n")
    Path("nested.toml").write_text("algos = " + "[" * 2000 + "]" * 2000)
    with Path("endless.pth").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole
    there = set(tmp_path.iterdir())
    words, said = WRONG[what]
    usual = OFF if words[0] == "run" and "" not in words else ()
    status, err = bench(words[0], *usual, *words[1:], capsys=capsys)
    assert status == 2 and said in err and err.count("\n") == 1 and len(err) < 400
    assert set(tmp_path.iterdir()) == there


def test_a_name_that_no_file_can_have_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    status, err = bench("run", "--preset", "a" * 300, *OFF, capsys=capsys)
    assert status == 2 and "there is no such file" in err and err.count("\n") == 1


# Processes of their own -------------------------------------------------------------------------------------


def begun(*words: str, **more: object) -> subprocess.Popen[str]:
    """Begin a command in a process of its own."""
    done: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", "bench", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )  # type: ignore[call-overload]
    return done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
@pytest.mark.parametrize("words", [("list", "algorithms"), ("table", "results", "--format", "md")])
def test_output_that_cannot_be_written_is_a_sentence(words: tuple[str, ...]) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "bench", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=buffered)
    said = "bench: what was asked for cannot be written to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_whoever_reads_no_further_is_told_nothing() -> None:
    process = begun("show", "fedrep", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(120) == 1 and process.stderr.read() == ""
    process.stderr.close()


def test_too_little_memory_is_a_sentence(tmp_path: Path) -> None:
    few = 1_500_000_000
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (few, few))  # noqa: E731
    process = begun("run", "--out", str(tmp_path / "out"), *OFF, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert (
        err == "bench: the memory that this process may use is too little; give it more ('ulimit -v' says how much)\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_scheduler_ends_a_sweep_as_a_person_does(number: signal.Signals, tmp_path: Path) -> None:
    words = ("run", "--algos", "fedavg", "--rounds", "100000", "--out", str(tmp_path), *OFF)
    process = begun(*words)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*/progress.jsonl")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: 0 of 1 runs are done and kept. The same command goes on: bench run" in err
    assert "Traceback" not in err
    (journal,) = (tmp_path / "sweeps").glob("*.json")
    assert json.loads(journal.read_text())["ended"] is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_that_comes_where_nobody_is_told_comes_again(number: signal.Signals) -> None:
    class Gone:
        def __del__(self) -> None:
            signal.raise_signal(number)
            time.sleep(1)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), terminable():
        gone = Gone()
        del gone
        time.sleep(30)
    assert time.monotonic() - began < 15


def test_a_command_leaves_the_signals_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert bench("list", "settings", capsys=capsys)[0] == 0
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_run_that_quits_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaves.py").write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom bench import Algorithm, register\n\n"
        "@register('leaves')\n@dataclass(frozen=True, kw_only=True)\nclass Leaves(Algorithm):\n"
        "    def local_update(self, task, shared, private, data):\n        sys.exit(3)\n"
    )
    words = ("run", "--plugin", "leaves.py", "--algos", "leaves,fedavg", "--rounds", "1", "--out", "out")
    status, err = bench(*words, *OFF, capsys=capsys)
    assert status == 1 and "1 of 2 runs failed" in err
    reasons = [json.loads(file.read_text()).get("reason") for file in Path("out").glob("*/run.json")]
    assert sorted(map(str, reasons)) == ["None", "SystemExit: 3 (leaves.py, line 9)"]


def test_without_room_for_temporary_files_that_is_said(tmp_path: Path) -> None:
    nowhere = {name: str(tmp_path / "none") for name in ("TMPDIR", "TEMP", "TMP")}
    words = "import resource, tempfile; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    code = words + "from bench.command.main import main; main(['run', '--algos', 'fedavg', '--out', 'out'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **nowhere}
    )
    assert done.returncode == 2 and done.stderr == (
        "bench: temporary files cannot be written; free some space in the folder that TMPDIR names, or /tmp\n"
    )
