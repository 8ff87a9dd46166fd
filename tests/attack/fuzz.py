"""Hostile files and command lines, one after the other: `python -m tests.attack.fuzz --minutes 60`.

Real run.json, Parquet tables, packs, checkpoints and files of images are changed, with an idea of what is in them and
without; command lines are put together of words that are known and words that are not. Nothing may end in a traceback,
hang, or hold more than 2 GB. What does is kept in a folder, with a line that repeats it.

Cases are Hypothesis's. With `--guided TARGET` they are those of atheris instead (`pip install atheris`, which is no part
of the test extras: it has no wheels for every system), which looks at what code they reach: whole contents of a file.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.attack import frame
from tests.attack.checkpoints import numbers, unfinished
from tests.attack.command_lines import CODE, DRY, NUMBER, TEXT, VERBS, surroundings
from tests.attack.published import DATA, published, valid
from tests.attack.verdict import Answer, Fell, bench, calm, equal, require

SECONDS = 30
"""Of a case."""
GIB = 1 << 30
MEMORY = 2 * GIB
BATCH = 40
"""Cases in a process."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, -(10**30), 0.5, 1e308, -1e308, 5e-324, float("nan"),
    float("inf"), "", "x", "\x1b[31m", "\ud800", "a" * 100_000, "=1+1", "../..", "<script>", [], [[]], [None] * 1000,
    {}, {"x": {"x": {}}}, [[[[[[[[[[]]]]]]]]]], {"": None}, "2026-01-01T00:00:00+00:00", "nan", "1e999",
)  # fmt: skip
"""In the place of any value."""

# Changes ------------------------------------------------------------------------------------------------------

Change = tuple[str, float, int]
"""What is done, where in the file, as a share of it, and a number that says how."""
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "drop", "repeat", "swap", "zero", "insert"]), st.floats(0, 1), st.integers(0, 2**16)),
    min_size=1, max_size=4,
)  # fmt: skip
LEAVES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, len(HOSTILE) - 1), st.sampled_from(["put", "put", "put", "remove", "rename", "nest"])),
    min_size=1, max_size=4,
)  # fmt: skip


def changed(content: bytes, changes: list[Change]) -> bytes:
    """Change bytes."""
    for what, share, number in changes:
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        size = number % 600 + 1
        piece = content[place : place + size]
        if what == "flip" and content:
            piece = bytes([content[place] ^ (1 << number % 8)])
            content = content[:place] + piece + content[place + 1 :]
        elif what == "set" and content:
            content = content[:place] + bytes([number % 256]) + content[place + 1 :]
        elif what == "cut":
            content = content[:place]
        elif what == "drop":
            content = content[:place] + content[place + size :]
        elif what == "repeat":
            content = content[:place] + piece * (number % 5 + 1) + content[place:]
        elif what == "swap":
            content = content[:place] + content[place + size : place + 2 * size] + piece + content[place + 2 * size :]
        elif what == "zero":
            content = content[:place] + bytes(len(piece)) + content[place + size :]
        elif what == "insert":
            content = content[:place] + bytes([number % 256]) * size + content[place:]
    return content


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List all values of a JSON document that are in something, by their keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*place, key)
        yield from places(inner, (*place, key))


def rewritten(document: Any, changes: list[tuple[float, int, str]]) -> Any:
    """Change values of a JSON document."""
    document = json.loads(json.dumps(document))
    for share, number, what in changes:
        everything = list(places(document))
        if not everything:
            return document
        *way, key = everything[min(int(share * len(everything)), len(everything) - 1)]
        inside = document
        for each in way:
            inside = inside[each]
        value = HOSTILE[number]
        if what == "put":
            inside[key] = value
        elif what == "remove":
            del inside[key]
        elif what == "rename" and isinstance(inside, dict):
            inside[str(value)[:50]] = inside.pop(key)
        else:
            inside[key] = [inside[key]]
    return document


def spelt(document: Any) -> bytes:
    """Write JSON as Python does, with NaN and infinity, and numbers of any length."""
    text: str = json.dumps(document)
    return text.encode("utf-8", "surrogatepass")


# What is read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Something that reads what others made."""

    cases: st.SearchStrategy[Any]
    make: Callable[[Any], bytes]
    """A case's content."""
    read: Callable[[bytes], object]
    """In an empty working directory; raises `Fell` where a command does not end in a sentence."""
    memory: int = MEMORY


