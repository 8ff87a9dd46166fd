"""Downloads: servers that cut, change and lie, processes that are killed, archives that reach out of their folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import DataDamaged, DataMissing
from bench.command.data import data_command
from bench.files import archives, download
from bench.files.download import Remote, fetch_all, reporting
from bench.plugins.registry import DATASETS
from bench.system import reading

ROOT = Path(__file__).parents[1]
CONTENT = bytes(np.random.RandomState(0).randint(0, 256, 1_000_000, dtype=np.uint8))


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass
class Server:
    """A web server on this machine, and how it misbehaves."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: str | None = '"first"'
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers end."""
    answers: list[int] = field(default_factory=list)
    """Status of the next answers, which then have no content."""
    pause: float = 0.0
    """Seconds between two pieces of 16 KiB."""
    length: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of each request."""
    sent: int = 0

    def __call__(self, name: str, content: bytes, checksum: bool = True, **more: Any) -> Remote:
        """Serve a file."""
        self.files[f"/{name}"] = content
        return Remote(f"{self.address}/{name}", name, md5(content) if checksum else None, **more)


class Handler(BaseHTTPRequestHandler):
    state: Server

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        state, content = self.state, self.state.files.get(self.path)
        wanted = self.headers["Range"]
        state.asked.append((self.path, wanted))
        if state.answers or content is None:
            self.send_error(state.answers.pop(0) if state.answers else 404)
            return
        start = 0
        if wanted and state.ranges and self.headers["If-Range"] in (None, state.etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if state.length:
            self.send_header("Content-Length", str(len(content) - start))
        if state.etag:
            self.send_header("ETag", state.etag)
        self.end_headers()
        rest = content[start:]
        rest = rest[: state.cuts.pop(0)] if state.cuts else rest
        for begin in range(0, len(rest), 1 << 14):
            self.wfile.write(rest[begin : begin + (1 << 14)])
            state.sent += len(rest[begin : begin + (1 << 14)])
            time.sleep(state.pause)


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is part of the test."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve on a free port, and do not wait between attempts."""
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
    yield from serving()


def serving() -> Iterator[Server]:
    state = Server()
    with Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state})) as http:
        state.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def everything(folder: Path) -> dict[str, bytes]:
    """Give all files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Transfers --------------------------------------------------------------------------------------------------


def test_a_download_is_checked_and_made_once(server: Server, tmp_path: Path) -> None:
    remote = server("sub/file.bin", CONTENT, bytes=len(CONTENT))
    told: list[tuple[str, int, int | None]] = []
    fetch_all([remote], tmp_path / "new", report=lambda *news: told.append(news))
    assert everything(tmp_path / "new") == {"sub/file.bin": CONTENT}
    assert ("sub/file.bin", len(CONTENT), len(CONTENT)) in told
    assert told[-1] == ("checking sub/file.bin", len(CONTENT), len(CONTENT))
    fetch_all([remote], tmp_path / "new")
    assert len(server.asked) == 1


def test_a_cut_connection_is_taken_up_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 300_000]
    fetch_all([server("file", CONTENT)], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}
    assert [wanted for _, wanted in server.asked] == [None, "bytes=300000-", "bytes=600000-"]
    assert server.sent == len(CONTENT)


def test_a_server_without_ranges_is_asked_for_everything_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [300_000, 200_000]
    fetch_all([server("file", CONTENT)], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}
    assert server.sent == 500_000 + len(CONTENT)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_file_that_changes_on_the_server_is_not_mixed(server: Server, tmp_path: Path, checksum: bool) -> None:
    remote = server("file", bytes(1_000_000), checksum)
    server.cuts = [300_000, 0, 0, 0, 0]
    with pytest.raises(DataMissing, match="was cut after 300,000 of 1,000,000 bytes"):
        fetch_all([remote], tmp_path)
    assert (tmp_path / "file.part").stat().st_size == 300_000
    remote, server.etag = server("file", CONTENT, checksum), '"second"'
    fetch_all([remote], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}


def test_without_checksum_and_version_nothing_is_joined(server: Server, tmp_path: Path) -> None:
    server.etag, server.cuts = None, [300_000]
    fetch_all([server("file", CONTENT, checksum=False)], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}
    assert [wanted for _, wanted in server.asked] == [None, None]


def test_with_a_checksum_a_server_need_not_say_how_long_a_file_is(server: Server, tmp_path: Path) -> None:
    server.length = False
    fetch_all([server("known", CONTENT)], tmp_path)
    assert everything(tmp_path) == {"known": CONTENT}
    with pytest.raises(DataMissing, match="does not say how long"):
        fetch_all([server("unknown", CONTENT, checksum=False)], tmp_path)


def test_a_complete_part_needs_no_server(server: Server, tmp_path: Path) -> None:
    remote = server("file", CONTENT)
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch_all([remote], tmp_path)  # it says that nothing comes after
    assert everything(tmp_path) == {"file": CONTENT}
    assert server.asked == [("/file", f"bytes={len(CONTENT)}-")] and server.sent == 0
    (tmp_path / "file").rename(tmp_path / "file.part")
    fetch_all([replace(remote, url="http://127.0.0.1:9/none", bytes=len(CONTENT))], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    fetch_all([server("file", CONTENT)], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}


def test_a_wrong_checksum_names_the_file_and_keeps_nothing_of_it(server: Server, tmp_path: Path) -> None:
    remote = server("file", CONTENT)
    server.files["/file"] = CONTENT[:-1] + b"!"
    with pytest.raises(
        DataDamaged, match=rf"{remote.url} is not .* {md5(server.files['/file'])}, and not {remote.md5}"
    ):
        fetch_all([remote], tmp_path)
    assert everything(tmp_path) == {}
    short = server("short", CONTENT, checksum=False, bytes=1_000_001)
    with pytest.raises(DataDamaged, match="it has 1,000,000 bytes, and not 1,000,001"):
        fetch_all([short], tmp_path)


def test_a_wrong_file_that_was_there_is_named_and_left_alone(server: Server, tmp_path: Path) -> None:
    remote = server("file", CONTENT)
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataDamaged, match=rf"{tmp_path / 'file'} is not .*; delete it and run"):
        fetch_all([remote], tmp_path)
    assert everything(tmp_path) == {"file": b"mine"} and not server.asked


def test_what_the_server_does_not_have_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataMissing) as caught:
        fetch_all([Remote(f"{server.address}/none", "a/none")], tmp_path)
    said = str(caught.value)
    for part in (f"{server.address}/none", str(tmp_path), "404 Not Found", "try again", "put it there as a/none"):
        assert part in said
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again_and_given_up_at_last(server: Server, tmp_path: Path) -> None:
    server.answers = [503, 429, 500]
    fetch_all([server("file", CONTENT)], tmp_path)
    assert len(server.asked) == 4
    server.answers = [503] * 9
    with pytest.raises(DataMissing, match="503 Service Unavailable"):
        fetch_all([server("other", CONTENT)], tmp_path)
    assert len(server.asked) == 8  # as often as there are pauses, and once more


def test_a_silent_server_is_not_waited_for_for_ever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    server.pause = 1.0
    with pytest.raises(DataMissing, match="timed out"):
        fetch_all([server("file", CONTENT[:40_000])], tmp_path)


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    with pytest.raises(DataMissing, match=r"refused.*; try again, .* or get it by other means and put it there as f"):
        fetch_all([Remote("http://127.0.0.1:9/f", "f")], tmp_path)


@pytest.mark.parametrize("bytes_known", [True, False])
def test_what_does_not_fit_is_refused_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_known: bool
) -> None:
    monkeypatch.setattr(download, "free", lambda folder: 1_700_000)
    size = len(CONTENT) if bytes_known else None
    fetch_all([server("fits", CONTENT, bytes=size)], tmp_path)
    monkeypatch.setattr(download, "free", lambda folder: 700_000)
    (tmp_path / "half.part").write_bytes(CONTENT[:500_000])
    fetch_all([server("half", CONTENT, bytes=size)], tmp_path)
    with pytest.raises(DataMissing, match=rf"1,000,000 more bytes do not fit on the disk of {tmp_path}, where 700,000"):
        fetch_all([server("not", CONTENT, bytes=size)], tmp_path)
    assert "not" not in " ".join(everything(tmp_path))
    if bytes_known:
        assert len(server.asked) == 2
        with pytest.raises(DataMissing, match="1,000,000 more bytes"):  # an archive and its contents
            fetch_all([server("archive", CONTENT[:500_000], bytes=500_000, unpack=True)], tmp_path)


def test_a_full_disk_and_a_folder_that_is_none_are_sentences(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(DataMissing, match=r"cannot be written \(.*No space left.*same command goes on"):
        fetch_all([server("file", CONTENT)], tmp_path)
    (tmp_path / "plain").touch()
    with pytest.raises(DataMissing, match="cannot be written"):
        fetch_all([server("file", CONTENT)], tmp_path / "plain" / "below")


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert download.free(tmp_path / "not" / "yet") == pytest.approx(download.free(tmp_path), rel=0.01)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 5000),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    ranges=st.booleans(),
    etag=st.sampled_from([None, '"a"', 'W/"weak"']),
    checksum=st.booleans(),
    before=st.integers(0, 6000),
)
def test_however_it_is_cut_a_download_is_whole_or_says_why(
    size: int, cuts: list[int], ranges: bool, etag: str | None, checksum: bool, before: int
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "PAUSES", (0.0, 0.0))
        for server in serving():
            server.cuts, server.ranges, server.etag = list(cuts), ranges, etag
            remote, folder = server("file", CONTENT[:size], checksum), Path(name)
            (folder / "file.part").write_bytes(CONTENT[:before])
            try:
                fetch_all([remote], folder)
            except DataMissing:
                assert cuts and not (folder / "file").exists()
                server.cuts = []
                fetch_all([remote], folder)
            assert everything(folder) == {"file": CONTENT[:size]}


# Processes that end -----------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    from bench import Dataset, DataMissing, Splits
    from bench.command.main import main
    from bench.files.download import Remote, fetch_all
    from bench.plugins.registry import DATASETS

    @dataclass(frozen=True, kw_only=True)
    class Toy(Dataset):
        num_classes, image_shape, mean, std = 1, (1, 1, 1), (0.0,), (1.0,)
        size, source = "1 MB", "the test"

        def load(self, root):
            if not (root / "file").is_file():
                raise DataMissing("not there")
            x, y = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
            return Splits(x, y, x, y)

        def fetch(self, root):
            fetch_all([Remote({url!r}, "file", {md5!r}, 1_000_000)], root)

    DATASETS._classes["toy"] = Toy
    sys.argv = ["bench", "data", "fetch", "toy", "--yes", "--data-root", {root!r}]
    main()
"""


