"""A stranger's folder of results: one sentence names it, and all else goes on, in little time and memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bench.contract import toy
from bench.protocol.identity import identify
from bench.protocol.presets import parse_presets
from bench.protocol.settings import BadConfig
from bench.results import packed, packing, records, storage, tables
from bench.results.content import digest
from bench.results.record import DamagedResult
from bench.sweep import forecast, journal
from bench.system import reading
from bench.validation import expected
from bench.validation.beside import models, strange
from bench.validation.inspection import inspect
from tests.test_command import Bench
from tests.test_command import bench as bench

PUBLISHED = Path(__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two methods and two seeds."""
    out = tmp_path_factory.mktemp("whole")
    for record in packed.read(PUBLISHED / "digits")[0]:
        if record.algorithm in ("fedavg", "fedrep") and record.seed < 2:
            names = (*record.companions.values(), "run.json")
            storage.place(out / record.id, {name: records.file_of(record, name) for name in names})
    return out


@pytest.fixture
def out(four: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "results"))


@pytest.fixture
def bad(out: Path) -> Path:
    """The folder that is tampered with, of four."""
    return sorted(path for path in out.iterdir())[0]


def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
    return content


def equal_rows(rows: int) -> pyarrow.Table:
    """Rows of counts that are all alike, which take a few bytes in a file."""
    columns: dict[str, Any] = {
        name: pyarrow.repeat(pyarrow.scalar(1, pyarrow.int32()), rows) for name in tables.COUNT_COLUMNS
    }
    return pyarrow.table({**columns, "model": pyarrow.DictionaryArray.from_arrays(columns["round"], ["a", "personal"])})


def many_rows(folder: Path) -> None:
    """More than 30 evaluations of 20 clients can have; 40 million of them take as little room."""
    parquet.write_table(equal_rows(500_000), folder / "counts.parquet")
    assert (folder / "counts.parquet").stat().st_size < 20_000


def long_texts(folder: Path) -> None:
    """A name of a megabyte, which stands there once, in each of 2,000 rows."""
    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 2_000)
    names = pyarrow.DictionaryArray.from_arrays(indices, ["m" * 2**20])
    table = equal_rows(2_000).set_column(1, "model", names)
    parquet.write_table(table, folder / "counts.parquet", store_schema=False)  # which says nothing of dictionaries


def lists(folder: Path) -> None:
    """One row, which holds a list of millions."""
    millions = pyarrow.ListArray.from_arrays(
        [0, 2_000_000], pyarrow.repeat(pyarrow.scalar(1, pyarrow.int32()), 2_000_000)
    )
    parquet.write_table(pyarrow.table({"round": millions}), folder / "counts.parquet")


def many_groups(folder: Path) -> None:
    with parquet.ParquetWriter(folder / "counts.parquet", equal_rows(1).schema) as writer:
        for _ in range(1500):
            writer.write_table(equal_rows(1))


