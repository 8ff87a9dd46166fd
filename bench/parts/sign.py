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
from typing import Any

import torch
from torch import Tensor

from bench import Channel, Task, Tree, bits, register, tree

_SMALL = 256


@register("sign")
@dataclass(frozen=True, kw_only=True)
class Sign(Channel):
    """A bit an entry, and 4 bytes a tensor. A client keeps what it has not sent, and adds it to the next update."""

    def init(self, task: Task, update: Tree) -> Tree:
        """Start with nothing left over."""
        return tree.zeros_like(update)

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Send the signs of update and remainder, and their mean size."""
        due = tree.map(torch.add, update, kept)
        sent = tree.map(self._signs, due)
        return sent, tree.sub(due, self.receive(task, sent, due))

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Give each entry its sign, and all of a tensor one size."""

        def whole(leaf: Tensor, sent: Tree) -> Tensor:
            if "whole" in sent:
                values: Tensor = sent["whole"]
            else:
                signs = 2 * bits.unpack(sent["signs"], 1, leaf.numel()) - 1
                values = sent["size"] * signs.reshape(leaf.shape)
            return values

        return tree.map(whole, like, sent)

    def _signs(self, leaf: Tensor) -> Any:
        if leaf.numel() < _SMALL or not leaf.is_floating_point():
            return {"whole": leaf}
        flat = leaf.flatten()
        return {"size": flat.abs().mean(), "signs": bits.pack((flat >= 0).to(torch.int32), 1)}
