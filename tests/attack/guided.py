"""A fuzz that looks at what code it reaches: `python -m tests.attack.guided documents --minutes 10`, or `calls`.

With atheris (`pip install atheris`), which is none of the test extras, as it has no wheels for every system. It needs
thousands of cases a second, so that only what reads a run.json and what reads algorithms on a command line is tried.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def main() -> None:
    """Try until the time is over, or something is raised that should not be; atheris ends this process."""
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["documents", "calls"])
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    with atheris.instrument_imports(include=["bench"]):
        from bench.plugins.registry import UnknownPlugin
        from bench.protocol.refusal import BadConfig
        from bench.protocol.spelling import parse_algorithms
        from bench.results.record import DamagedResult, check, parse

    def document(content: bytes) -> None:
        folder = Path("0" * 12)
        with suppress(DamagedResult, ValueError, RecursionError):  # what its readers name the folder for
            found: Any = parse(content)
            check(folder, found)

    def call(content: bytes) -> None:
        with suppress(BadConfig, UnknownPlugin):
            parse_algorithms(content.decode("utf-8", "replace"))

    real = Path(__file__).parents[1] / "formats" / "2" / "7f9a0ceba804" / "run.json"
    known = json.dumps(json.loads(real.read_text())).encode()
    calls = b"fedrep(head_epochs=5)+focal(gamma=1.0)+topk,fedprox(mu=0.1),set:pfl"
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "real").write_bytes(known if given.what == "documents" else calls)
        limits = [f"-max_total_time={int(60 * given.minutes)}", "-rss_limit_mb=4096", "-timeout=30", "-max_len=20000"]
        atheris.Setup([sys.argv[0], *limits, corpus], document if given.what == "documents" else call)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
