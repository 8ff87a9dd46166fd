"""What one client brings to a method of an algorithm's client half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.data import LocalData
from bench.task import Task
from bench.tree import Tree

Verb = Callable[[Task, Tree, Tree, LocalData], Any]
"""A method of an algorithm's client half: (task, shared, private, data) -> nested dicts and tuples of
tensors, or None.
"""


@dataclass(frozen=True)
class Visit:
    """What one client brings to a verb."""

    private: Tree
    index: Tensor
    """(n,) int64, rows of the resident images."""
    key: Tensor
    """() int64, of the client and the round."""
    client_key: Tensor
    """() int64, of the client in every round."""
    class_counts: Tensor
    """(C,) int64."""
    sent: Tree = field(default_factory=dict)
    """What this client is sent besides the broadcast."""
    passes: Tensor | None = None
    """(n,) int64, as of `LocalData`."""
