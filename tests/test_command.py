"""The command as a person uses it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.command.main import _VERBS, main

OFF = ("--ray", "off", "--tracking-uri", "off")
SMALL = ("--algos", "fedavg", "--rounds", "2", *OFF)


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    status: int
    out: str
    err: str


Bench = Callable[..., Answer]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Call the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        printed = capsys.readouterr()
        return Answer(int(str(ended.value.code)), printed.out, printed.err)

    return call


def process(*words: object, cwd: Path, code: str | None = None, **environment: str) -> Answer:
    """Call the command, or a piece of code, in a process of its own."""
    start = ["-c", code] if code is not None else ["-m", "bench"]
    command = [sys.executable, *start, *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, timeout=180
    )
    return Answer(done.returncode, done.stdout, done.stderr)


# Start


def test_help_answers_in_under_half_a_second(tmp_path: Path) -> None:
    took = []
    for _ in range(3):
        started = time.perf_counter()
        assert process("--help", cwd=tmp_path).status == 0
        took.append(time.perf_counter() - started)
    assert min(took) < 0.5


def test_help_of_no_verb_loads_anything_heavy(tmp_path: Path) -> None:
    code = """
import sys
from bench.command.main import _VERBS, main
for verb in _VERBS:
    try:
        main([verb, "--help"], prog_name="bench")
    except SystemExit as ended:
        assert ended.code == 0
print(*{"torch", "ray", "mlflow", "pandas", "numpy", "rich", "pydantic"} & set(sys.modules))
"""
    answer = process(cwd=tmp_path, code=code)
    assert answer.status == 0 and answer.out.splitlines()[-1] == "", answer
    for verb in _VERBS:
        assert f"Usage: bench {verb}" in answer.out


def test_help_shows_its_examples_a_line_each(bench: Bench) -> None:
    for verb in _VERBS:
        lines = bench(verb, "--help").out.splitlines()
        assert not any("\\b" in line for line in lines), "the sign that keeps lines apart is not to be seen"
        assert all(line.count(f"bench {verb}") <= 1 for line in lines if line.startswith("  bench ")), verb


def test_without_a_verb_the_help_is_printed(bench: Bench) -> None:
    answer = bench()
    assert answer.status == 0 and "bench run --algos fedloge,fedrep" in answer.out


# A run


def test_a_run_is_reported_as_json_and_the_second_time_as_cached(bench: Bench) -> None:
    first = bench("run", *SMALL, "--json")
    assert first.status == 0
    (run,) = json.loads(first.out)["runs"]
    assert set(run) >= {"id", "algorithm", "dataset", "imbalance", "alpha", "seed", "status", "metrics", "digest"}
    named = {key: run[key] for key in ("algorithm", "dataset", "imbalance", "alpha", "seed", "status")}
    assert named == {
        "algorithm": "fedavg",
        "dataset": "digits",
        "imbalance": 10.0,
        "alpha": 0.5,
        "seed": 0,
        "status": "done",
    }
    assert len(run["digest"]) == 64 and 0 <= run["metrics"]["generic"] <= 1
    second = bench("run", *SMALL, "--json")
    assert json.loads(second.out)["runs"] == [{**run, "status": "cached"}]
    assert sorted(path.name for path in Path("runs", run["id"]).iterdir()) == [
        "counts.parquet",
        "predictions.parquet",
        "rounds.parquet",
        "run.json",
    ]


def test_a_run_ends_with_the_leaderboard_and_where_things_are(bench: Bench) -> None:
    answer = bench("run", *SMALL)
    assert answer.status == 0
    assert "fedavg" in answer.out and "results: runs" in answer.out
    assert "done: fedavg on digits, imbalance 10, alpha 0.5, seed 0: generic" in answer.err
    assert "setting quick on digits, with other rounds" in answer.err


def test_force_runs_again_with_the_same_bits(bench: Bench) -> None:
    first = json.loads(bench("run", *SMALL, "--json").out)["runs"][0]
    document = Path("runs", first["id"], "run.json")
    before = document.stat().st_mtime_ns
    again = json.loads(bench("run", *SMALL, "--json", "--force").out)["runs"][0]
    assert again == first
    assert document.stat().st_mtime_ns > before


def test_a_dry_run_says_what_would_run_and_writes_nothing(bench: Bench) -> None:
    answer = bench("run", "--algos", "fedavg,fedrep", "--seeds", "2", "--dry-run", "--no-probe")
    assert answer.status == 0 and len(answer.out.splitlines()) == 4 + 2
    assert not Path("runs").exists()
    done = json.loads(bench("run", *SMALL, "--json").out)["runs"][0]
    planned = bench("run", "--algos", "fedavg,fedrep", "--rounds", "2", "--dry-run", "--no-probe", "--json")
    states = [(run["id"], run["status"]) for run in json.loads(planned.out)["runs"]]
    assert states[0] == (done["id"], "cached") and states[1][1] == "to do"


def test_neither_ray_nor_mlflow_is_imported_when_both_are_off(tmp_path: Path) -> None:
    code = f"""
