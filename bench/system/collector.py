"""Python's garbage collector, told when there is nothing for it to find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Keep the collector from looking at many new objects that all live, or all go by themselves."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def settling() -> Iterator[None]:
    """Make what lasts as long as the process, such as modules, of which the collector need never know. For a process of
    our own: in another's, who looks for what refers to an object no longer finds it.
    """
    with paused():
        yield
        gc.freeze()
