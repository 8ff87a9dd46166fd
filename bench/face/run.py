"""`bench.run`: the command `bench run` for Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.algorithm import Algorithm
from bench.dataset import Dataset
from bench.face.asked import DEFAULT_ALGORITHMS, DEFAULT_DATASET, DEFAULT_SETTING, Asked
from bench.plugins.cells import enter
from bench.plugins.names import meant, near
from bench.plugins.registry import UnknownPlugin
from bench.protocol import suites
from bench.protocol.settings import BadConfig
from bench.results import records

if TYPE_CHECKING:
    from bench.face.runs import Runs

Numbers = float | str | Sequence[float | str]
Files = Path | str | Sequence[Path | str]


def run(
    algos: str | Algorithm | type[Algorithm] | Sequence[str | Algorithm | type[Algorithm]] = DEFAULT_ALGORITHMS,
    *,
    dataset: str | Dataset | type[Dataset] | Sequence[str | Dataset | type[Dataset]] = DEFAULT_DATASET,
    imbalance: Numbers | None = None,
    alpha: Numbers | None = None,
    grid: str | Sequence[str] = (),
    seeds: int | str | Sequence[int] = 1,
    setting: str = DEFAULT_SETTING,
    preset: str = "default",
    partition: str | None = None,
    clients: int | None = None,
    participation: float | None = None,
    rounds: int | None = None,
    match: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    model: str | None = None,
    eval_clients: int | None = None,
    auxiliary: str | None = None,
    weights: Path | str | None = None,
    teacher: Path | str | None = None,
    set: Mapping[str, object] | None = None,
    plugin: Files = (),
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "auto",
    jobs: int | None = None,
    workers_per_run: int = 1,
    ray: str | None = None,
    shared_out: bool = False,
    no_ship: bool = False,
    out: Path | str = "runs",
    data_root: Path | str | None = None,
    tracking_uri: str | None = None,
    time_budget: str | None = None,
    force: bool = False,
    keep_models: bool = False,
    suite: str | None = None,
) -> Runs:
    """Compare algorithms in every cell of datasets, imbalance, alpha and seeds; what is finished is not run again.

    All options have the names and meanings of `bench run --help`; several values are a list.

    Args:
        algos: As on the command line, "fedavg, fedloge(sparsity=0.8)"; or algorithms, classes and text in a list. A
            class may be one that a notebook's cell defines: its source is part of the result's identity.
        dataset: Likewise.
        imbalance: Largest class over smallest; the setting's by default.
        alpha: Concentration of the partition.
        grid: Cells to run of all these, "imbalance=10,50; alpha=0.5", where they are no full product.
        seeds: How many, or a list of which.
        setting: Named protocol; the next options replace parts of it.
        preset: "default", "paper", or what `bench tune` wrote.
        partition: How images are dealt to clients.
        clients: Number of clients.
        participation: Share of the clients that train in a round, in (0, 1].
        rounds: Rounds of communication.
        match: "rounds" or "samples": what is equal for all.
        epochs: Local epochs of a round.
        batch_size: Examples of an optimiser step.
        lr: Learning rate.
        model: Network.
        eval_clients: Personal models tested: those of so many clients.
        auxiliary: Images at the server, "own:N" or "DATASET:N".
        weights: File of weights that the model's body starts from.
        teacher: File of a teacher's features, of all training images and of the classes.
        set: Any other field of the setting, {"norm": "batch"}.
        plugin: Files with algorithms, parts or datasets.
        engine: "auto", "serial" or "stacked".
        precision: "fp32" or "bf16".
        device: "auto", "cpu", "cuda" or "mps".
        jobs: Runs at once.
        workers_per_run: Processes that share the clients of each run.
        ray: "local" (default for several runs), "off", or a cluster's address.
        shared_out: Whether the machines of a cluster write `out` themselves.
        no_ship: Whether these machines have this package; else they are sent it.
        out: Folder of results.
        data_root: Folder of datasets.
        tracking_uri: MLflow, by default SQLite beside the results; "off".
        time_budget: Begin no run that would not end in time, "90m".
        force: Whether what is finished is run again.
        keep_models: Whether the models are written beside each result.
        suite: A named grid with its protocol: what is at its default here is as it says.

    Returns:
        The runs that were asked for, those that failed too.

    Raises:
        BadConfig, UnknownPlugin, DataMissing, ...: It cannot be done, with the command's sentence; nothing was begun.
        KeyboardInterrupt: It was interrupted. What is done is kept, and the same call goes on.
    """
    given: dict[str, Any] = {key: value for key, value in locals().items() if key in _NAMES}
    if suite is not None:
        return run(**{**given, **_of_suite(suite, given)})
    from bench.face.runs import Runs
    from bench.face.sweeping import perform

    asked = Asked(
        **{
            **given,
            "algos": _plugins(algos, Algorithm),
            "dataset": _plugins(dataset, Dataset),
            "imbalance": _text(imbalance),
            "alpha": _text(alpha),
            "grid": (grid,) if isinstance(grid, str) else tuple(grid),
            "seeds": str(seeds) if isinstance(seeds, int | str) else ",".join(map(str, seeds)) + ",",
            "plugin": tuple(map(Path, _several(plugin))),
            "weights": None if weights is None else Path(weights),
            "teacher": None if teacher is None else Path(teacher),
            "set": set or {},
            "out": Path(out),
            "data_root": None if data_root is None else Path(data_root),
        }
    )
    swept = perform(asked, "bench.run(...)")
    ended = [result.run.id for result in swept.results if result.status != "waiting"]
    return Runs([records.read(asked.out / run) for run in ended])


_NAMES = {field.name for field in fields(Asked) if field.default is MISSING}


def _of_suite(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options that a suite says and a person did not.

    Raises:
        UnknownPlugin: There is no such suite.
    """
    known = meant(name, suites.names())
    if known is None:
        raise UnknownPlugin(f"no suite is called {name!r}; {near(name, suites.names())}")
    usual = {each.name: each.default for each in inspect.signature(run).parameters.values()}
    return {key: value for key, value in suites.suite(known).options.items() if given[key] == usual[key]}


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _text(numbers: Numbers | None) -> str | None:
    return None if numbers is None else ",".join(map(str, _several(numbers)))


def _plugins(given: Any, kind: type) -> list[Any]:
    """Leave names, and make instances of classes."""
    found: list[Any] = []
    for item in _several(given):
        if isinstance(item, kind) or (isinstance(item, type) and issubclass(item, kind)):
            enter(item if isinstance(item, type) else type(item))
            item = item() if isinstance(item, type) else item
        elif not isinstance(item, str):
            raise BadConfig(f"{item!r}: a name, an instance or a class of {kind.__name__} is wanted")
        found.append(item)
    return found
