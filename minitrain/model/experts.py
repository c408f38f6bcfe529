"""LoRA on parameters that are no layer's weight, such as the experts of a block [E, out, in], and their quantization.

    y = x W_e^T + s (x A_e^T) B_e^T        A [E r, in], B [out, r E]: the layout of PEFT's `target_parameters`

The module that owns such a parameter computes with it in its own forward pass, which transformers has in several
versions. During that pass, the parameter is replaced with a `LowRankSum`, whose products are those of W plus those of
A and B, or with the unpacked weight.
"""

import difflib
import functools
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from minitrain.errors import ConfigError

from .packed import pack, pack_on_meta, unpack, unpack_on_meta

if TYPE_CHECKING:
    from .lora import LoRASettings

ALL = "all-experts"
A, B = "_lora_A", "_lora_B"  # suffixes of the names of LoRA matrices


# ------------------------------------------------------------------------------------------------------- which ones


def find_experts(model: nn.Module) -> dict[str, torch.Size]:
    """Return the name and the shape of each stack of matrices [E, out, in] of experts, packed or not."""
    candidates = _candidates(model).items()
    return {name: shape for name, (module, shape) in candidates if _is_experts(module) and len(shape) == 3}


def find_parameters(model: nn.Module, targets: list[str] | str) -> list[str]:
    """Return the names of the parameters to adapt, in the model's order.

    Args:
        model: The transformers model.
        targets: Names or ends of names, or `all-experts`.

    Raises:
        ConfigError: A name matches no parameter that can be adapted.
    """
    candidates = _candidates(model)
    if targets == ALL:
        if names := list(find_experts(model)):
            return names
        raise ConfigError(
            f"lora.target_parameters: {type(model).__name__} has no experts in 3-D parameters. Remove {ALL}.",
            "not-a-choice",
        )
    for target in targets:
        if not any(_matches(name, target) for name in candidates):
            raise ConfigError(f"lora.target_parameters: {_unknown(target, model, candidates)}", "not-a-choice")
    return [name for name in candidates if any(_matches(name, target) for target in targets)]


def shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Return the last two parts of the names if they match no other parameters, else the full names."""
    short = {".".join(name.split(".")[-2:]) for name in names}
    matching = {name for name, _, _ in _owners(model) if any(_matches(name, target) for target in short)}
    return sorted(short) if matching == set(names) else sorted(names)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _owners(model: nn.Module) -> list[tuple[str, nn.Module, torch.Size]]:
    """Return the name, module and shape of each parameter of two or three dimensions, packed or not."""
    return [
        (f"{path}.{name}", module, shape)
        for path, module in model.named_modules()
        for name, shape in _shapes(module).items()
        if len(shape) in (2, 3) and path
    ]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    if is_wrapped(module):
        return module.shapes
    return {name: p.shape for name, p in module._parameters.items() if p is not None}


def _candidates(model: nn.Module) -> dict[str, tuple[nn.Module, torch.Size]]:
    """Return module and shape of the parameters that LoRA can adapt as such, by name.

    Only parameters that the forward pass of their own module reads can be replaced (not those of DBRX).
    """
    found = {}
    for name, module, shape in _owners(model):
        last = name.rpartition(".")[2]
        is_layer = isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or type(module).__module__.startswith("torch.")
        if not is_layer and min(shape) > 0 and last in _names_read(type(module)):
            found[name] = module, shape
    return found


def _names_read(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of attributes that the forward pass of a module uses."""
    base = next(cls for cls in kind.__mro__ if not issubclass(cls, _Wrapped))
    code = getattr(inspect.unwrap(base.forward), "__code__", None)
    return code.co_names if code is not None else ()


def _is_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower()


def _unknown(target: str, model: nn.Module, candidates: dict[str, Any]) -> str:
    available = sorted({".".join(name.split(".")[-2:]) for name in candidates})
    near = difflib.get_close_matches(target, available, n=3, cutoff=0.4)
    if any(_matches(name, target) for name, _, _ in _owners(model)):
        return f"{target!r} is the weight of a layer, or is not used by its own module. Use target_modules."
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"no parameter is named {target!r}.{hint} The model has {', '.join(available) or 'none'}."


# ------------------------------------------------------------------------------------------------------------- LoRA


