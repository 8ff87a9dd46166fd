"""Bad or odd input on the command line: a sentence, no code that runs, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tests.attack.frame import TRIES, Try, limited
from tests.attack.verdict import Answer, apart, bench, calm, refused, require, untouched

AREA = "command line, bad or odd input"
OFF = ("--ray", "off", "--tracking-uri", "off")
LONG = "9" * 5000
DRY = ("--dry-run", "--no-probe", *OFF)

# What values are tried, by what they should be ----------------------------------------------------------------

NUMBER = ("", "-1", "0", "nan", "inf", "1e308", "10**9", LONG, "0x10", "1_0", "\u0661\u0662", "1;2", "\x1b[31m5")
TEXT = ("", "nothing", "../../etc/passwd", "a" * 5000, "\x1b]0;title\x07", "%s%n", "\ud800", "fed avg", "*")
NEVER = {
    "--clients": NUMBER,
    "--rounds": NUMBER,
    "--epochs": NUMBER[:8],
    "--batch-size": NUMBER[:8],
    "--participation": NUMBER[:8],
    "--alpha": NUMBER[:8],
    "--imbalance": NUMBER[:8],
    "--lr": ("", "nan", "-1", LONG),
    "--seeds": ("", "-1", "1e9", "1,1", "nan", LONG),
    "--eval-clients": ("", "-1", "0", LONG),
}
"""Options of numbers. Whatever is no number there is refused, and what is one may be taken."""
TEXTS = {
    "--algos": TEXT,
    "--dataset": TEXT,
    "--setting": TEXT[:7],
    "--partition": TEXT[:6],
    "--model": TEXT[:6],
    "--preset": TEXT[:5],
    "--auxiliary": ("", "own", "own:-1", "own:" + LONG, "mars:4"),
    "--set": ("", "rounds", "=", "rounds=", "rounds=9=9", "nothing=1", "lr=__import__('os')", "lr=1e308", "lr=nan"),
    "--time-budget": ("", "-1h", "9" * 50 + "h", "1 fortnight", "nan", "\x1b[2J"),
    "--weights": ("", "none.pth", ".", "/dev/zero", "pipe", "notes.txt"),
    "--teacher": ("", "none.safetensors", ".", "/dev/zero", "pipe", "notes.txt"),
    "--plugin": ("", "notes.txt", "none.py", "quits.py", "two.py", "folder.py", "/dev/null", "binary.py"),
    "--from": ("", "none.toml", "notes.txt", ".", "nested.toml", "unknown.toml", "/dev/zero", "pipe"),
    "--ray": ("", "host", "host:1", "127.0.0.1:1", "ray://nowhere:1", LONG[:500]),
    "--tracking-uri": ("", "nowhere://x", "\x00"),
    "--data-root": ("", "notes.txt"),
    "--jobs": ("", "0", "-1", LONG),
    "--workers-per-run": ("0", "-1", "1000", LONG),
    "--device": ("", "tpu", "cuda:99"),
    "--engine": ("", "x"),
    "--precision": ("", "fp8"),
    "--match": ("", "time"),
    "--out": ("", "notes.txt", "/proc/x"),
}
ALLOWED = {("--seeds", "1e9"), ("--participation", "1e308"), ("--weights", "")}

CODE = (
    "__import__('os').mkdir('opened')",
    "fedrep(head_epochs=__import__('os').mkdir('opened'))",
    "fedrep(**{'head_epochs': 1})",
    "fedrep(*[1])",
    "fedrep((lambda: 1)())",
    "fedrep(head_epochs=[1][0])",
    "fedrep(head_epochs=1 if 1 else 2)",
    "fedrep(head_epochs=os.mkdir('opened'))",
    "fedrep.__class__",
    "fedrep()()",
    "fedrep(head_epochs=eval('1'))",
    "fedrep(head_epochs=f'{1}')",
    "fedrep(head_epochs=(x:=1))",
    "fedrep(head_epochs=open('opened', 'w'))",
    "fedrep; touch opened",
    "$(touch opened)",
    "`touch opened`",
    "fedrep(head_epochs=print(1))",
    "fedrep(head_epochs={1})",
    "fedrep(head_epochs=...)",
    "fedrep(head_epochs=1j)",
    "fedrep(head_epochs=b'1')",
    "fedrep(head_epochs=-True)",
    "fedrep(__class__=1)",
    "fedrep(self=1)",
    "fedavg+",
    "+focal",
    "fedavg++focal",
    "fedavg+focal+focal",
    "fedavg+fedrep",
    "set:",
    "set:nothing",
    "set:all+",
    "fedrep(",
    "fedrep)",
    "(((fedrep)))",
    "fedrep(head_epochs=1,head_epochs=2)",
    "fedrep(head_epochs)",
    "fedrep(,)",
    "fedrep(1)",
    "fedrep(head_epochs=-1)",
    "fedrep(head_epochs=10**23)",
    "fedrep(head_epochs=1.5)",
    "fedavg_ft(finetune_epochs=-3)",
    "creff(match_steps=-1)",
    "creff(features_per_class=0)",
    "fedprox(mu=-1)",
    "fedprox(mu=nan)",
    "fedprox(mu=1e999)",
    f"fedrep(head_epochs={'[' * 300 + ']' * 300})",
    f"fedrep(head_epochs={LONG[:4000]})",
    f"fedrep(head_epochs={'-' * 3000}1)",
    f"fedrep({'(' * 90 + ')' * 90})",
    "fedrep(head_epochs='\x1b[31m')",
    "fedrep(head_epochs=\ud800)",
    "fedrep#",
    "fedrep\n(head_epochs=1)",
)
TAKEN = {"(((fedrep)))", "fedrep#", "fedrep\n(head_epochs=1)"}
"""What may be read as what it obviously means."""

VERBS = (
    *((verb, "nowhere") for verb in ("table", "site", "compare", "status", "validate", "submit", "clean", "track")),
    *((verb, "notes.txt") for verb in ("table", "site", "compare", "status", "validate", "submit", "track", "pack")),
    *((verb, "\x1b[31mred") for verb in ("table", "validate", "status", "show", "check")),
    *((verb, "--nothing") for verb in ("run", "list", "show", "tune", "table", "new", "speed", "data")),
    *(("data", what, "mars") for what in ("stats", "fetch", "check", "prepare", "embed")),
    *(("new", kind, name) for kind in ("algorithm", "model") for name in ("torch", "os", "bench", "../up", "1", "")),
    ("new", "planet", "mars"),
    ("new", "algorithm", "a" * 300),
    ("new", "algorithm", "mine", "--out", "notes.txt"),
    ("nothing",),
    ("",),
    ("\x1b[31m",),
    ("run", "run"),
    ("--", "run", "x"),
    ("list", "planets"),
    ("list",),
    ("show",),
    ("show", "nothing"),
    ("show", "../fedavg"),
    ("show", "fedavg", "--kind", "datasets"),
    ("check", "fedavg(x=1)"),
    ("check", "fedavg", "--plugin", "notes.txt"),
    ("validate", ".", "--plugin", "notes.txt"),
    ("eval", "ffff"),
    ("eval", "../x"),
    ("eval", ""),
    ("table", "--metrics", "nothing"),
    ("table", "--metrics", ""),
    ("table", "--format", "xml"),
    ("table", "--metric", "worst"),
    ("table", "--into", "notes.txt"),
    ("table", "--into", "none.md"),
    ("table", "--per-seed"),
    ("compare", ".", "fedavg"),
    ("compare", "--metric", "x"),
    ("compare", "--diagram", "x.exe"),
    ("validate", ".", "--rerun", "0"),
    ("validate", ".", "--rerun", LONG),
    ("validate", ".", "--rerun", "-1"),
    ("validate", ".", "--rerun-seed", "-1"),
    ("validate", ".", "--write"),
    ("validate", ".", "--jobs", "0"),
    ("submit", ".", "--to", "notes.txt"),
    ("submit", "."),
    ("pack", "."),
    ("pack", ".", "--to", "notes.txt"),
    ("pack", ".", "--to", "x", "--unpack"),
    ("clean", "."),
    ("site", ".", "--to", "."),
    ("track", ".", "--tracking-uri", ""),
    ("data", "stats", "digits", "--clients", "0"),
    ("data", "stats", "digits", "--clients", "10000000"),
    ("data", "stats", "digits", "--alpha", "-1"),
    ("data", "stats", "digits", "--imbalance", "1e300"),
    ("data", "stats", "digits", "--seed", "-1"),
    ("data", "stats", "digits", "--set", "x=1"),
    ("data", "stats", "digits", "--out", "x.exe"),
    ("data", "stats", "arrays(path='pickled.npz')"),
    ("data", "stats", "arrays(path='/dev/zero')"),
    ("data", "stats", "arrays(path='pipe')"),
    ("data", "stats", "folder(path='.')"),
    ("data", "stats", "folder(path='')"),
    ("data", "pack", "digits", "--out", "notes.txt/x.npz"),
    ("data", "stats", "features(path='notes.txt')"),
    ("speed", "--model", "nothing"),
    ("speed", "--batch-size", "0"),
    ("speed", "--workload", "nothing"),
    ("tune", "--trials", "0"),
    ("tune", "--validation", "2"),
    ("tune", "--fields", "nothing", "--trials", "1"),
    ("tune", "--for", "fun"),
    ("run", "--json", "--dry-run", "--algos", "x"),
)
NOT_REFUSED = {
    ("list",),
    ("clean", "."),
    ("track", "nowhere"),
    ("status", "nowhere"),
    ("run", "--nothing"),
    ("table", "--into", "notes.txt"),
}
"""What may be well: it says so, or asks."""


def surroundings() -> set[Path]:
    """Write what command lines name into the working directory; give what is there."""
    Path("notes.txt").write_text("x = 1\n")
    Path("quits.py").write_text("import sys\nsys.exit(3)\n")
    Path("two.py").write_text("raise RuntimeError('one\\ntwo')\n")
    Path("binary.py").write_bytes(bytes(range(256)))
    Path("folder.py").mkdir()
    Path("nested.toml").write_text("algos = " + "[" * 2000 + "]" * 2000)
    Path("unknown.toml").write_text("planet = 'mars'\n")
    os.mkfifo("pipe")
    np.savez("pickled.npz", train_x=np.zeros((4, 8, 8), np.uint8), train_y=np.array([{}] * 4, dtype=object))
    return set(Path().iterdir())


def _said(words: tuple[str, ...], must: bool) -> Answer:
    before = surroundings()
    answer = bench(*words)
    require(not Path("opened").exists(), "code has run")
    (refused if must else calm)(answer)
    if answer.status == 2:
        untouched(Path(), before)
    require("allow_pickle" not in answer.text and "unsafe" not in answer.text, "numpy's advice is passed on")
    return answer


def _enter(name: str, act: Callable[[], object], seconds: float = 40, memory: float | None = 2) -> None:
    TRIES.append(Try(area=AREA, name=name, act=act, seconds=seconds, memory=memory))


def _shown(word: str) -> str:
    text = word if len(word) < 40 else f"{word[:20]}...{len(word)}"
    return text.encode("unicode_escape").decode()


for option, values in (*NEVER.items(), *TEXTS.items()):
    for value in values:
        words = ("run", "--algos", "fedavg", *DRY, option, value)
        # only what is no number at all must be refused: what is one may be allowed
        sure = value in ("", "-1", "nan", LONG, "10**9") and option in NEVER
        _enter(f"run {option} {_shown(value)!r}", partial(_said, words, sure), memory=None if option == "--ray" else 2)
for text in CODE:
    _enter(f"--algos {_shown(text)!r}", partial(_said, ("run", "--algos", text, *DRY), text not in TAKEN))
for each in VERBS:
    _enter(" ".join(map(_shown, each)), partial(_said, each, each not in NOT_REFUSED))
for what, more in {
    "clients": ("--clients", "5000"),
    "weights": ("--weights", "none.pth"),
    "alpha": ("--alpha", "1e-300"),
    "imbalance": ("--imbalance", "1e300"),
    "model": ("--model", "resnet50"),
    "mars": ("--dataset", "mars"),
    "auxiliary": ("--auxiliary", "own:100000"),
    "address": ("--ray", "127.0.0.1:1"),
}.items():
    asked = ("run", "--algos", "fedavg", *OFF, *more)
    _enter(f"a run that cannot be leaves no folder: {what}", partial(_said, asked, True), memory=None)


def _many_workers() -> None:
    answer = apart("run", "--algos", "fedavg", "--rounds", 1, "--workers-per-run", 1000, *OFF[2:], seconds=40)
    refused(answer)


def _too_little() -> None:
    import resource

    with limited(resource.RLIMIT_AS, 1_500_000_000):
        answer = apart("run", "--algos", "fedavg", "--rounds", 1, *OFF)
    calm(answer, memory=True)
    require(answer.status == 1, f"exit status {answer.status}")


_enter("a thousand workers for a run", _many_workers, 60, None)
_enter("an address space of 1.5 GB", _too_little, 60, None)