import sys
from bench.command.main import main
try:
    main(["run", *{SMALL!r}, "--json"], prog_name="bench")
except SystemExit as ended:
    assert ended.code == 0
print(sorted({{"ray", "mlflow"}} & set(sys.modules)), file=sys.stderr)
"""
    answer = process(cwd=tmp_path, code=code)
    assert answer.status == 0 and answer.err.splitlines()[-1] == "[]"
    json.loads(answer.out)
    assert answer.err == "setting quick on digits, with other rounds\n[]\n"  # no progress where nobody looks


def test_where_ray_and_mlflow_are_missing_the_defaults_do_without(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ray", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    answer = bench("run", "--algos", "fedavg,local", "--rounds", "1")
    assert answer.status == 0
    assert "ray is not installed" in answer.err and "mlflow is not installed" in answer.err
    refused = bench("run", "--algos", "fedavg,local", "--rounds", "2", "--ray", "local", "--tracking-uri", "off")
    assert refused.status == 2 and "use --ray off" in refused.err


def test_a_sweep_file_gives_defaults_and_the_command_line_wins(bench: Bench) -> None:
    Path("sweep.toml").write_text(
        """
        algos = ["fedavg", "fedrep(head_epochs=2)"]
        imbalance = [10, 50]
        seeds = [7]
        rounds = 5
        batch-size = 8
        ray = "off"
        [set]
        norm = "batch"
        momentum = 0.9
        """
    )
    planned = json.loads(bench("run", "--from", "sweep.toml", "--dry-run", "--no-probe", "--json").out)["runs"]
    cells = [(run["call"], run["imbalance"], run["seed"]) for run in planned]
    assert cells == [(call, factor, 7) for factor in (10, 50) for call in ("fedavg", "fedrep(head_epochs=2)")]
    shorter = bench(
        "run", "--from", "sweep.toml", "--dry-run", "--no-probe", "--json", "--imbalance", "10", "--rounds", "6"
    )
    assert [run["imbalance"] for run in json.loads(shorter.out)["runs"]] == [10, 10]
    assert {run["id"] for run in json.loads(shorter.out)["runs"]}.isdisjoint(run["id"] for run in planned)


# Bad input


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--algos fedrap", 2, "did you mean fedrep"),
        ("--dataset digit", 2, "did you mean digits"),
        ("--setting quik", 2, "did you mean quick"),
        ("--partition dirichle", 2, "did you mean dirichlet"),
        ("--algos fedrep(head_epoch=5)", 2, "no such parameter; fedrep takes head_epochs, body_epochs"),
        ("--algos fedrep(head_epochs='x')", 2, "a whole number from 0 to 1,000"),
        ("--algos fedloge(sparsity=2)", 2, "from 0 to below 1"),
        ("--set nom=batch", 2, "did you mean norm"),
        ("--set rounds=3", 2, "use --rounds"),
        ("--set momentum=1.5", 2, "from 0 to below 1"),
        ("--set momentum=x", 2, "from 0 to below 1"),
        ("--clients 0", 2, "must be a whole number from 1"),
        ("--clients 5000", 2, "use fewer clients"),
        ("--clients x", 2, "'x' is not a valid integer"),
        ("--imbalance -5", 2, "at least 1"),
        ("--imbalance 0", 2, "at least 1"),
        ("--imbalance ,", 2, "--imbalance is empty"),
        ("--alpha -1", 2, "must be a number above 0"),
        ("--alpha nan", 2, "finite numbers"),
        ("--rounds 0", 2, "must be a whole number from 1"),
        ("--participation 2", 2, "must be a number above 0 and up to 1"),
        ("--lr inf", 2, "must be a number above 0"),
        ("--seeds 0", 2, "at least 1"),
        ("--jobs 0", 2, "not in the range"),
        ("--algos fedrep --model linear", 2, "needs a model with a body and a head"),
        ("--model resnet9", 2, "did you mean resnet8"),
        ("--model fedavg_cnn", 2, "fedavg_cnn needs images of at least 16 pixels"),
        ("--out file/below", 2, "name another folder with --out"),
        ("--plugin nowhere.py", 2, "no such file"),
        ("--from nowhere.toml", 2, "No such file"),
        ("--from file", 2, "not TOML"),
        ("--nonsense", 2, "No such option"),
        ("--dataset cifar10 --data-root .", 3, "bench data fetch cifar10"),
    ],
)
def test_bad_input_is_answered_with_a_sentence_and_a_status(bench: Bench, words: str, status: int, said: str) -> None:
    Path("file").write_text("not a folder, not TOML")
    answer = bench("run", *SMALL, *words.split())
    assert answer.status == status
    assert said in answer.err
    assert answer.err.startswith("bench: ") and answer.err.count("\n") == 1
    assert answer.out == ""
    assert not list(Path("runs").glob("*/run.json"))


def test_a_missing_gpu_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = bench("run", *SMALL, "--device", "cuda")
    assert answer.status == 2 and "use --device cpu" in answer.err


def test_a_wrong_key_of_a_sweep_file_is_answered_with_the_near_ones(bench: Bench) -> None:
    Path("sweep.toml").write_text("algoritms = 'fedavg'")
    answer = bench("run", "--from", "sweep.toml", *OFF)
    assert answer.status == 2 and "'algoritms'; did you mean algos" in answer.err


def test_a_corrupt_data_file_ends_with_status_3(bench: Bench) -> None:
    folder = Path("data", "cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cut off")
    answer = bench("run", *SMALL, "--dataset", "cifar10", "--data-root", "data")
    assert answer.status == 3 and "not the official file" in answer.err
    assert "Traceback" not in answer.err


def test_a_damaged_result_stops_the_run_and_is_left_out_of_the_table(bench: Bench) -> None:
    run = json.loads(bench("run", *SMALL, "--json").out)["runs"][0]
    document = Path("runs", run["id"], "run.json")
    whole = document.read_text()
    document.write_text(whole[: len(whole) // 2])
    stopped = bench("run", *SMALL)
    assert stopped.status == 2 and "run.json" in stopped.err and "--force" in stopped.err
    assert document.read_text() == whole[: len(whole) // 2]  # nothing is thrown away
    table = bench("table", "--format", "csv")
    assert table.status == 0 and "run.json" in table.err and "fedavg" not in table.out
    assert bench("run", *SMALL, "--force").status == 0
    assert "fedavg" in bench("table", "--format", "csv").out


def test_an_unreachable_tracking_server_is_said_once_and_nothing_is_lost(tmp_path: Path) -> None:
    words = ("--tracking-uri", "http://127.0.0.1:9", "--json")
    answer = process("run", *SMALL, *words, cwd=tmp_path)
    assert answer.status == 0
    (run,) = json.loads(answer.out)["runs"]
    assert run["status"] == "done" and (tmp_path / "runs" / run["id"] / "run.json").is_file()
    assert answer.err.count("MLflow at http://127.0.0.1:9 is not written any more") == 1
    assert "Traceback" not in answer.err


def test_a_run_that_diverges_fails_and_the_others_go_on(bench: Bench) -> None:
    words = ("--algos", "fedavg,local", "--rounds", "2", "--lr", "1e6", "--set", "weight_decay=1e6", *OFF)
    answer = bench("run", *words, "--json")
    assert answer.status == 1
    runs = json.loads(answer.out)["runs"]
    assert [run["status"] for run in runs] == ["failed", "failed"]
    assert runs[0]["metrics"] == {} and runs[0]["digest"] is None
    assert "diverged" in runs[0]["reason"]
    assert "2 of 2 runs failed" in answer.err and "Traceback" not in answer.err
    again = json.loads(bench("run", *words, "--json").out)["runs"]
    assert [run["status"] for run in again] == ["failed", "failed"]  # tried again, not cached


# What there is


def test_list_names_what_there_is_and_imports_no_plugin(tmp_path: Path, bench: Bench) -> None:
    entries = json.loads(bench("list", "algorithms", "--json").out)
    names = [entry["name"] for entry in entries]
    wanted = "local centralised fedavg fedavg_ft fedprox scaffold ditto fedper fedrep fedbabu fedrod creff fedloge"
    assert set(names) >= set(wanted.split())
    (fedrep,) = (entry for entry in entries if entry["name"] == "fedrep")
    assert fedrep.pop("summary").startswith("FedRep: one representation for all")
    assert fedrep == {"name": "fedrep", "family": "pfl", "tier": "S", "year": 2021}
    assert "FedRep: one representation for all" in bench("list", "algorithms").out
    everything = json.loads(bench("list", "--json").out)
    assert " ".join(everything) == "algorithms sets aliases parts datasets models settings partitions suites"
    assert "resnet8" in everything["models"] and "quick" in everything["settings"]
    code = """