def started(server: Server, folder: Path) -> subprocess.Popen[str]:
    """Run `bench data fetch` in a process of its own."""
    remote = server("file", CONTENT)
    code = textwrap.dedent(PROGRAM.format(url=remote.url, md5=remote.md5, root=str(folder)))
    # A shell may have started the tests with interrupts ignored, which a child would inherit.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ended_in_the_middle_is_taken_up(server: Server, tmp_path: Path, ending: signal.Signals) -> None:
    part = tmp_path / "file.part"
    server.pause = 0.02
    process = started(server, tmp_path)
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(ending)
    said, errors = process.communicate(timeout=30)
    assert "toy: download 1 MB from the test to" in errors and "GB are free" in errors
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert f"The same command goes on: bench data fetch toy --yes --data-root {tmp_path}" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    kept = part.stat().st_size
    assert 200_000 < kept < len(CONTENT)
    server.pause = 0.0
    process = started(server, tmp_path)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "1 training and 1 test images" in said
    assert "file: 1.0 of 1.0 MB" in errors
    assert server.asked[-1][1] == f"bytes={kept}-"
    assert everything(tmp_path) == {"file": CONTENT}


def test_a_sha256_counts_more_than_an_md5(server: Server, tmp_path: Path) -> None:
    remote = server("file", CONTENT)
    right = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataDamaged, match=f"its SHA-256 is {right}, and not {'0' * 64}; it was removed again"):
        fetch_all([replace(remote, sha256="0" * 64)], tmp_path)
    fetch_all([replace(remote, md5="0" * 32, sha256=right)], tmp_path)
    assert everything(tmp_path) == {"file": CONTENT}


