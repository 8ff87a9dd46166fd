"""What somebody wrote is text wherever it is shown: on a terminal, in CSV, LaTeX, Markdown, HTML, on the site."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bench.command.main import main
from bench.face.bar import Bar
from bench.face.progress import Display
from bench.plugins import blame
from bench.protocol.identity import identify
from bench.results import records
from bench.results.record import DOCUMENT
from bench.site.rendering import markdown
from bench.sweep import journal
from bench.system import text
from bench.tracking import described
from bench.validation.report import validate
from bench.validation.wording import overlong, unfit
from tests.test_site import pages, plant

RAW = "\x1b]0;owned\x07\x1b[2J\u202e\u200b\u0085\r\n\x7f\ue000"
"""What no output has: commands of terminals, marks of direction and of no width, line ends that are not ours."""
WILD = f"=HYPERLINK(0)|`x`<script>wild(1)</script>\\input{{wild}}[a](javascript:wild)*b*$c${RAW}wild"
LINK = "https://example.org/elsewhere"
NOTES = f"Seen by [hand]({LINK}). {WILD}".replace("\r\n", "") + "\n"
Spoken = Callable[..., tuple[int, str, str]]


def hostile(out: Path, seed: int = 0, **planted: Any) -> Path:
    """Plant a run all of whose free text is wild; give its folder."""
    run = plant(out, seed=seed, evaluations=1, clients=4, **planted)
    content = json.loads((out / run / DOCUMENT).read_bytes())
    named = WILD + content["algorithm"]
    content["identity"]["algorithm"] |= {"name": named, "version": WILD, "fields": {WILD: WILD}}
    content["identity"]["dataset"] |= {"source": WILD, "fields": {WILD: WILD}}
    content["identity"]["setting"] |= {"model": WILD}
    content["setting"] |= dict.fromkeys(("name", "model", "norm", "partition", WILD), WILD)
    content |= dict.fromkeys(("algorithm", "call", "label", "tier", "dataset", "engine", "precision", "device"), WILD)
    content |= dict.fromkeys(("commit", "finished", "fingerprint", "digest", "preset", WILD), WILD)
    content |= {key: {"cpu": WILD, WILD: WILD} for key in ("versions", "hardware", "overrides")}
    if planted.get("reason") is None:
        content["metrics"][f"generic.{WILD}"] = content["cost"][WILD] = 0.5
    content["label"] = content["call"] = named
    content["id"] = identify(content["identity"])
    (out / run).rename(out / content["id"])
    (out / content["id"] / DOCUMENT).write_text(json.dumps(content))
    return out / str(content["id"])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results in which no text is as it should be; nobody writes into it."""
    out = tmp_path_factory.mktemp("wild") / "results"
    for seed, algorithm in itertools.product(range(2), ("alpha", "beta")):
        hostile(out, seed, algorithm=algorithm)
    hostile(out, 3, reason=WILD)
    (out / "NOTES.md").write_text(NOTES)
    (out / RAW.replace("\r\n", "")).write_text("a file that does not belong here")
    return out


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spoken:
    """Call the command in this process, in an empty folder; give its status, and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    return call


def is_text(said: str) -> bool:
    """Tell whether nothing but text was written, and no line that somebody else began."""
    lines = said.split("\n")
    begun = re.compile(r"\\x7f|\\ue000|wild")
    return all(line.isprintable() for line in lines) and not any(begun.match(line) for line in lines)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("table OUT", 0),
        ("table OUT --all-versions", 0),
        ("table OUT --dataset nowhere", 2),
        ("table OUT --metrics WILD,generic", 0),
        ("compare OUT", 0),
        ("compare OUT nobody", 2),
        ("compare OUT --json", 0),
        ("clean OUT --failed --stale --dry-run", 0),
        ("status OUT", 0),
        ("status OUT --json", 0),
        ("validate OUT", 1),
        ("validate OUT --json", 1),
        ("submit OUT", 1),
        ("pack OUT --to pack", 0),
    ],
)
def test_no_command_writes_what_is_no_text(planted: Path, bench: Spoken, words: str, status: int) -> None:
    ended, said, err = bench(*(str(planted) if word == "OUT" else word.replace("WILD", WILD) for word in words.split()))
    tables = words.startswith(("table", "compare")) and not words.endswith("--json")
    assert ended == status, err
    assert is_text(err) and is_text(re.sub(r"\n *(?=\S)", " " * tables, said) if tables else said)  # long names go on
    assert "wild" in said + err or words.startswith("pack")


def test_a_damaged_result_and_a_journal_are_told_of_as_text(tmp_path: Path, bench: Spoken) -> None:
    out = tmp_path / "runs"
    file = hostile(out, 4) / DOCUMENT
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "metrics": {WILD: WILD}}))
    damaged = file.parent.rename(out / RAW) / DOCUMENT
    driver = journal.Sweep(pid=1, host=WILD, born=None, began=0.0, command=f"bench run {WILD}")
    driver.runs["0" * 12] = journal.Entry(title=WILD, cell=WILD, rounds=1, state="failed", reason=WILD)
    (out / journal.FOLDER).mkdir()
    (out / journal.FOLDER / "1-0.json").write_text(json.dumps({"format": 1, **asdict(driver)}))
    for words in ("table runs", "status runs", "validate runs", "pack runs --to pack"):
        _, said, err = bench(*words.split())
        assert is_text(said) and is_text(err), words
        assert "wild" in said + err or "owned" in said + err or words.startswith("validate"), words
    assert damaged.is_file() and "a bad key" in bench("table", "runs")[2]
    assert "1 failed" in bench("status", "runs")[1]


def cells_of(written: str) -> list[str]:
    return [each for line in csv.reader(io.StringIO(written)) for each in line]


def test_a_spreadsheet_computes_nothing(planted: Path, bench: Spoken) -> None:
    for words in (("csv",), ("csv", "--per-seed"), ("long",)):
        _, said, _ = bench("table", planted, "--format", *words)
        cells = cells_of(said)
        assert is_text(said) and sum(text.plain(WILD) in each for each in cells) > 10, words
        assert not [each for each in cells if each[:1] in set("=+-@\t\r") and not is_number(each)], words
        assert f"'{text.plain(WILD)}" in cells
    _, said, _ = bench("table", planted, "--format", "csv", "--metrics", f"{WILD},generic")
    assert f"'{text.plain(WILD)}" in next(csv.reader(io.StringIO(said))), "a column is called so"


def is_number(written: str) -> bool:
    try:
        float(written)
    except ValueError:
        return False
    return True


def test_latex_reads_no_command(planted: Path, bench: Spoken) -> None:
    _, said, _ = bench("table", planted, "--format", "latex")
    ours = "begin end caption toprule midrule bottomrule par textbf textbackslash textasciitilde textasciicircum"
    ours += " textless textgreater textbar textasciigrave usepackage"
    assert is_text(said) and set(re.findall(r"\\([a-z]+)", said)) <= set(ours.split())
    assert not re.search(r"(?<!\\)[$#_]|[`|<>]", said) and said.count("{") == said.count("}")


def test_markdown_holds_no_tag_no_link_and_no_cell_more(planted: Path, bench: Spoken, tmp_path: Path) -> None:
    front = tmp_path / "front.md"
    front.write_text("# Front\n\n<!-- leaderboard -->\n<!-- end of leaderboard -->\n")
    _, table, _ = bench("table", planted, "--format", "md")
    copied = shutil.copytree(planted, tmp_path / "copied")
    assert bench("table", copied, "--write")[0] == 0 and bench("table", planted, "--into", front)[0] == 0
    readme = (copied / "README.md").read_text()
    for written in (table, readme):
        assert is_text(written)
        rows = [line for line in written.splitlines() if line.startswith("| `")]
        assert rows and len({len(re.split(r"(?<!\\)\|", line)) for line in rows}) == 1
        tokens = [inner for token in MarkdownIt("commonmark").enable("table").parse(written) for inner in flat(token)]
        assert not [token for token in tokens if token.type.startswith("html")]
        links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
        assert set(links) == ({LINK} if written == readme else set())
    assert not [each for each in MarkdownIt("commonmark").parse(table) if each.type == "em_open"]
    assert is_text(front.read_text()) and "fewer than 5 seeds" in front.read_text()


def flat(token: Token) -> list[Token]:
    return [token, *(inner for child in token.children or () for inner in flat(child))]


def test_pages_show_wild_text_as_it_is(planted: Path, bench: Spoken, tmp_path: Path) -> None:
    _, said, _ = bench("table", planted, "--format", "html")
    assert is_text(said) and "<script" not in said and html.escape(text.plain(WILD)) in said
    assert bench("site", "--out", planted, "--to", "site")[0] == 0
    for name, page in pages(tmp_path / "site").items():
        assert all(line.isprintable() for line in page.source.replace("\t", " ").split("\n")), name
        assert "wild(1)</script>" not in page.source, name
        assert all(":" not in link or link == LINK for link in page.links), name
    for file in ("leaderboard.csv", "leaderboard.json"):
        assert is_text((tmp_path / "site" / file).read_text())


def test_links_of_notes_vouch_for_nobody() -> None:
    page = str(markdown(f"[here]({LINK}), <{LINK}> and\n\n* ![a](https://example.org/b.png)"))
    assert page.count("<a ") == 3 and page.count('rel="nofollow noopener"') == 3 and "<img" not in page


def test_mlflow_is_told_text_under_names_that_it_takes(planted: Path) -> None:
    known, _ = records.read_all(planted)
    for record in known:
        told = described.of_record(record)
        pairs = {**told.params, **told.tags, **described.record_tags(record)}
        assert is_text("\n".join((told.title, *pairs.values()))) and "wild" in told.title
        assert all(re.fullmatch(r"[\w\-. :/]+", key, re.ASCII) for key in pairs)


@given(st.text())
def test_whatever_is_written_stays_one_line_of_text(written: str) -> None:
    shown = text.plain(written)
    assert shown.isprintable() and text.plain(shown) == shown
    assert shown == written or not written.isprintable()
    several = text.lines(written)
    assert [*map(text.plain, re.split(r"[\n\t]", written))] == re.split(r"[\n\t]", several)
    shown.encode()  # halves of pairs have no code


@given(st.one_of(st.text(), st.from_regex(r"\s*[=+\-@].*"), st.floats(), st.integers(), st.none(), st.booleans()))
def test_a_cell_is_a_number_or_text_that_is_not_computed(value: object) -> None:
    (shown,) = cells_of(f"{csv_line(text.cell(value))}") or [""]
    if isinstance(value, str):
        assert not shown.lstrip().startswith(("=", "+", "-", "@")) or is_number(shown)
        assert shown.removeprefix("'") == text.plain(value).removeprefix("'")
    else:
        assert text.cell(value) is value


def csv_line(value: object) -> str:
    sink = io.StringIO()
    csv.writer(sink).writerow([value])
    return sink.getvalue()


def test_numbers_stay_numbers_and_words_that_begin_like_one_do_not() -> None:
    for number in ("-1", "+0.5", "-.5e-3", "-3."):
        assert text.cell(number) == number
    for formula in ("-1+cmd|' /C calc'!A0", "@SUM(1)", "+A1", " =1+1", "\uff1d1+1", "--1"):
        assert text.cell(formula) == f"'{formula}"
    assert text.cell("\t=1") == "\\t=1" and text.cell((1, 2)) == "(1, 2)"


@given(st.text())
def test_markdown_and_html_give_the_text_back(written: str) -> None:
    shown = " ".join(text.plain(written).split(" "))
    (_, inline, _) = MarkdownIt("commonmark").parse(f"x{text.markdown(written)}x")
    assert "".join(token.content for token in inline.children or ()) == f"x{shown}x"
    assert html.unescape(text.html_text(written)) == text.plain(written)


def test_a_long_first_line_of_an_error_is_cut() -> None:
    said = blame.told(ValueError("tensor " * 1000))
    assert len(said) < 450 and said.startswith("ValueError: tensor ")


def test_what_begins_a_row_of_latex_is_no_option_of_the_row_above() -> None:
    assert text.latex("[2cm] wide") == "{}[2cm] wide" and text.latex("*") == "{}*" and text.latex("a[1]") == "a[1]"


def test_a_plug_in_and_a_sweep_are_told_of_as_text(tmp_path: Path, bench: Spoken) -> None:
    file = tmp_path / "mine.py"
    assert bench("new", "part", "mine")[0] == 0
    written = re.sub(
        r"^(    def .*:)$", r'\1\n        raise ValueError("\\x1b]0;owned\\x07")', file.read_text(), flags=re.M
    )
    file.write_text(written.replace('"""Mine', r'"""\x1b]0;owned\x07 Mine', 1))
    for words, ended in (("show", 0), ("check", 1)):
        status, said, err = bench(words, "mine", "--plugin", file)
        assert status == ended and is_text(said) and is_text(err) and r"\x1b]0;owned\x07" in said
    sink = io.StringIO()
    with Display(stream=sink) as display, redirect_stderr(sink), Bar("images") as bar:
        display.warn(f"failed: {WILD}")
        bar.say(WILD)
    assert is_text(sink.getvalue().replace("\n\\x7f", "")) and sink.getvalue().count("owned") == 2


def test_a_dollar_begins_no_formula_in_a_picture() -> None:
    assert text.picture("a$b$\x1b") == r"a\$b\$\x1b"


def test_texts_of_a_submission_have_a_length_and_can_be_seen() -> None:
    honest: dict[str, object] = {"label": "fedrep(head_epochs=5)", "reason": "two\nlines\tof it", "metrics": {"a": 0.5}}
    honest |= {"hardware": {"cpu": "x" * 100}, "tested": {"images": [1, 2]}, "alpha": None, "call": "y" * 2_000}
    assert [*unfit(honest)] == []
    for change, said in (
        ({"label": "x" * 301}, ("label", "has 301 characters, and may have 300")),
        ({"reason": "x" * 2_001}, ("reason", "has 2,001 characters, and may have 2,000")),
        ({"hardware": {"cpu": "x" * 101}}, ("hardware.cpu", "has 101 characters, and may have 100")),
        ({"versions": {"a\u202eb": "1"}}, ("versions.a\u202eb", r"holds \u202e, and must be text that can be seen")),
        ({"groups": [{"a": ["\x1b"]}]}, ("groups.a", r"holds \x1b, and must be text that can be seen")),
        ({"label": "a\nb"}, ("label", r"holds \n, and must be text that can be seen")),
        ({"reason": "a\rb"}, ("reason", r"holds \r, and must be text that can be seen")),
        ({"x" * 501: 1}, (f"{'x' * 77}...", "has 501 characters, and may have 500")),
    ):
        assert [*unfit({**honest, **change})] == [said]
    assert [*overlong(f"{'x' * 2_000}\n{'y' * 2_001}\n")] == [
        ("line 2", "has 2,001 characters, and may have 2,000; break it")
    ]


def test_validation_looks_at_the_length_of_texts(tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    (tmp_path / "NOTES.md").write_text("x" * 3_000)
    said = {(problem.file, problem.key) for problem in validate(tmp_path, tmp_path).problems}
    assert ("NOTES.md", "line 1") in said and (f"{folder.name}/{DOCUMENT}", "label") in said
    (tmp_path / "NOTES.md").write_bytes(b"\xff")
    assert any(
        "cannot be read" in str(each) for each in validate(tmp_path, tmp_path).problems if each.file == "NOTES.md"
    )
