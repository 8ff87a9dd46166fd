"""How things are spelt on the command line: algorithms as Python calls, their parts after a plus, lists, seeds, fields
of a setting.

fedloge,fedrep(head_epochs=5)+topk      0.5,0.1      3 (seeds 0, 1, 2)      0,4,7      momentum=0.9
"""

from __future__ import annotations

import ast
import keyword
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from bench.algorithm import Algorithm
from bench.dataset import Dataset
from bench.plugins.names import meant, near
from bench.plugins.registry import ALGORITHMS, DATASETS, PARTS, BadPlugin, Registry, UnknownPlugin
from bench.plugins.registry import label as label
from bench.plugins.registry import name as name
from bench.protocol.composition import compose
from bench.protocol.refusal import BadConfig
from bench.protocol.sets import PREFIX, unfold
from bench.protocol.words import split_at, split_list
from bench.ranges import checked, hints, shown

P = TypeVar("P")

_CALL = re.compile(r"(?P<name>[A-Za-z_][\w-]*)\s*(?P<parameters>\(.*\))?", re.DOTALL)
_MOST_SEEDS = 1000


# Plug-ins ---------------------------------------------------------------------------------------------------


def parse_algorithms(text: str) -> list[Algorithm]:
    """Read a comma list such as `fedloge,fedrep(head_epochs=5)+focal(gamma=1)+topk`, in which `set:pfl` stands for all
    algorithms of a set.

    Raises:
        UnknownPlugin: No algorithm, or no part, has that name.
        BadConfig: The list is empty, a parameter is unknown, of the wrong type or out of range, a part makes no sense
            on its method, or no set has that name.
    """
    return list(ask(text).algorithms)


@dataclass(frozen=True)
class Asked:
    """What a list of algorithms asks for."""

    algorithms: tuple[Algorithm, ...]
    """In the order of the list; one may stand there twice, and is one run."""
    optional: tuple[Algorithm, ...]
    """Those of them that a set brought and nobody named: where they cannot run they are left out."""
    left_out: tuple[str, ...]
    """A sentence for each member of a set that the parts after it make no sense on."""


def ask(given: str | Sequence[str | Algorithm]) -> Asked:
    """Read a list of algorithms and sets; syntax and errors as of `parse_algorithms`."""
    items = _items(given)
    if not items:
        raise BadConfig(f"--algos is empty; there are {', '.join(ALGORITHMS)}")
    algorithms: list[Algorithm] = []
    named: list[Algorithm] = []
    left_out: list[str] = []
    for item in items:
        if isinstance(item, Algorithm):
            algorithms.append(item)
            named.append(item)
            continue
        calls = unfold(item)
        refusals: list[BadConfig] = []
        for call in calls:
            try:
                algorithms.append(_algorithm(call))
            except BadConfig as error:
                refusals.append(error)
        if len(refusals) == len(calls):  # it is no set, or what stands after it is wrong
            raise refusals[0]
        left_out += [f"left out of {item}: {refusal}" for refusal in refusals]
        named += [] if item.startswith(PREFIX) else algorithms[-1:]
    return Asked(tuple(algorithms), tuple(each for each in algorithms if each not in named), tuple(left_out))


def respell(call: str) -> str:
    """Spell a call of an algorithm as `label` does; leave it as it stands where it cannot be read here."""
    try:
        (algorithm,) = parse_algorithms(call)
    except (UnknownPlugin, BadPlugin, BadConfig, ValueError):
        return call
    return label(algorithm)


def parse_datasets(given: str | Sequence[str | Dataset]) -> list[Dataset]:
    """Read a comma list of datasets; same syntax and errors as `parse_algorithms`."""
    items = _items(given)
    if not items:
        raise BadConfig(f"--dataset is empty; there are {', '.join(DATASETS)}")
    return [_construct(item, DATASETS) if isinstance(item, str) else item for item in items]


