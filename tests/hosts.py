"""Hosts on one machine that share nothing but the network and the installed Python: a name space each for network and
mounts, with folders for HOME, temporary files, shared memory, data and results of its own, and none of the checkout.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import ROOT, wait

NETWORK = "10.213.7"
"""Of addresses that are used here and nowhere else."""
_RAY = (
    sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats",
    "--object-store-memory", str(120 * 2**20),
)  # fmt: skip
OWN = Path("/mnt")
"""Where each host sees what is its own, and nobody else does."""


def lacking() -> str | None:
    """Say what is missing to make hosts; None: nothing."""
    for tool in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"the command {tool} is not there"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", "mount -t tmpfs tmpfs /mnt && ip link set lo up"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"no name spaces are to be had ({tried.stderr.strip()})"


@dataclass
class Host:
    """One of them."""

    number: int
    folder: Path
    """Of all that it has of its own, as it is seen from outside."""
    holder: subprocess.Popen[bytes]
    """Keeps its name spaces."""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number + 1}"

    @property
    def link(self) -> str:
        """Its end of the cable, outside."""
        return f"bench{self.number}"

    def start(self, *words: object, cwd: Path = OWN, **environment: str) -> subprocess.Popen[str]:
        """Start a command there, in a session of its own."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS") if key in os.environ}
        ours = {"HOME": "home", "TMPDIR": "tmp", "RAY_TMPDIR": "", "BENCH_DATA": "data"}
        ours = {key: str(OWN / name) for key, name in ours.items()} | {"RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            ["nsenter", "-t", str(self.holder.pid), "--mount", "--net", f"--wdns={cwd}", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**kept, **ours, **environment},
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, *words: object, **environment: str) -> str:
        """Have a command done there, and give what it prints."""
        out, err = self.start(*words, cwd=OWN, **environment).communicate(timeout=120)
        assert self.processes[-1].returncode == 0, f"{out}\n{err}"
        return out

    def cut(self, cut: bool = True) -> None:
        """Cut its cable, or mend it."""
        _ip("link", "set", self.link, "down" if cut else "up")

    def kill(self) -> None:
        """Switch it off: all its processes end at once."""
        for pid in _of(self.holder.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.holder.wait()


@contextmanager
def hosts(number: int, folder: Path, hidden: Sequence[Path] = (ROOT,)) -> Iterator[list[Host]]:
    """Make hosts on one switch, and remove all that belongs to them.

    Args:
        number: How many.
        folder: For their own folders.
        hidden: Folders that the second host and all further ones do not see.
    """
    made: list[Host] = []
    switch = "benchswitch"
    try:
        _ip("link", "add", switch, "type", "bridge")
        _ip("link", "set", switch, "up")
        for k in range(number):
            made.append(_host(k, folder / f"host{k}", switch, hidden if k else ()))
        yield made
    finally:
        for host in made:
            host.kill()
            for process in host.processes:
                process.communicate()
        for host in made:
            with suppress(AssertionError):  # it went with the name space
                _ip("link", "delete", host.link)
        _ip("link", "delete", switch)


def _host(number: int, folder: Path, switch: str, hidden: Sequence[Path]) -> Host:
    for name in ("home", "tmp", "data", "shm"):
        (folder / name).mkdir(parents=True)
    mounts = [f"mount --bind '{folder / 'shm'}' /dev/shm", *(f"mount -t tmpfs tmpfs '{path}'" for path in hidden)]
    steps = ["mount --make-rprivate /", f"mount --bind '{folder}' {OWN}", *mounts, "ip link set lo up"]
    script = " && ".join([*steps, f"touch {OWN}/ready", "exec sleep infinity"])
    holder = subprocess.Popen(["unshare", "--mount", "--net", "sh", "-c", script], cwd="/", start_new_session=True)
    host = Host(number, folder, holder)
    wait((folder / "ready").exists, 20)
    inside = f"{host.link}i"
    _ip("link", "add", host.link, "type", "veth", "peer", "name", inside)
    _ip("link", "set", host.link, "master", switch, "up")
    _ip("link", "set", inside, "netns", str(holder.pid))
    host.run("ip", "address", "add", f"{host.address}/24", "dev", inside)
    host.run("ip", "link", "set", inside, "up")
    return host


def cluster(hosts: Sequence[Host], cores: int = 1) -> str:
    """Start Ray's head on the first host, without a core for runs, and a node on each other; give its address."""
    address = f"{hosts[0].address}:6379"
    head = ("--head", "--port", "6379", "--include-dashboard=false", "--num-cpus=0")
    hosts[0].run(*_RAY, *head, f"--node-ip-address={hosts[0].address}")
    for host in hosts[1:]:
        node(host, address, cores)
    return address


def node(host: Host, address: str, cores: int = 1) -> None:
    """Have a host join a cluster."""
    host.run(*_RAY, "--address", address, f"--num-cpus={cores}", f"--node-ip-address={host.address}")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _of(holder: int) -> list[int]:
    """List the processes in the mount name space of one."""
    try:
        wanted = os.readlink(f"/proc/{holder}/ns/mnt")
    except OSError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns" / "mnt") == wanted:
                found.append(int(entry.name))
    return found
