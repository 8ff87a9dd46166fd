"""The attack's script does not rot: some tries of each area hold, what falls is told, and limits end what has none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack import frame, fuzz, mutations, recipes, targets
from tests.attack.frame import Outcome, Try
from tests.attack.verdict import Answer, Fell, calm, refused

SAMPLE = (
    "*/a metric changed by a billionth",
    "*/endless epochs",
    "*/rounds of 1000000000",
    "*/two hundred thousand brackets",
    "*/the command of a journal",
    "*/brackets",
    "*/counts.parquet is a socket",
    "*/arrays: a header of 64 TB",
    "*/arrays: a pipe",
    "*/weights: a list",
    "*/tar above",
    "*/a pipe",
    "*/one bit of a checkpoint, 0",
    "*/states hole, 1",
    "*/run.json nested, then table",
    "*/in one process, 0*",
    "*/no file above 0 bytes",
    "*/a umask of 077",
    "*/run --rounds '-1'",
    '*/--algos "__import__*',
    "*/new algorithm torch",
    "*/a changed run",
    "*/no dashboard",
    "*/half made",
)
EXPENSIVE = (
    "*/counts.parquet is a socket",
    "*/brackets",
    "*/one bit of a checkpoint, 0",
    "*/no dashboard",
    "*/no file above 0 bytes",
    "*/a umask of 077",
    "*/states hole, 1",
    "*/half made",
    "*/in one process, 0*",
)
"""Known by name and not done here."""


@pytest.fixture(scope="module")
def tries() -> list[Try]:
    recipes.load(0)
    return frame.TRIES


def held() -> None: ...


def fallen() -> None:
    raise Fell("it is taken | at once")


def raised() -> None:
    raise ValueError("one\ntwo")


def endless() -> None:
    while True:
        time.sleep(1)


def hungry() -> None:
    held = []
    while True:
        held.append(bytes(64 << 20))


def killed() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def lacking() -> None:
    raise frame.Skipped("there is no such thing")


def test_there_are_as_many_tries_as_the_report_has_and_more(tries: list[Try]) -> None:
    names = [(each.area, each.name) for each in tries]
    assert len(names) == len(set(names)) >= 611 and len(frame.areas(tries)) == len(recipes.AREAS) == 17


def test_some_of_each_area_hold(tries: list[Try], tmp_path: Path) -> None:
    chosen = [each for pattern in SAMPLE for each in frame.chosen(pattern=pattern)]
    assert {each.area for each in chosen} == set(frame.areas(tries))
    expensive = {each.name for pattern in EXPENSIVE for each in frame.chosen(pattern=pattern)}
    ends = frame.attack([each for each in chosen if each.name not in expensive], tmp_path, jobs=2)
    assert [(end.area, end.name, end.fell) for end in ends if end.fell is not None] == []


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (held, None),
        (fallen, "it is taken | at once"),
        (raised, "ValueError: one"),
        (endless, "no end within 1 s"),
        (hungry, "MemoryError"),
        (killed, "ended by signal 9"),
    ],
)
def test_a_try_that_falls_is_told_and_one_without_an_end_is_ended(
    act: Callable[[], None], said: str | None, tmp_path: Path
) -> None:
    (end,) = frame.attack([Try(area="one", name="a", act=act, seconds=1 if act is endless else 30)], tmp_path / "place")
    assert (end.fell is None) if said is None else (end.fell or "").startswith(said)
    assert not list(tmp_path.glob("place/0*/*"))


def test_the_table_says_what_is_left_and_why() -> None:
    ends = [
        Outcome(area="one", name="a", fell=None),
        Outcome(area="one", name="b", fell="x | y"),
        Outcome(area="two", name="c", fell="z", left="nobody can know"),
        Outcome(area="two", name="d", fell=None, skipped="no"),
    ]
    assert frame.table(ends).splitlines()[2:] == [
        "| one | 2 | 1 | b: **x \\| y** |",
        "| two | 1 | 0 | c: nobody can know; not tried here: no |",
        "| **together** | **3** | **1** | |",
    ]
    assert [end.name for end in frame.unexpected(ends)] == ["b"] and json.loads(frame.stored(ends))[1][
        "fell"
    ] == "x | y"


def test_what_cannot_be_tried_is_no_success(tmp_path: Path) -> None:
    (end,) = frame.attack([Try(area="one", name="a", act=lacking)], tmp_path)
    assert (end.fell, end.skipped) == (None, "there is no such thing")


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (Answer(1, "", "Traceback (most recent call last):\n  x\nKeyError: 1\n"), "traceback: KeyError: 1"),
        (Answer(2, "", ""), "no sentence at the end"),
        (Answer(-9, "", "bench: x\n"), "exit status -9"),
        (Answer(0, "a\x07b", ""), "a control character comes through"),
        (Answer(2, "", "bench: " + "x" * 2000), "a sentence of"),
        (
            Answer(1, "", "bench: the memory that this process may use is too little; give it more\n"),
            "all memory was taken",
        ),
    ],
)
def test_a_verdict(answer: Answer, wrong: str) -> None:
    with pytest.raises(Fell, match=wrong):
        calm(answer)


def test_what_is_taken_is_not_refused() -> None:
    assert calm(Answer(0, "\x1b[1mbold\x1b[0m", "")).status == 0
    refused(Answer(2, "", "bench: no such thing\n"), "no such")
    with pytest.raises(Fell, match="taken"):
        refused(Answer(0, "well", ""))
    with pytest.raises(Fell, match="'more' is not said"):
        refused(Answer(2, "", "bench: no such thing\n"), "more")


def test_a_fuzz_changes_bytes_and_values() -> None:
    content = bytes(range(200))
    for what in ("flip", "set", "drop", "repeat", "swap", "zero", "insert", "cut"):
        assert mutations.changed(content, [(what, 0.5, 7)]) != content, what
        mutations.changed(b"", [(what, 0.5, 7)])
    assert list(mutations.places({"a": [1, {"b": 2}]})) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    changed = mutations.rewritten({"a": 1, "b": 2}, [(0.0, mutations.HOSTILE.index(""), "put"), (0.9, 0, "remove")])
    assert changed == {"a": ""} and mutations.spelt({"a": float("nan"), "b": "\ud800"})


def test_a_case_of_a_fuzz_that_goes_wrong_is_kept_with_the_line_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = targets.Target(mutations.CHANGES, lambda case: b"x" * len(case), lambda content: content.index(b"y"))
    (tmp_path / "cases").mkdir()
    done = fuzz.batch("run.json", target, 0, tmp_path / "cases")
    assert done["cases"] == fuzz.BATCH == len(done["found"])
    content, wrong = done["found"][0]
    fuzz._keep(tmp_path / "kept", "run.json", content, wrong, 1)
    assert (tmp_path / "kept" / "001-run.json").read_bytes() == content
    assert "--target run.json --again" in (tmp_path / "kept" / "README.txt").read_text()
