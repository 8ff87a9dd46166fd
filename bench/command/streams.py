"""Output where it is not UTF-8 (a code page, a pipe): what cannot be written is written in ASCII, and nothing fails."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "bench.ascii"
_ALIKE = {"–": "-", "±": "+-", "×": "x", "·": "*", "≥": ">=", "≤": "<=", "✓": "ok", "✗": "NO"}
_BLOCKS = dict(zip("▁▂▃▄▅▆▇█░▒▓", "..::==##.=#", strict=True))


def make_safe() -> None:
    """Have standard output and error write stand-ins for characters that their encoding lacks."""
    codecs.register_error(_NAME, _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors=_NAME)


def unwritten(error: OSError) -> str | None:
    """Say why standard output cannot be written, if that is what an error is of; what is left of it is dropped then."""
    if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
        return None
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except io.UnsupportedOperation:  # it is no file
        return None
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        return again.strerror
    return None


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM, which schedulers send, end a command as Ctrl-C does; and have either end it wherever it arrives.

    In what Python calls by itself, as when an object is gone, an interruption is told to nobody: it comes again then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, usual = signal.signal(signal.SIGTERM, signal.default_int_handler), sys.unraisablehook
    here = threading.get_ident()

    def again(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is KeyboardInterrupt:
            # not here, where it would be lost too; and as a signal, which ends whatever is waited for
            threading.Timer(0.05, signal.pthread_kill, (here, signal.SIGTERM)).start()
        else:
            usual(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = usual
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    """Write a character in ASCII: what looks like it, a letter without its accent, or a question mark."""
    known = {**_ALIKE, **_BLOCKS}.get(character)
    if known is not None:
        return known
    plain = unicodedata.normalize("NFKD", character)
    return "".join(each for each in plain if each.isascii()) or "?"
