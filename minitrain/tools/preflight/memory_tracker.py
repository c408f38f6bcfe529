"""Count the memory of tensors, real and fake: `MemoryTracker`."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from minitrain.model import kd_divergence, logprobs

HEAD = {logprobs.__name__, kd_divergence.__name__}  # their backward passes belong to the LM head
MOST_CHOICES = 1 << 22  # real indices of one `topk`; they take memory
aten = torch.ops.aten
FACTORIES = {aten.empty.memory_format, aten.empty_strided.default}
FROM_INPUTS = {
    aten._local_scalar_dense.default: 0,
    aten.allclose.default: True,
}  # results of operations that read values


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes that each part of a training holds, for real and for fake tensors.

    A tensor belongs to the part that was active when it was allocated, unless `hold` assigns another. Views of a tensor
    count once. Temporary buffers inside an operation are not counted.

    Attributes:
        elsewhere: Parts that do not count toward the peak.
        part: The active part.
        now: Bytes that each part holds.
        peaks: The most bytes that each part has held.
        peak: The most bytes that all parts have held together.
    """

    def __init__(self, fake: FakeTensorMode | None = None, elsewhere: frozenset[str] = frozenset()):
        super().__init__()
        self.fake, self.elsewhere = fake, elsewhere
        self.part = "activations"
        self.now, self.peaks, self.total, self.peak = Counter(), Counter(), 0, 0
        self.held: dict[int, tuple[str, int, weakref.ref]] = {}  # storage -> part, bytes, reference

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local shards are dispatched again
        kwargs = kwargs or {}
        if active_fake_mode() not in (None, self.fake):  # DTensor propagates shapes
            return function(*args, **kwargs)
        made = self._call(function, args, kwargs)
        part = "head" if _in_head() else self.part
        if self._makes_floats(function, kwargs):
            part = "gathered"
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self.held.keys():
                self.hold(tensor, part)
        return made

    def _call(self, function, args: tuple, kwargs: dict) -> Any:
        if not any(isinstance(value, FakeTensor) for value in tree_iter((args, kwargs))):
            with self.fake if self._makes_floats(function, kwargs) else contextlib.nullcontext():
                return function(*args, **kwargs)
        if function in FROM_INPUTS:
            return FROM_INPUTS[function]
        if function is aten._grouped_mm.default:
            return self._grouped_mm(*args, **kwargs)
        if function is aten.index.Tensor:  # a real mask has a known number of elements
            args = args[0], [index for each in args[1] for index in _indices(each)], *args[2:]
        made = function(*tree_map_only(Tensor, self._to_fake, args), **tree_map_only(Tensor, self._to_fake, kwargs))
        return _with_even_choices(made, args) if function is aten.topk.default else made

    def _grouped_mm(self, a: Tensor, b: Tensor, offsets: Tensor | None = None, *rest) -> Tensor:
        """Return the result of a product of groups of rows, which fake tensors only support in bfloat16."""
        shape = (*a.shape[:-1], b.shape[-1]) if b.dim() == 3 else (len(offsets), a.shape[0], b.shape[1])
        with self.fake:
            return torch.empty(shape, dtype=a.dtype, device=a.device)

    def _to_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.fake:  # FakeTensorMode.from_tensor keeps some real tensors alive
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _makes_floats(self, function, kwargs: dict) -> bool:
        """Return whether an operation allocates floats without an input, as only FSDP does here."""
        floats = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        return self.fake is not None and function in FACTORIES and floats

    def hold(self, tensor: Tensor, part: str) -> None:
        """Assign a tensor to a part."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._release(key)
        self.held[key] = part, storage.nbytes(), weakref.ref(storage, lambda _: self._release(key))
        self._add(part, storage.nbytes())

    def reset_peaks(self) -> None:
        """Reset the peaks to what is held now."""
        self.peaks, self.peak = Counter(self.now), self.total

    def __enter__(self) -> "MemoryTracker":
        self.resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:  # FSDP frees gathered parameters so
            self.resize(storage, size)
            if storage._cdata in self.held:
                part, before, reference = self.held[storage._cdata]
                self.held[storage._cdata] = part, size, reference
                self._add(part, size - before)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def _release(self, key: int) -> None:
        if key in self.held:
            part, size, _ = self.held.pop(key)
            self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size
        self.peaks[part] = max(self.peaks[part], self.now[part])
        if part not in self.elsewhere:
            self.total += size
            self.peak = max(self.peak, self.total)


def _key(tensor: Tensor) -> int:
    """Return a key that all views of the same memory share."""
    return tensor.untyped_storage()._cdata


def _in_head() -> bool:
    """Return whether the backward pass is in the LM head."""
    node = torch._C._current_autograd_node()
    return getattr(type(node), "_forward_cls", Tensor).__module__ in HEAD


def _indices(index: Tensor | None) -> Iterable[Tensor | None]:
    real_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if real_mask else (index,)


def _with_even_choices(largest: tuple[Tensor, Tensor], args: tuple) -> tuple[Tensor, Tensor]:
    """Replace the indices of `topk` along the last dimension by real ones, which choose each index equally often.

    Models that loop over their experts need them, and the estimate is that of an even load.
    """
    values, indices = largest
    if args[2:3] not in ((), (-1,), (values.dim() - 1,)) or indices.numel() > MOST_CHOICES:
        return largest
    return values, (torch.arange(indices.numel()) % args[0].shape[-1]).view(indices.shape)
