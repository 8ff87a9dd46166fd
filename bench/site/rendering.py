"""How text comes onto a page: templates, notes in Markdown, values."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import bench
from bench.plugins.ledger import TIERS
from bench.results.columns import ABSENT
from bench.system.text import lines, plain

if TYPE_CHECKING:
    from jinja2 import Environment

NAME = "bench"
TITLE = "Personalised and long-tailed federated learning"
_TIERS = ", ".join(f"{tier} {what}" for tier, what in TIERS.items())


def many(number: int, one: str, several: str | None = None) -> str:
    """Count things."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def markdown(text: str) -> str:
    """Turn a person's notes into HTML without tags of their own, pictures, or headings above our own. Their links lead
    anywhere: no page there is told of ours, nor vouched for.
    """
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(lines(text))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        for inner in token.children or ():
            if inner.type == "link_open":
                inner.attrSet("rel", "nofollow noopener")
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def render(template: str, root: str, **content: object) -> str:
    """Fill a template in; `root` is the way from the page to the site's first folder."""
    page = _environment().get_template(template)
    return page.render(root=root, name=NAME, site=TITLE, version=bench.__version__, tiers=_TIERS, **content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bench.site"),
        autoescape=True,  # a label or a reason may hold anything
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "sort_keys": False}
    return environment


def _plain(value: object) -> object:
    """Write text that is no markup yet on one line, before it is escaped."""
    from markupsafe import Markup

    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def spell(value: object) -> str:
    """Spell a value of a document."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(spell, value))
    return ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)