def _items(given: str | Sequence[str | P]) -> list[str | P]:
    """Split lists, and leave what is there already."""
    texts = [given] if isinstance(given, str) else given
    return [item for text in texts for item in (split_list(text) if isinstance(text, str) else [text])]


def parse_dataset(text: str) -> Dataset:
    """Read one dataset; same syntax and errors as `parse_algorithms`."""
    datasets = parse_datasets(text)
    if len(datasets) != 1:
        raise BadConfig(f"{text!r}: one dataset is wanted here")
    return datasets[0]


def _algorithm(text: str) -> Algorithm:
    method, *parts = items = split_at("+", text)
    if not all(items):
        raise BadConfig(f"{text!r}: a method and parts are wanted, with a plus between them")
    names = [item.partition("(")[0].strip() for item in items]
    if names[0] not in ALGORITHMS and names[0] in PARTS:
        methods = [item for item, called in zip(items, names, strict=True) if called in ALGORITHMS]
        raise BadConfig(f"{names[0]} is a part; write {(*methods, 'METHOD')[0]}+{method}")
    for called in names[1:]:
        if called not in PARTS and called in ALGORITHMS:
            raise BadConfig(f"{text}: {called} is an algorithm, and after a plus stand parts: {', '.join(PARTS)}")
    return compose(_construct(method, ALGORITHMS), [_construct(part, PARTS) for part in parts])


def _construct(text: str, registry: Registry[P]) -> P:
    call = _CALL.fullmatch(text)
    if call is None:
        raise BadConfig(f"{text!r} is not a name or a call such as name(parameter=1)")
    plugin_name = registry.meant(call["name"])
    plugin = registry[plugin_name]
    types = hints(plugin)
    takes = f"{plugin_name} takes {', '.join(types) or 'no parameters'}"
    written = call["parameters"] or "()"
    if (reserved := _reserved(written)) is not None:
        raise BadConfig(f"{plugin_name}{written}: {reserved} is a word of Python's own and no parameter; {takes}")
    values: dict[str, object] = {}
    for parameter, value in _keywords(plugin_name, written).items():
        field = meant(parameter, types)
        if field is None:
            raise BadConfig(f"{plugin_name}({parameter}={shown(value)}): no such parameter; {takes}")
        if field in values:
            raise BadConfig(f"{plugin_name}{written}: {field} is given twice")
        values[field] = value
    typed = {
        key: check_type(types[key], value, f"{plugin_name}({key}={shown(value)}): {key}")
        for key, value in values.items()
    }
    try:
        return plugin(**typed)
    except ValueError as error:  # what a range check of `__post_init__` raises, `BadConfig` included
        raise BadConfig(f"{text}: {error}") from error


def _reserved(parameters: str) -> str | None:
    """Give the first word of Python's own that stands in the place of a parameter, such as `lambda`."""
    words = (item.partition("=")[0].strip() for item in split_list(parameters.strip()[1:-1]) if "=" in item)
    return next((word for word in words if keyword.iskeyword(word)), None)


