"""Shared by all tests: one torch thread, no way out to the network, and no plug-in of another test."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.plugins.registry import REGISTRIES

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process connect to loopback addresses and local sockets only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = isinstance(address, str | bytes) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a test wants to connect to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield


def forgotten() -> Iterator[None]:
    """Forget the plug-ins that are loaded or defined meanwhile, or they would stand in the lists of the next test."""
    known = [registry.entered() for registry in REGISTRIES]
    modules = set(sys.modules)
    yield
    for registry, before in zip(REGISTRIES, known, strict=True):
        for name, plugin in registry.entered().items():
            if name not in before and not plugin.__module__.startswith("bench."):  # whose files are imported once
                del registry._classes[name]
    for module in [module for module in sys.modules if module.startswith("bench_plugin_") and module not in modules]:
        del sys.modules[module]


plugins_of_a_file = pytest.fixture(scope="module", autouse=True)(forgotten)
plugins_of_a_test = pytest.fixture(autouse=True)(forgotten)
