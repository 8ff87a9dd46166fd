"""Each try in a process of its own, forked from this one: a fresh start costs nothing, and nothing is shared.

The process has a session, an empty working directory, a limit of time after which its whole session is killed, and one
of memory, of what it may reserve beyond this process and of what it and its children have really held.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.attack.verdict import Fell

GIB = 1 << 30


class Skipped(Exception):
    """Cannot be tried here: the message says what is lacking."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One thing that is tried."""

    area: str
    name: str
    act: Callable[[], object]
    """Done in an empty working directory; raises `Fell`, or any AssertionError, where something has not held."""
    seconds: float = 60
    memory: float | None = 2
    """GiB it may take beyond the packages themselves; None: no limit, for what starts Ray."""
    needs: tuple[str, ...] = ()
    """Materials, see `made`."""
    alone: bool = False
    """Whether nothing else is to run meanwhile."""
    left: str | None = None
    """Why it is known not to hold, and left; None: it is expected to."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a try."""

    area: str
    name: str
    fell: str | None
    """What came; None: it has held."""
    skipped: str | None = None
    seconds: float = 0
    gigabytes: float = 0
    """Most that it, or a child of it, held at a time."""
    left: str | None = None


TRIES: list[Try] = []
_MATERIALS: dict[str, Callable[[], object]] = {}
_LOOKS: dict[str, Callable[[Path], object]] = {}
_place = [Path("nowhere")]
"""Of the materials; set by `attack`."""


def trying(area: str, name: str, **how: object) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Enter a function as a try."""

    def enter(act: Callable[[], object]) -> Callable[[], object]:
        TRIES.append(Try(area=area, name=name, act=act, **how))  # type: ignore[arg-type]
        return act

    return enter


def made(act: Callable[[], object]) -> Callable[[], object]:
    """Enter a function that makes, in an empty working directory, what several tries begin from a copy of."""
    _MATERIALS[act.__name__] = act
    return act


def looked_at(name: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Enter a function that looks at a material in this process: what it then keeps in memory, tries begin with."""

    def enter(look: Callable[[Path], object]) -> Callable[[Path], object]:
        _LOOKS[name] = look
        return look

    return enter


def material(name: str) -> Path:
    """Give the folder of a material, which is not to be changed."""
    return _place[0] / "materials" / name


def copied(name: str, to: str = "copy") -> Path:
    """Copy a material into the working directory."""
    return Path(shutil.copytree(material(name), to, symlinks=True)).resolve()


def chosen(area: str | None = None, pattern: str | None = None) -> list[Try]:
    """Choose tries by area and by a pattern of the shell for "area/name"."""
    return [
        each
        for each in TRIES
        if (area is None or each.area.startswith(area))
        and (pattern is None or fnmatch.fnmatch(f"{each.area}/{each.name}", pattern))
    ]


def attack(
    tries: Sequence[Try], place: Path, jobs: int = 1, seed: int = 0, told: Callable[[Outcome], None] = lambda one: None
) -> list[Outcome]:
    """Try.

    Args:
        tries: What.
        place: A folder for all that is written.
        jobs: Tries at a time.
        seed: Of what a try draws, with its name.
        told: Told each outcome at once.

    Returns:
        Outcomes, in the order of their ends.
    """
    _place[0] = place
    _warm()
    ends: list[Outcome] = []
    for name in dict.fromkeys(need for each in tries for need in each.needs):
        if material(name).exists():
            continue
        making = Try(area="material", name=name, act=_MATERIALS[name], seconds=600, memory=None)
        child = _Child(making, material(name), seed)
        while (end := child.end()) is None:
            time.sleep(0.02)
        if end.fell is not None:
            raise RuntimeError(f"{name} cannot be made: {end.fell}")
        if name in _LOOKS:
            _LOOKS[name](material(name))
    waiting, running = list(tries), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs and not any(child.of.alone for child in running):
            if waiting[0].alone and running:
                break
            one = waiting.pop(0)
            folder = place / f"{len(tries) - len(waiting):04d}"
            running.append(_Child(one, folder, seed))
        for child in list(running):
            if (end := child.end()) is not None:
                running.remove(child)
                shutil.rmtree(child.folder, ignore_errors=True)
                ends.append(end)
                told(end)
        time.sleep(0.005)
    return ends


def _warm() -> None:
    """Import what tries need, once; none of it begins a thread, which would not be there in a child."""
    import torch

    from bench.plugins import registry

    torch.set_num_threads(1)
    for name in _HEAVY:
        importlib.import_module(name)
    for each in registry.REGISTRIES:
        dict(each)


