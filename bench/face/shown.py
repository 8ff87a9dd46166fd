"""What the command prints, as text and as HTML."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 160
"""Columns where there is no terminal: fewer would cut."""


def as_text(parts: Iterable[RenderableType], width: int = WIDTH) -> str:
    """Write as on a terminal without colours."""
    from rich.console import Console

    sink = io.StringIO()
    console = Console(file=sink, width=width, force_jupyter=False, force_terminal=False, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def as_html(parts: Iterable[RenderableType], width: int = WIDTH) -> str:
    """Write as on a terminal, with its bold and faint letters, for a notebook."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, record=True, force_jupyter=False, force_terminal=False)
    for part in parts:
        console.print(part)
    form = '<pre style="font-family: monospace; line-height: 1.25; overflow-x: auto">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=form)
