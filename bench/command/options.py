"""The options of `bench run`: on the command line, or as keys of a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.command.typed import Choice, Place
from bench.face.asked import DEFAULT_ALGORITHMS, DEFAULT_DATASET, DEFAULT_SETTING, Asked
from bench.plugins.names import meant, near
from bench.protocol import suites
from bench.system import reading


@dataclass(frozen=True, kw_only=True)
class Options(Asked):
    """What the command line, the sweep file and the defaults say; names as of the options."""

    dry_run: bool
    no_probe: bool
    json: bool


def run_options(command: click.Command) -> click.Command:
    """Give a command the options of `bench run`."""
    command.params += [click.Option([name], help=text, **more) for name, text, more in _OPTIONS]
    return command


def some_run_options(names: Collection[str]) -> Callable[[click.Command], click.Command]:
    """Give a command those options of `bench run` that mean something to it."""

    def add(command: click.Command) -> click.Command:
        command.params += [click.Option([name], help=text, **more) for name, text, more in _OPTIONS if name in names]
        return command

    return add


def defaults() -> dict[str, Any]:
    """Give what the options of `bench run` are when none is given."""
    params: list[click.Parameter] = [click.Option([name], **more) for name, _, more in _OPTIONS]
    return click.Command("run", params=params).make_context("run", []).params


def _read_file(context: click.Context, parameter: click.Parameter, file: Path | None) -> None:
    """Make the keys of a TOML file the defaults of the options of these names; a suite says what it is besides."""
    if file is None:
        return
    if context.default_map:
        raise click.BadParameter("--suite and --from exclude each other; leave one out", context, parameter)
    try:
        content = tomllib.loads(reading.contents(file).decode())
    except RecursionError as error:
        raise click.BadParameter(f"{file}: too many brackets in each other", context, parameter) from error
    except (OSError, ValueError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else f"not TOML: {error}"
        raise click.BadParameter(f"{file}: {why}", context, parameter) from error
    options = {name.removeprefix("--").replace("-", "_"): more for name, _, more in _OPTIONS}
    del options["from"], options["suite"]
    defaults: dict[str, Any] = {}
    content.pop(suites.ABOUT, None)
    for key, value in content.items():
        name = meant(key, options)
        if name is None:
            said = f"{file}: no option is called {key!r}; {near(key, options)}"
            raise click.BadParameter(said, context, parameter)
        defaults[name] = _as_typed(value, bool(options[name].get("multiple")))
    context.default_map = defaults


def _as_typed(value: Any, many: bool) -> Any:
    """Spell a value of TOML as a person types it."""
    if many:
        if isinstance(value, dict):
            return [f"{key}={item!r}" for key, item in value.items()]
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")  # `5,` is a seed, `5` a count
    return value if isinstance(value, bool) else str(value)


def _read_suite(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """Make what a named suite says the defaults of the options."""
    if name is not None:
        known = meant(name, suites.names())
        if known is None:
            said = f"no suite is called {name!r}; {near(name, suites.names())}"
            raise click.BadParameter(said, context, parameter)
        _read_file(context, parameter, suites.file(known))


_PATH = Place()
_Callback = Callable[[click.Context, click.Parameter, Any], Any]
_ON_SUITE: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": _read_suite}
_ON_FILE: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": _read_file}


def _shown(default: str) -> dict[str, Any]:
    return {"default": default, "show_default": True}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": Choice(values), "default": values[0], "show_default": True}


_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "--algos",
        "Algorithms, with parameters and parts as in fedrep(head_epochs=5)+topk, and sets as in set:pfl.",
        _shown(DEFAULT_ALGORITHMS),
    ),
    (
        "--preset",
        "Fields and learning rates of the algorithms: default, paper, or what 'bench tune' wrote; several at once.",
        {"default": "default", "show_default": True, "metavar": "default|paper|FILE"},
    ),
    ("--dataset", "Dataset, or several separated by commas.", _shown(DEFAULT_DATASET)),
    ("--imbalance", "Largest class over smallest, e.g. 10,50; the setting's by default.", {}),
    ("--alpha", "Concentration of the partition, e.g. 0.1,0.5; small is more skewed.", {}),
    (
        "--grid",
        "Cells to run of these, where they are no full product: 'imbalance=10,50; alpha=0.5'; repeatable.",
        {"metavar": "CELLS", "multiple": True},
    ),
    ("--seeds", "A count (3 is 0,1,2), or seeds with a comma (0,4,7 or 3407,).", _shown("1")),
    (
        "--plugin",
        "File with an algorithm, a part, a dataset or a model; repeatable.",
        {"type": _PATH, "multiple": True},
    ),
    ("--setting", "Named protocol; the next options replace parts of it.", _shown(DEFAULT_SETTING)),
    ("--partition", "How images are dealt to clients; see 'bench list partitions'.", {}),
    ("--clients", "Number of clients.", {"type": int}),
    ("--participation", "Share of the clients that train in a round, in (0, 1].", {"type": float}),
    ("--rounds", "Rounds of communication.", {"type": int}),
    (
        "--match",
        "What is equal for all: rounds (the default), or samples: each has the rounds in which it processes about what "
        "plain local training processes in --rounds.",
        {"type": Choice(["rounds", "samples"])},
    ),
    ("--epochs", "Local epochs of a round.", {"type": int}),
    ("--batch-size", "Examples of an optimiser step.", {"type": int}),
    ("--lr", "Learning rate.", {"type": float}),
    ("--model", "Network; see 'bench list models'.", {}),
    ("--eval-clients", "Personal models tested: those of so many clients, drawn once; by default all.", {"type": int}),
    (
        "--auxiliary",
        "Images at the server, where an algorithm needs some: N of each class that the tail cut away, or others.",
        {"metavar": "own:N|DATASET:N"},
    ),
    ("--weights", "File of weights, trained elsewhere, that the model's body starts from.", {"type": _PATH}),
    (
        "--teacher",
        "File of a teacher's features, images (N, d) and texts (C, d) in safetensors, where an algorithm needs some.",
        {"type": _PATH},
    ),
    (
        "--set",
        "Any other field of the setting, e.g. norm=batch; repeatable.",
        {"metavar": "FIELD=VALUE", "multiple": True},
    ),
    ("--engine", "Clients one by one, or stacked.", _one_of("auto", "serial", "stacked")),
    ("--precision", "Arithmetic of the networks.", _one_of("fp32", "bf16")),
    ("--device", "auto is a CUDA GPU where there is one; mps is Apple's.", _one_of("auto", "cpu", "cuda", "mps")),
    ("--jobs", "Runs at once; by default what the machine holds.", {"type": click.IntRange(min=1)}),
    (
        "--workers-per-run",
        "Processes that share the clients of each run; the numbers stay the same.",
        {"type": click.IntRange(min=1), **_shown("1")},
    ),
    (
        "--ray",
        "Where runs go: Ray on this machine (default for several), this process, or a cluster.",
        {"metavar": "local|off|ADDRESS"},
    ),
    (
        "--shared-out",
        "The machines of a cluster write --out themselves, one folder at the same path on all; else results come home.",
        {"is_flag": True},
    ),
    ("--no-ship", "The machines of a cluster have this package; else they are sent it.", {"is_flag": True}),
    (
        "--out",
        "Folder of results.",
        {"type": _PATH, "default": Path("runs"), "show_default": True},
    ),
    ("--data-root", "Folder of datasets; else $BENCH_DATA, else the user's cache.", {"type": _PATH}),
    ("--tracking-uri", "MLflow; by default SQLite beside the results.", {"metavar": "URI|off"}),
    ("--from", "TOML file with these options as keys; those given here win.", {"type": _PATH, **_ON_FILE}),
    ("--suite", "A named grid with its protocol, see 'bench list suites'; options given here win.", {**_ON_SUITE}),
    ("--time-budget", "Begin no run that would not end in time, e.g. 45s, 90m, 1h30m.", {"metavar": "DURATION"}),
    ("--dry-run", "Say what would run, and what it will take, and stop.", {"is_flag": True}),
    ("--no-probe", "With --dry-run: try nothing out, forecast from finished runs only.", {"is_flag": True}),
    ("--force", "Run again what is finished, and replace it.", {"is_flag": True}),
    (
        "--keep-models",
        "Write the last models beside the results (safetensors); what is finished without is run again.",
        {"is_flag": True},
    ),
    ("--json", "Print one JSON document on standard output.", {"is_flag": True}),
)
"""Name, help, and the rest of what `click.Option` takes."""