def adapt_parameter(module: nn.Module, name: str, settings: "LoRASettings") -> None:
    """Add LoRA matrices of zeros in float32 for a parameter of a module."""
    device = getattr(module, name).device
    shape = _shapes(module)[name]
    n, (rows, columns) = shape[0] if len(shape) == 3 else 1, _matrix_shape(module, shape)
    _wrap(module)
    module.lora_parameters[name] = settings
    a, b = ((n * settings.rank, columns), (rows, settings.rank * n))  # [E r, in], [out, r E]
    for suffix, size in ((A, a), (B, b)):
        value = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))
        module.register_parameter(f"{name}{suffix}", value)


def is_matrix_name(name: str) -> bool:
    """Return whether a parameter is a LoRA matrix of another parameter."""
    return name.endswith((A, B))


def initial_a(module: nn.Module, name: str, method: str, generator: torch.Generator) -> Tensor:
    """Return the initial A [E r, in]: uniform, or with `gaussian` normal with deviation 1/r. B is zero."""
    a = torch.empty(module._parameters[f"{name}{A}"].shape)
    if method == "gaussian":
        return a.normal_(std=1 / module.lora_parameters[name].rank, generator=generator)
    bound = 1 / math.sqrt(a.shape[1])
    return a.uniform_(-bound, bound, generator=generator)


def peft_key(path: str, module: nn.Module, name: str) -> str:
    """Return the key of a LoRA matrix in PEFT's files: `experts.base_layer.lora_A.weight` for `gate_up_proj_lora_A`.

    PEFT nests a wrapper for each adapted parameter of a module, the last one outermost.
    """
    parameter, matrix = name[: -len(A)], name[-len(A) + 1 :]
    adapted = list(module.lora_parameters)
    return f"{path}{'.base_layer' * (len(adapted) - 1 - adapted.index(parameter))}.{matrix}.weight"


def merge_experts(module: nn.Module) -> None:
    """Merge the LoRA of a module's parameters, in float32 and cast once, and restore the ordinary module."""
    for name in module.lora_parameters:
        merged = merged_parameter(module, name).to(module._parameters[name].dtype)
        module._parameters[name] = nn.Parameter(merged, requires_grad=False)
        for suffix in (A, B):
            del module._parameters[f"{name}{suffix}"]
    _unwrap(module)


def merged_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a module, unpacked and with its LoRA, in float32 if it has one."""
    weight = unpack(getattr(module, name), module.shapes.get(name)).detach()
    if name not in module.lora_parameters:
        return weight
    left, right = _factors(module, name, module.lora_parameters[name], torch.float32)
    return weight.float() + (left @ right).detach()


def _matrix_shape(module: nn.Module, shape: torch.Size) -> tuple[int, int]:
    """Return (out, in) of a matrix; GPT-OSS has experts [E, in, out]."""
    return tuple(shape[-2:][::-1]) if _is_transposed(module, shape) else tuple(shape[-2:])


def _is_transposed(module: nn.Module, shape: torch.Size) -> bool:
    return len(shape) == 3 and getattr(module, "is_transposed", False)


def _factors(module: nn.Module, name: str, settings: "LoRASettings", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factors [..., m, r] and [..., r, n] of the change of a parameter [..., m, n]."""
    shape, a, b = module.shapes[name], module._parameters[f"{name}{A}"], module._parameters[f"{name}{B}"]
    b = (b * settings.scaling).to(dtype)
    a = a.to(dtype)
    if len(shape) == 2:
        return b, a
    a = a.view(shape[0], settings.rank, -1)  # [E, r, in]
    b = b.view(-1, settings.rank, shape[0]).permute(2, 0, 1).contiguous()  # [E, out, r]
    return (a.mT, b.mT) if _is_transposed(module, shape) else (b, a)


