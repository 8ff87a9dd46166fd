"""A folder of one's own photographs with links, loops, pipes and bombs in it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests import trees
from tests.attack.frame import TRIES, Try
from tests.attack.verdict import bench, calm, refused, require
from tests.test_walk import LOOPS

AREA = "photographs folder: bomb, links, pipe, loop"


def bomb(path: Path) -> None:
    """Write a PNG of 60,000 x 60,000 pixels that takes few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(7501) * 1000)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def _text(path: Path) -> None:
    path.symlink_to("/etc/passwd")


ODD: dict[str, Callable[[Path], object]] = {
    "a bomb": bomb,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a text": _text,
    "nothing": lambda path: path.write_bytes(b""),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a terabyte of nothing": lambda path: _sparse(path),
}


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _asked(own: Path, verb: str) -> tuple[object, ...]:
    if verb == "prepare":
        return ("data", "prepare", f"folder(path='{own}')", "--jobs", 1, "--size", 16, "--data-root", "data")
    return ("data", verb, f"folder(path='{own}')", "--data-root", "data")


def _prepared(put: Callable[[Path], object]) -> None:
    """The photograph is named, and nothing waits for it."""
    own = trees.folder(Path("own").absolute(), classes=2, largest=6, smallest=4, tested=2, users=None)
    put(own / "train" / "kind 0" / "odd.png")
    answer = calm(bench(*_asked(own, "prepare")))
    if answer.status == 0:
        listed = "odd.png" in answer.text or any("odd.png" in file.read_text() for file in own.rglob("*broken*"))
        require(listed or "kind 0/odd" in answer.text, f"it is not named: {answer.text[-300:]}")
    else:
        require("odd.png" in answer.text or "photograph" in answer.text, f"it is not named: {answer.text[-300:]}")


for name, put in ODD.items():
    TRIES.append(Try(area=AREA, name=name, act=partial(_prepared, put), memory=3, seconds=60))


def _looped(loop: str) -> None:
    own = Path("own").absolute()
    for kind in ("cats", "dogs"):
        (own / kind / "garden").mkdir(parents=True)
        for number in range(4):
            trees.photograph(own / kind / "garden" / f"{number}.jpg", kind == "cats", number)
    place, target = LOOPS[loop](own)
    if loop == "up by way of another":
        (own / "dogs" / "back").symlink_to(own / "cats")
    place.symlink_to(target)
    (calm if loop == "to itself" else refused)(bench(*_asked(own, "prepare")))  # which leads nowhere


for loop in LOOPS:
    TRIES.append(Try(area=AREA, name=f"a loop {loop}", act=partial(_looped, loop), memory=3))
