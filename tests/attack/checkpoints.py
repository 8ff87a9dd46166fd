"""A checkpoint or states that were damaged: the same numbers as ever, or the run anew, and that is said."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.attack.frame import TRIES, Try, copied, made, material
from tests.attack.verdict import Answer, bench, calm, equal, require

AREA = "damaged checkpoint or states of an unfinished run"
OFF = ("--ray", "off", "--tracking-uri", "off")
ASKED = ("run", "--algos", "fedrep(head_epochs=1)", "--rounds", 6, "--epochs", 1, *OFF, "--json", "--out", "out")


def _save_each_round() -> None:
    from bench.training import rounds

    run: Any = rounds.Run
    run._is_due = lambda self: True


def _in_a_file() -> None:
    """Keep private states in a file, however few they are."""
    from bench.training import states

    states.IN_MEMORY_BYTES = 0
    _save_each_round()


def numbers(answer: Answer) -> dict[str, object]:
    """Digest and metrics of the runs that a command printed, by id."""
    require(answer.out.startswith("{"), f"nothing was printed: {answer.err[-300:]}")
    return {
        run["id"]: (run["status"] == "failed", run["digest"], run["metrics"]) for run in json.loads(answer.out)["runs"]
    }


def _killed(in_a_file: bool) -> None:
    """A run that is killed after its fourth round, and one that is not."""
    if in_a_file:
        _in_a_file()
    else:
        _save_each_round()
    whole = calm(bench(*ASKED))
    Path("wanted.json").write_text(whole.out)
    shutil.rmtree("out")
    child = os.fork()
    if not child:
        _stop_after(4)
        bench(*ASKED)
        os._exit(0)
    os.waitpid(child, 0)
    require(any(Path("out").glob("*/checkpoint.pt")), "there is no checkpoint")


def _stop_after(stop: int) -> None:
    from bench.training import checkpoint

    save, count = checkpoint.save, [0]

    def watched(file: Path, saved: Mapping[str, Any]) -> None:
        save(file, saved)
        count[0] += 1
        if count[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = watched


@made
def unfinished() -> None:
    """States in memory, hence in the checkpoint."""
    _killed(False)


@made
def unfinished_states() -> None:
    """States in a file."""
    _killed(True)


def flipped(content: bytes, place: int) -> bytes:
    """Change a bit."""
    return content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]


def cut(content: bytes, place: int) -> bytes:
    """Lose the end."""
    return content[:place]


def hole(content: bytes, place: int) -> bytes:
    """Have zeros in place of a page, as a loss of power leaves them."""
    start = place - place % 4096
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def swapped(content: bytes, place: int) -> bytes:
    """Exchange two pieces."""
    half = len(content) // 2
    place %= max(half - 512, 1)
    one, other = content[place : place + 512], content[half + place : half + place + 512]
    return content[:place] + other + content[place + 512 : half + place] + one + content[half + place + 512 :]


def _gone_on(name: str, suffix: str, damage: Callable[[Path], object]) -> None:
    out = copied(name, "out-copy")
    shutil.move(out / "out", "out")
    if name == "unfinished_states":
        _in_a_file()
    (file,) = Path("out").glob(f"*/checkpoint{suffix}")
    damage(file)
    answer = calm(bench(*ASKED))
    require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    wanted = Answer(0, (material(name) / "wanted.json").read_text(), "")
    equal(numbers(answer), numbers(wanted))
    require("Unpickl" not in answer.text and "KeyError" not in answer.text, "words of a library")


def _bytes(change: Callable[[bytes, int], bytes], share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(change(content, min(int(share * len(content)), len(content) - 1)))


def _crafted(change: Callable[[dict[str, Any]], Any], file: Path) -> None:
    """Another content, with the digest that it must have."""
    from bench.training import checkpoint

    checkpoint.save(file, change(checkpoint.load(file, "cpu")))


def _replaced(by: Callable[[Path], object], file: Path) -> None:
    file.unlink()
    by(file)


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda saved: [1, 2],
    "without the store": lambda saved: {k: v for k, v in saved.items() if k != "store"},
    "round 10^9": lambda saved: {**saved, "round": 10**9},
    "round -1": lambda saved: {**saved, "round": -1},
    "round as a text": lambda saved: {**saved, "round": "2"},
    "one key more": lambda saved: {**saved, "more": 1},
    "an empty server": lambda saved: {**saved, "server": {}},
    "no counts": lambda saved: {**saved, "counts": []},
    "costs that are NaN": lambda saved: {**saved, "cost": {"wall_seconds": float("nan")}},
}
ODD: dict[str, Callable[[Path], object]] = {
    "a link to nowhere": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a folder": lambda file: file.mkdir(),
    "a pipe": os.mkfifo,
    "nothing": lambda file: file.write_bytes(b""),
    "a pickle that runs code": lambda file: _evil(file),
    "a device": lambda file: file.symlink_to("/dev/zero"),
}


def _evil(file: Path) -> None:
    import pickle

    from tests.attack.foreign import Evil

    file.write_bytes(pickle.dumps(Evil()))


def _enter(what: str, name: str, suffix: str, damage: Callable[[Path], object]) -> None:
    TRIES.append(Try(area=AREA, name=what, act=partial(_gone_on, name, suffix, damage), needs=(name,), seconds=60))


def draw(seed: int) -> None:
    """Enter the damage at random places."""
    chosen = random.Random(f"{seed} checkpoints")
    for number in range(16):
        _enter(f"one bit of a checkpoint, {number}", "unfinished", ".pt", partial(_bytes, flipped, chosen.random()))
    for number in range(6):
        change = (cut, hole, swapped)[number % 3]
        _enter(f"{change.__name__}, {number}", "unfinished", ".pt", partial(_bytes, change, chosen.random()))
    for number in range(8):
        change = (flipped, hole, cut, swapped)[number % 4]
        _enter(
            f"states {change.__name__}, {number}",
            "unfinished_states",
            ".states",
            partial(_bytes, change, chosen.random()),
        )
    for name, craft in CRAFTED.items():
        _enter(f"a checkpoint that is {name}", "unfinished", ".pt", partial(_crafted, craft))
    for name, put in ODD.items():
        _enter(f"a checkpoint is {name}", "unfinished", ".pt", partial(_replaced, put))
    for name in ("nothing", "a folder", "a link to nowhere"):
        _enter(f"states are {name}", "unfinished_states", ".states", partial(_replaced, ODD[name]))
