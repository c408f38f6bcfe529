"""The policy as it was when training began: a reference for the price of what is trained.

With an adapter that is a copy of the adapter. A new LoRA adds nothing at first, so this is the base model; one that was
loaded to go on with is the reference as it was loaded, and not the base with the adapter switched off (trl#1193).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .engine.parallel import SingleDevice, local_rows


class InitialValues:
    """A copy of what is trained, as it is when this is made; of a sharded policy, each rank's own rows."""

    def __init__(self, policy: nn.Module, parallel: SingleDevice):
        self.policy, self.parallel = policy, parallel
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.pairs = [(local_rows(p)[0].detach(), local_rows(p)[0].detach().clone()) for p in trained]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the policy is what it was, without gradients; after it, what it is."""
        now = [rows.clone() for rows, _ in self.pairs]
        self._put(value for _, value in self.pairs)
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(now)

    def _put(self, values) -> None:
        for (rows, _), value in zip(self.pairs, values, strict=True):
            rows.data.copy_(value)
        self.parallel.reshard(self.policy)
