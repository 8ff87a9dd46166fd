"""Verbs, choices and options as people type them: in whatever case, and with what was meant where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bench.plugins.names import close, meant, near


class Choice(click.Choice[str]):
    """One of some names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Give the name as it is spelt."""
        found = meant(str(value), self.choices)
        if found is None:
            self.fail(f"there is no {str(value)!r}; {near(str(value), self.choices)}", param, ctx)
        return found


class Place(click.Path):
    """A file or folder, there or not: no empty text, which would be the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Give a path."""
        if value == "":
            self.fail("it is empty; a file or folder is wanted, and . is the working directory", param, ctx)
        return super().convert(value, param, ctx)


class Verbs(click.Group):
    """A group of commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant."""
        typed, known = args[0], self.list_commands(ctx)
        found = meant(typed, known)
        if found is None:
            raise click.UsageError(f"No such command {typed!r}; {near(typed, known)}", ctx)
        return found, self.get_command(ctx, found), args[1:]


def as_spelt(token: str) -> str:
    """Write an option's name as all are: small, with - for _."""
    return token.replace("_", "-").lower()


def sentence(error: click.UsageError) -> str:
    """Say what is wrong with the words of a command, and what to type or where to look."""
    said, context = error.format_message().rstrip("."), error.ctx
    if isinstance(error, click.NoSuchOption):
        known = [name for param in context.command.get_params(context) for name in param.opts] if context else []
        hint = close(error.option_name, known)
        said = f"No such option {error.option_name!r}" + (f"; {hint}" if hint else "")
    elif context is not None and said.startswith("Got unexpected extra argument") and not _arguments(context):
        said += "; several values of one option are separated by commas, as in --algos fedavg,fedrep"
    return said if said.endswith("?") else f"{said}; see '{context.command_path if context else 'bench'} --help'"


def _arguments(context: click.Context) -> list[click.Parameter]:
    return [param for param in context.command.params if isinstance(param, click.Argument)]
