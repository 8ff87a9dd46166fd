"""What others on the machine and in the network could reach while a sweep is on Ray."""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try
from tests.attack.kills import descendants
from tests.attack.verdict import Fell, require
from tests.processes import start, wait

AREA = "ports, permissions, tokens"
LONG = ("run", "--algos", "fedavg", "--rounds", 100_000, "--out", "out", "--ray", "local")


@contextmanager
def sweeping(**environment: str) -> Iterator[dict[int, str]]:
    """Have a sweep on Ray meanwhile; give its processes."""
    process = start(*LONG, cwd=Path(), **environment)
    try:
        wait(lambda: any(Path("out").glob("*/progress.jsonl")), 90)
        time.sleep(1)
        yield {process.pid: "driver", **descendants(process.pid)}
    finally:
        process.terminate()
        process.communicate(timeout=60)


def listening(pids: set[int]) -> dict[int, str]:
    """Give the ports that processes listen on, and at which address."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:
                continue
            if found:
                inodes.add(found[1])
    ports = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and cells[9] in inodes:
                address, port = cells[1].split(":")
                packed = b"".join(struct.pack("<I", int(address[n : n + 8], 16)) for n in range(0, len(address), 8))
                ports[int(port, 16)] = socket.inet_ntop(socket.AF_INET if table == "tcp" else socket.AF_INET6, packed)
    return ports


def _loopback() -> None:
    with sweeping() as those:
        ports = listening(set(those))
        require(bool(ports), "nothing listens")
        open_to_all = {
            port: at for port, at in ports.items() if not (at.startswith("127.") or at in ("::1", "::ffff:127.0.0.1"))
        }
        require(not open_to_all, f"{len(open_to_all)} of {len(ports)} listen on every interface: {open_to_all}")


def _environments(those: dict[int, str]) -> list[dict[str, str]]:
    found = []
    for pid in those:
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        found.append(dict(line.split("=", 1) for line in text.split("\0") if "=" in line))
    return found


def _folder(those: dict[int, str]) -> Path:
    for line in those.values():
        if found := re.search(r"--(?:session_dir|session-dir|temp_dir|temp-dir)[= ](\S+)", line):
            return Path(found[1])
    raise Fell("no session folder is known")


def _token() -> None:
    """Nobody gets in without a token, and Ray's own user's is not used."""
    with sweeping() as those:
        modes = [each.get("RAY_AUTH_MODE", "") for each in _environments(those)]
        require("token" in modes, "RAY_AUTH_MODE=token is not set for Ray's processes")


def _token_file() -> None:
    home = Path("home").absolute()
    home.mkdir()
    with sweeping(HOME=str(home)) as those:
        given = [each.get("RAY_AUTH_TOKEN_PATH") for each in _environments(those)]
        files = [Path(path) for path in given if path] + [file for file in home.rglob("*token*") if file.is_file()]
        kept = any(each.get("RAY_AUTH_TOKEN") for each in _environments(those))
        require(bool(files) or kept, "there is no token")
        wide = [
            f"{file} {stat.filemode(file.stat().st_mode)}"
            for file in files
            if file.exists() and file.stat().st_mode & 0o077
        ]
        require(not wide, f"others may read {', '.join(wide)}")


def _session_folder() -> None:
    with sweeping() as those:
        folder = _folder(those)
        closed = [place for place in (folder, *folder.parents) if place.exists() and not place.stat().st_mode & 0o011]
        require(bool(closed), f"everybody may enter {folder} ({stat.filemode(folder.stat().st_mode)})")


def _no_dashboard() -> None:
    with sweeping() as those:
        shown = [
            line for line in those.values() if "dashboard/dashboard.py" in line and "--disable-frontend" not in line
        ]
        require(not shown, f"a dashboard runs: {shown}")
        require(8265 not in listening(set(those)), "its port is open")


def _without_token() -> None:
    """Somebody without the token asks the control store."""
    with sweeping() as those:
        gcs = next((line for line in those.values() if "gcs_server" in line), "")
        found = re.search(r"--gcs_server_port=(\d+)", gcs)
        ports = (
            [int(found[1])]
            if found and int(found[1])
            else list(listening({pid for pid, line in those.items() if "gcs_server" in line}))
        )
        require(bool(ports), "the control store listens nowhere")
        code = f"""
import os
for key in [key for key in os.environ if key.startswith('RAY_')]: del os.environ[key]
os.environ['RAY_AUTH_MODE'] = 'disabled'
import ray
from ray._raylet import GcsClient
client = GcsClient(address='127.0.0.1:{ports[0]}')
print('IN', client.internal_kv_keys(b'', None, 5))
"""
        home = Path("nobody").absolute()
        home.mkdir()
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={"PATH": os.environ["PATH"], "HOME": str(home)},
            )
        except subprocess.TimeoutExpired:
            return  # no answer
        require("IN" not in done.stdout, f"the control store answers: {done.stdout[:200]}")


def _lowest_ray() -> None:
    """The lowest Ray that may be installed has tokens by default."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lowest = re.search(r'"ray>=(\d+)\.(\d+)', text)
    require(lowest is not None and (int(lowest[1]), int(lowest[2])) >= (2, 52), f"{lowest and lowest[0]} is allowed")


def _results_follow_the_umask() -> None:
    os.umask(0o027)
    with sweeping():
        modes = {stat.filemode(path.stat().st_mode) for path in Path("out").rglob("*") if "sweeps" not in str(path)}
        require(not any(mode[7:] != "---" for mode in modes), f"open to others: {modes}")


def _enter(name: str, act: Callable[[], object]) -> None:
    TRIES.append(Try(area=AREA, name=name, act=act, seconds=240, memory=None, alone=True))


for act in (
    _loopback,
    _token,
    _token_file,
    _session_folder,
    _no_dashboard,
    _without_token,
    _lowest_ray,
    _results_follow_the_umask,
):
    _enter(act.__name__.strip("_").replace("_", " "), partial(act))
