"""Many runs looked at side by side, by several processes; a few by this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.sweep.cluster import Payload, packed, spread, unpacked
from bench.validation.found import Inspected
from bench.validation.inspection import inspect

Place = tuple[Path, Path | None]
"""A run's folder, and the pack that it is in, as for `inspect`."""

_FEW = 200
"""Runs that are looked at before another process has begun: that takes it some seconds."""
_AT_A_TIME = 50


def inspect_all(
    places: Sequence[Place],
    root: Path,
    plugins: Sequence[Path] = (),
    jobs: int | None = None,
    told: Callable[[int], None] = lambda runs: None,
) -> list[Inspected]:
    """Look at runs.

    Args:
        places: Of the runs; neighbours in a pack should be neighbours here, as their rows are read together.
        root: Of all datasets.
        plugins: Files of the plug-ins that were loaded, for other processes.
        jobs: Processes; None: as many as the machine holds, or this one for few runs.
        told: Told how many runs more have been looked at, now and then.

    Returns:
        In the order of the places.
    """
    found: dict[str, Inspected] = {}
    parts = [places[first : first + _AT_A_TIME] for first in range(0, len(places), _AT_A_TIME)]

    def done(_: object, those: Sequence[Inspected]) -> None:
        found.update({one.folder.name: one for one in those})
        told(len(those))

    if jobs == 1 or (jobs is None and len(places) < _FEW):
        for part in parts:
            done(part, _look(root, part))
    else:
        spread(_look_elsewhere, [packed(plugins, (root, part)) for part in parts], jobs, done)
    return [found[folder.name] for folder, _ in places]


def _look(root: Path, places: Sequence[Place]) -> list[Inspected]:
    return [inspect(folder, root, pack) for folder, pack in places]


def _look_elsewhere(payload: Payload) -> list[Inspected]:
    import torch

    torch.set_num_threads(1)
    with unpacked(payload) as (root, places):
        return _look(root, places)