def _keywords(plugin_name: str, parameters: str) -> dict[str, object]:
    try:
        tree = ast.parse(f"{plugin_name}{parameters}", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise BadConfig(f"{plugin_name}{parameters} is not written as a Python call") from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise BadConfig(f"{plugin_name}{parameters} is not written as one Python call")
    if tree.args or any(given.arg is None for given in tree.keywords):
        raise BadConfig(f"{plugin_name}{parameters}: give parameters by name, as in name(parameter=1)")
    values: dict[str, object] = {}
    for given in tree.keywords:
        assert given.arg is not None
        if given.arg in values:
            raise BadConfig(f"{plugin_name}{parameters}: {given.arg} is given twice")
        try:
            values[given.arg] = ast.literal_eval(given.value)
        except (ValueError, TypeError, MemoryError, RecursionError) as error:
            written = ast.unparse(given.value)
            call = f"{plugin_name}({given.arg}={written})"
            raise BadConfig(f"{call}: {written} is not a Python literal; text needs quotes") from error
    return values


def check_type(hint: Any, value: object, where: str) -> Any:
    """Give a value as a field's type has it, and names in their own case.

    Raises:
        BadConfig: It is none; begins with `where`.
    """
    if isinstance(value, str):
        value = meant(value, _choices(hint)) or value
    try:
        return checked(hint, value)
    except ValueError as error:
        raise BadConfig(f"{where} {error}") from error


def _choices(hint: Any) -> list[str]:
    """Give the names among which a field's type lets choose."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return [name for name in inner if isinstance(name, str)]
    return [name for each in inner for name in _choices(each)]


# Numbers and settings ---------------------------------------------------------------------------------------


def parse_numbers(text: str, option: str) -> list[float]:
    """Read a comma list of finite numbers.

    Raises:
        BadConfig: It is empty, or something else stands there.
    """
    try:
        numbers = [float(item) for item in split_list(text)]
    except ValueError as error:
        raise BadConfig(f"{option} {text}: numbers are wanted, separated by commas") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise BadConfig(f"{option} {text}: finite numbers are wanted, separated by commas")
    return numbers


def parse_imbalance(text: str) -> float | None:
    """Read an imbalance factor; a value in (0, 1) is understood as its inverse, and standard error says so.

    Returns:
        The factor; None for "natural".

    Raises:
        BadConfig: Not a number above 0.
    """
    if text.strip() == "natural":
        return None
    (factor, *others) = parse_numbers(text, "--imbalance")
    if factor <= 0 or others:
        raise BadConfig(
            f"--imbalance {text}: must be at least 1 (largest class over smallest), or its inverse in (0, 1)"
        )
    if factor < 1:
        inverse = float(f"{1 / factor:.12g}")  # 1 / 0.02 is 50 to a person
        print(f"imbalance {text} is understood as its inverse, {inverse:g}", file=sys.stderr)
        return inverse
    return factor


def parse_seeds(text: str) -> list[int]:
    """Read seeds: a lone number N counts (0..N-1), a number with a comma is itself (`3407,` or `0,4,7`).

    Raises:
        BadConfig: Not whole numbers, below 0 or above 2^32 - 1, or a count beyond reason.
    """
    try:
        numbers = [int(item) for item in split_list(text)]
    except ValueError as error:
        raise BadConfig(f"--seeds {text}: a count such as 3, or seeds such as 0,4,7, are wanted") from error
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**32 or ("," not in text and numbers == [0]):
        raise BadConfig(f"--seeds {text}: a count of at least 1, or seeds from 0 to 2^32 - 1, are wanted")
    if "," in text:
        return list(dict.fromkeys(numbers))
    if numbers[0] > _MOST_SEEDS:
        raise BadConfig(f"--seeds {text} would run everything {text} times; write '{text},' for that one seed")
    return list(range(numbers[0]))


def parse_assignments(items: Iterable[str]) -> dict[str, object]:
    """Read `field=value` items; what is no Python literal is text.

    Raises:
        BadConfig: No equals sign, or a field twice.
    """
    values: dict[str, object] = {}
    for item in items:
        field, equals, text = (part.strip() for part in item.partition("="))
        field = field.replace("-", "_").lower()
        if not equals or not field:
            raise BadConfig(f"--set {item}: field=value is wanted")
        if field in values:
            raise BadConfig(f"--set {field} is given twice")
        try:
            values[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[field] = text
    return values


def check_fields(kind: type, values: Mapping[str, object], where: str) -> dict[str, Any]:
    """Check names and types of a dataclass's fields.

    Args:
        kind: The dataclass.
        values: By field.
        where: What the values were given to, for messages.

    Raises:
        BadConfig: No such field, or a value of the wrong type.
    """
    types = hints(kind)
    for field in values:
        if field not in types:
            raise BadConfig(f"{where} has no field {field!r}; {near(field, types)}")
    return {field: check_type(types[field], value, f"{field} = {shown(value)}:") for field, value in values.items()}
