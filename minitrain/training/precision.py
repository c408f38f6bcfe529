"""Mixed precision: autocast for the forward pass, dynamic loss scaling for float16."""

from dataclasses import dataclass

import torch

from minitrain.errors import RunError

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # clean steps before the scale is doubled
SMALLEST_SCALE = 2.0**-10


@dataclass
class Precision:
    """The dtype of compute. Parameters keep their own dtype, float32 by default.

    float16 has no exponents for small gradients: the loss is multiplied by `scale` before the backward pass and
    the gradients divided by it after. An overflow halves the scale, and the step is skipped.
    """

    dtype: torch.dtype
    device: torch.device
    scale: float = 1.0
    clean_steps: int = 0

    def __post_init__(self):
        if self.dtype == torch.float16:
            self.scale = FIRST_SCALE

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale).backward()

    def unscale(self, parameters: list[torch.nn.Parameter]) -> None:
        """Gives the gradients their true size; before clipping, and once a step."""
        if self.scale != 1.0:
            grads = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1.0 / self.scale)

    def update(self, overflow: bool) -> None:
        """Adapts the scale after a step. Raises RunError when no scale helps."""
        if self.dtype != torch.float16:
            return
        if overflow:
            self.scale, self.clean_steps = self.scale / 2, 0
            if self.scale < SMALLEST_SCALE:
                raise RunError(
                    "float16 gradients overflow at every loss scale; use model.policy_dtype=bfloat16", "not-finite"
                )
        else:
            self.clean_steps += 1
            if self.clean_steps == GROWTH_INTERVAL:
                self.scale, self.clean_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.clean_steps = state["scale"], state["clean_steps"]