_HEAVY = (
    "bench.command.run",
    "bench.command.publish",
    "bench.command.table",
    "bench.command.site",
    "bench.face.run",
    "bench.validation.report",
    "bench.validation.rerun",
    "bench.sweep.driver",
    "pyarrow.parquet",
    "pandas",
    "pydantic",
    "scipy.stats",
    "sklearn.datasets",
    "bench.site.build",
    "bench.results.table",
)


class _Child:
    """A try at work."""

    def __init__(self, of: Try, folder: Path, seed: int) -> None:
        self.of, self.folder, self.began = of, folder, time.monotonic()
        folder.mkdir(parents=True)
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            _do(of, folder, seed, writing)
        os.close(writing)
        self.reading = reading
        self.late = False

    def end(self) -> Outcome | None:
        """Give what became of it; None: it is at work."""
        took = time.monotonic() - self.began
        if took > self.of.seconds and not self.late:
            self.late = True
            _kill(self.pid)
        ended, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not ended:
            return None
        _kill(self.pid)  # what it has left in its session
        with open(self.reading, "rb") as stream:
            os.set_blocking(stream.fileno(), False)
            with contextlib.suppress(OSError, TypeError):
                said = stream.read() or b""
        held = usage.ru_maxrss * 1024 / GIB  # which children that it waited for are counted in
        fell, skipped = _read(said)
        if self.late:
            fell = f"no end within {self.of.seconds:.0f} s"
        elif os.WIFSIGNALED(status):
            fell = f"ended by signal {os.WTERMSIG(status)}"
        elif fell is None and skipped is None and self.of.memory is not None and held > _own() / GIB + self.of.memory:
            fell = f"held {held:.1f} GiB"
        return Outcome(
            area=self.of.area,
            name=self.of.name,
            fell=fell,
            skipped=skipped,
            seconds=took,
            gigabytes=held,
            left=self.of.left,
        )


def _read(said: bytes) -> tuple[str | None, str | None]:
    try:
        answer = json.loads(said)
    except ValueError:
        return "ended without a word", None
    return answer["fell"], answer["skipped"]


def _kill(session: int) -> None:
    """Kill a child and what it started, by their group."""
    for ended in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            ended(session, signal.SIGKILL)


def _own() -> int:
    """Bytes that this process has held at most: its children begin with them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _do(of: Try, folder: Path, seed: int, writing: int) -> None:
    """Do a try in the child, and never return."""
    fell = skipped = None
    try:
        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sink = os.open(os.devnull, os.O_RDWR)
        os.dup2(sink, 0)
        os.dup2(sink, 1)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        random.seed(f"{seed} {of.area} {of.name}")
        if of.memory is not None and Path("/proc/self/statm").exists():
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + int((of.memory + 1) * GIB)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        of.act()
    except Skipped as said:
        skipped = str(said)
    except Fell as said:
        fell = str(said)
    except MemoryError:
        fell = "MemoryError"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fell = f"{type(error).__name__}: {str(error)[:400]} ({Path(last.filename).name}, line {last.lineno})"
    with contextlib.suppress(OSError):
        os.write(writing, json.dumps({"fell": fell and fell[:3000], "skipped": skipped}).encode())
    os._exit(0)


# What came of all -------------------------------------------------------------------------------------------


def areas(tries: Sequence[Try]) -> list[str]:
    """Name the areas, in the order of the report."""
    return list(dict.fromkeys(each.area for each in tries))


def table(ends: Sequence[Outcome]) -> str:
    """Write the report's table: area, tried, held, what is left and why."""
    lines = ["| area | tried | held | what is left, and why |", "|---|--:|--:|---|"]
    tried = held = 0
    for area in dict.fromkeys(end.area for end in ends):
        mine = [end for end in ends if end.area == area and end.skipped is None]
        stood = sum(end.fell is None for end in mine)
        tried, held = tried + len(mine), held + stood
        why = [f"{end.name}: {end.left or f'**{_short(end.fell or str())}**'}" for end in mine if end.fell is not None]
        lacking = sorted({end.skipped for end in ends if end.area == area and end.skipped is not None})
        why += [f"not tried here: {each}" for each in lacking]
        lines.append(f"| {area} | {len(mine)} | {stood} | {_cell('; '.join(why))} |")
    return "\n".join([*lines, f"| **together** | **{tried}** | **{held}** | |"])


def _short(text: str) -> str:
    return text if len(text) < 160 else f"{text[:160]}..."


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def unexpected(ends: Sequence[Outcome]) -> list[Outcome]:
    """Give the tries that fell, and were not known to."""
    return [end for end in ends if end.fell is not None and end.left is None]


def stored(ends: Sequence[Outcome]) -> str:
    """Write outcomes as JSON."""
    return json.dumps([asdict(end) for end in ends], indent=1) + "\n"


@contextlib.contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """Set one of the resource module's limits meanwhile."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)
