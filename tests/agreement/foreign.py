"""Opening a checkout of somebody's code: its modules, with nothing in the place of what is not installed."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import runpy
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch


class Opened:
    """A checkout whose modules can be imported and whose scripts can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str) -> Any:
        """Import a module."""
        return importlib.import_module(name)

    def script(self, name: str) -> dict[str, Any]:
        """Run a script as one does from a shell, and give what its global names are in the end."""
        return runpy.run_path(str(self.folder / name), run_name="__main__")


@contextlib.contextmanager
def opened(
    folder: Path, seed: int, absent: tuple[str, ...] = (), replaced: Mapping[str, Any] | None = None
) -> Iterator[Opened]:
    """Open a checkout: its folder leads the path, it works in an empty folder, on the CPU, from a seed, unheard.

    Args:
        folder: Where its modules lie.
        seed: Of torch's, numpy's and Python's generators.
        absent: Modules that nothing needs of what is called; they do nothing whatever is asked of them.
        replaced: Modules in whose place others are.
    """
    environment, path = dict(os.environ), list(sys.path)
    instead: dict[str, Any] = {**{name: MagicMock() for name in absent}, **(replaced or {})}
    before = {name: sys.modules[name] for name in sys.modules if name not in instead}
    covered = {name: sys.modules[name] for name in instead if name in sys.modules}
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(tempfile.TemporaryDirectory(prefix="agreement-"))
        stack.enter_context(contextlib.chdir(here))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for owner in (torch.nn.Module, torch.Tensor):
            stack.enter_context(patch.object(owner, "cuda", lambda this, *_: this))
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        logging.disable(logging.CRITICAL)
        sys.path.insert(0, str(folder))
        sys.modules.update(instead)
        try:
            yield Opened(folder)
        finally:
            logging.disable(logging.NOTSET)
            for handler in {*root.handlers} - {*handlers}:
                root.removeHandler(handler)
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
            new = sys.modules.keys() - before.keys()
            for name in [name for name in new if name in instead or _lies_in(sys.modules[name], folder)]:
                del sys.modules[name]
            sys.modules.update(covered)


def _lies_in(module: Any, folder: Path) -> bool:
    """Tell whether a module, or a package that is only a folder, is of a checkout."""
    places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", ()))]
    return any(place.startswith(f"{folder}{os.sep}") for place in places if isinstance(place, str))


def options(values: Mapping[str, object]) -> Any:
    """Give options as a command line's parser does."""
    return SimpleNamespace(**values)
