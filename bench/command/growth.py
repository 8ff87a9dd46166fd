"""What `bench speed --growth` leaves: a table in Markdown and a picture of how time grows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.speed.growth import QUANTITIES
from bench.system.text import plain

TABLE, PICTURE = "growth.md", "growth.png"
_COLOURS = {"start": "#e0a030", "round": "#3b6fb6", "evaluation": "#c0504d"}


def markdown(document: Mapping[str, Any]) -> str:
    """Write a table for each axis: milliseconds of each quantity by value, and the exponents below.

    Args:
        document: Of `bench.speed.growth.measure`.
    """
    machine, versions = document["machine"], document["versions"]
    lines = [
        "# How time grows",
        "",
        f"Measured by `bench speed --growth` on one thread of {plain(machine['cpu'])} ({machine['cores']} cores), "
        f"torch {versions['torch']}, commit {document['commit'] or '–'}: medians of {document['repeats']} turns, in "
        "milliseconds; the exponent is the slope of a line through the logarithms.",
        "",
        *(f"* *{quantity}*: {what}" for quantity, what in QUANTITIES.items()),
    ]
    for axis, found in document["axes"].items():
        rows = [
            [f"{value:,}", *(f"{1000 * found[quantity]['seconds'][k]['median']:,.1f}" for quantity in QUANTITIES)]
            for k, value in enumerate(found["values"])
        ]
        rows.append(["exponent", *(f"{found[quantity]['exponent']:.2f}" for quantity in QUANTITIES)])
        align = ("right",) * (1 + len(QUANTITIES))
        lines += ["", tabulate(rows, [axis, *QUANTITIES], tablefmt="pipe", disable_numparse=True, colalign=align)]
    return "\n".join([*lines, ""])


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the table and the picture into a folder, which is made.

    Args:
        folder: Where.
        document: Of `bench.speed.growth.measure`.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(markdown(document), encoding="utf-8")
    axes = document["axes"]
    figure = Figure(figsize=(4 * len(axes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        for quantity in QUANTITIES:
            medians = [each["median"] for each in found[quantity]["seconds"]]
            label = f"{quantity}, exponent {found[quantity]['exponent']:.2f}"
            panel.plot(found["values"], medians, marker="o", color=_COLOURS[quantity], label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.xaxis.set_minor_formatter(NullFormatter())  # between powers of ten labels would lie on each other
        panel.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("seconds")
    figure.savefig(folder / PICTURE, dpi=150)