def _published(name: str, verb: tuple[str, ...], content: bytes) -> None:
    out = frame.copied("published")
    first = sorted(path for path in out.iterdir() if path.is_dir())[0]
    (first / name).write_bytes(content)
    if verb[0] == "validate":
        calm(bench("validate", out, *DATA))
    else:
        calm(bench(*verb, "--out", out))


def _original(name: str) -> bytes:
    first = sorted(path for path in frame.material("published").iterdir() if path.is_dir())[0]
    return (first / name).read_bytes()


def _document(content: bytes) -> None:
    _published("run.json", ("validate",), content)
    for verb in (("table",), ("status",), ("compare",)):
        _published_again(verb)


def _published_again(verb: tuple[str, ...]) -> None:
    calm(bench(*verb, "--out", "copy"))


def _tables(case: bytes) -> None:
    name, _, content = case.partition(b"\n")
    _published(name.decode(), ("validate",), content)
    for verb in (("table", "--metrics", "f1,generic"), ("table", "--format", "long")):
        _published_again(verb)


def _results_pack(case: bytes) -> None:
    from bench.results import packing, records

    name, _, content = case.partition(b"\n")
    packing.pack(records.read_all(frame.material("published"))[0], Path("copy/pack"))
    (Path("copy/pack") / name.decode()).write_bytes(content)
    calm(bench("validate", "copy", *DATA))
    for verb in (("table",), ("compare",), ("status",)):
        _published_again(verb)


def _pack_file(name: str) -> bytes:
    from bench.results import packing, records

    with tempfile.TemporaryDirectory() as folder:
        packing.pack(records.read_all(frame.material("published"))[0], Path(folder) / "pack")
        return (Path(folder) / "pack" / name).read_bytes()


ASKED = ("run", "--algos", "fedrep(head_epochs=1)", "--rounds", 6, "--epochs", 1, "--ray", "off", "--tracking-uri", "off",
         "--json", "--out", "out")  # fmt: skip


def _checkpoint(content: bytes) -> None:
    """Whatever stands in the checkpoint: the numbers of an undisturbed run."""
    kept = frame.copied("unfinished")
    (kept / "out").rename("out")
    (file,) = Path("out").glob("*/checkpoint.pt")
    file.write_bytes(content)
    answer = calm(bench(*ASKED))
    require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    equal(numbers(answer), numbers(Answer(0, (kept / "wanted.json").read_text(), "")))


def _checkpoint_file() -> bytes:
    (file,) = frame.material("unfinished").glob("out/*/checkpoint.pt")
    return file.read_bytes()


def _images(content: bytes) -> None:
    """A file of images is refused before a run begins, or gives what it was written with."""
    Path("pack.npz").write_bytes(content)
    answer = calm(bench("run", "--algos", "fedavg", "--rounds", 1, *DRY[2:], "--json", "--data-root", "pack.npz"))
    require(answer.status in (0, 2, 3), f"begun, and then: {answer.err[-300:]}")


def _arrays(content: bytes) -> None:
    Path("own.npz").write_bytes(content)
    place = Path("own.npz").absolute()
    calm(bench("run", "--algos", "fedavg", *DRY, "--dataset", f"arrays(path='{place}')"))


def _arrays_file() -> bytes:
    import io

    import numpy as np

    from tests.test_foreign import own

    stream = io.BytesIO()
    np.savez(stream, **own())
    return stream.getvalue()


def _images_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pack.npz"
        require(bench("data", "pack", "digits", "--imbalance", 10, "--out", file).status == 0, "no file")
        return file.read_bytes()


def _line(case: bytes) -> None:
    before = surroundings()
    words: list[str] = json.loads(case)
    answer = calm(bench(*words))
    require(not Path("opened").exists(), "code has run")
    if answer.status == 2:
        new = sorted(path.name for path in set(Path().iterdir()) - before)
        require(not new, f"left behind: {', '.join(new)}")


_WORDS = st.one_of(st.sampled_from([*NUMBER, *TEXT, *CODE]), st.text(max_size=30), st.integers().map(str), st.floats().map(str))
_OPTIONS = (
    "--algos", "--preset", "--dataset", "--imbalance", "--alpha", "--seeds", "--plugin", "--setting", "--partition",
    "--clients", "--participation", "--rounds", "--match", "--epochs", "--batch-size", "--lr", "--model",
    "--eval-clients", "--auxiliary", "--weights", "--set", "--engine", "--precision", "--device", "--jobs", "--out",
    "--data-root", "--from", "--time-budget", "--keep-models", "--force", "--json",
)  # fmt: skip
_NAMES = ("notes.txt", "two.py", "quits.py", "pickled.npz", "nested.toml", "digits", "fedavg", "fedrep+focal", "mlp", "2",
          "0.5", "rounds=2", "norm=batch", "own:4", "quick", "iid", "set:pfl", "off", "auto", "cpu")  # fmt: skip