import sys
from bench.command.main import main
try:
    main(["list", "algorithms"], prog_name="bench")
except SystemExit:
    print([name for name in sys.modules if name.startswith("bench.algorithms.") or name == "torch"], file=sys.stderr)
"""
    assert process(cwd=tmp_path, code=code).err == "[]\n"


def test_show_gives_ledger_fields_and_their_documentation(bench: Bench) -> None:
    answer = bench("show", "fedrep")
    for part in ("Client keeps   head", "Departs", "head_epochs = 10", "Epochs on the personal head", "arxiv.org"):
        assert part in answer.out
    described = json.loads(bench("show", "fedrep", "--json").out)
    assert described["kind"] == "algorithms" and described["tier"] == "S" and described["needs"] == ["body"]
    assert described["fields"]["head_epochs"]["default"] == 10


def test_show_knows_datasets_models_settings_and_partitions(bench: Bench) -> None:
    described = json.loads(bench("show", "cifar10", "--json").out)
    assert described["licence"] and described["setting"]["imbalance"] == 10
    shown = bench("show", "inat").out
    assert "model resnet18_64" in shown and "imbalance –" in shown and "120 GB" in shown
    assert json.loads(bench("show", "resnet8", "--json").out)["parameters"]["total"] == 1_227_594
    setting = json.loads(bench("show", "quick", "--json").out)["fields"]
    assert setting["model"]["value"] == "mlp" and "rate" in setting["lr_decay"]["doc"]
    assert "Dirichlet" in bench("show", "dirichlet").out
    both = bench("show", "creff")
    assert both.out.startswith("creff (algorithm)") and "bench show creff --kind settings" in both.err
    assert bench("show", "creff", "--kind", "settings").out.startswith("creff (setting)")
    unknown = bench("show", "fedrap")
    assert unknown.status == 2 and "did you mean fedrep" in unknown.err


@pytest.mark.parametrize("form", ["md", "csv", "latex", "html", "json"])
def test_the_table_is_written_in_every_format(bench: Bench, form: str) -> None:
    bench("run", *SMALL)
    answer = bench("table", "--format", form, "--metric", "last10")
    assert answer.status == 0 and "fedavg" in answer.out and answer.err == ""
    Path("empty").mkdir()
    empty = bench("table", "empty", "--format", form)
    assert empty.status == 0 and "fedavg" not in empty.out


def test_the_table_writes_the_readme_of_a_folder_of_results(bench: Bench) -> None:
    bench("run", *SMALL, "--out", "results")
    assert bench("table", "--out", "results", "--write").status == 0
    readme = Path("results", "README.md").read_text()
    assert "fedavg" in readme and "bench table --out results --write" in readme
    assert bench("table", "--out", "nowhere").status == 2
