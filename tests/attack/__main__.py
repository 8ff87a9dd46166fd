"""The attack: `python -m tests.attack [--area NAME] [--only PATTERN] [--list] [--jobs N] [--seed N] [--json FILE]`.

Some 700 tries in about twenty minutes on two cores. The exit status is 1 if anything fell that is not known to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.attack import frame, recipes


def main() -> None:
    """Try what was asked for, and print the report's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", action="append", help="of the tries, or its beginning; may be given several times")
    parser.add_argument("--only", metavar="PATTERN", help="of the shell, for 'area/name': '*/*bomb*'")
    parser.add_argument("--list", action="store_true", help="name the tries, and try nothing")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--jobs", type=int, default=2, help="tries at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where outcomes go")
    given = parser.parse_args()
    recipes.load(given.seed)
    tries = [each for area in given.area or [None] for each in frame.chosen(area, given.only)]
    if given.list:
        for each in tries:
            print(f"{each.area}/{each.name}")
        print(f"{len(tries)} tries in {len(frame.areas(tries))} areas")
        return
    if not tries:
        parser.error("nothing is called so; --list names all tries")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        ends = frame.attack(tries, Path(place).resolve(), given.jobs, given.seed, tell)
    if given.json is not None:
        given.json.write_text(frame.stored(ends))
    order = frame.areas(tries)
    ends.sort(key=lambda end: order.index(end.area))
    print(f"\n{frame.table(ends)}\n\n{time.monotonic() - began:.0f} s, seed {given.seed}")
    sys.exit(1 if frame.unexpected(ends) else 0)


def tell(end: frame.Outcome) -> None:
    """Say what became of a try."""
    word = f"skipped ({end.skipped})" if end.skipped else "held" if end.fell is None else "FELL"
    print(f"{end.area}/{end.name}: {word}, {end.seconds:.1f} s" + (f": {end.fell}" if end.fell else ""), flush=True)


if __name__ == "__main__":
    main()
