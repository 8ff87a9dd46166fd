"""What there is to choose from, and what is known of each: for `bench list` and `bench show`.

Names and first lines are read from source text, so that listing imports no plug-in.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from bench.face.asked import DEFAULT_SETTING
from bench.plugins import declared as declarations
from bench.plugins import ledger
from bench.plugins.declared import declared, source
from bench.plugins.names import meant, near
from bench.plugins.registry import ALGORITHMS, DATASETS, MODELS, PARTS, Registry, UnknownPlugin
from bench.protocol import suites
from bench.ranges import hints, words

if TYPE_CHECKING:
    from torch import Tensor

    from bench.algorithm import Adaptation, Algorithm
    from bench.dataset import Dataset
    from bench.models import Model

KINDS = ("algorithms", "sets", "aliases", "parts", "datasets", "models", "settings", "partitions", "suites")
PLUGINS: Mapping[str, Registry[Any]] = {
    "algorithms": ALGORITHMS,
    "parts": PARTS,
    "datasets": DATASETS,
    "models": MODELS,
}


def summaries(kind: str) -> dict[str, str]:
    """Give all names of a kind with the first line of what each is; imports no plug-in.

    Args:
        kind: One of `KINDS`.
    """
    if kind == "models":
        return {name: _first_line(_doc(MODELS.entered().get(name))) or _ELSEWHERE for name in MODELS}
    if kind in PLUGINS:
        return {name: _first_line(_module_docstring(kind, name)) for name in PLUGINS[kind]}
    if kind == "sets":
        return {name: f"{said} {', '.join(_members(name))}" for name, said in _builtins(kind).items()}
    return {name: _first_line(documentation) for name, documentation in _builtins(kind).items()}


def entries(kind: str) -> list[dict[str, object]]:
    """Give what there is of a kind, in JSON's types: "name" and "summary"; of algorithms and parts besides "family" (of
    a part "kind"), "tier", and "year" of their paper, None where there is none; of models "parameters", "model_bytes"
    and "forward_flops", for ten classes and colour images of 32 pixels, or as large ones as a network needs.

    Args:
        kind: One of `KINDS`.
    """
    listed: list[dict[str, object]] = []
    for name, summary in summaries(kind).items():
        entry: dict[str, object] = {"name": name, "summary": summary}
        if kind in _GROUPS:
            plugin = PLUGINS[kind][name]()
            entry |= {_GROUPS[kind]: getattr(plugin, _GROUPS[kind]), "tier": plugin.tier}
            entry |= {"year": _year(inspect.getdoc(inspect.getmodule(plugin)) or "")}
        if kind == "models":
            entry |= {"parameters": _count_parameters(name)["total"], **_footprint(name)}
        listed.append(entry)
    return listed


_GROUPS = {"algorithms": "family", "parts": "kind"}
"""What tells groups of a kind apart."""


def _year(documentation: str) -> int | None:
    """Find the year of the first paper that a module's docstring names in its second paragraph."""
    _, _, rest = documentation.partition("\n\n")
    found = re.search(r"\b(?:19|20)\d\d\b", re.sub(r"https?://\S+", "", rest.partition("\n\n")[0]))
    return int(found[0]) if found else None


def find(name: str) -> list[str]:
    """Tell of which kinds a name is: an algorithm and a setting may share one. A method with parts is an algorithm.

    Raises:
        UnknownPlugin: Of none; the message offers near ones.
    """
    if "+" in name:
        return ["algorithms"]
    known = {kind: list(summaries(kind)) for kind in KINDS}
    kinds = [kind for kind, names in known.items() if meant(name, names) is not None]
    if kinds:
        return kinds
    everything = [each for names in known.values() for each in names]
    raise UnknownPlugin(f"nothing is called {name!r}; {near(name, everything)}")


def describe(kind: str, name: str, dataset: str) -> dict[str, Any]:
    """Give what is known of a thing, in JSON's types.

    Args:
        kind: One of `KINDS`.
        name: As a person types one of `summaries`, or a method with parts.
        dataset: That a setting's values are shown for, as on the command line.

    Returns:
        "name", "kind", "documentation", and what the kind has: "fields" (name to value or default, what
        it takes, and doc), "ledger" (by title), "tier", "needs", "version", "adaptation", and of "newcomers" where
        they differ, "size", "parameters", a dataset's default "setting" and so on; of a method with parts "pieces",
        each with the values it has there.
    """
    if "+" in name:
        return _describe_composed(name)
    name = meant(name, summaries(kind)) or name
    if kind in ("algorithms", "parts"):
        described = _describe_plugin(kind, name, PLUGINS[kind][name], _FACTS[kind])
        if kind == "parts":
            return described
        return {**described, **_adaptation(ALGORITHMS[name]()), "controls": declarations.controls(name)}
    if kind == "datasets":
        facts = ("num_classes", "image_shape", "size", "licence", "citation", "source", "revision")
        described = _describe_plugin(kind, name, DATASETS[name], facts)
        return {**described, "setting": _default_setting(DATASETS[name]())}
    if kind == "models":
        return _describe_model(name)
    if kind == "aliases":
        return _describe_composed(name)
    described = {"name": name, "kind": kind, "documentation": _builtins(kind)[name]}
    if kind == "sets":
        return {**described, "algorithms": _members(name)}
    if kind == "suites":
        return {**described, **_suite(suites.suite(name))}
    if kind == "settings":
        from bench.protocol.spelling import label, parse_dataset

        shown_for = parse_dataset(dataset)
        return {**described, "dataset": label(shown_for), "fields": _setting_fields(name, shown_for)}
    return described


