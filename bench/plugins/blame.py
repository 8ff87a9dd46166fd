"""Of an error that nobody expected: what it says, and the last line that its user wrote."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Collection
from pathlib import Path

_OURS = Path(__file__).parents[1]
_MOST = 400
"""Characters of an error's first line; some print whole tensors in it."""
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def told(error: BaseException, plugins: Collection[str] = ()) -> str:
    """Say of which kind an error is, its first line, and where: `KeyError: 'head' (mine.py, line 7)`.

    That is the last line of a plug-in, or of another file that is neither this suite's nor a library's, or else the
    last line of all.

    Args:
        error: As it was caught.
        plugins: Files of plug-ins, which may lie among ours or a library's: `bench.plugins.registry.plugin_files`.
    """
    first = (str(error).strip() or "no message").splitlines()[0]
    first = first if len(first) <= _MOST else f"{first[: _MOST - 3]}..."
    said = f"{type(error).__name__}: {first}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or (isinstance(error, SyntaxError) and error.filename):  # which says it itself
        return said
    theirs = [frame for frame in frames if frame.filename in plugins or _is_foreign(frame.filename)]
    where = (theirs or frames)[-1]
    return f"{said} ({Path(where.filename).name}, line {where.lineno})"


def _is_foreign(file: str) -> bool:
    """Tell whether a file is neither this suite's nor a library's; `<string>` and the like are a library's."""
    folders = Path(file).parents
    return not file.startswith("<") and _OURS not in folders and _LIBRARIES.isdisjoint(folders)
