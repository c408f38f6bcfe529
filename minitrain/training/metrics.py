"""Means that are exact whatever the batches: sums over tokens, divided once at the end."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from minitrain.batch import Batch
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import Loss, LossOutput, Models

from .failpoints import failpoint
from .precision import Precision


class MetricAccumulator:
    """Running sums of a loss and its metrics, in float64, over micro-batches, steps and ranks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums: dict[str, torch.Tensor] = {}  # name -> [2] (sum, weight)
        self.samples: dict[str, list[float]] = {}

    def add(self, output: LossOutput) -> None:
        for name, (total, weight) in {"loss": (output.loss_sum, output.num_items), **output.metrics}.items():
            pair = torch.stack([total.detach().to(self.dtype), weight.to(self.dtype)])  # [2]
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_samples(self, output: LossOutput) -> None:
        for name, tensor in output.samples.items():
            self.samples.setdefault(name, []).extend(tensor.tolist())

    def means(self, parallel: SingleDevice) -> dict[str, float]:
        """Sum / weight of each, over all ranks; a metric that no rank has seen is left out."""
        # A loss may give a metric on some ranks only, and sums are made in one order on all of them.
        names = dict.fromkeys(name for known in parallel.gather(list(self.sums)) for name in known)
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=self.dtype, device=self.device)
        totals = parallel.sum(torch.stack([self.sums.get(name, nothing) for name in names])).tolist()  # [M, 2]
        return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight}

    def all_samples(self, parallel: SingleDevice) -> dict[str, list[float]]:
        """The samples of all ranks."""
        found: dict[str, list[float]] = {}
        for samples in parallel.gather(self.samples):
            for name, numbers in samples.items():
                found.setdefault(name, []).extend(numbers)
        return found


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


def share_step_statistics(loss: Loss, batches: Iterable[Batch], models: Models, parallel: SingleDevice) -> None:
    """Sum a loss's step statistics over all batches and ranks, and give it the sums."""
    if not loss.has_step_statistics:
        return
    with torch.no_grad():
        sums = [loss.step_statistics(batch.to(parallel.device), models) for batch in batches]
    loss.set_step_statistics(parallel.sum(torch.stack(sums).sum(0)))


def evaluate(
    loss: Loss,
    batches: Callable[[], Iterable[Batch]],
    models: Models,
    parallel: SingleDevice,
    precision: Precision,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss and metrics over batches; the same for every batch size and number of ranks.

    Ends early, with {}, when `stop()`, on which all ranks have to agree.
    """
    totals = MetricAccumulator(parallel.device)
    with inference(models.policy), precision.autocast():
        share_step_statistics(loss, batches(), models, parallel)
        for batch in batches():
            failpoint("eval.batch")
            if stop():
                return {}
            output = loss(batch.to(parallel.device), models)
            totals.add(output)
            totals.add_samples(output)
    parallel.reshard(models.policy)
    return loss.finalize_metrics(totals.means(parallel)) | loss.compute_eval_metrics(totals.all_samples(parallel))


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("loss", "perplexity", "kl"))