# Archives ---------------------------------------------------------------------------------------------------

MEMBERS = {"top/one.txt": b"1" * 3000, "top/sub/two.txt": b"2" * 10, "empty": b""}


def tarred(members: dict[str, bytes], mode: str = "w:gz", **header: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("top")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in header.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("top")
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "a.tar.gz": tarred,
    "a.tgz": tarred,
    "a.tar": lambda members: tarred(members, "w"),
    "a.tar.xz": lambda members: tarred(members, "w:xz"),
    "a.zip": zipped,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Give all files below a folder but the lists of what was unpacked."""
    return {name: content for name, content in everything(folder).items() if not name.endswith(".unpacked")}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("checksum", [True, False])
def test_an_archive_is_unpacked_once_and_does_not_stay(
    server: Server, tmp_path: Path, name: str, checksum: bool
) -> None:
    remote = server(f"below/{name}", ARCHIVES[name](MEMBERS), checksum, unpack=True)
    told = []
    with reporting(lambda what, done, total: told.append(what)):
        fetch_all([remote], tmp_path)
    assert contents(tmp_path) == {f"below/{member}": content for member, content in MEMBERS.items()}
    assert f"unpacking below/{name}" in told
    fetch_all([remote], tmp_path)
    fetch_all([replace(remote, url=remote.url.replace("http:", "https:"))], tmp_path)  # the host has learnt it
    assert len(server.asked) == 1


@pytest.mark.parametrize("loss", ["missing", "shorter", "list"])
def test_an_archive_of_which_something_went_is_unpacked_again(server: Server, tmp_path: Path, loss: str) -> None:
    remote = server("a.zip", zipped(MEMBERS), unpack=True)
    fetch_all([remote], tmp_path)
    if loss == "missing":
        (tmp_path / "top" / "sub" / "two.txt").unlink()
    elif loss == "shorter":
        (tmp_path / "top" / "one.txt").write_bytes(b"1")
    else:
        (tmp_path / "a.zip.unpacked").write_text("")
    fetch_all([remote], tmp_path)
    assert contents(tmp_path) == MEMBERS and len(server.asked) == 2
    fetch_all([server("a.zip", zipped({"top/new": b"3"}), unpack=True)], tmp_path)  # another archive
    assert contents(tmp_path) == {**MEMBERS, "top/new": b"3"}


def test_an_interrupted_unpacking_leaves_whole_files_and_is_done_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = server("a.tar.gz", tarred(MEMBERS), unpack=True)
    copied: list[str] = []
    copy = shutil.copyfileobj

    def interrupted(source: Any, target: Any, length: int) -> None:
        if copied:
            target.write(source.read(5))
            raise KeyboardInterrupt
        copied.append(target.name)
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_all([remote], tmp_path)
    monkeypatch.undo()
    whole = {name for name in contents(tmp_path) if ".part" not in name}
    assert whole == {"top/one.txt"} and "a.tar.gz.part" in contents(tmp_path)
    fetch_all([remote], tmp_path)
    assert contents(tmp_path) == MEMBERS
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={len(tarred(MEMBERS))}-"] and server.sent < 2000


def test_an_archive_placed_by_hand_needs_no_network_and_stays(tmp_path: Path) -> None:
    packed = tarred(MEMBERS)
    (tmp_path / "a.tar.gz").write_bytes(packed)
    fetch_all([Remote("http://127.0.0.1:9/a", "a.tar.gz", md5(packed), unpack=True)], tmp_path)
    assert contents(tmp_path) == {**MEMBERS, "a.tar.gz": packed}


MALICIOUS = {
    "tar above": tarred({"top/../../evil": b"!"}),
    "tar absolute": tarred({"/{folder}/evil": b"!"}),
    "tar link": tarred({"top/evil": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "tar hard link": tarred({"top/evil": b""}, type=tarfile.LNKTYPE, linkname="../../secret"),
    "tar device": tarred({"top/evil": b""}, type=tarfile.CHRTYPE),
    "zip above": zipped({"../evil": b"!"}),
    "zip absolute": zipped({"/{folder}/evil": b"!"}),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_an_archive_cannot_write_elsewhere(server: Server, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data" / "root"
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(DataDamaged, match=r"cannot be unpacked .*(would lie elsewhere|neither a file nor a folder)"):
        fetch_all([server("archive", MALICIOUS[kind], unpack=True)], folder)
    assert not [file for file in tmp_path.rglob("*evil*")]
    assert not [file for file in tmp_path.rglob("*") if file.is_symlink()]
    assert not Path("/{folder}").exists()
    assert not list(tmp_path.rglob("*.unpacked"))


def sparse(nbytes: int) -> bytes:
    """Make a tar archive of a file that is a hole."""
    info = tarfile.TarInfo("top/hole")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % nbytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512 * 3)


def named(nbytes: int) -> bytes:
    """Make a packed tar archive of a file whose name is long."""
    info = tarfile.TarInfo("./@LongLink")
    info.size, info.type = nbytes, tarfile.GNUTYPE_LONGNAME
    first = tarfile.TarInfo("first").tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(first + info.tobuf(tarfile.GNU_FORMAT) + b"n" * nbytes + tarred(MEMBERS, "w"))


def negative() -> bytes:
    """Make a tar archive of a file that has less than nothing."""
    header = bytearray(tarfile.TarInfo("top/hole").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tarfile.TarInfo("first").tobuf(tarfile.GNU_FORMAT) + bytes(header) + bytes(512 * 2)


MB = 10**6
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip": (lambda: zipped({"zeros": bytes(3 * MB)}), r"more than 2,000,000 bytes would come out of its \d,\d\d\d"),
    "tar.gz": (lambda: tarred({"zeros": bytes(3 * MB)}), "more than 2,000,000 bytes would come out of its"),
    "tar.xz": (lambda: tarred({"zeros": bytes(3 * MB)}, "w:xz"), "more than 2,000,000 bytes would come out of its"),
    "in pieces": (lambda: zipped({f"{n}": bytes(MB) for n in range(3)}), "more than 2,000,000 bytes would come out"),
    "empty files": (lambda: tarred({f"{n}": b"" for n in range(500)}), "more than 2,000,000 bytes would come out of"),
    "a hole": (lambda: sparse(2**32), "more than 2,000,000 bytes would come out of its 2,048"),
    "behind the end": (lambda: gzip.compress(tarred(MEMBERS, "w") + bytes(3 * MB)), "more than 2,000,000 bytes would"),
    "less than nothing": (negative, "it has a file of -1 bytes"),
    "a name": (lambda: named(2**20 + 1), "it has a name of 1,048,577 bytes"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_when_it_has_grown_a_hundred_times(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's: 0.3 MB became 300 MB."""
    monkeypatch.setattr(reading, "SMALL", 2 * MB)
    make, said = BOMBS[kind]
    with pytest.raises(DataDamaged, match=rf"bomb\.part cannot be unpacked \({said}.*\); delete it and run the same"):
        fetch_all([server("bomb", make(), unpack=True)], tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 2.1 * MB
    assert not list(tmp_path.glob("*.unpacked"))


def test_large_archives_hold_photographs_and_small_ones_lists(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SMALL", 10_000)
    noise = np.random.default_rng(0).bytes(30_000)
    packed = zipped({"noise": noise, "zeros": bytes(10**6)})  # a thirtieth
    fetch_all([server("a.zip", packed, unpack=True)], tmp_path)
    monkeypatch.setattr(archives, "_LARGE", 10**5)
    with pytest.raises(DataDamaged, match=f"more than {max(3 * len(packed), 10**5):,} bytes would come out"):
        fetch_all([server("b.zip", packed, unpack=True)], tmp_path)
    with pytest.raises(DataDamaged, match="more than 100,000 bytes would come out"):  # a file takes from a disk
        fetch_all([server("d.zip", zipped({f"{n}": b"" for n in range(30)}), unpack=True)], tmp_path)
    monkeypatch.setattr(archives, "_LARGE", 10**4)
    fetch_all([server("c.zip", zipped({"a": noise}), unpack=True)], tmp_path)


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("damage", ["cut", "changed", "nothing", "noise", "no end"])
def test_a_broken_archive_is_named(server: Server, tmp_path: Path, name: str, damage: str) -> None:
    packed = ARCHIVES[name](MEMBERS)
    middle = 600 if name == "a.tar" else len(packed) // 2
    broken = {
        "cut": packed[:middle],
        "changed": packed[:middle] + bytes(byte ^ 0xFF for byte in packed[middle : middle + 8]) + packed[middle + 8 :],
        "nothing": b"",
        "noise": CONTENT[:5000],
        "no end": packed.rstrip(b"\0") if name == "a.tar" else packed[:-1],
    }[damage]
    with pytest.raises(DataDamaged, match=rf"{name}\.part cannot be unpacked") as caught:
        fetch_all([server(name, broken, checksum=False, unpack=True)], tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.unpacked"))


# Datasets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"])
def test_a_dataset_downloads_what_it_reads(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"bench.datasets.{name}")
    official = module.FILES
    contents = {file: f"{name} {file}".encode() * 50 for file in official.checksums}
    assert all(remote.url.startswith("https:") and remote.checksum and remote.bytes for remote in official.remotes)
    total = sum(remote.bytes for remote in official.remotes)
    assert official.size == f"{total / 1e6:.0f} MB"
    if official.remotes[0].unpack:
        packed = {official.remotes[0].name: tarred({f"{official.folder}/{file}": contents[file] for file in contents})}
    else:
        packed = {
            remote.name: gzip.compress(content) if remote.name.endswith(".gz") else content
            for remote, content in zip(official.remotes, contents.values(), strict=True)
        }
    served = replace(
        official,
        checksums={file: md5(content) for file, content in contents.items()},
        remotes=tuple(
            replace(server(remote.name, packed[remote.name]), unpack=remote.unpack) for remote in official.remotes
        ),
    )
    monkeypatch.setattr(module, "FILES", served)
    DATASETS[name]().fetch(tmp_path)
    assert {file: served.read(tmp_path, file) for file in contents} == contents
    asked = len(server.asked)
    DATASETS[name]().fetch(tmp_path)
    assert len(server.asked) == asked == len(official.remotes)


def test_the_command_refuses_a_file_as_data_root_and_asks_before_a_download(tmp_path: Path) -> None:
    (tmp_path / "pack.npz").touch()
    result = CliRunner().invoke(data_command, ["fetch", "cifar10", "--data-root", str(tmp_path / "pack.npz")])
    assert result.exit_code == 2 and "downloads go to a folder" in result.stderr
    result = CliRunner().invoke(data_command, ["fetch", "cifar10", "--data-root", str(tmp_path)])
    assert result.exit_code == 2 and "use --yes" in result.stderr
    said = r"cifar10: download 170 MB from https://www\.cs\.toronto\.edu/\S+ to .*, where [\d,.]+ GB are free"
    assert re.search(said, result.stderr)
    assert os.listdir(tmp_path) == ["pack.npz"]


def test_what_cannot_be_downloaded_says_so_without_asking(tmp_path: Path) -> None:
    result = CliRunner().invoke(data_command, ["fetch", "femnist", "--data-root", str(tmp_path)])
    assert isinstance(result.exception, DataMissing) and "preprocess.sh" in str(result.exception)
    assert "download" not in result.stderr
