"""The command: verbs that are loaded when they are called, and errors as one sentence with an exit status.

Exit status 0 done, 1 some run failed or some result does not hold together, 2 wrong usage or configuration, 3 data
missing or damaged, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

import click

import bench
from bench.command.streams import make_safe, terminable, unwritten
from bench.command.typed import Verbs, as_spelt, sentence
from bench.system.text import lines

_VERBS = {
    "run": ("bench.command.run", "Compare algorithms; with no options, five of them on scikit-learn's digits."),
    "list": ("bench.command.show", "List algorithms, parts, datasets, models, settings, partitions."),
    "show": ("bench.command.show", "Say what a plug-in, model, setting or partition is, and what it takes."),
    "data": ("bench.command.data", "Fetch, check and look at datasets and how they are split."),
    "tune": ("bench.command.tune", "Choose hyper-parameters on training data, with one budget for every algorithm."),
    "status": ("bench.command.status", "Say how far a sweep is that runs in another shell."),
    "table": ("bench.command.table", "Print the leaderboard of stored results."),
    "eval": ("bench.command.evaluate", "Test the models that a run kept on other images, or on new clients."),
    "track": ("bench.command.track", "Show stored results in MLflow, if a sweep could not while it ran."),
    "compare": ("bench.command.compare", "Test whether algorithms differ, paired by split and seed."),
    "clean": ("bench.command.clean", "Remove runs of older versions of a plug-in, and failed ones."),
    "site": ("bench.command.site", "Build a static site of stored results."),
    "pack": ("bench.command.pack", "Put many runs into a few files, and take them out again."),
    "validate": ("bench.command.publish", "Check whether published results hold together."),
    "submit": ("bench.command.publish", "Pack finished runs for a pull request."),
    "check": ("bench.command.plugin", "Check that an algorithm, a part or a dataset keeps the contract."),
    "speed": ("bench.command.speed", "Measure how fast training is, beside the bare loop and beside others."),
    "new": ("bench.command.plugin", "Write an algorithm, a part or a dataset to start from."),
}
"""Verb to the module that has the command of that name, and what it does, for `bench --help`."""

_STATUS = {
    "BadConfig": 2,
    "UnknownPlugin": 2,
    "BadPlugin": 2,
    "BadModel": 2,
    "BadWeights": 2,
    "BadTeacher": 2,
    "StoreUnwritable": 2,
    "PartitionFailed": 2,
    "OutputUnwritable": 2,
    "DamagedResult": 2,
    "NotKept": 2,
    "TrackingFailed": 2,
    "RayDied": 1,
    "DataMissing": 3,
    "DataDamaged": 3,
}
"""Our errors that are shown as a sentence, by name: importing them takes seconds. Anything else is a bug."""


class LazyVerbs(Verbs):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the verbs, in the order of use."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in _VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(_VERBS[cmd_name][0]), f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, says) for verb, (_, says) in _VERBS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a verb and exit; errors that are the user's are one line on standard error."""
        make_safe()
        with terminable():
            self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> None:
        try:
            os.getcwd()
        except FileNotFoundError:
            fail("the working directory is gone; change to one that is there, and type the command again", 2)
        try:
            alone = not args and "args" not in kwargs  # words are the process's own, which is here for nothing else
            status = super().main(*args, **{**kwargs, "standalone_mode": False, "obj": {"alone": alone}})
            sys.stdout.flush()
        except click.UsageError as error:
            fail(sentence(error), 2)
        except click.ClickException as error:
            fail(error.format_message(), 2)
        except click.Abort:
            fail("interrupted", 130)
        except Exception as error:
            ours = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("bench.")]
            expected = [_STATUS[name] for name in ours if name in _STATUS]
            if not expected and isinstance(error, OSError) and (why := unwritten(error)) is not None:
                fail(f"what was asked for cannot be written to standard output: {why}", 2)
            if not expected and "No usable temporary directory" in str(error):
                fail("temporary files cannot be written; free some space in the folder that TMPDIR names, or /tmp", 2)
            if not expected and (isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY)):
                fail("the memory that this process may use is too little; give it more ('ulimit -v' says how much)", 1)
            if not expected:
                raise
            fail(str(error), expected[0])
        sys.exit(status if isinstance(status, int) else 0)


def fail(sentence: str, status: int) -> None:
    """Say what is wrong and exit."""
    click.echo(f"bench: {_LONG.sub(_cut, lines(sentence))}", err=True)
    sys.exit(status)


_NO_MEMORY = ("failed to map segment", "Cannot allocate memory")  # the linker's words, and the system's
_LONG = re.compile(r"\S{500,}")  # no word, and no path


def _cut(match: re.Match[str]) -> str:
    return f"{match[0][:60]}...{match[0][-20:]}"


@click.group(
    cls=LazyVerbs,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": as_spelt,
    },
)
@click.version_option(bench.__version__, package_name="pfl-lt-bench", prog_name="bench")
@click.pass_context
def main(context: click.Context) -> None:
    """Personalised and long-tailed federated learning, side by side, under one protocol.

    \b
    bench run                                      five algorithms on digits, in a minute
    bench run --algos fedloge,fedrep --dataset cifar10 --imbalance 50,100 --seeds 3
    bench table                                    what there is so far
    bench show fedloge                             what an algorithm does, keeps and sends
    bench new algorithm mine                       a file to start from
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
