"""Presets: which fields and which learning rate each algorithm of a comparison has, and who chose them.

`default` is what the command line says, `paper` the papers' values, and any other one a file that `bench tune` wrote.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bench.algorithm import Algorithm
from bench.plugins.registry import label
from bench.protocol.composition import prefixed, with_values
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms, respell
from bench.protocol.words import split_list
from bench.system import reading

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FOLDER = "presets"
"""Within the folder of results."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a preset says of one algorithm."""

    call: str
    """With its fields, as on the command line."""
    lr: float | None = None
    """Its own learning rate; None: the setting's."""
    score: float | None = None
    """What it reached on the validation part; absent where a person wrote the preset."""
    untuned: float | None = None
    """What it reached as asked, with the setting's learning rate; None if it failed."""
    study: str | None = None
    """Id of the study, whose folder holds all trials."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A choice for each algorithm, all made with one budget."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    name: str
    """Stands beside the algorithm in the table."""
    dataset: str | None = None
    """What they were chosen on, as on the command line."""
    protocol: str | None = None
    """Of the runs that they were chosen for."""
    trials: int | None = None
    """Of each algorithm."""
    validation: float | None = None
    """Share of the clients' training images that were set aside to choose on."""
    seeds: list[int] = field(default_factory=list)
    """Each trial's score is the mean over these."""
    target: str | None = None
    """"personal" or "generic"."""
    tuned: list[str] | None = None
    """The fields that could be tuned; None: all."""
    algorithms: dict[str, Choice] = field(default_factory=dict)
    """By the algorithm as asked for."""

    def choose(self, algorithm: Algorithm) -> tuple[Algorithm, float | None]:
        """Give the fields and the learning rate for an algorithm; None: the setting's.

        Raises:
            BadConfig: The preset does not have it.
        """
        asked = label(algorithm)
        choice = {**{respell(call): choice for call, choice in self.algorithms.items()}, **self.algorithms}.get(asked)
        if choice is None:
            known = ", ".join(self.algorithms) or "nothing"
            raise BadConfig(f"preset {self.name} has no {asked}; it has {known}: leave others out, or tune them too")
        chosen = parse_algorithms(choice.call)
        if len(chosen) != 1 or not _same(chosen[0], algorithm):
            raise BadConfig(f"preset {self.name} has {choice.call!r} for {asked}; a call of that algorithm is wanted")
        return chosen[0], choice.lr

    def budget(self) -> dict[str, object]:
        """Give all that must be equal for choices to stand in one preset."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "algorithms")}


def _same(chosen: Algorithm, asked: Algorithm) -> bool:
    """Tell whether two are of one method, and a choice has no part that was not asked for; one may be off."""
    kinds, known = ([type(piece) for piece in each.pieces] for each in (chosen, asked))
    return kinds[0] is known[0] and set(kinds) <= set(known)


class _Default(Preset):
    def choose(self, algorithm: Algorithm) -> tuple[Algorithm, float | None]:
        return algorithm, None


class _Paper(Preset):
    def choose(self, algorithm: Algorithm) -> tuple[Algorithm, float | None]:
        """Replace fields at their defaults by the papers' values."""
        values: dict[str, object] = {}
        for prefix, piece in prefixed(algorithm):
            usual = {each.name: each.default for each in fields(piece)}  # type: ignore[arg-type]
            missing = set(piece.paper) - set(usual)
            if missing:
                raise BadConfig(f"{label(piece)}: its `paper` names {', '.join(sorted(missing))}, which is no field")
            values |= {prefix + key: new for key, new in piece.paper.items() if getattr(piece, key) == usual[key]}
        return with_values(algorithm, values), None


DEFAULT: Preset = _Default(name="default")
PAPER: Preset = _Paper(name="paper")


def parse_presets(text: str, out: Path) -> tuple[Preset, ...]:
    """Read a comma list of `default`, `paper`, files, and names of files in the folder of results.

    Raises:
        BadConfig: It is empty, there is no such preset, or a file is none.
    """
    known = {"default": DEFAULT, "paper": PAPER}
    presets = tuple(known[item] if item in known else read(_file(item, out)) for item in split_list(text))
    if not presets:
        raise BadConfig("--preset is empty; there are default, paper, and the files that 'bench tune' writes")
    return presets


def remarks(presets: Iterable[Preset], protocols: Collection[str]) -> list[str]:
    """Say which presets were tuned for other protocols than those of the runs."""
    foreign = [preset for preset in presets if preset.protocol is not None and {*protocols} - {preset.protocol}]
    return [
        f"preset {preset.name} was tuned for another protocol (on {preset.dataset}); "
        "'bench tune' with this command's options tunes for this one"
        for preset in foreign
    ]


def file_of(name: str, out: Path) -> Path:
    """Give the file of a preset in a folder of results."""
    return out / FOLDER / f"{name}.toml"


def _file(item: str, out: Path) -> Path:
    files = (Path(item), file_of(item, out))
    for file in files:
        with suppress(OSError, ValueError):  # of a name that no file can have
            if file.is_file():
                return file
    raise BadConfig(f"--preset {item}: there is no such file, nor {files[1]}; 'bench tune' writes one")


def read(file: Path) -> Preset:
    """Read a preset.

    Raises:
        BadConfig: It cannot be read, or is none.
    """
    from pydantic import ValidationError

    try:
        # As JSON: "strict" lets an object be a dataclass there.
        preset = _adapter().validate_json(json.dumps(tomllib.loads(reading.contents(file, reading.TEXT).decode())))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadConfig(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadConfig(f"{file} cannot be read as a preset: {reading.why(error)}") from error
    if preset.name in ("default", "paper"):
        raise BadConfig(f"{file}: a preset cannot be called {preset.name!r}, which is another one")
    return preset


def spell(preset: Preset, comment: str) -> str:
    """Write a preset as TOML, with lines of comment before it."""
    lines = [*(f"# {line}" for line in comment.splitlines()), *_table({"name": preset.name, **preset.budget()})]
    for asked, choice in sorted(preset.algorithms.items()):
        lines += ["", f"[algorithms.{json.dumps(asked)}]", *_table(asdict(choice))]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, object]) -> list[str]:
    """Spell values as TOML does, which for text, numbers and lists is as JSON; what is absent is left out."""
    return [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]


@cache
def _adapter() -> TypeAdapter[Preset]:
    from pydantic import TypeAdapter

    return TypeAdapter(Preset)
