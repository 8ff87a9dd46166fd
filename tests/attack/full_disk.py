"""A disk that is too small, or fills at any moment: a sentence, and with room again the same numbers."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.attack.checkpoints import numbers
from tests.attack.frame import TRIES, Skipped, Try, copied, made
from tests.attack.verdict import Answer, apart, bench, calm, equal, require

AREA = "full disk: too small from the start, filled at a random moment"
ASKED = (
    "run",
    "--algos",
    "fedavg,fedrep(head_epochs=1),ditto",
    "--rounds",
    6,
    "--epochs",
    1,
    "--ray",
    "off",
    "--json",
    "--out",
    "out",
)
SPACE = ("unshare", "-rm")
TRACKED = {"off": ("--tracking-uri", "off"), "on": ()}


@made
def swept() -> None:
    """Three runs on a disk with room."""
    Path("wanted.json").write_text(calm(bench(*ASKED, *TRACKED["off"])).out)


def _again(tracked: str) -> None:
    answer = calm(apart(*ASKED, *TRACKED[tracked]))
    require(answer.status == 0, f"with room again, exit status {answer.status}: {answer.err[-300:]}")
    wanted = (copied("swept") / "wanted.json").read_text()
    equal(numbers(answer), numbers(Answer(0, wanted, "")))


def _largest_file(most: int) -> None:
    """No file can be larger: what a quota and a full disk do, without a disk of one's own."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "bench", *map(str, ASKED), *TRACKED["off"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False)
    answer = Answer(done.returncode, done.stdout, done.stderr)
    calm(answer)
    _again("off")


for most in (0, 1_000, 4_000, 12_000, 40_000, 200_000):
    TRIES.append(
        Try(
            area=AREA,
            name=f"no file above {most:,} bytes",
            act=partial(_largest_file, most),
            needs=("swept",),
            memory=None,
            seconds=200,
        )
    )


def _small_disk(kilobytes: int, tracked: str, fills: float | None) -> None:
    """A disk of one's own, in a name space of one's own; somebody else fills it meanwhile."""
    disk = Path("disk").absolute()
    disk.mkdir()
    probe = [*SPACE, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        raise Skipped("a small disk cannot be mounted")
    filling = f"(sleep {fills}; head -c {kilobytes}k /dev/zero > {disk}/stuff) 2> /dev/null &" if fills else ""
    script = f"""
mount -t tmpfs -o size={kilobytes}k none {disk}
cd {disk}
{filling}
"$@" > {Path("first").absolute()} 2> {Path("said").absolute()}
echo $? > {Path("status").absolute()}
wait
rm -f {disk}/stuff
cp -r {disk}/out {Path("out").absolute()}
"""
    command = [sys.executable, "-m", "bench", *map(str, ASKED), *TRACKED[tracked]]
    subprocess.run([*SPACE, "sh", "-c", script, "sh", *command], check=False, timeout=200, capture_output=True)
    first = Answer(int(Path("status").read_text()), Path("first").read_text(), Path("said").read_text())
    calm(first)
    _again(tracked)


def draw(seed: int) -> None:
    """Enter the moments at which a disk fills."""
    chosen = random.Random(f"{seed} disks")
    for kilobytes in (8, 32, 128, 512):
        act = partial(_small_disk, kilobytes, "off", None)
        TRIES.append(
            Try(area=AREA, name=f"{kilobytes} kB from the start", act=act, needs=("swept",), memory=None, seconds=240)
        )
    for number in range(8):
        tracked = ("off", "on")[number % 2]
        when = chosen.uniform(2, 12)
        act = partial(_small_disk, 4096, tracked, when)
        name = f"full after {when:.1f} s, MLflow {tracked}"
        TRIES.append(Try(area=AREA, name=name, act=act, needs=("swept",), memory=None, seconds=240))
