"""Means that are exact whatever the batches: sums over tokens, divided once at the end."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .batch import Batch
from .engine.faults import failpoint
from .engine.parallel import SingleDevice
from .engine.precision import Precision
from .losses import Loss, LossOutput


class Totals:
    """Running sums of a loss and its metrics, in float64, over micro-batches, steps and ranks."""

    def __init__(self, device: torch.device):
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums: dict[str, torch.Tensor] = {}  # name -> [2] (sum, weight)

    def add(self, output: LossOutput) -> None:
        for name, (total, weight) in {"loss": (output.sum, output.weight), **output.metrics}.items():
            pair = torch.stack([total.detach().to(self.dtype), weight.to(self.dtype)])  # [2]
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, parallel: SingleDevice) -> dict[str, float]:
        """Sum / weight of each, over all ranks; a metric that no rank has seen is left out."""
        if not self.sums:
            return {}
        totals = parallel.sum(torch.stack(list(self.sums.values()))).tolist()  # [M, 2]
        return {name: total / weight for name, (total, weight) in zip(self.sums, totals, strict=True) if weight}


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode and the random numbers are restored after it."""
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def evaluate(
    policy: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    parallel: SingleDevice,
    precision: Precision,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss and metrics over batches; the same for every batch size and number of ranks.

    Ends early, with {}, when `stop()`, on which all ranks have to agree.
    """
    totals = Totals(parallel.device)
    with inference(policy), precision.autocast():
        for batch in batches:
            failpoint("eval.batch")
            if stop():
                return {}
            totals.add(loss(batch.to(parallel.device), policy))
    parallel.reshard(policy)
    return loss.summary(totals.means(parallel))


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("loss", "perplexity"))
