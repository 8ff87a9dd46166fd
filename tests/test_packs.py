"""Packs: many runs in three files, the same to the bit as in their folders, whole or not at all."""

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
from click.testing import CliRunner
from pyarrow import parquet

from bench.command.main import main
from bench.face.run import run
from bench.protocol.identity import identify
from bench.results import packed, packing, records
from bench.results.kept import NotKept
from bench.system import durable
from bench.validation.rerun import _bits
from tests import thousands

OFF: dict[str, Any] = {"ray": "off", "tracking_uri": "off"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of three algorithms, and a run that failed."""
    out = tmp_path_factory.mktemp("stored") / "runs"
    models = [each for each in thousands.templates() if each.algorithm in ("fedavg", "fedrep", "centralised")]
    *_, last = thousands.make(6, out, models=models)
    document = json.loads((out / last / "run.json").read_text())
    identity = {**document["identity"], "seed": 7}
    kept = {
        key: document[key]
        for key in (
            "protocol", "algorithm", "call", "label", "preset", "tier", "dataset", "imbalance", "alpha", "setting",
            "overrides", "engine", "precision", "device", "versions", "hardware", "commit", "started", "finished",
        )
    }  # fmt: skip
    records.fail(out, identify(identity), {**kept, "identity": identity, "seed": 7}, "it diverged")
    return out


def runs(out: Path) -> list[records.Record]:
    found, damaged = records.read_all(out)
    assert not damaged, damaged
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bench(*words: object) -> str:
    """Run the command, and give what it says on both streams."""
    answer = CliRunner().invoke(main, [str(word) for word in words])
    return f"{answer.exit_code}\n{answer.output}"


@pytest.fixture
def pack(stored: Path, tmp_path: Path) -> Path:
    packing.pack(runs(stored), tmp_path / "in" / "pack")
    return tmp_path / "in" / "pack"


def test_runs_come_back_bit_for_bit(stored: Path, pack: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in pack.iterdir()) == sorted(packed.FILES)
    packing.unpack(pack, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(stored) and len(contents(stored)) == 6 * 4 + 1


def test_both_readers_give_the_same(stored: Path, pack: Path) -> None:
    for one, other in zip(runs(stored), runs(pack), strict=True):
        assert one.document == other.document and other.pack == pack and other.folder == pack / one.id
        if one.status == "done":
            assert one.rounds().equals(other.rounds()) and one.counts().equals(other.counts())
            assert one.predictions().equals(other.predictions()) and one.recompute() == other.recompute()
    assert [each.id for each in runs(pack.parent)] == [each.id for each in runs(stored)]


def test_the_same_runs_give_the_same_bytes_in_any_order_and_number(stored: Path, pack: Path, tmp_path: Path) -> None:
    known = runs(stored)
    packing.pack(reversed(known), tmp_path / "reversed")
    for part in (known[4:], known[:2], known[1:5]):
        packing.pack(part, tmp_path / "parts")
    packing.pack(runs(pack), tmp_path / "again")
    assert contents(pack) == contents(tmp_path / "reversed") == contents(tmp_path / "parts")
    assert contents(pack) == contents(tmp_path / "again")


def test_one_run_is_read_without_the_others(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_ROWS", 10_000)
    packing.pack(runs(stored), tmp_path / "pack")
    file = parquet.ParquetFile(tmp_path / "pack" / "counts.parquet")
    assert file.metadata.num_row_groups > 2
    whole = [set(file.read_row_group(k)["run"].to_pylist()) for k in range(file.metadata.num_row_groups)]
    assert sum(map(len, whole)) == 6  # no run lies in two
    assert all(map(packing.same, runs(stored), runs(tmp_path / "pack")))


def test_a_table_of_folders_is_that_of_a_pack(stored: Path, pack: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "both")
    shutil.copytree(pack, tmp_path / "both" / "pack")
    for words in (("table", "--format", "md"), ("table", "--format", "json"), ("compare", "fedavg", "fedrep")):
        told = {bench(*words, "--out", out) for out in (stored, pack, pack.parent, tmp_path / "both")}
        told = {text.replace('"submission": "pack"', '"submission": null') for text in told}
        assert len(told) == 1 and told.pop()[0] in "01"


def rewritten(path: Path, change: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    table = parquet.read_table(path)
    parquet.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def column(table: pyarrow.Table, name: str, change: Callable[[list[object]], list[object]]) -> pyarrow.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pyarrow.array(change(table[name].to_pylist()), table.schema.field(name).type))


def first_plus_one(cells: list[object]) -> list[object]:
    return [int(str(cells[0])) + 1, *cells[1:]]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "a count": (
        lambda pack: rewritten(pack / "counts.parquet", lambda table: column(table, "correct", first_plus_one)),
        "the counts of run",
        6,
    ),
    "a prediction": (
        lambda pack: rewritten(pack / "predictions.parquet", lambda table: column(table, "count", first_plus_one)),
        "the predictions of run",
        6,
    ),
    "a document": (
        lambda pack: rewritten(
            pack / "runs.parquet",
            lambda table: column(
                table, "document", lambda cells: [str(cells[0]).replace("digits", "digit5", 1), *cells[1:]]
            ),
        ),
        "the document of run",
        0,
    ),
    "a run taken out": (
        lambda pack: rewritten(pack / "runs.parquet", lambda table: table.slice(1)),
        "has not the runs that it was written with",
        0,
    ),
    "counts cut off": (lambda pack: cut(pack / "counts.parquet"), "counts.parquet cannot be read", 1),
    "runs cut off": (lambda pack: cut(pack / "runs.parquet"), "runs.parquet cannot be read", 0),
    "no predictions": (lambda pack: (pack / "predictions.parquet").unlink(), "predictions.parquet cannot be read", 0),
    "other bytes": (
        lambda pack: rewritten(pack / "counts.parquet", lambda table: table),
        "counts.parquet is not the file that runs.parquet was written with",
        7,
    ),
    "no pack at all": (
        lambda pack: parquet.write_table(pyarrow.table({"id": [1]}), pack / "runs.parquet"),
        "cannot",
        0,
    ),
    "a later format": (
        lambda pack: parquet.write_table(
            parquet.read_table(pack / "runs.parquet").replace_schema_metadata({packed.NOTE: '{"format": 2}'}),
            pack / "runs.parquet",
        ),
        "update bench",
        0,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_what_is_whole_is_kept(pack: Path, kind: str) -> None:
    damage, told, kept = DAMAGE[kind]
    damage(pack)
    found, damaged = records.read_all(pack.parent)
    assert len(found) == kept and any(told in sentence for sentence in damaged) and "\n" not in damaged[0]
    assert str(pack) in damaged[0] and all("delete" not in sentence for sentence in damaged)
    assert any(told in line for line in bench("table", "--out", pack.parent).splitlines())


def test_files_of_two_packs_are_not_taken_for_one(stored: Path, pack: Path, tmp_path: Path) -> None:
    packing.pack(runs(stored)[:5], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "counts.parquet", pack)
    found, damaged = records.read_all(pack)
    assert damaged and "of run" in damaged[0]
    done = sum(each.status == "done" for each in runs(stored)[:5])
    assert sum(each.status == "done" for each in found) <= done < 6


def test_one_run_in_two_places_is_one_and_two_results_are_damage(stored: Path, pack: Path) -> None:
    one = runs(stored)[0]
    there = pack.parent / one.id
    shutil.copytree(stored / one.id, there)
    assert len(runs(pack.parent)) == 7
    text = (there / "run.json").read_text()
    (there / "run.json").write_text(text.replace('"commit": "', '"commit": "0', 1))
    found, damaged = records.read_all(pack.parent)
    assert len(found) == 6 and damaged == [
        f"run {one.id} is another result in each of {there} and {pack}; remove all but the right one"
    ]
    with pytest.raises(packing.NotPackable, match=f"run {one.id} of .* differs from that of"):
        packing.pack([records.read(there)], pack)
    with pytest.raises(packing.NotPackable, match="another result"):
        packing.unpack(pack, pack.parent)


def test_a_pack_is_there_whole_or_as_it_was_whenever_the_writer_is_killed(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, place = runs(stored), tmp_path / "pack"
    left: list[Path] = []
    packing.pack(known[:3], place)
    packing.pack(known, tmp_path / "whole")

    def watched(call: Callable[..., None]) -> Callable[..., None]:
        def step(*words: object) -> None:
            left.append(Path(shutil.copytree(place, tmp_path / f"killed {len(left)}")))
            if call is durable.write:
                (left[-1] / Path(str(words[0])).name).write_bytes(b"half")
            call(*words)

        return step

    with monkeypatch.context() as patch:
        for module, name in ((durable, "write"), (durable, "flush"), (os, "replace")):
            patch.setattr(module, name, watched(getattr(module, name)))
        packing.pack(known, place)
    numbers = []
    for folder in left:
        found = runs(folder)
        whole = [packing.same(one, other) for one, other in zip(found, known, strict=False)]
        packing.pack(known[:1], folder)  # whoever comes next tidies up
        assert all(whole) and [each.id for each in runs(folder)] == [each.id for each in found]
        packing.pack(known, folder)
        assert contents(folder).items() >= contents(tmp_path / "whole").items() and len(runs(folder)) == 7
        numbers.append(len(found))
    assert numbers == sorted(numbers) and set(numbers) == {3, 7} and contents(place) == contents(tmp_path / "whole")


def test_a_folder_that_is_no_pack_is_left_alone(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    told = bench("pack", stored, "--to", tmp_path / "mine")
    assert told.startswith("2") and "is there and no pack" in told and len(told.splitlines()) == 2
    assert contents(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_the_command_packs_removes_and_unpacks(stored: Path, tmp_path: Path) -> None:
    out, to = tmp_path / "runs", tmp_path / "results" / "pack"
    shutil.copytree(stored, out)
    (out / ("0" * 12)).mkdir()
    (old,) = (path for path in (Path(__file__).parent / "formats" / "2").iterdir() if path.is_dir())
    shutil.copytree(old, out / old.name)
    told = bench("pack", out, "--to", to, "--remove")
    assert told.startswith("0") and "000000000000 is unfinished" in told
    assert f"{old.name} stays a folder: an earlier version of bench wrote it" in told and "removed 7 folders" in told
    assert sorted(path.name for path in out.iterdir()) == ["0" * 12, old.name]
    assert bench("pack", to, "--unpack", "--to", tmp_path / "back").startswith("0")
    assert contents(tmp_path / "back").items() >= contents(stored).items()
    assert "it has no runs.parquet" in bench("pack", stored, "--unpack", "--to", tmp_path / "back")


def test_what_the_pack_does_not_give_back_is_not_removed(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(stored, out)
    monkeypatch.setattr(packing, "same", lambda one, other: one.id != runs(stored)[0].id)
    bench("pack", out, "--to", tmp_path / "pack", "--remove")
    assert [path.name for path in out.iterdir()] == [runs(stored)[0].id]


def test_a_site_of_a_pack_carries_it_as_one_of_folders_does(stored: Path, pack: Path, tmp_path: Path) -> None:
    for out, site in ((stored, "folders"), (pack, "pack")):
        assert bench("site", out, "--to", tmp_path / site).startswith("0\n")
    of_pack, of_folders = contents(tmp_path / "pack"), contents(tmp_path / "folders")
    assert {path: of_pack[path] for path in of_pack if path.startswith("data/")} == {
        f"data/{path}": content for path, content in contents(pack).items()
    }
    assert of_pack == of_folders


def test_compare_takes_a_folder_with_a_pack_for_a_folder(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pack.parent.parent)
    told = bench("compare", pack.parent.name, "fedavg", "centralised")
    assert told.startswith("0\n") and "centralised" in told


def test_what_lies_in_a_pack_is_not_cleaned_and_that_is_said(pack: Path) -> None:
    before = contents(pack)
    told = bench("clean", pack.parent, "--failed", "--yes")
    assert told.startswith("0\n") and "0 runs" in told and "removed" not in told
    assert "7 runs lie in packs, which stay as they are; bench pack --unpack takes one apart" in told
    assert contents(pack) == before


def test_a_pack_has_no_kept_models_and_says_so(stored: Path, tmp_path: Path) -> None:
    (first, *_) = runs(stored)
    document = json.loads((first.folder / "run.json").read_text())
    shutil.copytree(first.folder, tmp_path / "runs" / first.id)
    listed = {**document, "models": {"server.safetensors": "0" * 64}}
    (tmp_path / "runs" / first.id / "run.json").write_text(json.dumps(listed))
    packing.pack(runs(tmp_path / "runs"), tmp_path / "in" / "pack")
    with pytest.raises(NotKept, match="lies in a pack without its models"):
        runs(tmp_path / "in")[0].model("generic")


def test_a_rerun_of_a_packed_run_is_compared_whatever_the_order_of_its_curves(tmp_path: Path) -> None:
    """Adapted models are tested in the last round only: in a folder their columns come last, in a pack they do not."""
    (record,) = run("fedavg_ft", rounds=2, clients=6, out=tmp_path / "runs", **OFF)
    packing.pack([record], tmp_path / "pack")
    (of_pack,) = runs(tmp_path / "pack")
    assert list(of_pack.rounds()) != list(record.rounds()), "else this shows nothing"
    assert _bits(of_pack, record) == []
    assert _bits(of_pack, run("fedavg_ft", seeds=[1], rounds=2, clients=6, out=tmp_path / "o", **OFF)[0])[-1:] == [
        "the curves are others"
    ]


def test_a_rerun_sees_that_other_bytes_were_sent_by_an_evaluation(tmp_path: Path) -> None:
    (record,) = run("fedavg", rounds=2, clients=6, out=tmp_path / "runs", **OFF)
    assert record.sent and _bits(record, record) == []
    less = replace(record, sent={round: amount - 1 for round, amount in record.sent.items()})
    assert _bits(less, record) == ["the bytes by each evaluation are others"]
    assert _bits(replace(record, sent={}), record) == []  # as runs were stored before
