"""Notes that are slow to parse, or to render."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try
from tests.attack.verdict import bench, calm
from tests.test_site import plant

AREA = "Markdown of NOTES.md that is slow to parse"
N = 20_000
TEXTS = {
    "brackets": "[" * N,
    "brackets that close": "[" * N + "]" * N,
    "stars": "*a_" * N,
    "quotes": ">" * N,
    "lists in lists": "".join(" " * (2 * n) + "- a\n" for n in range(400)),
    "backticks": "".join("`" * n + " " for n in range(600)),
    "links": "[a](" * N,
    "pictures": "![" * N,
    "entities": "&" * N,
    "a wide table": "|" + "a|" * 3000 + "\n|" + "-|" * 3000 + "\n",
    "a long table": "|a|\n|-|\n" + "|a|\n" * N,
    "references": "".join(f"[a{n}]: x\n" for n in range(N // 4)) + "[a1]" * N,
    "emphasis that never ends": "**a *b " * N,
    "headings": "# a\n" * N,
    "tildes": "~~~\n" * N,
    "autolinks": "<a:" * N,
}


def _parsed(text: str) -> None:
    out = Path("out")
    plant(out)
    (out / "NOTES.md").write_text(text)
    calm(bench("table", "--out", out, "--write"))
    calm(bench("site", "--out", out, "--to", "site"))


for name, text in TEXTS.items():
    TRIES.append(Try(area=AREA, name=name, act=partial(_parsed, text), seconds=30))
