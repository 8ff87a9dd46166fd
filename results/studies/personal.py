"""Write the tables of personal.md: algorithms by each view of their personal models, and what a view does to the order.

    python results/studies/personal.py RUNS > tables.md

RUNS is a folder of results; each combination of dataset and alpha in it is a table, and views are compared on the
algorithms that have all of them.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from scipy.stats import kendalltau
from tabulate import tabulate

from bench.results import records
from bench.results.layout import title
from bench.results.leaderboard import Leaderboard, leaderboards
from bench.results.statistics import NOTHING

VIEWS = {
    "balanced": "personal.balanced",
    "personal": "personal",
    "few": "personal.few",
    "drawn": "personal.drawn",
    "never": "personal.never",
    "after": "personal:after",
    "balanced, after": "personal:after.balanced",
    "generic": "generic",
    "generic few": "generic.few",
}
_SHOWN = 5


def table(board: Leaderboard) -> str:
    """Lay out every algorithm by every view: means over seeds in percent, in the order of `balanced`."""
    cells = [[f"`{row.label}`", *(_percent(row.metrics.get(key, NOTHING).mean) for key in VIEWS.values())]
             for row in board.rows]  # fmt: skip
    return tabulate(
        cells, ["algorithm", *VIEWS], "pipe", disable_numparse=True, colalign=["left", *["right"] * len(VIEWS)]
    )


def orders(board: Leaderboard) -> str:
    """Compare the orders of two views: Kendall's tau, pairs that change places, and who leads."""
    known = {
        view: {row.label: mean for row in board.rows if (mean := row.metrics.get(key, NOTHING).mean) is not None}
        for view, key in VIEWS.items()
    }
    lines = []
    for one, other in itertools.combinations([view for view in VIEWS if "generic" not in view], 2):
        both = [label for label in known[one] if label in known[other]]
        if len(both) < 2:
            continue
        pairs = list(itertools.combinations(both, 2))
        turned = sum((known[one][a] - known[one][b]) * (known[other][a] - known[other][b]) < 0 for a, b in pairs)
        tau = kendalltau([known[one][a] for a in both], [known[other][a] for a in both]).statistic
        lines.append([one, other, f"{tau:.2f}", f"{turned} of {len(pairs)}"])
    leaders = [
        [view, ", ".join(f"`{label}`" for label in sorted(found, key=lambda label: -found[label])[:_SHOWN])]
        for view, found in known.items()
        if found
    ]
    return "\n\n".join((
        tabulate(leaders, ["view", f"first {_SHOWN}"], "pipe", disable_numparse=True),
        tabulate(lines, ["view", "another", "Kendall's tau", "pairs turned"], "pipe", disable_numparse=True),
    ))  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def main(out: Path) -> None:
    """Print the tables of a folder of results."""
    found, damaged = records.read_all(out)
    for sentence in damaged:
        print(sentence, file=sys.stderr)
    for board in leaderboards(found):
        print(f"### {title(board)}, {len(board.seeds)} seeds\n\n{table(board)}\n\n{orders(board)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
