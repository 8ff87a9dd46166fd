"""Leaderboards as one picture that needs no script: for a page such as the front page of a repository."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files as resources
from typing import Any

from bench.results.among import best_rows
from bench.results.layout import title
from bench.results.leaderboard import Leaderboard
from bench.site import drawing
from bench.site.charts import seed_by_seed

_WIDTH = 420
"""Of the part of a line that numbers are drawn in, in pixels."""
_ROOM = 1.0
"""Percentage points beyond the lowest and the highest number."""
_FONT = "Helvetica Neue, Segoe UI, Roboto, Liberation Sans, Arial, sans-serif"
_DATA = re.compile(r"<metadata>(.*?)</metadata>", re.DOTALL)


def drawn(boards: Sequence[Leaderboard], key: str, most: int | None = None) -> str:
    """Draw mean, interval and single seeds of the rows of leaderboards, one below the other.

    Args:
        boards: At least one of which a row has the metric.
        key: Of the metric.
        most: Rows of each, the best; None: all.

    Returns:
        An SVG, in the colours of the site, light or dark as the reader's system is; it holds its numbers.

    Raises:
        ValueError: No row has the metric.
    """
    import vl_convert

    shown = numbers(boards, key, most)
    if not shown:
        raise ValueError(f"no row has {key}")
    spec = {"vconcat": [_panel(part, f"{key.rpartition('.')[2]} accuracy, %") for part in shown], "config": _config()}
    svg = vl_convert.vegalite_to_svg(spec)
    held = f"<metadata>{html.escape(json.dumps(shown), quote=False)}</metadata>"
    return re.sub(r"(<svg[^>]*>)", lambda found: f"{found[1]}{held}<style>{_colours()}</style>", svg, count=1) + "\n"


def numbers(boards: Sequence[Leaderboard], key: str, most: int | None = None) -> list[dict[str, Any]]:
    """Give what `drawn` draws: the title, values and dots of each leaderboard."""
    found = []
    for board in boards:
        values, dots = seed_by_seed(best_rows(board, most), key)
        if values:
            found.append({"title": title(board), "values": values, "dots": dots})
    return found


def _panel(part: dict[str, Any], axis: str) -> drawing.Spec:
    values, dots = part["values"], part["dots"]
    seen = [value[end] for value in values for end in ("low", "mean", "high") if value[end] is not None]
    seen += [dot["value"] for dot in dots if dot["value"] is not None]
    scale = {"domain": [max(0.0, min(seen) - _ROOM), min(100.0, max(seen) + _ROOM)], "nice": False}
    order = [value["algorithm"] for value in values]
    spec = drawing.dots_and_bars(values, dots, order, title=axis, domain=scale)
    heading = {"text": part["title"], "anchor": "start", "frame": "group", "fontSize": 12, "fontWeight": "normal"}
    del spec["autosize"]  # which is for a page that may be narrow
    return {**spec, "title": heading, "width": _WIDTH}


def read(svg: str) -> list[dict[str, Any]]:
    """Read the numbers that a picture of `drawn` holds.

    Raises:
        ValueError: It holds none.
    """
    held = _DATA.search(svg)
    if held is None:
        raise ValueError("it holds no numbers")
    parts: list[dict[str, Any]] = json.loads(html.unescape(held[1]))
    return parts


def _config() -> dict[str, Any]:
    words = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "titleFontWeight": "normal"}
    lines = {"domainColor": "var(--rule)", "tickColor": "var(--rule)", "gridColor": "var(--grid)"}
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "title": {"color": "var(--ink)"},
        "axis": {**words, **lines, "labelFontSize": 11, "titleFontSize": 11},
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "labelColor": "var(--ink)"},
    }


def _colours() -> str:
    """Take the colours of the site's style sheet, of light pages and of dark ones."""
    sheet = (resources("bench.site") / "static" / "style.css").read_text(encoding="utf-8")
    light, dark = (" ".join(re.findall(r"--[\w-]+: (?:#|rgb)[^;]*;", block)) for block in _roots(sheet))
    return f":root{{{light}}} @media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _roots(sheet: str) -> list[str]:
    return re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)[:2]