def replaced(name: str, by: Callable[[Path], object]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return tamper


def hole(path: Path) -> None:
    """A terabyte that takes nothing from the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def linked_folder(folder: Path) -> None:
    elsewhere = folder.parents[1] / folder.name
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)


def longer(folder: Path) -> None:
    text = json.dumps({**document(folder), "class_counts": [1] * 2_000_000})
    (folder / "run.json").write_text(text)


def repeated(folder: Path) -> None:
    """A hundred thousand keys, the last of which stands there twice."""
    keys = "".join(f'"{k}": 0, ' for k in range(60_000))
    (folder / "run.json").write_text("{" + keys + '"x": 0, "x": 1}')


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nested": (
        lambda folder: (folder / "run.json").write_text(
            (folder / "run.json").read_text().rstrip()[:-1] + ', "x": ' + "[" * 200_000 + "]" * 200_000 + "}"
        ),
        "run.json cannot be read: maximum recursion depth",
    ),
    "long": (longer, "run.json cannot be read: more than 1,048,576 bytes would come out of it"),
    "repeated": (repeated, "key 'x' stands there twice"),
    "a pipe": (replaced("run.json", os.mkfifo), "run.json cannot be read: it is a pipe or a device, and no file"),
    "no end": (
        replaced("run.json", lambda path: path.symlink_to("/dev/zero")),
        "run.json cannot be read: it is a link, and no file of its own",
    ),
    "a link": (
        replaced("counts.parquet", lambda path: path.symlink_to("/etc/hostname")),
        "counts.parquet cannot be read: it is a link, and no file of its own",
    ),
    "a piped table": (replaced("predictions.parquet", os.mkfifo), "predictions.parquet cannot be read: it is a pipe"),
    "a folder": (replaced("run.json", Path.mkdir), "run.json cannot be read: Is a directory"),
    "a linked folder": (linked_folder, "run.json cannot be read: its folder is a link, and no folder of its own"),
    "many rows": (many_rows, "counts.parquet cannot be read: it has 500,000 rows, and can have 403,200 at most"),
    "long texts": (long_texts, "counts.parquet cannot be read: its column model holds texts of 2,097,152,000 bytes"),
    "lists": (lists, "counts.parquet cannot be read: its column round.list.element holds lists"),
    "many groups": (many_groups, "counts.parquet cannot be read: it has 7 columns in 1,500 row groups"),
    "a hole": (
        replaced("counts.parquet", hole),
        "counts.parquet cannot be read: more than 268,435,456 bytes would come out of it",
    ),
}


VERBS = (
    ("table",), ("compare", "fedavg", "fedrep"), ("status",), ("submit",),
    ("clean", "--failed"),
)  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_what_reads_results_names_a_strange_folder_and_goes_on(kind: str, out: Path, bad: Path, bench: Bench) -> None:
    tamper, told = STRANGE[kind]
    tamper(bad)
    before = pyarrow.default_memory_pool().max_memory()
    found, damaged = records.read_all(out)
    assert pyarrow.default_memory_pool().max_memory() - before < 64 << 20
    assert len(found) == 3 and len(damaged) == 1
    assert damaged[0].startswith(str(bad)) and told in damaged[0] and "\n" not in damaged[0]
    for verb in (("table",), ("submit",)) if kind != "nested" else VERBS:
        answer = bench(*verb, "--out", out)
        assert answer.status == (2 if verb[0] == "submit" else 0), answer.err
        assert verb[0] == "status" or [line for line in answer.err.splitlines() if told in line], (verb, answer.err)
    assert not Path("submission.zip").exists()


def packed_rows(pack: Path) -> None:
    many = equal_rows(100_000).add_column(0, "run", pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 100_000))
    parquet.write_table(many, pack / "counts.parquet")


STRANGE_PACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (replaced("counts.parquet", os.mkfifo), "counts.parquet cannot be read: it is a pipe"),
    "a link": (replaced("counts.parquet", lambda path: path.symlink_to("/dev/zero")), "counts.parquet cannot be read"),
    "no runs": (replaced("runs.parquet", lambda path: path.symlink_to("/etc/hostname")), "it is a link"),
    "a linked pack": (linked_folder, "is a link, and no folder of its own; put the pack itself there"),
    "many rows": (packed_rows, "counts.parquet cannot be read (it has 100,000 rows of "),
}


@pytest.mark.parametrize("kind", STRANGE_PACKS)
def test_what_reads_packs_names_a_strange_one_and_goes_on(
    kind: str, four: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_ROWS", 99_999)
    found, _ = records.read_all(four)
    out = tmp_path / "results"
    for place, run in enumerate(found[:2]):
        packing.pack([run], out / f"pack-{place}")
    tamper, told = STRANGE_PACKS[kind]
    tamper(out / "pack-0")
    runs, damaged = records.read_all(out)
    assert [run.id for run in runs] == [found[1].id] and told in damaged[0] and len(damaged) == 1
    assert str(out / "pack-0") in damaged[0]
    for verb in (("table",), ("status",)):
        assert bench(*verb, "--out", out).status == 0


def test_documents_of_a_pack_that_would_fill_the_memory_are_refused(four: Path, tmp_path: Path) -> None:
    packing.pack(records.read_all(four)[0], pack := tmp_path / "pack")
    rows = parquet.read_table(pack / "runs.parquet")
    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 2_000)
    long = pyarrow.DictionaryArray.from_arrays(indices, ["d" * 2**20])
    columns = {"id": [f"{k:012x}" for k in range(2_000)], "document": long, "sha256": ["0" * 64] * 2_000}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(rows.schema.metadata), pack / "runs.parquet")
    with pytest.raises(DamagedResult, match="its column document holds texts of 2,097,152,000 bytes"):
        packed.opened(pack)


def test_a_table_has_as_many_rows_as_the_run_can_have_and_no_more(bad: Path) -> None:
    record = records.read(bad)
    rounds = record.table("rounds").to_pylist()
    assert len(rounds) == 30
    table = tables.curves([*rounds, {**rounds[-1], "round": 31}])
    (bad / "rounds.parquet").write_bytes(storage.parquet(table))
    told = {**record.document, "tables": {**record.tables, "rounds": digest(table)}}
    (bad / "run.json").write_text(json.dumps(told))
    with pytest.raises(DamagedResult, match=r"rounds\.parquet cannot be read: it has 31 rows, and can have 30 at most"):
        records.read(bad)


def test_notes_that_are_a_link_are_shown_nowhere(out: Path, bench: Bench) -> None:
    (out / "NOTES.md").symlink_to("/etc/hostname")
    for verb in (("table", "--write"), ("site", "--to", "pages")):
        answer = bench(*verb, "--out", out)
        assert answer.status == 2 and "NOTES.md cannot be read: it is a link, and no file of its own" in answer.err
    assert not (out / "README.md").exists()
    (out / "NOTES.md").unlink()
    os.mkfifo(out / "NOTES.md")
    assert "it is a pipe" in bench("table", "--write", "--out", out).err


def test_a_folder_of_results_may_be_a_link_where_the_user_names_it(out: Path, tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "disk").symlink_to(out)
    assert len(records.read_all(tmp_path / "disk")[0]) == 4
    packing.pack(records.read_all(out)[0], tmp_path / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "pack")
    assert len(records.read_all(tmp_path / "link")[0]) == 4 and bench("table", "--out", "link").status == 0


JOURNALS = {
    "nested": b"[" * 200_000,
    "a list": b'["format", 1]',
    "other runs": b'{"format": 1, "pid": 1, "host": "h", "born": null, "began": 1.0, "command": "c", "runs": {"../x": '
    b'{"title": "t", "cell": "c", "rounds": 1}}}',
    "no time": b'{"format": 1, "pid": 1, "host": "h", "born": null, "began": 1e300, "command": "c", "runs": {}}',
    "no process": b'{"format": 1, "pid": -1, "host": "h", "born": null, "began": 1.0, "command": "c", "runs": {}}',
    "no text": b'{"format": 1, "pid": 1, "host": ["h"], "born": null, "began": 1.0, "command": "c", "runs": {}}',
}


@pytest.mark.parametrize("kind", [*JOURNALS, "a pipe", "a link"])
def test_a_strange_journal_is_passed_over(kind: str, out: Path, bench: Bench) -> None:
    (out / "sweeps").mkdir()
    file = out / "sweeps" / "1-1.json"
    if kind in JOURNALS:
        file.write_bytes(JOURNALS[kind])
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    assert journal.read(out) == []
    assert bench("status", "--out", out).status == 0


def test_strange_progress_is_no_progress(out: Path) -> None:
    from bench.command.status import _latest

    run = out / "0123456789ab"
    run.mkdir()
    file = run / "progress.jsonl"
    honest = {"round": 1, "rounds": 2, "seconds": 0.5, "metrics": {"generic": 0.5, "personal": None}}
    file.write_text(json.dumps(honest) + "\n")
    assert _latest(out, run.name) is not None
    for key, value in (("round", "1"), ("seconds", None), ("metrics", {"generic": "x"}), ("metrics", [1])):
        file.write_text(json.dumps({**honest, key: value}) + "\n")
        assert _latest(out, run.name) is None, (key, value)
    file.write_text("[" * 200_000 + "\n")
    assert _latest(out, run.name) is None
    file.unlink()
    os.mkfifo(file)
    assert _latest(out, run.name) is None


def test_a_forecast_passes_over_what_is_strange(out: Path, bad: Path) -> None:
    record = records.read(sorted(out.iterdir())[1])
    key = forecast._cell_of_document(record.document)
    (bad / "run.json").write_text("[1]")
    here, elsewhere = forecast.measured(out, [key])
    assert {**here, **elsewhere}.keys() == {key}
    (bad / "run.json").unlink()
    os.mkfifo(bad / "run.json")
    here, elsewhere = forecast.measured(out, [key])
    assert {**here, **elsewhere}.keys() == {key}


def test_a_strange_preset_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    file = tmp_path / "presets" / "mine.toml"
    file.write_text("x = " + "[" * 10_000)
    with pytest.raises(BadConfig, match=r"mine\.toml cannot be read as a preset"):
        parse_presets("mine", tmp_path)
    file.write_bytes(b"#" * (reading.TEXT + 1))
    with pytest.raises(BadConfig, match=r"mine\.toml cannot be read as a preset: more than 16,777,216 bytes"):
        parse_presets("mine", tmp_path)


def changed(folder: Path, change: dict[str, Any]) -> str:
    """Write a run of another setting, whose name and identity agree, and say what inspection has to say of it."""
    told = document(folder)
    for setting in (told["setting"], told["identity"]["setting"], told["overrides"]):
        setting.update(change)
    told["clients"] = change.get("clients", told["clients"])
    told["id"] = identify(told["identity"])
    here = folder.rename(folder.parent / told["id"])
    (here / "run.json").write_text(json.dumps(told))
    found = inspect(here, Path("nowhere"))
    return "\n".join([*map(str, found.problems), *found.notes])


@pytest.mark.parametrize("rounds", [10**9, 10**9 + 0.0, str(10**9)])
def test_a_thousand_million_rounds_are_none_in_any_spelling(rounds: object, bad: Path) -> None:
    assert "identity.setting.rounds is " in (said := changed(bad, {"rounds": rounds})) and "from 1 to 100,000" in said


def test_ten_million_clients_are_none(bad: Path) -> None:
    assert "identity.setting.clients is 10000000, and must be a whole number from 1 to" in changed(
        bad, {"clients": 10**7}
    )


def test_ten_million_epochs_are_none(bad: Path) -> None:
    told = document(bad)
    told["identity"]["algorithm"]["name"] = "fedavg_ft"
    told["identity"]["algorithm"]["fields"] = {"finetune_epochs": 10**7}
    told["identity"]["algorithm"]["version"] = 1
    told["id"] = identify(told["identity"])
    here = bad.rename(bad.parent / told["id"])
    (here / "run.json").write_text(json.dumps(told))
    said = "\n".join(map(str, inspect(here, Path("nowhere")).problems))
    assert "identity.algorithm.fields.finetune_epochs is 10000000, and must be a whole number from 0 to 1,000" in said


def test_the_largest_setting_is_looked_at_without_its_cohorts(bad: Path) -> None:
    said = changed(bad, {"rounds": 100_000, "clients": 100_000})
    assert "the split is not made anew, nor are cohorts, as there are too many clients and rounds" in said


def test_many_rounds_of_many_clients_are_counted() -> None:
    setting = replace(toy.SETTING, rounds=500, clients=1000, participation=0.04)
    assert expected.countable(setting, 1000) and expected.countable(replace(setting, rounds=5000), 1000)
    drawn = expected.drawn(setting, 1000, 0)
    assert drawn.times.sum() == 500 * 40 and (drawn.times > 0).all() and drawn.first.max() <= 500
    assert drawn.times.nbytes + drawn.first.nbytes == 16_000


BESIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "NOTES.md": (lambda path: path.symlink_to("/etc/hostname"), "NOTES.md: is a link, and no part of these results"),
    "verified.json": (lambda path: path.symlink_to("/dev/zero"), "verified.json: is a link"),
    ".gitattributes": (lambda path: path.write_text("* -diff"), ".gitattributes: does not belong into a folder of"),
    "README.md": (os.mkfifo, "README.md: cannot be read: it is a pipe"),
    "0123456789ab": (lambda path: path.symlink_to("/etc"), "0123456789ab: is a link"),
    "presets/page.html": (Path.touch, "presets/page.html: does not belong into presets, as it is no preset, which is"),
    "presets/mine.toml": (lambda path: path.write_text("x = 1"), "presets/mine.toml: does not belong into presets, as"),
    "presets/etc": (lambda path: path.symlink_to("/etc"), "presets/etc: does not belong into presets, as it is a link"),
    "tuning/program": (lambda path: path.write_bytes(b"\x7fELF"), "tuning/program: does not belong into tuning"),
    "tuning/0123456789ab/trials.jsonl": (os.mkfifo, "trials.jsonl: cannot be read as a study's: "),
    "tuning/0123456789ab/study.json": (lambda path: path.write_text("[" * 10**5), "study.json: cannot be read as a"),
    "tuning/0123456789ab/other": (Path.touch, "other: cannot be read as a study's: a study has no such file"),
    "studies/program": (Path.touch, "studies/program: does not belong into studies, as it is neither a text"),
    "studies/long.md": (
        lambda path: path.write_bytes(b" " * (reading.TEXT + 1)),
        "studies/long.md: does not belong into studies, as it cannot be read: more than 16,777,216 bytes",
    ),
    "pack/plugins/mine.so": (Path.touch, "pack/plugins/mine.so: does not belong into plug-ins, as it is no file of"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_runs_is_known_or_named(name: str, out: Path) -> None:
    make, told = BESIDE[name]
    packing.pack(records.read_all(out)[0][:1], out / "pack")
    assert list(strange(out)) == []
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    make(out / name)
    (problem,) = strange(out)
    assert told in str(problem)


def test_what_bench_tune_and_we_ourselves_left_is_known(out: Path) -> None:
    assert list(strange(PUBLISHED)) == []
    (out / "presets").mkdir()
    (out / "presets" / "tuned.toml").write_text('name = "tuned"\n\n[algorithms."fedavg"]\ncall = "fedavg"\nlr = 0.1\n')
    study = out / "tuning" / "0123456789ab"
    study.mkdir(parents=True)
    (study / "study.json").write_text("{}")
    (study / "trials.jsonl").write_text("")
    (out / "studies").mkdir()
    (out / "studies" / "personal.md").write_text("Nothing.")
    assert list(strange(out)) == []


def test_models_of_a_run_are_files_that_it_lists(bad: Path) -> None:
    record = records.read(bad)
    listed = replace(record, models={"server.safetensors": "0" * 64, "clients-00000.safetensors": "0" * 64})
    (bad / "models").mkdir()
    (bad / "models" / "server.safetensors").write_bytes(b"")
    assert list(models(listed)) == []
    (bad / "models" / "clients-00000.safetensors").symlink_to("/etc/hostname")
    (bad / "models" / "page.html").touch()
    said = [" ".join(each) for each in models(listed)]
    assert said == [
        "models/clients-00000.safetensors is a link or a folder, and no file of its own",
        "models/page.html is not listed in run.json; remove it",
    ]
    (bad / "models").rename(bad.parent / "elsewhere")
    (bad / "models").symlink_to(bad.parent / "elsewhere")
    assert [*models(listed)] == [("models", "is a link, and no folder of its own")]


def test_validation_names_all_that_is_strange_and_goes_on(out: Path, bad: Path, bench: Bench) -> None:
    many_rows(bad)
    (out / "NOTES.md").symlink_to("/etc/hostname")
    (out / ".gitattributes").touch()
    (out / "README.md").write_text("`bench table --out results --write`")
    answer = bench("validate", out)
    assert answer.status == 1 and "Traceback" not in answer.err and "4 finished runs" in answer.out
    lines = answer.out.splitlines()
    table = "README.md: cannot be made of these folders (DamagedResult: "
    rows = f"{bad.name}/counts.parquet: cannot be read: it has 500,000 rows"
    for told in (rows, table, "NOTES.md: is a link", ".gitattributes: does not"):
        assert sum(line.startswith(told) for line in lines) == 1, answer.out
    assert len(lines) == 5
