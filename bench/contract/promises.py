"""What a check of a plug-in's promises finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.plugins import blame
from bench.plugins.registry import plugin_files


class ContractBroken(AssertionError):
    """A promise is not kept; the message says which and how."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    promise: str
    problem: str | None
    """None where the promise is kept."""
    looked_at: bool = True
    """False where an error kept the promise from being looked at: the problem is that error."""


def findings(plugin: type, promises: Mapping[str, Callable[[Any], None]]) -> Iterator[Finding]:
    """Say of each promise whether a plug-in keeps it."""
    for promise, keep in promises.items():
        try:
            keep(plugin)
        except ContractBroken as broken:
            yield Finding(promise, str(broken))
        except (
            Exception,
            SystemExit,
        ) as error:  # of one promise, and the others are still of interest
            yield Finding(promise, blame.told(error, plugin_files()), looked_at=False)
        else:
            yield Finding(promise, None)


def require(kept: bool, problem: str) -> None:
    """Break a promise, with a sentence, where it is not kept."""
    if not kept:
        raise ContractBroken(problem)
