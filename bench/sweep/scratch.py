"""Folders of one process's own: nobody else enters them, and they go with it, or later if it was killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.results.claims import Claimed, claim
from bench.system import durable


@contextmanager
def folder(where: Path, prefix: str, end: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """Give a new folder, and remove it in the end; what processes that were killed have left is removed first.

    Args:
        where: It is made there.
        prefix: Of its name, and of those that are looked for.
        end: Ends what lives in a folder before it goes.

    Raises:
        OSError: It cannot be made.
    """
    _tidy(where, prefix, end)
    with ExitStack() as held:
        made = _made(where, prefix, held)
        held.callback(durable.remove, made)
        held.callback(end, made)
        yield made


def _made(where: Path, prefix: str, held: ExitStack) -> Path:
    """Make a folder that is claimed as long as this process lives."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        with suppress(Claimed, FileNotFoundError):  # somebody took it for one that was left, and removes it
            held.enter_context(claim(made))
            return made


def _tidy(where: Path, prefix: str, end: Callable[[Path], None]) -> None:
    """Remove what processes that were killed have left of ours."""
    if not hasattr(os, "getuid"):
        return
    for left in where.glob(f"{prefix}*"):
        with suppress(OSError, Claimed):
            if left.lstat().st_uid == os.getuid() and left.is_dir() and not left.is_symlink():
                with claim(left):
                    end(left)
                    durable.remove(left)
