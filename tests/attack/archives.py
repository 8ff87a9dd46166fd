"""Archives from a server that reach out of their folder, or become more than they can honestly be."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try
from tests.attack.verdict import Fell, require
from tests.test_fetch import MALICIOUS, MEMBERS, md5, named, negative, sparse, tarred, zipped

AREA = "archives from a server"
MB = 10**6


def zeros(nbytes: int, mode: str) -> bytes:
    """Make an archive of zeros, a piece at a time."""
    stream = io.BytesIO()
    if mode == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("zeros", "w") as member:
            for _ in range(nbytes // MB):
                member.write(bytes(MB))
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode=mode) as packed:  # type: ignore[call-overload]
        info = tarfile.TarInfo("zeros")
        info.size = nbytes
        packed.addfile(info, _Zeros(nbytes))
    return stream.getvalue()


class _Zeros(io.RawIOBase):
    def __init__(self, nbytes: int) -> None:
        self.left = nbytes

    def read(self, size: int = -1) -> bytes:
        size = min(size if size >= 0 else self.left, self.left)
        self.left -= size
        return bytes(size)


def renamed(name: str) -> bytes:
    """Make a zip whose member is called what zipfile would not write."""
    packed = zipped({"a" * len(name): b"!"})
    return packed.replace(b"a" * len(name), name.encode())


def overlapping() -> bytes:
    """Make a zip that lists one member a thousand times, as the bombs without recursion do."""
    packed = zeros(10 * MB, "zip")
    place = packed.index(b"PK\x01\x02")
    end = packed.index(b"PK\x05\x06")
    entry = packed[place:end]
    many = entry * 1000
    tail = bytearray(packed[end:])
    tail[8:16] = struct.pack("<HHI", 1000, 1000, len(many))
    return packed[:place] + many + bytes(tail)


MORE: dict[str, Callable[[], bytes]] = {
    "a member below a link": lambda: _linked(),
    "a pipe": lambda: tarred({"top/evil": b""}, type=tarfile.FIFOTYPE),
    "a block device": lambda: tarred({"top/evil": b""}, type=tarfile.BLKTYPE),
    "a name with a line of its own": lambda: tarred({"top/a\nb": b"!"}),
    "a zip with a name that climbs by backslashes": lambda: renamed("..\\..\\evil"),
    "a zip that lists one member a thousand times": overlapping,
    "300 MB of zeros in a zip": lambda: zeros(300 * MB, "zip"),
    "300 MB of zeros in a tar.gz": lambda: zeros(300 * MB, "w:gz"),
    "300 MB of zeros in a tar.xz": lambda: zeros(300 * MB, "w:xz"),
    "300 MB of zeros in a tar.bz2": lambda: zeros(300 * MB, "w:bz2"),
    "a hole of a terabyte": lambda: sparse(2**33 - 1),
    "a name of 100 MB": lambda: named(10**8),
    "a tar in a tar in a gzip": lambda: gzip.compress(gzip.compress(tarred(MEMBERS, "w"))),
    "a zip that was cut off": lambda: zipped(MEMBERS)[:-30],
    "a size below zero": lambda: negative(),
    "a file and a folder of one name": lambda: tarred({"top": b"!", "top/one": b"!"}),
}
_TAKEN = {"a zip with a name that climbs by backslashes"}
"""May be unpacked, as long as it stays inside: elsewhere a backslash is a letter."""


def _linked() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        link = tarfile.TarInfo("top")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        archive.addfile(link)
        info = tarfile.TarInfo("top/evil")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"!"))
    return stream.getvalue()


def _unpacked(make: Callable[[], bytes], taken: bool) -> None:
    from bench import DataDamaged, DataMissing
    from bench.files.download import Remote, fetch_all

    Path("secret").write_bytes(b"secret")
    folder = Path("data/root").absolute()
    folder.mkdir(parents=True)
    content = make()
    (folder / "archive").write_bytes(content)
    before = {path for path in Path().rglob("*")}
    try:
        fetch_all([Remote("http://127.0.0.1:9/archive", "archive", md5(content), unpack=True)], folder)
    except (DataDamaged, DataMissing) as error:
        require("\n" not in str(error) and len(str(error)) < 600, f"many words: {error}")
        refused = True
    else:
        refused = False
    new = [path for path in Path().rglob("*") if path not in before]
    outside = [path for path in new if not path.resolve().is_relative_to(folder)]
    require(not outside, f"it has written {outside}")
    require(not any(path.is_symlink() for path in new), "it has made a link")
    require(Path("secret").read_bytes() == b"secret" and not Path("/{folder}").exists(), "it has written elsewhere")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - len(content)
    require(size < 150 * MB, f"{size:,} bytes were unpacked of {len(content):,}")
    if not refused and not taken:
        raise Fell("it is taken")


for kind, content in MALICIOUS.items():
    TRIES.append(Try(area=AREA, name=kind, act=partial(_unpacked, content.__bytes__, False)))
for kind, make in MORE.items():
    TRIES.append(Try(area=AREA, name=kind, act=partial(_unpacked, make, kind in _TAKEN), seconds=90))
