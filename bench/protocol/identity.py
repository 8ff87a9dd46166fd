"""Names for what a run is: the hash of everything that can change its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def canonical(identity: Mapping[str, object]) -> str:
    """Write an identity in the one way that is hashed: JSON, keys sorted, no spaces.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has no word for.
        TypeError: A value is not JSON's.
    """
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identify(identity: Mapping[str, object]) -> str:
    """Give the first 12 hexadecimal digits of the SHA-256 of the canonical identity.

    Among a million runs, two share an identifier with a probability of 0.2 %.
    """
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]
