"""Optimizers that are made of others: Muon with AdamW, master weights, rows of shards, steps in the backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minitrain.distributed.parallel import SingleDevice, is_sharded, local_shard
from minitrain.errors import RunError

Groups = list[dict[str, Any]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group to its multiple of `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step for a tensor
            group["lr"].fill_(lr * group["lr_ratio"])
        else:
            group["lr"] = lr * group["lr_ratio"]


class Joint(torch.optim.Optimizer):
    """Optimizers of different parameters as one. Groups and state are theirs."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]):
        self.parts = [inner for part in parts for inner in (part.parts if isinstance(part, Joint) else [part])]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            self.state.update(part.state)
            part.state = self.state

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()


class Muon(Joint):
    """torch.optim.Muon for the matrices of the groups with `is_matrix`, AdamW for the rest.

    With adjust_lr_fn=match_rms_adamw, updates of matrices are as large as those of AdamW, so both use one `lr`.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr_ratio: float = 1.0,
    ):
        """
        Args:
            params: Parameter groups with `is_matrix` and `lr_ratio`.
            fused: Of AdamW.
            momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: Of torch.optim.Muon.
            adamw_lr_ratio: Learning rate of AdamW as a multiple of `lr`.
        """
        if not adamw_lr_ratio >= 0:
            raise ValueError(f"adamw_lr_ratio must be >= 0, got {adamw_lr_ratio}")
        options = {"lr": lr, "weight_decay": weight_decay}
        matrices = [group for group in params if group["is_matrix"]]
        rest = [group | {"lr_ratio": group["lr_ratio"] * adamw_lr_ratio} for group in params if not group["is_matrix"]]
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        own["ns_coefficients"] = tuple(ns_coefficients)
        parts = [torch.optim.Muon(matrices, **options, **own)] if matrices else []
        parts += [torch.optim.AdamW(rest, betas=betas, eps=eps, fused=fused, **options)] if rest else []
        super().__init__(parts)


class StandIns(torch.optim.Optimizer):
    """An optimizer of other tensors, its stand-ins, that updates the parameters.

    Attributes:
        stand_ins: parameter -> its stand-in.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.stand_ins, self.state = optimizer, stand_ins, optimizer.state

    def step(self, closure: None = None) -> None:
        self.update(self.stand_ins, self.optimizer)

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Update parameters that have a gradient by a step of `optimizer` on their stand-ins."""
        pairs = [(p, self.stand_ins[p]) for p in parameters if p.grad is not None]
        for parameter, stand_in in pairs:
            self.lend(parameter, stand_in)
        optimizer.step()
        self.take_back(pairs)
        for _, stand_in in pairs:
            stand_in.grad = None

    def lend(self, parameter: nn.Parameter, stand_in: nn.Parameter) -> None:
        """Give a stand-in the gradient of its parameter."""
        raise NotImplementedError

    def take_back(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Give parameters the values of their stand-ins."""


class MasterWeights(StandIns):
    """The stand-ins are float32 master weights, and the parameters rounded copies of them with float32 gradients."""

    def lend(self, parameter: nn.Parameter, stand_in: nn.Parameter) -> None:
        stand_in.grad = parameter.grad

    def take_back(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        rounded = [(parameter, master) for parameter, master in pairs if parameter is not master]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded, strict=True)))


class LocalRows(StandIns):
    """The stand-ins are this rank's rows of sharded parameters, for optimizers that do not know DTensor."""

    def lend(self, parameter: nn.Parameter, stand_in: nn.Parameter) -> None:
        rows = local_shard(parameter.detach())[0]
        if rows.numel():
            stand_in.data, stand_in.grad = rows, local_shard(parameter.grad)[0]


def round_to(dtype: torch.dtype, parameter: nn.Parameter) -> nn.Parameter:
    """Round a parameter to `dtype`, keep its gradient in float32, and return its master."""
    master = nn.Parameter(parameter.detach())
    parameter.data = parameter.detach().to(dtype)
    parameter.grad_dtype = master.dtype
    return master


def local_rows(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local_shard(parameter.detach())[0]) if is_sharded(parameter) else parameter


class InBackward(torch.optim.Optimizer):
    """Updates each parameter as soon as its gradient is accumulated, and frees the gradient.

    The learning rate must be set before the backward pass. `step` updates the parameters that still have a gradient.
    """

    def __init__(self, optimizer: Joint | StandIns, parts: dict[nn.Parameter, torch.optim.Optimizer]):
        """
        Args:
            optimizer: The optimizer of all parameters.
            parts: The optimizer of each parameter, or of its stand-in.
        """
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.parts, self.state = optimizer, parts, optimizer.state
        self.norms: list[Tensor] = []
        for parameter in parts:
            parameter.register_post_accumulate_grad_hook(self._update)

    def step(self, closure: None = None) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        gradient = local_shard(parameter.grad)[0]
        self.norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))  # also of bfloat16
        self.update(parameter)

    def update(self, parameter: nn.Parameter) -> None:
        """Update a parameter, and free its gradient."""
        if isinstance(self.optimizer, StandIns):
            self.optimizer.update([parameter], self.parts[parameter])
        else:
            self.parts[parameter].step()
        parameter.grad = None

    def grad_norm(self, parallel: SingleDevice) -> Tensor:
        """Return the norm of the gradients since the last call, shape []."""
        norms = nn.Parameter(torch.zeros(len(self.norms), device=parallel.device))
        norms.grad = torch.stack(self.norms) if self.norms else norms.detach()
        self.norms = []
        return parallel.grad_norm([norms])


def non_finite_in_backward() -> RunError:
    return RunError(
        "the loss or a gradient is not finite, and optimizer_in_backward has already updated the weights. Rerun to "
        "resume from the last checkpoint with optimizer_in_backward=false, which skips such steps.",
        "not-finite",
    )
