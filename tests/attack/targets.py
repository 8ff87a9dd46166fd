"""What reads files and words of strangers, and how hostile ones are made of real ones."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.attack import frame
from tests.attack.checkpoints import numbers
from tests.attack.command_lines import CODE, DRY, NUMBER, TEXT, VERBS, surroundings
from tests.attack.mutations import CHANGES, LEAVES, changed, rewritten, spelt
from tests.attack.published import DATA
from tests.attack.verdict import Answer, bench, calm, equal, require
from tests.test_foreign import own

MEMORY = 2 << 30
"""Bytes that a case may reserve beyond what this process has."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others made."""

    cases: st.SearchStrategy[Any]
    make: Callable[[Any], bytes]
    """A case's content."""
    read: Callable[[bytes], object]
    """In an empty working directory; raises `Fell` where a command does not end in a sentence."""
    memory: int = MEMORY


def _published(name: str, verb: tuple[str, ...], content: bytes) -> None:
    out = frame.copied("published")
    first = sorted(path for path in out.iterdir() if path.is_dir())[0]
    (first / name).write_bytes(content)
    if verb[0] == "validate":
        calm(bench("validate", out, *DATA))
    else:
        calm(bench(*verb, "--out", out))


def _original(name: str) -> bytes:
    first = sorted(path for path in frame.material("published").iterdir() if path.is_dir())[0]
    return (first / name).read_bytes()


def _document(content: bytes) -> None:
    _published("run.json", ("validate",), content)
    for verb in (("table",), ("status",), ("compare",)):
        _published_again(verb)


def _published_again(verb: tuple[str, ...]) -> None:
    calm(bench(*verb, "--out", "copy"))


def _tables(case: bytes) -> None:
    name, _, content = case.partition(b"\n")
    _published(name.decode(), ("validate",), content)
    for verb in (("table", "--metrics", "f1,generic"), ("table", "--format", "long")):
        _published_again(verb)


def _results_pack(case: bytes) -> None:
    from bench.results import packing, records

    name, _, content = case.partition(b"\n")
    packing.pack(records.read_all(frame.material("published"))[0], Path("copy/pack"))
    (Path("copy/pack") / name.decode()).write_bytes(content)
    calm(bench("validate", "copy", *DATA))
    for verb in (("table",), ("compare",), ("status",)):
        _published_again(verb)


def _pack_file(name: str) -> bytes:
    from bench.results import packing, records

    with tempfile.TemporaryDirectory() as folder:
        packing.pack(records.read_all(frame.material("published"))[0], Path(folder) / "pack")
        return (Path(folder) / "pack" / name).read_bytes()


ASKED = (
    "run",
    "--algos",
    "fedrep(head_epochs=1)",
    "--rounds",
    6,
    "--epochs",
    1,
    "--ray",
    "off",
    "--tracking-uri",
    "off",
    "--json",
    "--out",
    "out",
)


def _checkpoint(content: bytes) -> None:
    """Whatever stands in the checkpoint: the numbers of an undisturbed run."""
    kept = frame.copied("unfinished")
    (kept / "out").rename("out")
    (file,) = Path("out").glob("*/checkpoint.pt")
    file.write_bytes(content)
    answer = calm(bench(*ASKED))
    require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    equal(numbers(answer), numbers(Answer(0, (kept / "wanted.json").read_text(), "")))


def _checkpoint_file() -> bytes:
    (file,) = frame.material("unfinished").glob("out/*/checkpoint.pt")
    return file.read_bytes()


def _images(content: bytes) -> None:
    """A file of images is refused before a run begins, or gives what it was written with."""
    Path("pack.npz").write_bytes(content)
    answer = calm(bench("run", "--algos", "fedavg", "--rounds", 1, *DRY[2:], "--json", "--data-root", "pack.npz"))
    require(answer.status in (0, 2, 3), f"begun, and then: {answer.err[-300:]}")


