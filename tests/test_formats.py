"""Results of earlier formats, two real ones: read, counted as finished, and what they lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.results import records
from bench.results.columns import columns
from bench.results.layout import remarks
from bench.results.leaderboard import leaderboards
from bench.results.record import Lacking, Record
from bench.results.table import FORMATS, render
from bench.validation.inspection import inspect

STORED = Path(__file__).parent / "formats"


def stored(format: int) -> Record:
    (folder,) = (STORED / str(format)).iterdir()
    return records.read(folder)


@pytest.mark.parametrize("format", [1, 2])
def test_an_earlier_result_is_read_and_says_what_it_lacks(format: int) -> None:
    record = stored(format)
    assert record.format == format and record.status == "done" and record.pack is None
    assert "counts by predicted class" in record.lacks
    assert records.status(STORED / str(format), record.id) == "done"  # it is never run again
    for ask in (record.predictions, lambda: record.confusion("generic")):
        with pytest.raises(Lacking, match=f"run {record.id} is of format {format}, which has no predictions"):
            ask()


def test_all_that_format_2_tells_is_what_it_told() -> None:
    record = stored(2)
    assert record.metrics == record.document["metrics"] and record.cost == record.document["cost"]
    assert record.recompute().items() <= record.metrics.items()
    counts = record.counts()
    assert list(counts.columns) == ["round", "model", "client", "class", "correct", "total", "drawn"]
    assert counts["round"].nunique() == len(record.rounds()) == 30
    assert set(record.rounds()) - {"round"} == {key for key in record.metrics if "@" not in key}
    assert inspect(record.folder, Path("nowhere")).problems == []


def test_of_format_1_stands_nowhere_what_is_counted_otherwise_now() -> None:
    record = stored(1)
    assert record.metrics["generic"] == 0.1512 and record.document["metrics"]["personal"] > 0.36  # type: ignore[index]
    assert all(key.startswith("generic") for key in record.metrics)
    assert set(record.rounds()) == {"round", "generic", "generic.many", "generic.medium", "generic.few"}
    counts = record.counts()
    assert set(counts["model"]) == {"generic"} and set(counts["drawn"]) == {-1} and counts["total"].sum() == 10_000
    assert record.recompute()["generic"] == 0.1512 and record.recompute()["personal"] is None
    assert "samples" not in record.cost and "train_flops" not in record.cost and record.cost["bytes_up"] == 117849024
    (board,) = leaderboards([record])
    titles = [column.title for column in columns(board)]
    assert titles[0] == "generic" and not {"personal", "balanced", "samples", "k samples"} & set(titles)
    assert any("MB" in title for title in titles)


def test_what_earlier_results_lack_is_said_below_the_tables(tmp_path: Path) -> None:
    one, two = stored(1), stored(2)
    said = {line for board in leaderboards([one, two]) for line in remarks(board)}
    assert "1 run of format 2 has no counts by predicted class." in said
    assert any(
        line.startswith("1 run of format 1 has no counts by predicted class, personal numbers,") for line in said
    )
    for form in set(FORMATS) - {"csv", "long"}:
        assert "counts by predicted class" in render(leaderboards([two]), form)


def test_no_earlier_result_is_to_be_deleted(tmp_path: Path) -> None:
    for format in (1, 2):
        folder = Path(shutil.copytree(stored(format).folder, tmp_path / stored(format).id))
        (folder / "rounds.parquet").write_bytes(b"PAR1")
        with pytest.raises(records.DamagedResult, match=r"rounds\.parquet is not the file"):
            records.read(folder)
        document = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**document, "format": 4}))
        with pytest.raises(records.DamagedResult, match="so update bench") as error:
            records.read(folder)
        assert "delete" not in str(error.value) and "--force" not in str(error.value)


def test_validation_says_which_format_it_cannot_judge() -> None:
    (problem,) = inspect(stored(1).folder, Path("nowhere")).problems
    assert "format is 1, which this version reads and cannot validate" in str(problem)
    assert "of format 2, without counts by predicted class" in inspect(stored(2).folder, Path("nowhere")).notes
