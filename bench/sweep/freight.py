"""Data that a machine lacks: packed here, of exactly what a run reads, sent by Ray in pieces, and kept there.

A pack lies below a machine's own folder of data, as `packs/FINGERPRINT.npz`, where the next sweep finds it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from bench import files
from bench.dataset import DataMissing, Splits
from bench.files import pack, source
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import label
from bench.splits.longtail import subsample
from bench.system import durable

if TYPE_CHECKING:
    from bench.sweep.run import Run

MOST_BYTES = 4 * 2**30
"""That are sent of one dataset: the driver holds them in Ray's memory."""
_PIECE = 2**26


class Lacks(Exception):
    """This machine does not have the data of a run."""


@dataclass(frozen=True)
class Freight:
    """A pack that may be sent for."""

    fingerprint: str
    nbytes: int
    pieces: tuple[Any, ...]
    """References of Ray to its bytes, in order: nobody fetches what it does not need."""


def packed(ray: Any, run: Run) -> Freight:
    """Pack what a run reads of its dataset, and give it to Ray.

    Raises:
        BadConfig: It is too large to send.
        DataMissing, DataDamaged: It cannot be read here.
    """
    splits = source.load(run.dataset, run.data_root)
    setting = run.setting
    tail = torch.from_numpy(subsample(splits.train_y, run.dataset.num_classes, setting.profile, setting.imbalance))
    rows = torch.cat([tail, *run.reserved(splits.labels)]).unique()
    if (nbytes := _bytes(splits, len(rows))) > MOST_BYTES:
        raise BadConfig(
            f"{label(run.dataset)}: the {nbytes / 2**30:.1f} GiB that a run reads are too much to send; put them below "
            "the folder of data of each machine ($BENCH_DATA there)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack.npz"
        made = pack.write(path, run.dataset, splits, rows, setting.profile, setting.imbalance)
        with path.open("rb") as stream:
            pieces = tuple(ray.put(piece) for piece in iter(partial(stream.read, _PIECE), b""))
        return Freight(made.fingerprint, path.stat().st_size, pieces)


def _bytes(splits: Splits, rows: int) -> int:
    """Count the bytes of images that a pack would hold."""
    image = splits.test_x[torch.arange(min(len(splits.test_y), 1))]
    return (rows + len(splits.test_y)) * image.nbytes // max(len(image), 1)


def located(run: Run, freight: Freight | None) -> tuple[Run, int]:
    """Find a run's data on this machine, below its own folder of data or at the driver's path, or send for them.

    Args:
        run: From elsewhere.
        freight: What may be sent for; None: nothing.

    Returns:
        The run with the place where its data are here, and how many bytes were sent for.

    Raises:
        Lacks: They are not here, and nothing may be sent for.
        DataDamaged: What came is not what was sent.
    """
    own = files.data_root()
    for root in dict.fromkeys((own, run.data_root)):
        if _has(run, root):
            return replace(run, data_root=root), 0
    if freight is None:
        raise Lacks
    path = own / "packs" / f"{freight.fingerprint}.npz"
    if path.is_file():
        return replace(run, data_root=path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.put(path, partial(_write, freight))
    try:
        pack.verify(path)
    except BaseException:
        durable.remove(path)
        raise
    return replace(run, data_root=path), freight.nbytes


def _has(run: Run, root: Path) -> bool:
    try:
        for dataset in run.datasets:
            source.labels(dataset, root)
            source.require(dataset, root, [])
    except (DataMissing, OSError):
        return False
    return True


def _write(freight: Freight, stream: BinaryIO) -> None:
    """Write the pieces of a pack, one at a time in memory."""
    for piece in _fetched(freight):
        stream.write(piece)


def _fetched(freight: Freight) -> Iterator[bytes]:
    import ray

    for reference in freight.pieces:
        yield ray.get(reference)
