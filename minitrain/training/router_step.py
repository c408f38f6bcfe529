"""The router of a mixture of experts over an optimizer step: its auxiliary loss, and metrics of the load."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minitrain.batch import IGNORE_INDEX, Batch
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import LossOutput
from minitrain.model.router import RouterRecord, Routing


class RouterStep:
    """The routing of an optimizer step, over its micro-batches.

    Attributes:
        load: Tokens that each expert computed on this rank, int64, shape [L, E]; None for a dense model.
    """

    def __init__(self, policy: Callable, batches: Sequence[Batch], parallel: SingleDevice):
        """Start a step. With an auxiliary loss and several micro-batches, run them once to count the choices.

        Args:
            policy: The policy; a function that is not one has no routing.
            batches: The micro-batches of this rank.
            parallel: The ranks.
        """
        self.routing: Routing | None = getattr(policy, "routing", None)
        self.parallel, self.n_batches = parallel, len(batches)
        self.record: RouterRecord | None = None
        self.load: Tensor | None = None
        self.choices: Tensor | None = None  # [E + 1] those of the full step, and its number of tokens
        self.coef = self.routing.aux_loss.coef if self.routing is not None and self.routing.aux_loss else 0.0
        self.parts: list[Tensor] = []  # of the auxiliary loss, by micro-batch
        if self.coef and len(batches) > 1:
            self.choices = self._count_choices(policy, batches)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass of a micro-batch."""
        with contextlib.nullcontext() if self.routing is None else self.routing.recording() as self.record:
            yield

    def add(self, output: LossOutput) -> Tensor | float:
        """Add the recorded micro-batch, and its metric to its output; return its part of coef * auxiliary loss."""
        if self.record is not None and self.record.load is not None:
            self.load = self.record.load if self.load is None else self.load + self.record.load
        if not self.coef:
            return 0.0
        step = self.choices if self.choices is not None else self._sum_choices(self.record)  # [E + 1]
        n_tokens = step[-1].clamp(min=1)
        part = len(step[:-1]) * (step[:-1] / n_tokens) @ (self.record.probs / n_tokens)  # []
        self.parts.append(part.detach())
        n_parts = torch.tensor(self.n_batches * self.parallel.world_size)
        output.metrics["router/aux_loss"] = part, part.new_ones(()) / n_parts  # the parts of a step sum up
        return self.coef * part

    def loss(self) -> Tensor | float:
        """Return coef * auxiliary loss of the step, shape [], the same on every rank."""
        return self.coef * self.parallel.sum(torch.stack(self.parts).sum()) if self.parts else 0.0

    def _count_choices(self, policy: Callable, batches: Sequence[Batch]) -> Tensor:
        """Return the choices over the step and its number of tokens [E + 1], from forward passes without gradients."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.routing.recording(only_choices=True) as record:
            for batch in batches:
                # Without targets, so that the LM head has nothing to do.
                empty = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
                policy(empty.to(self.parallel.device))
        return self._sum_choices(record)

    def _sum_choices(self, record: RouterRecord) -> Tensor:
        return self.parallel.sum(torch.cat([record.choices, record.n_tokens[None]]))


def load_metrics(load: Tensor) -> dict[str, float]:
    """Return metrics of the load of the experts [L, E], as means over layers.

    MaxVio: Wang et al. 2024 (arXiv 2408.15664).
    """
    load = load.double().cpu()
    load = load[load.sum(1) > 0]  # a layer of another tower has none
    if not len(load):
        return {}
    relative = load / load.mean(1, keepdim=True)  # [L, E]
    return {
        "router/max_violation": float(relative.amax(1).mean()) - 1,
        "router/unused_experts": float((load == 0).double().mean()),
    }
