"""What has held: a refusal in one clear sentence, or an answer that is no other than an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOO_LITTLE_MEMORY = "the memory that this process may use is too little"
_LONGEST = 1500
"""Characters of a sentence, which may name files and all that is allowed."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


class Fell(AssertionError):
    """Something that was tried has not been withstood. The message says what came."""


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All that was said."""
        return self.out + self.err


def bench(*words: object) -> Answer:
    """Call the command in this process, which is the try's own. An error that nobody caught is its traceback."""
    from bench.command.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words], prog_name="bench")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            status = 1
            err.write(traceback.format_exc())
    return Answer(status, out.getvalue(), err.getvalue())


def apart(*words: object, seconds: float = 120, **environment: str) -> Answer:
    """Call the command in another process, and wait for it."""
    command = [sys.executable, "-m", "bench", *map(str, words)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Fell(f"no end within {seconds:.0f} s") from None
    return Answer(done.returncode, done.stdout, done.stderr)


def calm(answer: Answer, memory: bool = False) -> Answer:
    """Require that a command ended by itself: done, or with a sentence at the end of what it says.

    Args:
        answer: What came.
        memory: Whether too little memory may be the reason.

    Raises:
        Fell: It did not.
    """
    if "Traceback (most recent call last)" in answer.text:
        last = [line for line in answer.text.splitlines() if line.strip()][-1]
        raise Fell(f"traceback: {last[:300]}")
    if answer.status not in (0, 1, 2, 3, 130):
        raise Fell(f"exit status {answer.status}: {answer.err[-200:]}")
    found = _UNPRINTABLE.search(_COLOURS.sub("", answer.text))
    if found is not None:
        raise Fell(f"a control character comes through: {answer.text[max(0, found.start() - 20) : found.end() + 20]!r}")
    if TOO_LITTLE_MEMORY in answer.err and not memory:
        raise Fell("all memory was taken")
    if answer.status:
        said = answer.err.rstrip("\n").splitlines()
        if not said or not (said[-1].startswith("bench: ") or answer.status == 1):  # 1: something is left out
            raise Fell(f"no sentence at the end, exit status {answer.status}: {answer.err[-200:]!r}")
        if len(said[-1]) > _LONGEST:
            raise Fell(f"a sentence of {len(said[-1]):,} characters")
    return answer


def refused(answer: Answer, *words: str, status: tuple[int, ...] = (1, 2, 3)) -> Answer:
    """Require that a command ended with a sentence and a status that says so.

    Args:
        answer: What came.
        words: Must all be said, in whatever is printed.
        status: Which are allowed.

    Raises:
        Fell: It did not.
    """
    calm(answer)
    if answer.status not in status:
        raise Fell(f"taken: exit status {answer.status}; {answer.text.strip()[-300:]}")
    for word in words:
        if word not in answer.text:
            raise Fell(f"{word!r} is not said: {answer.text.strip()[-300:]}")
    return answer


def require(holds: bool, otherwise: str) -> None:
    """Require something.

    Raises:
        Fell: It is not so.
    """
    if not holds:
        raise Fell(otherwise)


def equal(found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Require what an undisturbed sweep gave, by run.

    Raises:
        Fell: A run is lost, or has other numbers.
    """
    lost = sorted(set(wanted) - set(found))
    changed = sorted(run for run in set(wanted) & set(found) if found[run] != wanted[run])
    require(not lost, f"lost: {', '.join(lost)}")
    require(not changed, f"changed: {', '.join(changed)}")


def untouched(folder: Path, before: set[Path]) -> None:
    """Require that a refused command has left nothing.

    Raises:
        Fell: There is something new.
    """
    new = sorted(path.name for path in set(folder.iterdir()) - before)
    require(not new, f"left behind: {', '.join(new)}")
