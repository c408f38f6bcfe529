"""`deterministic`: deterministic algorithms, and a check that a step computed twice gives the same bits."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from minitrain.batch import Batch
from minitrain.distributed.parallel import local_shard
from minitrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms, and restore the settings of torch at the end.

    Raises:
        ConfigError: An operation has no deterministic implementation.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a GPU
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    cudnn, was_enabled = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if (match := NOT_DETERMINISTIC.search(str(error))) is None:
            raise
        message = f"deterministic: {match[1]} has no deterministic implementation on this device."
        raise ConfigError(f"{message} Set deterministic=false.", "unsupported-model") from None
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warns_only)
        cudnn.deterministic, cudnn.benchmark = flags


def check_repeatable(trainer: "Trainer", batches: Sequence[Batch]) -> None:
    """Compute the loss and the gradients of a step twice. The state of the trainer does not change.

    Raises:
        RunError: They differ, on all ranks.
    """
    loss, gradients = _compute(trainer, batches)
    loss_again, gradients_again = _compute(trainer, batches)
    different = [name for name, gradient in gradients.items() if not torch.equal(gradient, gradients_again[name])]
    what = [f"the gradient of {name} differs" for name in different[:1]]
    if not torch.equal(loss, loss_again):
        what = ["the loss differs"]
    if found := next((one for one in trainer.parallel.gather(what[0] if what else "") if one), None):
        raise RunError(
            f"deterministic: {found} when step {trainer.step + 1} is computed twice. Set deterministic=false, or "
            "another model.attn_implementation.",
            "mismatch",
        )


def _compute(trainer: "Trainer", batches: Sequence[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the bits of the loss and of this rank's gradients, on the CPU."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        loss = trainer.forward_backward(batches).loss
    named = [(name, p.grad) for name, p in trainer.policy.named_parameters() if p.grad is not None]
    gradients = {name: _bits(local_shard(gradient)[0]) for name, gradient in named}
    for parameter in trainer.parameters:  # `zero_grad` of an optimizer with master weights does not reach them
        parameter.grad = None
    trainer.step_output = None
    return _bits(loss), gradients


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy as bytes, since a NaN does not equal itself."""
    return tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
