"""What follows from the costs of a run, as it tells them: sums, and what one client is sent in one round."""

from __future__ import annotations

import math
from collections.abc import Mapping

_SUMS = {
    "bytes": ("bytes_down", "bytes_up"),
    "samples": ("train_samples", "adaptation_samples", "server_samples"),
    "flops": ("train_flops", "adaptation_flops", "server_flops"),
}
_PAYLOADS = {"payload_bytes_down": "bytes_down", "payload_bytes_up": "bytes_up"}
"""Per client and round, on average."""


def with_derived(cost: Mapping[str, float | None]) -> dict[str, float | None]:
    """Give the costs of a run with what follows from them.

    What follows from something absent is absent. There are no payloads where no client ever took part, and of runs that
    do not tell how often clients did.
    """
    sums = {sum_of: _added([cost.get(key) for key in keys]) for sum_of, keys in _SUMS.items()}
    times = cost.get("client_rounds")
    payloads = {key: _shared(cost.get(total), times) for key, total in _PAYLOADS.items()} if times else {}
    return {**cost, **sums, **payloads}


def _added(amounts: list[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return math.fsum(known) if len(known) == len(amounts) else None


def _shared(total: float | None, times: float) -> float | None:
    return None if total is None else total / times
