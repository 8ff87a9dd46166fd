"""Reproduction cards: their form, that their numbers are those of the study of agreement, and that commands exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from bench.dataset import DataMissing
from bench.face.asked import sweep
from bench.models.teacher import BadTeacher
from bench.plugins import declared
from bench.plugins.registry import ALGORITHMS, label
from bench.protocol.spelling import ask
from tests.agreement import report
from tests.agreement.__main__ import METHODS
from tests.test_suites import options

CARDS = Path(__file__).parent.parent / "results" / "reproductions"
NAMES = sorted(file.stem for file in CARDS.glob("*.md") if file.stem != "README")
BUILT_IN = [name for name in ALGORITHMS if declared.source("algorithms", name) is not None]
STUDY = report.read(Path(__file__).parent / "agreement" / "rows.json")

ABSENT = "–"
IN_PART = "Agrees in part with its authors' code"
AGREES = "Agrees with its authors' code"
WITH_PAPER = "Agrees with its paper"
DIFFERS = "Differs"
NOT_RUN = "Not run at full budget"
NOTHING = "Nothing to compare with"
VERDICTS = (AGREES, IN_PART, WITH_PAPER, DIFFERS, NOT_RUN, NOTHING)

TABLE = """\
| case | metric | reported | authors' code | ours | gap |
|:-----|:-------|---------:|--------------:|-----:|----:|
"""
PARAGRAPH = r"(?:(?! {4}).+\n)+"
CARD = re.compile(
    r"# (?P<heading>.+)\n\n`(?P<name>\w+)` · (?P<paper>.+)\n\n"
    + re.escape(TABLE)
    + r"(?P<rows>(?:\| .+ \|\n)+)\n"
    + rf"(?P<setting>\*\*Setting\.\*\* {PARAGRAPH})\n(?P<gap>\*\*Gap\.\*\* {PARAGRAPH})\n"
    + rf"\*\*Verdict\.\*\* (?P<verdict>[^.]+)\.(?P<why>\s{PARAGRAPH})"
    + rf"(?P<commands>(?:\n{PARAGRAPH}|\n(?: {{4}}.+\n)+)*)"
)
NUMBER = r"[-+]?\d+(?:\.\d+)?"
FIGURE = re.compile(rf"{ABSENT}|{NUMBER}(?: ± {NUMBER}| \({NUMBER}–{NUMBER}\)| [(\[]{NUMBER}, {NUMBER}[)\]])?")


@dataclass(frozen=True)
class Row:
    case: str
    metric: str
    reported: str
    theirs: str
    ours: str
    gap: str

    @property
    def source(self) -> str:
        tag = re.search(r" \[([^\[\]]+)\]$", self.case)
        return tag[1] if tag else ""

    @property
    def figures(self) -> tuple[str, ...]:
        return self.reported, self.theirs, self.ours, self.gap


@dataclass(frozen=True)
class Card:
    name: str
    heading: str
    paper: str
    rows: tuple[Row, ...]
    verdict: str
    commands: tuple[str, ...]
    prose: tuple[str, ...]

    def has(self, *columns: str) -> bool:
        return any(all(getattr(row, column) != ABSENT for column in columns) for row in self.rows)


@cache
def read(name: str) -> Card:
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    found = CARD.fullmatch(text)
    assert found is not None, f"{name}.md has not the form of a card"
    lines = text.splitlines()
    return Card(
        name=found["name"],
        heading=found["heading"],
        paper=found["paper"],
        rows=tuple(Row(*(cell.strip() for cell in line[1:-1].split("|"))) for line in found["rows"].splitlines()),
        verdict=found["verdict"],
        commands=tuple(line.strip() for line in lines if line.startswith("    ")),
        prose=tuple(line for line in lines[3:] if not line.startswith(("|", "    "))),
    )


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_every_card_is_of_an_algorithm() -> None:
    assert NAMES and all(file.suffix == ".md" for file in CARDS.iterdir())
    assert not set(NAMES) - set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_algorithm_has_a_card(name: str) -> None:
    assert name in NAMES


def test_the_list_of_verdicts_is_that_of_the_cards() -> None:
    listed = re.findall(
        r"^\| \[(.+)\]\((\w+)\.md\) \| ([^|]+) \| .+ \|$", (CARDS / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted((read(name).heading, name, read(name).verdict) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_the_method_and_the_paper_of_its_ledger(name: str) -> None:
    card, text = read(name), declared.text("algorithms", name)
    assert text is not None
    ledger = " ".join(text.documentation.split())
    assert card.name == name and letters(name) in letters(card.heading)
    titles = re.findall(r"\*([^*]+)\*", card.paper)
    assert titles or "Not one paper's" in ledger
    for title in titles:
        assert title in ledger
    for year in re.findall(r"\b(?:19|20)\d\d\b", re.sub(r"\*[^*]+\*", "", card.paper)):
        assert year in ledger


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_where_its_numbers_are_from(name: str) -> None:
    rows = read(name).rows
    for row in rows:
        assert all(FIGURE.fullmatch(figure) for figure in row.figures), row
        assert row.source or set(row.figures) == {ABSENT}, f"no source: {row}"
        assert (row.theirs != ABSENT) == (row.source == "agreement"), f"authors' code is run for the study alone: {row}"
        compared = row.ours != ABSENT and (row.reported != ABSENT or row.theirs != ABSENT)
        assert (row.gap != ABSENT) == compared, f"a gap is between ours and another: {row}"
    assert sum(row.reported != ABSENT for row in rows) <= 4
    assert len(rows) == len({(row.case, row.metric) for row in rows})


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_short(name: str) -> None:
    assert max(len(line) for line in read(name).prose) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_is_one_that_the_numbers_allow(name: str) -> None:
    card = read(name)
    assert card.verdict in VERDICTS
    compared = {AGREES: card.has("theirs"), IN_PART: card.has("theirs"), WITH_PAPER: card.has("reported", "ours")}
    assert compared.get(card.verdict, True)
    assert card.verdict != DIFFERS or card.has("ours")
    assert card.verdict != NOT_RUN or (card.has("reported") and not card.has("ours"))
    assert (card.verdict == NOTHING) == (not card.has("reported") and not card.has("theirs"))


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_the_agreement_that_the_study_found(name: str) -> None:
    cases = {row.case for row in STUDY if row.method == name}
    there = [row for row in read(name).rows if row.source == "agreement"]

    def case(row: Row) -> str:
        """Say which case of the study a row names, which a method's only one need not be."""
        return max((case for case in cases if case in row.case), key=len, default=min(cases) if len(cases) == 1 else "")

    found = sorted((case(row), row.metric, row.reported, row.theirs, row.ours, row.gap.split()[0]) for row in there)
    assert found == sorted(written(row) for row in STUDY if row.method == name)
    intervals = {row.gap for row in there if " " in row.gap}
    assert intervals <= {cells(row)["difference"] for row in STUDY if row.method == name}


