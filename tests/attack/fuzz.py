"""Hostile files and command lines, one after the other: `python -m tests.attack.fuzz --minutes 60`.

Real run.json, Parquet tables, packs, checkpoints and files of images are changed, with an idea of what is in them and
without; command lines are put together of words that are known and words that are not. Nothing may end in a traceback,
hang, or hold more than 2 GB. What does is kept in a folder, with a line that repeats it.

Cases are Hypothesis's, and go through whole commands, some a second. `tests.attack.guided` is for what takes less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.attack import frame
from tests.attack.checkpoints import unfinished
from tests.attack.published import published, valid
from tests.attack.targets import Target, targets
from tests.attack.verdict import Fell

SECONDS = 30
"""Of a case."""
GIB = 1 << 30
BATCH = 40
"""Cases in a process."""


class Hang(BaseException):
    """A case has no end."""


def tried(target: Target, content: bytes) -> str | None:
    """Try a case in an empty working directory: what is wrong with it, or None."""

    def late(number: int, where: object) -> None:
        raise Hang

    before = os.getcwd()
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(prefix="case-", dir=before) as folder:
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.read(content)
        except Hang:
            return f"no end within {SECONDS} s"
        except Fell as error:
            return str(error)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(before)
    return None


def signature(wrong: str) -> str:
    """Shorten what is wrong to what it has in common with others of its kind."""
    return "".join("#" if sign.isdigit() else sign for sign in wrong)[:90]


def batch(name: str, target: Target, seed: int, place: Path) -> dict[str, Any]:
    """Try some cases in a process of their own; give how many, and the contents and words of those that went wrong."""
    log, current = place / "log", place / "current"
    for file in (log, current):
        file.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _batch(target, seed, place, log, current)
    limit, usage = time.monotonic() + BATCH * SECONDS, None
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        quiet = time.time() - (current.stat().st_mtime if current.exists() else time.time())
        if time.monotonic() > limit or quiet > 2 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    said = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = [(Path(each["file"]).read_bytes(), each["wrong"]) for each in said if each["wrong"]]
    if os.WIFSIGNALED(status) and current.exists():
        found.append((current.read_bytes(), f"ended by signal {os.WTERMSIG(status)}, or without an end"))
    return {"cases": len(said), "found": found, "gigabytes": usage.ru_maxrss / 1024**2}


def _batch(target: Target, seed: int, place: Path, log: Path, current: Path) -> None:
    os.chdir(place)
    sink = os.open(os.devnull, os.O_RDWR)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + target.memory + GIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    number = 0

    @seeded(seed)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=target.cases)
    def one(case: Any) -> None:
        nonlocal number
        number += 1
        content = target.make(case)
        current.write_bytes(content)
        wrong = tried(target, content)
        file = place / f"wrong-{number}"
        if wrong is not None:
            file.write_bytes(content)
        with log.open("a") as stream:
            stream.write(json.dumps({"wrong": wrong, "file": str(file)}) + "\n")

    try:
        one()
    except BaseException as error:  # of the fuzz itself
        with log.open("a") as stream:
            stream.write(
                json.dumps({"wrong": f"the fuzz: {type(error).__name__}: {error}", "file": str(current)}) + "\n"
            )
    os._exit(0)


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Path, dict[str, Target]]]:
    """Make what cases begin from."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder).resolve()
        frame.attack([], place)
        before = os.getcwd()
        for act in (published, unfinished):
            frame.material(act.__name__).mkdir(parents=True)
            os.chdir(frame.material(act.__name__))
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_RDWR), 2)
                act()
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(f"{act.__name__} cannot be made")
        os.chdir(before)
        valid(frame.material("published"))
        (place / "cases").mkdir()
        yield place / "cases", targets()


def main() -> None:
    """Try for as long as was asked for, and say what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="run.json, tables, ...; may be given several times")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder of what went wrong")
    parser.add_argument("--again", type=Path, metavar="FILE", help="try this content with --target, and nothing else")
    given = parser.parse_args()
    given.keep = given.keep.resolve()
    content = None if given.again is None else given.again.read_bytes()
    with prepared() as (place, known):
        if content is not None:
            os.chdir(place)
            wrong = tried(known[given.target[0]], content)
            print(wrong or "held")
            sys.exit(1 if wrong else 0)
        sys.exit(1 if _rounds(given, place, {name: known[name] for name in given.target or known}) else 0)


def _rounds(given: argparse.Namespace, place: Path, known: dict[str, Target]) -> bool:
    """Try batch after batch of every target; give whether anything went wrong."""
    end, seed = time.monotonic() + 60 * given.minutes, given.seed
    cases, wrongs, largest = Counter[str](), dict[tuple[str, str], int](), dict[str, float]()
    began = time.monotonic()
    while time.monotonic() < end:
        for name, target in known.items():
            if time.monotonic() >= end:
                break
            done = batch(name, target, seed, place)
            cases[name] += done["cases"]
            largest[name] = max(largest.get(name, 0.0), done["gigabytes"])
            if done["gigabytes"] > frame._own() / GIB + 2:
                done["found"].append((b"", f"a batch held {done['gigabytes']:.1f} GiB, seed {seed}"))
            for content, wrong in done["found"]:
                key = (name, signature(wrong))
                wrongs[key] = wrongs.get(key, 0) + 1
                if wrongs[key] == 1:
                    _keep(given.keep, name, content, wrong, len(wrongs))
            for leftover in place.iterdir():
                _remove(leftover)
        seed += 1
    print("| what is read | cases | wrong | kinds | GiB at most |\n|---|--:|--:|--:|--:|")
    for name in known:
        mine = {kind: number for (of, kind), number in wrongs.items() if of == name}
        print(f"| {name} | {cases[name]} | {sum(mine.values())} | {len(mine)} | {largest.get(name, 0):.1f} |")
    print(f"\n{cases.total()} cases in {(time.monotonic() - began) / 60:.1f} minutes, seeds {given.seed} to {seed - 1}")
    return bool(wrongs)


def _remove(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _keep(folder: Path, name: str, content: bytes, wrong: str, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{number:03d}-{name.replace(' ', '-').replace(',', '')}"
    file.write_bytes(content)
    command = shlex.join(["python", "-m", "tests.attack.fuzz", "--target", name, "--again", str(file)])
    with (folder / "README.txt").open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{command}\n    {wrong[:600]}\n")
    print(f"{name}: {wrong[:300]}\n    {command}", flush=True)


if __name__ == "__main__":
    main()
