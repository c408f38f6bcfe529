"""Keep the inputs of recomputed blocks in host memory between the forward and the backward pass."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class HostCopies:
    """The inputs of blocks, copied to host memory on a stream of their own.

    The backward pass reads them in reverse order, so reading one begins to copy the one before.

    Attributes:
        kept: The copies that the backward pass has not read.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kept: list[_Copy] = []

    def offload(self, block: nn.Module) -> None:
        """Keep only a host copy of the input of a block. Call it after the block's forward function is compiled."""
        forward = block.forward

        def offloaded(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if not args:  # what is saved are the positional arguments
                args = (kwargs.pop("hidden_states"),)
            key = _key(args[0])  # not the tensor itself, which the graph would hold with this function

            def pack(tensor: Tensor) -> "Tensor | _Copy":
                return self.save(tensor) if _key(tensor) == key else tensor

            with saved_tensors_hooks(pack, self._read):
                return forward(*args, **kwargs)

        block.forward = offloaded

    def save(self, tensor: Tensor) -> "_Copy":
        """Copy a tensor to the host."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            host.copy_(tensor)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)  # its memory is reused only after the copy
        copy = _Copy(host, tensor.device)
        self.kept.append(copy)
        return copy

    def _read(self, packed: "Tensor | _Copy") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        number = next((i for i, copy in enumerate(self.kept) if copy is packed), None)
        tensor = self._fetch(packed, wait=True)
        if number is not None:
            del self.kept[number:]  # those after it belong to a backward pass that was not run
            if number > 0 and self.stream is not None:
                self._fetch(self.kept[number - 1])
        return tensor

    def _fetch(self, copy: "_Copy", wait: bool = False) -> Tensor:
        """Begin the copy to the device, if it has not begun. With `wait`, later work waits for it."""
        if self.stream is None:
            return copy.host.to(copy.device)
        if copy.fetched is None:
            with torch.cuda.stream(self.stream):
                copy.fetched = copy.host.to(copy.device, non_blocking=True)
        tensor = copy.fetched
        if wait:
            current = torch.cuda.current_stream(copy.device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
            copy.fetched = None
        return tensor


class _Copy:
    """A copy on the host, and the tensor on the device while it is fetched."""

    def __init__(self, host: Tensor, device: torch.device):
        self.host, self.device = host, device
        self.fetched: Tensor | None = None


def _key(tensor: Tensor) -> tuple[torch.Size, int]:
    """Return a key that tensors with the same memory and shape share."""
    return tensor.shape, tensor.untyped_storage()._cdata