def cells(row: report.Row) -> dict[str, str]:
    line = report.table([row]).splitlines()[-1]
    return dict(zip(report.HEADINGS, (cell.strip() for cell in line[1:-1].split("|")), strict=True))


def written(row: report.Row) -> tuple[str, str, str, str, str, str]:
    cell = cells(row)
    return cell["case"], cell["metric"], ABSENT, cell["theirs"], cell["ours"], cell["difference"].split()[0]


def test_the_study_is_what_the_cards_are_held_against() -> None:
    rows = json.loads((Path(__file__).parent / "agreement" / "rows.json").read_text())
    assert len(STUDY) == len(rows) > 0 and {row.method for row in STUDY} == set(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_there_and_can_be_read(name: str) -> None:
    card = read(name)
    assert card.commands or not card.has("ours")
    for command in card.commands:
        known = [check for start, check in COMMANDS.items() if command.startswith(start)]
        assert known, command
        known[0](name, shlex.split(command))


def _of_bench(name: str, words: list[str]) -> None:
    asked = options("--data-root", "nowhere", *words[2:])
    with suppress(DataMissing, BadTeacher):  # files of the reader's
        sweep(asked).expand()
    assert name in {re.split(r"\W", label(algorithm))[0] for algorithm in ask(asked.algos).algorithms}


def _of_the_study(name: str, words: list[str]) -> None:
    assert words[3] == name and words[4:6] == ["--code", "code"]
    case = words[words.index("--case") + 1] if "--case" in words else ""
    seeds = {len(row.ours) for row in STUDY if row.method == name and case in row.case}
    assert seeds == {int(words[words.index("--seeds") + 1]) if "--seeds" in words else 5}


def _of_git(name: str, words: list[str]) -> None:
    repository, commit = words[2].removeprefix("https://github.com/").removesuffix(".git"), words[-1]
    assert f"{repository}@{commit}" in {row.code for row in STUDY if row.method == name}


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "bench run ": _of_bench,
    "bench data ": lambda name, words: None,
    "python -m tests.agreement ": _of_the_study,
    "git clone ": _of_git,
    "pip install ": lambda name, words: None,
}
"""The beginning of a command, and what must be true of its words."""
