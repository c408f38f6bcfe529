"""Count what a step asks of a CUDA device that has shapes and no values. `fake_card.load` makes it possible."""

import functools
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_iter

ROOT = str(Path(__file__).parents[1])
DEVICE = torch.device("cuda", 0)
TENSORS_PER_LAUNCH = 64  # of a foreach kernel, about
aten = torch.ops.aten
FREE = {  # launch no kernel
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "_reshape_alias", "_unsafe_view", "set_", "view", "expand", "_fused_sdp_choice",
    "is_same_size", "resize_", "record_stream",
}  # fmt: skip
WAITS: dict[str, Callable[[tuple], Any]] = {  # need values on the host: what they return here
    "_local_scalar_dense": lambda args: True if args[0].dtype == torch.bool else _one(args[0].dtype),
    "equal": lambda args: True,
    "allclose": lambda args: True,
    "is_nonzero": lambda args: True,
}
SIZES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount"}  # sizes follow values


def _one(dtype: torch.dtype) -> float | int:
    return 1.0 if dtype.is_floating_point else 1


class Card(TorchDispatchMode):
    """``with Card() as card: ...``: tensors on "cuda" are fake inside, and those on the CPU are real.

    Attributes:
        kernels: Number of kernels of each operation.
        waits: Operations for which the host waits for the device, with the line of minitrain that calls them.
        copies: Number of copies from pinned memory of the host, which do not wait.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.attention = F.scaled_dot_product_attention
        self.reset()

    def __enter__(self) -> "Card":
        torch.cuda._lazy_init = lambda: None  # what `tensor.to("cuda")` calls first
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1.0, device="cuda") is then a copy from the host
        torch.cuda.get_device_name = lambda *_: "a card without values"
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as of a real one
        Tensor.pin_memory, Tensor.is_pinned = _pin, _is_pinned
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda *_, **__: True
        _foreach_utils._foreach_supported_types = (Tensor, nn.Parameter, FakeTensor)
        F.scaled_dot_product_attention = functools.partial(_attention, self.attention)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        F.scaled_dot_product_attention = self.attention
        super().__exit__(*error)

    def reset(self) -> None:
        """Start to count again."""
        self.kernels, self.waits, self.copies = Counter(), [], 0

    def move(self, module: nn.Module) -> None:
        """Replace parameters and buffers by fake ones on the device; tied ones stay tied."""
        fake_of = functools.cache(self.fake_of)
        for part in module.modules():
            for own in (part._parameters, part._buffers):
                own |= {name: fake_of(tensor) for name, tensor in own.items() if tensor is not None}

    def fake_of(self, tensor: Tensor) -> Tensor:
        """Return a tensor or parameter of the same shape on the device."""
        with self.fake:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        on_device = tree_any(_is_on_device, (args, kwargs))
        target = kwargs.get("device")
        if not on_device and (target is None or torch.device(target).type != "cuda"):
            return function(*args, **kwargs)
        if name == "device":  # of a fake tensor
            return function(*args, **kwargs)
        if name in WAITS:
            self._wait(name)
            return WAITS[name](args)
        if name in ("_to_copy", "copy_") and (copied := self._copy(name, args, kwargs)) is not None:
            return copied
        selects = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        assert not (name in SIZES or selects or repeats), f"{name}: waits for the size of its result, {_where()}"
        self._check_one_device(name, args, kwargs)
        with self.fake:
            made = function(*args, **kwargs)
        if not (function.is_view or name in FREE):
            self.launched(function, name, args, kwargs, made)
        return made

    def launched(self, function, name: str, args: tuple, kwargs: dict, made: Any) -> None:
        """Count the kernels of an operation."""
        lists = [len(each) for each in args if isinstance(each, (list, tuple)) and each and _is_tensor(each[0])]
        many = name.startswith(("_foreach", "_fused_ada", "_fused_sgd")) and lists
        self.kernels[name] += -(-max(lists) // TENSORS_PER_LAUNCH) if many else 1

    def _copy(self, name: str, args: tuple, kwargs: dict) -> Tensor | None:
        """Return the result of a copy from the host or to it, and count it; None for other copies."""
        to_device = _is_on_device(args[0]) if name == "copy_" else torch.device(kwargs.get("device") or args[0].device)
        source = args[1] if name == "copy_" else args[0]
        to_device = to_device if isinstance(to_device, bool) else to_device.type == "cuda"
        if _is_on_device(source) == to_device:
            return None
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        if non_blocking and to_device and source.is_pinned():
            self.copies += 1
        else:
            self._wait(name)
        if name == "copy_":
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        if not to_device:
            return torch.ones(source.shape, dtype=dtype)
        with self.fake:
            return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=DEVICE)

    def _check_one_device(self, name: str, args: tuple, kwargs: dict) -> None:
        """Raise an error for an operation on tensors of host and device, as CUDA does."""
        for each in tree_iter((args, kwargs)):
            assert not _is_tensor(each) or _is_on_device(each) or each.dim() == 0, f"{name}: a tensor is on the CPU"

    def _wait(self, name: str) -> None:
        self.waits.append(f"{name} {_where()}")


def _where() -> str:
    """Return the last line of minitrain that runs."""
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{ROOT}/minitrain")]
    return f"{own[-1].filename.removeprefix(ROOT)}:{own[-1].lineno}" if own else "outside of minitrain"


def _attention(plain: Callable, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *args, **options) -> Tensor:
    """Call the kernel that PyTorch chooses on a card: flash attention, unless there is a mask."""
    if _is_on_device(query) and torch.is_autocast_enabled("cuda"):
        query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
    if not _is_on_device(query) or attn_mask is not None or query.dtype == torch.float32:
        return plain(query, key, value, attn_mask, *args, **options)
    rest = options.get("dropout_p", 0.0), options.get("is_causal", False)
    return aten._scaled_dot_product_flash_attention(query, key, value, *rest, scale=options.get("scale"))[0]


def _pin(tensor: Tensor) -> Tensor:
    pinned = tensor.clone()
    pinned.in_pinned_memory = True
    return pinned


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "in_pinned_memory", False)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_on_device(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda"