def _arrays(content: bytes) -> None:
    Path("own.npz").write_bytes(content)
    place = Path("own.npz").absolute()
    calm(bench("run", "--algos", "fedavg", *DRY, "--dataset", f"arrays(path='{place}')"))


def _arrays_file() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **own())
    return stream.getvalue()


def _images_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pack.npz"
        require(bench("data", "pack", "digits", "--imbalance", 10, "--out", file).status == 0, "no file")
        return file.read_bytes()


def _line(case: bytes) -> None:
    before = surroundings()
    words: list[str] = json.loads(case)
    answer = calm(bench(*words))
    require(not Path("opened").exists(), "code has run")
    if answer.status == 2:
        new = sorted(path.name for path in set(Path().iterdir()) - before)
        require(not new, f"left behind: {', '.join(new)}")


_WORDS = st.one_of(
    st.sampled_from([*NUMBER, *TEXT, *CODE]), st.text(max_size=30), st.integers().map(str), st.floats().map(str)
)
_OPTIONS = (
    "--algos",
    "--preset",
    "--dataset",
    "--imbalance",
    "--alpha",
    "--seeds",
    "--plugin",
    "--setting",
    "--partition",
    "--clients",
    "--participation",
    "--rounds",
    "--match",
    "--epochs",
    "--batch-size",
    "--lr",
    "--model",
    "--eval-clients",
    "--auxiliary",
    "--weights",
    "--set",
    "--engine",
    "--precision",
    "--device",
    "--jobs",
    "--out",
    "--data-root",
    "--from",
    "--time-budget",
    "--keep-models",
    "--force",
    "--json",
)
_NAMES = (
    "notes.txt",
    "two.py",
    "quits.py",
    "pickled.npz",
    "nested.toml",
    "digits",
    "fedavg",
    "fedrep+focal",
    "mlp",
    "2",
    "0.5",
    "rounds=2",
    "norm=batch",
    "own:4",
    "quick",
    "iid",
    "set:pfl",
    "off",
    "auto",
    "cpu",
)
_RUNS = st.lists(
    st.tuples(st.sampled_from(_OPTIONS), st.one_of(_WORDS, st.sampled_from(_NAMES))), min_size=1, max_size=4
).map(lambda pairs: ["run", *(word for pair in pairs for word in pair), *DRY])
_OTHERS = st.tuples(
    st.sampled_from([verb for verb in VERBS if verb[0] not in ("run", "speed", "tune", "data")]),
    st.lists(_WORDS, max_size=3),
).map(lambda pair: [*pair[0], *pair[1]])


def targets() -> dict[str, Target]:
    """Give all that is read; the materials must be there."""
    document = json.loads(_original("run.json"))
    checkpoint, images, arrays = _checkpoint_file(), _images_file(), _arrays_file()
    parquet = {f"{name}.parquet": _original(f"{name}.parquet") for name in ("counts", "predictions", "rounds")}
    packs = {name: _pack_file(name) for name in ("runs.parquet", "counts.parquet", "predictions.parquet")}

    def named(known: dict[str, bytes]) -> tuple[st.SearchStrategy[Any], Callable[[Any], bytes]]:
        return st.tuples(
            st.sampled_from(sorted(known)), CHANGES
        ), lambda case: case[0].encode() + b"\n" + changed(known[case[0]], case[1])

    return {
        "run.json": Target(LEAVES, lambda case: spelt(rewritten(document, case)), _document),
        "run.json, bytes": Target(CHANGES, lambda case: changed(spelt(document), case), _document),
        "tables": Target(*named(parquet), _tables),
        "packs": Target(*named(packs), _results_pack),
        "checkpoints": Target(CHANGES, lambda case: changed(checkpoint, case), _checkpoint),
        "images": Target(CHANGES, lambda case: changed(images, case), _images),
        "arrays": Target(CHANGES, lambda case: changed(arrays, case), _arrays),
        "command lines": Target(_RUNS | _OTHERS, lambda case: json.dumps(case).encode(), _line),
    }
