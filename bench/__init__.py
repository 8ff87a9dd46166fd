"""Personalised and long-tailed federated learning, side by side, under one protocol.

The public names are those a plug-in's file imports; they are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.algorithm import Adaptation as Adaptation
    from bench.algorithm import Algorithm as Algorithm
    from bench.algorithm import Exchange as Exchange
    from bench.data import Batch as Batch
    from bench.data import LocalData as LocalData
    from bench.data import Uploads as Uploads
    from bench.dataset import DataDamaged as DataDamaged
    from bench.dataset import DataMissing as DataMissing
    from bench.dataset import Dataset as Dataset
    from bench.dataset import Labels as Labels
    from bench.dataset import Splits as Splits
    from bench.face.run import run as run
    from bench.face.runs import Runs as Runs
    from bench.face.runs import load as load
    from bench.models.layers import evaluating as evaluating
    from bench.models.networks import Block as Block
    from bench.models.networks import Network as Network
    from bench.part import Aggregation as Aggregation
    from bench.part import Channel as Channel
    from bench.part import Compression as Compression
    from bench.part import Correction as Correction
    from bench.part import LearnedCorrection as LearnedCorrection
    from bench.part import Loss as Loss
    from bench.part import UsesPrior as UsesPrior
    from bench.plugins.registry import register as register
    from bench.task import Task as Task
    from bench.tree import Tree as Tree

__version__ = "0.1.0"

_HOMES = {
    "Adaptation": "algorithm",
    "Algorithm": "algorithm",
    "Exchange": "algorithm",
    "Batch": "data",
    "LocalData": "data",
    "Uploads": "data",
    "DataDamaged": "dataset",
    "DataMissing": "dataset",
    "Dataset": "dataset",
    "Labels": "dataset",
    "Splits": "dataset",
    "run": "face.run",
    "Runs": "face.runs",
    "load": "face.runs",
    "evaluating": "models.layers",
    "Block": "models.networks",
    "Network": "models.networks",
    "Aggregation": "part",
    "Channel": "part",
    "Compression": "part",
    "Correction": "part",
    "LearnedCorrection": "part",
    "Loss": "part",
    "UsesPrior": "part",
    "register": "plugins.registry",
    "Task": "task",
    "Tree": "tree",
}


_TOOLS = ("bits", "keys", "losses", "models", "optim", "tree")
"""Modules of functions, `bench.tree` for one, that are there without an import of their own."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name in _TOOLS:
        return importlib.import_module(f"bench.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_TOOLS, "__version__"])
