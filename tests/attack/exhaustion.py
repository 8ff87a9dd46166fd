"""A small file that asks for all of the time or memory: named, and the other runs are validated as ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.attack.frame import TRIES, Try
from tests.attack.published import altered, forged, validated
from tests.attack.verdict import refused, require
from tests.test_validation import Forger

AREA = "resource exhaustion by run.json and Parquet during validate"
SECONDS = 90


def _enter(name: str, act: Callable[[], object]) -> None:
    TRIES.append(Try(area=AREA, name=name, act=act, seconds=SECONDS, needs=("published",)))


def _named(out: Path, run: str) -> None:
    """The folder is named, and five others are looked at all the same."""
    answer = refused(validated(out, "--json"), run, status=(1,))
    said = json.loads(answer.out)
    others = [each for each in out.glob("*/run.json") if each.parent.name != run]
    require(said["runs"] >= len(others), f"{said['runs']} runs were looked at, and there are {len(others)} others")


def _setting(**values: Any) -> None:
    def change(forger: Forger) -> None:
        for field, value in values.items():
            forger.set(field, value)

    _named(*forged(change))


for values in (
    {"rounds": 10**9},
    {"rounds": 10**9, "eval_every": 10**9},
    {"rounds": 10**9, "participation": 1e-9},
    {"clients": 10**7, "partition": "iid", "alpha": None},
    {"clients": 10**9},
    {"epochs": 10**12},
    {"batch_size": 10**12},
    {"eval_clients": 10**9},
    {"unseen": 10**9},
    {"rounds": 10**30},
    {"eval_every": 10**30},
    {"imbalance": 1e300},
    {"alpha": 1e-300},
    {"lr": 1e308},
    {"participation": 1e-300},
):
    _enter(" and ".join(f"{field} of {value}" for field, value in values.items()), partial(_setting, **values))


def _algorithm(name: str, call: str, **fields: Any) -> None:
    from bench.plugins.registry import ALGORITHMS

    def change(forger: Forger) -> None:
        version = ALGORITHMS[name].version
        forger.document["identity"]["algorithm"] = {"name": name, "version": version, "fields": fields}
        words = ", ".join(f"{key}={value}" for key, value in fields.items())
        forger.document |= {"algorithm": name, "call": f"{call}({words})", "label": f"{name}({words})"}

    _named(*forged(change))


_enter(
    "an endless fine-tuning in an algorithm's name", partial(_algorithm, "fedavg_ft", "FedAvgFT", finetune_epochs=10**7)
)
_enter("endless epochs of a head", partial(_algorithm, "fedrep", "FedRep", head_epochs=10**7))


def _document(change: Callable[[dict[str, Any]], object]) -> None:
    _named(*altered(change))


def _put(*place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


MANY = 3 * 10**6
for name, change in {
    "class_counts of three million numbers": _put("class_counts", value=[1] * MANY),
    "groups of a million classes": _put("groups", "few", value=list(range(10**6))),
    "a million metrics": lambda content: content["metrics"].update({f"m{n}": 0.5 for n in range(10**6)}),
    "a million checksums": lambda content: content["tables"].update({f"t{n}": "0" * 64 for n in range(3 * 10**5)}),
    "a text of a hundred million letters": _put("label", value="a" * 10**8),
    "tested images of millions": _put("tested", "images", value=[1] * MANY),
    "a hundred thousand overrides": lambda content: content["overrides"].update({f"o{n}": 1 for n in range(10**5)}),
}.items():
    _enter(name, partial(_document, change))


def _text(change: Callable[[bytes], bytes], place: str = "run.json") -> None:
    out, run = altered(lambda content: None)
    file = out / run / place
    file.write_bytes(change(file.read_bytes()))
    _named(out, run)


def _within(inner: bytes) -> Callable[[bytes], bytes]:
    return lambda written: written[:-1] + b', "x": ' + inner + b"}"


for name, inner in {
    "two hundred thousand brackets": b"[" * 200_000 + b"]" * 200_000,
    "two hundred thousand braces": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "a number of a million digits": b"9" * 10**6,
    "a fraction of two million digits": b"0." + b"9" * (2 * 10**6),
    "millions of nulls": b"[" + b"null," * (5 * 10**6) + b"null]",
}.items():
    _enter(name, partial(_text, _within(inner)))


_enter(
    "a number beyond all floats",
    partial(_text, lambda written: written.replace(b'"wall_seconds": ', b'"wall_seconds": 9e999')),
)


def _hole(place: str) -> None:
    """A file of a terabyte that takes nothing on the disk."""
    out, run = altered(lambda content: None)
    with (out / run / place).open("r+b") as stream:
        stream.truncate(1 << 40)
    _named(out, run)


for place in ("run.json", "counts.parquet", "rounds.parquet"):
    _enter(f"a terabyte of nothing as {place}", partial(_hole, place))


def _rows(number: int, name: str = "counts", columns: int = 0) -> None:
    """A Parquet file of few bytes and many rows, with the checksum that its content would have."""
    out, run = altered(lambda content: None)
    file = out / run / f"{name}.parquet"
    known = parquet.read_table(file)
    piece = pyarrow.table(
        {
            column.name: pyarrow.chunked_array(
                [pyarrow.nulls(10**6, column.type).fill_null("generic" if column.type == pyarrow.string() else 1)]
            )
            for column in known.schema
        }
    )
    with parquet.ParquetWriter(file, piece.schema, compression="zstd") as writer:
        for _ in range(number // 10**6):
            writer.write_table(piece, row_group_size=10**6)
    _named(out, run)


_enter("forty million rows of counts", partial(_rows, 4 * 10**7))
_enter("two hundred million rows of counts", partial(_rows, 2 * 10**8))
_enter("forty million predictions", partial(_rows, 4 * 10**7, "predictions"))


def _wide(name: str) -> None:
    out, run = altered(lambda content: None)
    table = pyarrow.table({f"c{n}": pyarrow.array([1], pyarrow.int32()) for n in range(20_000)})
    parquet.write_table(table, out / run / f"{name}.parquet")
    _named(out, run)


_enter("twenty thousand columns of curves", partial(_wide, "rounds"))


def _beside(name: str, content: Callable[[Path], object], says: str) -> None:
    """Something beside the runs that has no end."""
    out, _ = altered(lambda content: None)
    (out / name).unlink(missing_ok=True)
    content(out / name)
    refused(validated(out), says)


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(1 << 40)


_enter("a terabyte of nothing as NOTES.md", partial(_beside, "NOTES.md", _sparse, "NOTES.md"))
_enter("a terabyte of nothing as README.md", partial(_beside, "README.md", _sparse, "README.md"))
_enter("a terabyte of nothing as verified.json", partial(_beside, "verified.json", _sparse, "verified.json"))
_enter(
    "a verified.json of nested brackets",
    partial(_beside, "verified.json", lambda file: file.write_text("[" * 200_000 + "]" * 200_000), "verified.json"),
)


def _pack(rows: int) -> None:
    """A pack whose counts are few bytes and many rows."""
    from bench.results import packing, records

    out, _ = altered(lambda content: None)
    packing.pack(records.read_all(out)[0], out / "pack")
    for each in list(out.glob("*/run.json")):
        shutil.rmtree(each.parent)
    file = out / "pack" / "counts.parquet"
    known = parquet.read_schema(file)
    piece = pyarrow.table(
        {
            column.name: pyarrow.nulls(10**6, column.type).fill_null(
                "generic" if column.type == pyarrow.string() else 1
            )
            for column in known
        }
    )
    with parquet.ParquetWriter(file, piece.schema, compression="zstd") as writer:
        for _ in range(rows // 10**6):
            writer.write_table(piece)
    refused(validated(out), "pack/counts.parquet")


_enter("a pack of a hundred million rows", partial(_pack, 10**8))


def _many_folders() -> None:
    out, _ = altered(lambda content: None)
    for number in range(3000):
        (out / f"{number:012x}").mkdir()
    refused(validated(out), "has no run.json")


TRIES.append(
    Try(
        area=AREA,
        name="three thousand empty folders",
        act=_many_folders,
        seconds=150,
        memory=None,
        needs=("published",),
    )
)


def _endless_rerun() -> None:
    """A rerun of what takes much longer than was said has an end, and is no sign of anything."""
    out, run = forged(lambda forger: forger.set("epochs", 900), "ditto")
    answer = refused(validated(out, "--rerun", run, "--time-limit", "5s"))
    require("No such option" not in answer.text, "a rerun has no limit")
    require(not (out / "verified.json").exists(), "it is noted")


_enter("a rerun that is much longer than said", _endless_rerun)
