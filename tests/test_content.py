"""A table's digest: the same however it is written, and another as soon as it says something else."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bench.results.content import digest

TABLE = pyarrow.table(
    {
        "round": pyarrow.array([1, 2, 300], "int64"),
        "model": pyarrow.array(["b", "a", "b"], "string"),
        "personal": pyarrow.array([0.5, None, 1.0], "float64"),
        "unseen": pyarrow.array([None, None, None], "float64"),
    }
)


def _put(name: str, cells: list[Any], kind: str, table: pyarrow.Table = TABLE) -> pyarrow.Table:
    return table.set_column(table.column_names.index(name), name, pyarrow.array(cells, kind))


def _stored(table: pyarrow.Table, **how: Any) -> pyarrow.Table:
    sink = io.BytesIO()
    parquet.write_table(table, sink, **how)
    return parquet.read_table(sink)


def test_the_digest_is_that_of_every_result_ever_written() -> None:
    assert digest(TABLE) == "e4702665582827fe143b5979ce085314b07139e6f1aa12ee20090796d8fce63d"


@pytest.mark.parametrize(
    "other",
    [
        lambda: _stored(TABLE, compression="zstd"),
        lambda: _stored(TABLE, compression="none", use_dictionary=False, row_group_size=1, version="1.0"),
        lambda: _stored(TABLE, column_encoding={"round": "DELTA_BINARY_PACKED"}, use_dictionary=["model"]),
        lambda: TABLE.select(["unseen", "model", "round", "personal"]),
        lambda: TABLE.drop_columns("unseen"),
        lambda: _put("unseen", [None] * 3, "string"),
        lambda: TABLE.append_column("generic", pyarrow.nulls(3)),
        lambda: _put("round", [1, 2, 300], "uint16"),
        lambda: _put("model", ["b", "a", "b"], "large_string"),
        lambda: TABLE.set_column(1, "model", pyarrow.array(["b", "a", "b"]).dictionary_encode()),
        lambda: TABLE.set_column(
            1, "model", pyarrow.DictionaryArray.from_arrays(pyarrow.array([2, 0, 2]), pyarrow.array(["a", "no", "b"]))
        ),
        lambda: pyarrow.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)]),
        lambda: pyarrow.concat_tables([TABLE, TABLE]).slice(3),
        lambda: _put("personal", [0.5, None, 1.0], "float32"),
        lambda: TABLE.replace_schema_metadata({"written": "by another"}),
    ],
)
def test_the_digest_does_not_depend_on_how_a_table_is_written(other: Callable[[], pyarrow.Table]) -> None:
    assert digest(other()) == digest(TABLE)


@pytest.mark.parametrize(
    "other",
    [
        lambda: TABLE.take([1, 0, 2]),
        lambda: TABLE.slice(0, 2),
        lambda: TABLE.rename_columns(["round", "model", "generic", "unseen"]),
        lambda: TABLE.rename_columns(["personal", "model", "round", "unseen"]),
        lambda: _put("round", [1, 2, 301], "int64"),
        lambda: _put("round", [1, 2, 300], "float64"),
        lambda: _put("round", ["1", "2", "300"], "string"),
        lambda: _put("round", [1, 2, 300 - 256], "int64"),
        lambda: _put("round", [1, 2, None], "int64"),
        lambda: _put("round", [1, 2, 0], "int64"),
        lambda: _put("model", ["a", "b", "a"], "string"),
        lambda: _put("model", ["b", "a", ""], "string"),
        lambda: _put("model", ["b", "a", None], "string"),
        lambda: _put("personal", [0.5, 0.0, 1.0], "float64"),
        lambda: _put("personal", [0.5, float("nan"), 1.0], "float64"),
        lambda: _put("personal", [None, 0.5, 1.0], "float64"),
        lambda: _put("personal", [0.5, None, 1.0 - 2**-53], "float64"),
        lambda: _put("unseen", [None, None, 0.0], "float64"),
    ],
)
def test_the_digest_is_another_where_the_content_is(other: Callable[[], pyarrow.Table]) -> None:
    assert digest(other()) != digest(TABLE)


def test_names_and_texts_cannot_run_into_each_other() -> None:
    one, two = pyarrow.table({"a": ['x","y']}), pyarrow.table({"a": ["x"], 'b"': ["y"]})
    assert len({digest(one), digest(two), digest(two.rename_columns(["a", "b"]))}) == 3


def test_any_nan_is_one() -> None:
    negative = pyarrow.array([float("-nan")])
    assert digest(pyarrow.table({"a": [float("nan")]})) == digest(pyarrow.table({"a": negative}))


def test_numbers_of_full_width_are_told_apart() -> None:
    ends = {
        digest(pyarrow.table({"a": pyarrow.array([n], "int64")}))
        for n in (2**63 - 1, -(2**63), -1, 0, 127, 128, -128, -129)
    }
    assert len(ends) == 8


def test_what_has_no_digest_is_said() -> None:
    with pytest.raises(ValueError, match="column 'a' holds bool; allowed are whole numbers, floats and texts"):
        digest(pyarrow.table({"a": [True]}))
    with pytest.raises(ValueError, match="two columns have one name"):
        digest(pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"]))
    assert digest(TABLE.slice(0, 0)) == digest(pyarrow.table({"a": pyarrow.array([], "int64")}))


ONE_THREAD = """
import os, sys
from bench.results import storage, tables
content = storage.parquet(tables.curves([{"round": 1, "generic": 0.5, "personal": 0.25}]))
before = os.listdir("/proc/self/task")
assert tables.parse(content).num_rows == 1
print(len(os.listdir("/proc/self/task")) - len(before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_is_left_with_the_content_of_a_table_that_was_read() -> None:
    """pyarrow's would end the process, if it ends just then, by an abort: once in some hundred runs."""
    done = subprocess.run([sys.executable, "-c", ONE_THREAD], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
