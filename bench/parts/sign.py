"""Sign: of each tensor of an update the signs are sent, and one length for all; the rest waits at the client.

Karimireddy, Rebjock, Stich, Jaggi. Error Feedback Fixes SignSGD and other Gradient Compression Schemes. ICML 2019.
https://arxiv.org/abs/1901.09847 (algorithm 1); without memory Bernstein, Wang, Azizzadenesheli, Anandkumar. signSGD.
ICML 2018. https://arxiv.org/abs/1802.04434

Kind           channel
Learns         which way entries moved, within updates
Departs        of updates of many local steps (paper: of gradients); of each tensor (as its experiments); an entry of
               exactly 0 is sent as plus, as a bit says no more; tensors below 256 entries are sent whole; what the
               server sends is whole. After `topk`, whose entries are others each time, its memory makes no sense
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Compression, Tree, bits, register


@register("sign")
@dataclass(frozen=True, kw_only=True)
class Sign(Compression):
    """A bit an entry, and 4 bytes a tensor. A client keeps what it has not sent, and adds it to the next update."""

    remembers: ClassVar[bool] = True

    def encode(self, path: str, entries: Tensor, key: Tensor) -> Tree:
        """Send the signs, and the mean size."""
        return {"size": entries.abs().mean(), "signs": bits.pack((entries >= 0).to(torch.int32), 1)}

    def decode(self, sent: Tree, like: Tensor) -> Tensor:
        """Give each entry its sign, and all one size."""
        values: Tensor = sent["size"] * (2 * bits.unpack(sent["signs"], 1, len(like)) - 1)
        return values
