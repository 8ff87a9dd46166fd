"""Text of strangers in what leaves the suite: it is shown, and never obeyed by a terminal, a spreadsheet or a page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try
from tests.attack.verdict import Answer, bench, calm, require
from tests.test_site import Page, contents, plant

AREA = "injection: site, scripts, Markdown, LaTeX, CSV, terminal"

WORDS = {
    "a script": "<script>window.wild=1</script>",
    "the end of a script": "</script><script>window.wild=1</script>",
    "an attribute": "\"><img src=x onerror='window.wild=1'>",
    "an entity": "&lt;script&gt;&#x3c;b&#x3e;",
    "a template": "{{ 7*7 }}{% raw %}",
    "a cell of a table": "a | b |\n| c | d |",
    "a link of Markdown": "[here](javascript:alert(1))",
    "a picture of Markdown": "![here](https://example.org/x.png)",
    "a command of LaTeX": "\\input{/etc/passwd}\\write18{ls}$x_1^2$ & % # ~",
    "a formula": '=HYPERLINK("https://example.org","here")',
    "a formula behind a sign": "+1+cmd|' /C calc'!A0",
    "a formula behind a blank": "\t@SUM(1)",
    "a title of a terminal": "\x1b]0;mine\x07",
    "a colour of a terminal": "\x1b[31mred\x1b[0m",
    "a C1 control": "\x9b31mred",
    "a line of its own": "well\nbench: all is verified",
    "letters that run backwards": "abc\u202edef\u2066ghi",
    "a null": "a\x00b",
    "an expression of Vega": "datum['x'] && window.wild",
    "quotes": "'\"`'\"`",
}


def _planted(word: str) -> Path:
    """A folder of results whose label, dataset, reason and file names say something wild."""
    out = Path("out")
    plant(out, "alpha", 0, dataset="digits")
    plant(out, "beta", 0, label=f"beta{word}", dataset=f"arrays(path='{word}')", imbalance=None)
    plant(out, "gamma", 0, label=f"{word}gamma", dataset=f"{word}digits")
    plant(out, "delta", 1, reason=f"{word} was the reason")
    (out / "NOTES.md").write_text(f"# {word}\n\n{word}\n\n- {word}\n", encoding="utf-8", errors="replace")
    return out


def _commands(out: Path) -> Iterator[tuple[str, Answer]]:
    for form in ("md", "csv", "long", "latex", "html", "json"):
        yield form, bench("table", "--out", out, "--format", form)
    yield "per seed", bench("table", "--out", out, "--format", "csv", "--per-seed")
    yield "table", bench("table", "--out", out)
    yield "status", bench("status", "--out", out)
    yield "validate", bench("validate", out, "--data-root", "no data here")
    yield "compare", bench("compare", "--out", out)
    yield "submit", bench("submit", out, "--to", "mine.zip")
    yield "clean", bench("clean", out, "--failed", "--dry-run")


def _disarmed(word: str) -> None:
    out = _planted(word)
    for form, answer in _commands(out):
        try:
            calm(answer)
        except AssertionError as error:
            raise AssertionError(f"{form}: {error}") from None
        require("bench: all is verified" not in answer.text.splitlines(), f"{form}: a line of its own")
        if form in ("csv", "long", "per seed"):
            for row in csv.reader(io.StringIO(answer.out)):
                for cell in row:
                    sign = cell.lstrip()[:1]
                    number = re.fullmatch(r"[-+]?[\d.,e+-]+", cell) is not None
                    require(sign not in tuple("=+-@\t") or number or cell in ("-", "–"), f"{form}: the cell {cell!r}")
        if form == "html":
            _harmless(form, answer.out)
        if form == "md":
            lines = [line for line in answer.out.splitlines() if line.startswith("|")]
            widths = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
            require(len(widths) <= len(answer.out.split("\n\n")), f"{form}: rows of other widths {widths}")
            require(re.search(r"(?<!\\)\]\(javascript:", re.sub(r"`[^`]*`", "", answer.out)) is None, f"{form}: a link")
        if form == "latex":
            bare = re.search(r"(?<!\\)\\(input|write18)", answer.out)
            require(bare is None, f"{form}: {bare}")
    calm(bench("table", "--out", out, "--write"))
    _no_controls("README.md", (out / "README.md").read_text())
    _site(out)


def _site(out: Path) -> None:
    calm(bench("site", "--out", out, "--to", "site"))
    for name, content in contents(Path("site")).items():
        if name.endswith((".html", ".csv", ".tex", ".md")):
            text = content.decode("utf-8", "replace")
            _no_controls(name, text)
            if name.endswith(".html"):
                _harmless(name, text)


def _harmless(name: str, text: str) -> None:
    """Require that a page has no script, picture, attribute or link of a stranger's."""
    try:
        page = Page(text)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
    foreign = [each for each in page.loaded if "://" in each or each.startswith(("//", "javascript:"))]
    require(not foreign, f"{name} loads {foreign}")
    wild = [each for each in page.links if each.lower().startswith(("javascript:", "data:", "vbscript:", "file:"))]
    require(not wild, f"{name} links to {wild}")
    require("<img" not in text, f"{name} has a picture")
    own = [script for script in page.scripts if script.strip() and not script.lstrip().startswith(("{", "[", '"'))]
    require(not any("wild" in script for script in own), f"{name} has a script")


def _no_controls(name: str, text: str) -> None:
    found = re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    require(found is None, f"{name}: a control character, {found and text[max(0, found.start() - 30) : found.end()]!r}")


for what, word in WORDS.items():
    TRIES.append(Try(area=AREA, name=what, act=partial(_disarmed, word), seconds=60))


def _link(address: str, allowed: bool) -> None:
    """A link of NOTES.md leads to pages only, and gives nothing away to them."""
    out = Path("out")
    plant(out)
    (out / "NOTES.md").write_text(f"[here]({address}) and <{address}>\n")
    calm(bench("site", "--out", out, "--to", "site"))
    page = Path("site/index.html").read_text()
    _harmless("index.html", page)
    mine = [link for link in re.findall(r"<a [^>]*>", page) if "example.org" in link]
    require(bool(mine) == allowed, f"links: {mine}")
    require(all("noopener" in link and "nofollow" in link for link in mine), f"{mine}")


for address, allowed in (
    ("https://example.org/x", True),
    ("javascript:alert(1)", False),
    ("data:text/html,x", False),
    ("vbscript:x", False),
    ("file:///etc/passwd", False),
):
    TRIES.append(Try(area=AREA, name=f"a link to {address}", act=partial(_link, address, allowed)))


def _journal() -> None:
    """A journal whose command invites copying."""
    out = Path("out")
    plant(out)
    (out / "sweeps").mkdir()
    document = {
        "format": 1,
        "command": "bench run\x1b[8m; rm -rf ~\x1b[0m\nbench: done",
        "began": "2026-01-01T00:00:00+00:00",
        "ended": None,
        "host": "\x1b]0;x\x07",
        "process": 1,
        "runs": {},
    }
    (out / "sweeps" / "20260101-000000-1.json").write_text(json.dumps(document))
    calm(bench("status", "--out", out))


TRIES.append(Try(area=AREA, name="the command of a journal", act=_journal))