_RUNS = st.lists(
    st.tuples(st.sampled_from(_OPTIONS), st.one_of(_WORDS, st.sampled_from(_NAMES))), min_size=1, max_size=4
).map(lambda pairs: ["run", *(word for pair in pairs for word in pair), *DRY])
_OTHERS = st.tuples(st.sampled_from([verb for verb in VERBS if verb[0] not in ("run", "speed", "tune", "data")]), st.lists(_WORDS, max_size=3)).map(
    lambda pair: [*pair[0], *pair[1]]
)  # fmt: skip


def targets() -> dict[str, Target]:
    """Give all that is read; the materials must be there."""
    document = json.loads(_original("run.json"))
    checkpoint, images, arrays = _checkpoint_file(), _images_file(), _arrays_file()
    parquet = {f"{name}.parquet": _original(f"{name}.parquet") for name in ("counts", "predictions", "rounds")}
    packs = {name: _pack_file(name) for name in ("runs.parquet", "counts.parquet", "predictions.parquet")}

    def named(known: dict[str, bytes]) -> tuple[st.SearchStrategy[Any], Callable[[Any], bytes]]:
        return st.tuples(st.sampled_from(sorted(known)), CHANGES), lambda case: case[0].encode() + b"\n" + changed(known[case[0]], case[1])

    return {
        "run.json": Target(LEAVES, lambda case: spelt(rewritten(document, case)), _document),
        "run.json, bytes": Target(CHANGES, lambda case: changed(spelt(document), case), _document),
        "tables": Target(*named(parquet), _tables),
        "packs": Target(*named(packs), _results_pack),
        "checkpoints": Target(CHANGES, lambda case: changed(checkpoint, case), _checkpoint),
        "images": Target(CHANGES, lambda case: changed(images, case), _images),
        "arrays": Target(CHANGES, lambda case: changed(arrays, case), _arrays),
        "command lines": Target(_RUNS | _OTHERS, lambda case: json.dumps(case).encode(), _line),
    }  # fmt: skip


# Cases --------------------------------------------------------------------------------------------------------


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
    cases = sum(not each["wrong"] or each["wrong"] != "memory" for each in said)
    if os.WIFSIGNALED(status) and current.exists():
        found.append((current.read_bytes(), f"ended by signal {os.WTERMSIG(status)}, or without an end"))
    return {"cases": cases, "found": found, "gigabytes": usage.ru_maxrss / 1024**2}


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
        max_examples=BATCH, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
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

    with contextlib.suppress(BaseException):
        one()
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
    parser.add_argument("--guided", metavar="TARGET", help="by coverage, with atheris")
    given = parser.parse_args()
    if given.guided is not None:
        _guided(given)
    with prepared() as (place, known):
        if given.again is not None:
            os.chdir(place)
            wrong = tried(known[given.target[0]], given.again.read_bytes())
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


def _guided(given: argparse.Namespace) -> None:
    """Have atheris look for contents that reach new code; it ends this process."""
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise SystemExit("atheris is not installed: pip install atheris") from None
    with atheris.instrument_imports(include=["bench"]):
        import bench.validation.report
    assert bench.validation.report
    with prepared() as (place, known):
        target = known[given.guided]
        corpus = place / "corpus"
        corpus.mkdir()
        (corpus / "real").write_bytes(target.make(_nothing(given.guided)))
        os.chdir(place)

        def one(content: bytes) -> None:
            wrong = tried(target, content)
            if wrong is not None:
                _keep(Path(given.keep), given.guided, content, wrong, abs(hash(signature(wrong))) % 1000)

        limits = [f"-max_total_time={int(60 * given.minutes)}", "-rss_limit_mb=4096", f"-timeout={2 * SECONDS}", "-max_len=200000"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
        atheris.Fuzz()


def _nothing(name: str) -> Any:
    """Give the case that changes nothing."""
    if name in ("tables", "packs"):
        return "counts.parquet", []
    return ["run", "--algos", "fedavg", *DRY] if name == "command lines" else []


if __name__ == "__main__":
    main()
