"""Pictures of a split: in the terminal with block characters, and as a file with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.splits.longtail import Rows

if TYPE_CHECKING:
    from rich.table import Table
    from scipy.sparse import csr_array

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_HEIGHT = 6
_DRAWN = 2000
"""Clients in a picture."""
_COLOURS = {"many": "#3b6fb6", "medium": "#e0a030", "few": "#c0504d"}


def bars(counts: Rows, width: int) -> list[str]:
    """Draw a histogram of positive numbers, one or more columns for each, in `_HEIGHT` lines of text.

    Args:
        counts: (C,). If there are more than `width` a column stands for the mean of neighbours.
        width: Columns at most.
    """
    columns = _fit(counts[None], width, 4)[0]
    eighths = np.ceil(columns / max(float(columns.max()), 1.0) * _HEIGHT * 8).astype(int)
    return [
        "".join(_EIGHTHS[level] for level in np.clip(eighths - 8 * line, 0, 8)) for line in reversed(range(_HEIGHT))
    ]


def strips(table: Rows, width: int) -> list[str]:
    """Draw a line of shaded blocks for each row of a table: blank is none, full is the largest cell.

    Args:
        table: (K, C) counts. If C is above `width` a block stands for the mean of neighbouring classes.
        width: Blocks of a line at most.
    """
    cells = _fit(table, width, 2)
    # The square root keeps a handful of images visible beside hundreds.
    shade = np.ceil(np.sqrt(cells / max(float(cells.max()), 1.0)) * (len(_SHADES) - 1)).astype(int)
    return ["".join(_SHADES[level] for level in row) for row in shade]


def _fit(table: Rows, width: int, most: int) -> npt.NDArray[np.float64]:
    """Widen the columns of a (K, C) table up to `most` times, or average neighbours, to fill `width`."""
    classes = table.shape[1]
    if classes <= width:
        return np.repeat(table.astype(np.float64), max(1, min(most, width // classes)), axis=1)
    starts = np.arange(0, classes, -(-classes // width))
    return np.add.reduceat(table, starts, axis=1) / np.diff(starts, append=classes)


def client_table(document: dict[str, Any], table: csr_array, width: int, most: int = 60) -> Table:
    """Lay out the clients of a split: sizes, and a strip of their classes.

    Args:
        document: Of `bench.splits.split.describe`.
        table: (K, C) training images of each class at each client.
        width: Columns of the terminal.
        most: Clients shown.
    """
    from rich import box
    from rich.table import Table

    layout = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("client", "train", "test", "classes"):
        layout.add_column(heading, justify="right", no_wrap=True)
    layout.add_column(f"class 0 to {table.shape[1] - 1}", no_wrap=True)
    clients = document["clients"][:most]
    cells = table[:most].toarray()
    for k, (client, strip) in enumerate(zip(clients, strips(cells, max(width - 44, 10)), strict=True)):
        layout.add_row(str(k), *(f"{client[key]:,}" for key in ("train", "test", "classes")), strip)
    if len(document["clients"]) > most:
        layout.caption = f"and {len(document['clients']) - most:,} more; --json has all"
    return layout


def spans(classes: list[int], most: int = 12) -> str:
    """Spell ascending class numbers: "0-3, 7"; a dash if there are none, and dots after so many pieces."""
    runs: list[list[int]] = []
    for c in classes:
        if runs and c == runs[-1][-1] + 1:
            runs[-1].append(c)
        else:
            runs.append([c])
    pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(pieces[:most] + ["..."] * (len(pieces) > most)) or "–"


def save(path: Path, title: str, document: dict[str, Any], table: csr_array) -> None:
    """Draw the long tail and the clients' classes to a file whose ending says its format (PNG, PDF, SVG).

    Args:
        path: Of the file; its folder is made.
        title: Written above.
        document: Of `bench.splits.split.describe`.
        table: (K, C) training images of each class at each client.

    Raises:
        OSError: It cannot be written.
        ValueError: Matplotlib does not know the ending.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 2))
    counts = document["class_counts"]
    for name, classes in document["groups"].items():
        label = f"{name}: {spans(classes)}"
        above.bar(classes, [counts[c] for c in classes], color=_COLOURS[name], label=label, width=0.9)
    above.set(title=title, ylabel="training images", xlim=(-0.5, len(counts) - 0.5))
    above.legend(frameon=False)
    step = -(-table.shape[0] // _DRAWN)  # every so many of very many clients
    cells = np.ma.masked_equal(table[::step].toarray(), 0)
    image = below.imshow(cells, aspect="auto", interpolation="nearest", norm=LogNorm(1, max(2, table.max())))
    below.set(xlabel="class", ylabel="client" if step == 1 else f"client, every {step}th")
    figure.colorbar(image, ax=below, label="training images; white is none")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