_FACTS = {
    "algorithms": ("family", "tier", "needs", "stackable", "version"),
    "parts": ("tier", "needs", "neutral", "stackable", "version"),
}


def _describe_composed(text: str) -> dict[str, Any]:
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import label, name, parse_algorithms

    algorithm, *others = parse_algorithms(text)
    if others:
        raise BadConfig(f"{text}: one algorithm is wanted here")
    pieces = []
    for piece in algorithm.pieces:
        kind = "algorithms" if piece is algorithm.pieces[0] else "parts"
        described = _describe_plugin(kind, name(piece), type(piece), _FACTS[kind])
        values = {field: {**each, "value": getattr(piece, field)} for field, each in described["fields"].items()}
        pieces.append({**described, "fields": values})
    facts = {"tier": algorithm.tier, "needs": sorted(algorithm.needs), "stackable": algorithm.stackable}
    said = f"{' and '.join(each['name'] for each in pieces)}, as one algorithm."
    return {"name": label(algorithm), "kind": "algorithms", "documentation": said, **facts, "pieces": pieces}


def _describe_plugin(kind: str, name: str, plugin: type, facts: tuple[str, ...]) -> dict[str, Any]:
    texts = (inspect.getmodule(plugin).__doc__, plugin.__doc__)
    documentation = "\n\n".join(inspect.cleandoc(text) for text in texts if text)
    said = {"ledger": ledger.sections(texts[0] or "")} if kind in ("algorithms", "parts") else {}
    values = {fact: _fact(plugin(), fact) for fact in facts}  # of its defaults: some depend on options
    plain = {fact: sorted(value) if isinstance(value, frozenset) else value for fact, value in values.items()}
    if isinstance(neutral := plain.get("neutral"), Mapping):
        plain["neutral"] = [f"{field} = {value!r}" for field, value in neutral.items()]
    described = {"name": name, "kind": kind, "documentation": documentation, **said, **plain}
    return {**described, "fields": field_descriptions(plugin)}


def _adaptation(algorithm: Algorithm) -> dict[str, str | None]:
    """Say what is tuned before the test, and by clients held out of training where that differs."""
    from bench.algorithm import stages
    from bench.contract import toy

    task = toy.task(algorithm)
    usual, newcomers = stages(algorithm.adaptation(task)), stages(algorithm.newcomer_adaptation(task))
    described = {"adaptation": _in_words(usual)}
    return described if newcomers == usual else {**described, "newcomers": _in_words(newcomers)}


