"""FedAvg: clients train the broadcast model, the server averages.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017. https://arxiv.org/abs/1602.05629 (Algorithm 1)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
Elsewhere      weights differ: examples (PFLlib, FedProx, pFedMe), uniform (FedBABU, Ditto, LG-FedAvg, FedNH), batches
               (FedGELA), examples before 30 % are held out (FedETF). FedDyn's code draws cohorts by independent coin
               flips, so their size varies. FedBABU, MOON and FedNH average batch norm's batch counter too
Reproduced     by Lee-Gihun/FedNTD@be00ee5 (momentum 0.5): models 6e-07 apart (results/studies/agreement.md)
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register


@register("fedavg")
@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """The server's verbs are the defaults of `Algorithm`; only the client's work is its own."""

    family: ClassVar[str] = "generic"

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