class LowRankSum:
    """W + L R [..., m, n], which is not added up for products, getting an item and transposing.

    In bfloat16, the sum would round small changes away. It would also need the memory of another W, and of its
    gradient.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor):
        self.weight, self.left, self.right = weight, left, right

    def dense(self) -> Tensor:
        return self.weight + self.left @ self.right

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in _SHARED else self.dense(), name)

    def __getitem__(self, index: Any) -> "LowRankSum | Tensor":
        is_item = self.weight.ndim == 3 and isinstance(index, (int, Tensor))
        if not is_item:
            return self.dense()[index]
        return LowRankSum(self.weight[index], self.left[index], self.right[index])

    def transpose(self, first: int, second: int) -> "LowRankSum | Tensor":
        n = self.weight.ndim
        if {first % n, second % n} != {n - 2, n - 1}:
            return self.dense().transpose(first, second)
        return LowRankSum(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> "LowRankSum":
        return self.transpose(-2, -1)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, cls)]
        if name in _PRODUCTS and len(operands) == 1 and any(value is operands[0] for value in args[:2]):
            return _multiply(function, name, args, kwargs)
        args = [value.dense() if isinstance(value, cls) else value for value in args]
        return function(*args, **{key: v.dense() if isinstance(v, cls) else v for key, v in kwargs.items()})


_SHARED = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "data_ptr", "is_cuda")
_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "grouped_mm", "_grouped_mm")


def _multiply(function, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return a product with W plus that with the factors."""
    first, second, *rest = args
    if isinstance(first, LowRankSum):
        low = function(first.right, second, **kwargs)
        return function(first.weight, second, *rest, **kwargs) + function(first.left, low, **kwargs)
    left, right = second.left, second.right
    full = function(first, second.weight, *rest, **kwargs)
    if name == "linear":
        return full + F.linear(F.linear(first, right), left)
    if "grouped" in name and (padding := -left.shape[-1] % 8):  # the kernel reads 16 bytes at a time
        left, right = F.pad(left, (0, padding)), F.pad(right, (0, 0, 0, padding))
    return full + function(function(first, left, *rest, **kwargs), right, *rest, **kwargs)


# ----------------------------------------------------------------------------------------------------- quantization


def pack_experts(module: nn.Module, name: str, bits: str, dtype: torch.dtype, device: torch.device) -> None:
    """Pack a parameter of a module, which then computes with it in `dtype`."""
    _wrap(module)
    module.packed[name] = dtype
    if device.type == "meta":
        pack_on_meta(module, name, bits)
    else:
        module._parameters[name] = pack(module._parameters[name], bits, device)


def unpack_experts(module: nn.Module) -> None:
    """Replace the packed parameters of a module with ordinary ones in float32."""
    for name in module.packed:
        weight = unpack(module._parameters[name], module.shapes[name]).float()
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    module.packed.clear()
    if not module.lora_parameters:
        _unwrap(module)


# ----------------------------------------------------------------------------------------------------- forward pass


class _Wrapped:
    """Mixin of modules with adapted or packed parameters.

    Attributes:
        shapes: Shapes of all parameters before they were packed.
        lora_parameters: LoRA settings of the adapted ones, in the module's order.
        packed: Dtype of the computation of the packed ones.
        recomputed: The block of the module is recomputed in the backward pass.
    """

    def forward(self, *args, **kwargs):
        # Products keep their weight for the backward pass. Running the pass again frees it, and unpacks it once.
        if self.packed and torch.is_grad_enabled() and not self.recomputed:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._replacing, super().forward, *args, **again, **kwargs)
        return self._replacing(super().forward, *args, **kwargs)

    def _replacing(self, forward, *args, **kwargs):
        """Run a forward pass in which attributes of the module hide the parameters of the same name."""
        self.__dict__.update({name: self._effective(name) for name in self.packed | self.lora_parameters})
        try:
            return forward(*args, **kwargs)
        finally:
            for name in self.packed | self.lora_parameters:
                del self.__dict__[name]

    def _effective(self, name: str) -> "Tensor | LowRankSum":
        weight = self._parameters.get(name)
        if weight is None:
            weight = unpack_on_meta(self, name, self.shapes[name], self.packed[name])
        elif name in self.packed:
            weight = unpack(weight, self.shapes[name]).to(self.packed[name])
        if name not in self.lora_parameters:
            return weight
        factors = _factors(self, name, self.lora_parameters[name], weight.dtype)
        total = LowRankSum(weight, *factors)
        return total.dense() if torch.compiler.is_compiling() else total


@functools.cache
def _wrapped(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoRA{kind.__name__}", (_Wrapped, kind), {})


def mark_recomputed(block: nn.Module) -> None:
    """Note that a block is recomputed in the backward pass, so that its experts need not be."""
    for module in filter(is_wrapped, block.modules()):
        module.recomputed = True


def is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, _Wrapped)


def _wrap(module: nn.Module) -> None:
    if not is_wrapped(module):
        module.shapes = _shapes(module)
        module.lora_parameters, module.packed, module.recomputed = {}, {}, False
        module.__class__ = _wrapped(type(module))


def _unwrap(module: nn.Module) -> None:
    for name in ("shapes", "lora_parameters", "packed", "recomputed"):
        delattr(module, name)
    module.__class__ = type(module).__mro__[2]