def _in_words(stages: tuple[Adaptation, ...]) -> str | None:
    """Say what is done in stages; turns that repeat are said once."""
    if not stages:
        return None
    turns = next(n for n in range(len(stages), 0, -1) if stages == n * stages[: len(stages) // n])
    said = ", then ".join(map(str, stages[: len(stages) // turns]))
    return f"before the test: {said}" + (f"; that {turns} times" if turns > 1 else "")


def _fact(plugin: object, fact: str) -> object:
    """Give a fact, None where a user's own files would say it and are not there."""
    from bench.dataset import DataMissing

    try:
        return getattr(plugin, fact)
    except DataMissing:
        return None


def field_descriptions(plugin: type) -> dict[str, dict[str, Any]]:
    """Give values in words, default and documentation (the string after it) of each field of a dataclass."""
    documented = {name: text for kind in reversed(plugin.__mro__) for name, text in _field_docstrings(kind).items()}
    described = {}
    types = hints(plugin)
    for field in fields(plugin):
        described[field.name] = {
            "takes": words(types[field.name]),
            "default": None if field.default is MISSING else field.default,
            "doc": documented.get(field.name, ""),
        }
    return described


def _field_docstrings(plugin: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(plugin))
    except (OSError, TypeError):  # no source file: an interactive session
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {field.name: field.doc for field in declarations.fields(definition)}


def _module_docstring(kind: str, name: str) -> str:
    """Read the docstring of a built-in plug-in's file; an entry point's is not known unless imported."""
    text = source(kind, name)
    return _ELSEWHERE if text is None else ast.get_docstring(ast.parse(text)) or ""


_ELSEWHERE = "from another distribution"


def family(name: str) -> str | None:
    """Give the set that an algorithm says it belongs to; of another distribution's, only if it is imported already."""
    told: str | None = declared(ALGORITHMS, name, "family")
    return told


def controls() -> dict[str, dict[str, str]]:
    """Give the rows that methods say they must be compared with: by method, what each row answers."""
    return {name: told for name in ALGORITHMS if (told := declarations.controls(name))}


def _members(called: str) -> list[str]:
    from bench.protocol.sets import EVERYTHING, PREFIX

    return [name for name in ALGORITHMS if called.removeprefix(PREFIX) in (EVERYTHING, family(name))]


def _builtins(kind: str) -> Mapping[str, str]:
    """Give the docstrings of what is no plug-in; of an alias the row that it stands for."""
    if kind == "aliases":
        return declarations.aliases()
    if kind == "suites":
        return {name: suites.suite(name).title for name in suites.names()}
    if kind == "sets":
        from bench.protocol.sets import PREFIX, SETS

        return {PREFIX + name: said for name, said in SETS.items()}
    if kind == "settings":
        from bench.protocol.bundles import SETTINGS

        return {name: _doc(setting) for name, setting in SETTINGS.items()}
    from bench.splits.split import PARTITIONS

    return {name: _doc(partition) for name, partition in PARTITIONS.items()}


def _suite(suite: suites.Suite) -> dict[str, Any]:
    """Say what a suite is for, and its options as on the command line."""
    words = {
        "version": suite.version,
        "shows": suite.shows,
        "hides": suite.hides,
        "costs": suite.costs,
        "needs": list(suite.needs),
    }
    return {**words, "options": dict(suite.options), "run": f"bench run --suite {suite.name}"}


def _setting_fields(name: str, dataset: Dataset) -> dict[str, dict[str, Any]]:
    from bench.protocol.bundles import named
    from bench.protocol.settings import Setting

    values = asdict(named(name, dataset))
    described = field_descriptions(Setting)
    return {
        field: {"value": value, "takes": described[field]["takes"], "doc": described[field]["doc"]}
        for field, value in values.items()
    }


def _default_setting(dataset: Dataset) -> dict[str, Any] | None:
    """Give the values that a run has by default; None where a user's own files would say and are not there."""
    from bench.dataset import DataMissing
    from bench.protocol.bundles import named

    try:
        return asdict(named(DEFAULT_SETTING, dataset))
    except DataMissing:
        return None


def _describe_model(name: str) -> dict[str, Any]:
    from bench.models import BUILT_IN

    network = MODELS[name]
    texts = (network.__doc__,) if name in BUILT_IN else (inspect.getmodule(network).__doc__, network.__doc__)
    documentation = "\n\n".join(inspect.cleandoc(text) for text in texts if text)
    version = {} if name in BUILT_IN else {"version": network.version}
    learns = {} if network.learns is None else {"server learns": network.learns}
    said = {
        "images": f"of at least {network.smallest} pixels",
        "parameters": _count_parameters(name),
        "norm layers": _norm_layers(name),
        **learns,
        **version,
    }
    return {"name": name, "kind": "models", "documentation": documentation, **said, **_footprint(name)}


def _leaves(name: str) -> Mapping[str, Tensor]:
    """Give what a network is made of by paths, without running statistics: shapes only, for nothing is drawn."""
    from bench import keys, tree
    from bench.models.layers import is_norm_statistic

    leaves = tree.flatten(_example(name).init(keys.key(0, "meta")))
    return {path: leaf for path, leaf in leaves.items() if not is_norm_statistic(path)}


def _count_parameters(name: str) -> dict[str, int]:
    from bench import tree

    leaves = _leaves(name)
    body = sum(leaf.numel() for path, leaf in leaves.items() if path.startswith("body/"))
    total = sum(leaf.numel() for leaf in leaves.values())
    fixed = sum(leaf.numel() for path, leaf in leaves.items() if tree.is_statistic(path))
    counts = {"total": total, "body": body, "head": total - body, "features": _example(name).feature_size}
    return counts | ({"fixed": fixed} if fixed else {})


def _norm_layers(name: str) -> str:
    """Say how many norm layers a network has, and of which kinds they may be."""
    from bench.models import is_norm

    count = len({path.rpartition("/")[0] for path in _leaves(name) if is_norm(path)})
    norms = MODELS[name].norms
    kinds = f"{count}, of the setting's kind: --set norm={' or '.join(norms)}"
    kinds = f"{count}, of layer norm alone" if norms == ("layer",) else kinds
    return kinds if count else "none: --set norm changes nothing here"


def _footprint(name: str) -> dict[str, int]:
    from bench.training.footprint import footprint

    return {key: int(number) for key, number in footprint(_example(name)).costs.items() if key != "parameters"}


def _example(name: str) -> Model:
    """Build a network for ten classes and colour images of 32 pixels, or as large ones as it needs."""
    from bench.models import build

    side = max(32, MODELS[name].smallest)
    return build(name, 10, (3, side, side))


def _doc(documented: object) -> str:
    return inspect.getdoc(documented) or ""


def _first_line(documentation: str) -> str:
    """Give a docstring's first paragraph, on one line."""
    return " ".join(documentation.partition("\n\n")[0].split())
