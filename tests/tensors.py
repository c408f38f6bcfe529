"""What tests of models and heads do with tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def shaken(model):
    """Other values for all that is trained, so that the B of LoRA and the like are not zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


class Largest(TorchDispatchMode):
    """``with Largest() as seen: ...``: `seen.numel` of the largest tensor that was made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


class Written(TorchDispatchMode):
    """``with Written() as seen: ...``: `seen.numel` of all tensors together that operations made or wrote inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel += out.numel() if isinstance(out, torch.Tensor) and not function.is_view else 0
        return out
