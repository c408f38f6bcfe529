"""The weights of a model with its adapter merged, one tensor at a time, while the model stays as it is."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from . import experts, lora, token_rows
from .packed import is_quantized
from .quantize import dequantized
from .vocabulary import embedding_layers
from .weights import state_tensors


def adapts_embeddings(model: nn.Module) -> bool:
    """Return whether an adapter changes embeddings or LM head. Merged, they differ even if the base model ties them."""
    adapter, layers = getattr(model, "adapter", None), embedding_layers(model).keys()
    return adapter is not None and bool((adapter.layers.keys() | set(adapter.modules_to_save)) & layers)


def merged_tensors(model: nn.Module, full_tensor: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the unsharded value of each tensor of a model as if its adapter were merged, tied ones once.

    Args:
        model: The transformers model.
        full_tensor: Returns the unsharded value of a tensor.
    """
    for name in state_tensors(model):
        path, _, last = name.rpartition(".")
        if last not in lora.MATRICES and not experts.is_matrix_name(last):
            module = model.get_submodule(path)
            with _unsharded(module, full_tensor):
                tensor = _merged(module, last)
            yield name, tensor


def _merged(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a module with its LoRA and trained rows."""
    if experts.is_wrapped(module):
        return experts.merged_parameter(module, name)
    if name != "weight":
        return getattr(module, name).detach()
    weight = token_rows.put_rows(module, dequantized(module).detach())
    return lora.merged_weight(module, weight) if hasattr(module, "lora") else weight.detach()


@contextlib.contextmanager
def _unsharded(module: nn.Module, full_tensor: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give a module the unsharded values of its own parameters inside the context."""
    own = dict(module._parameters)
    plain = {name: p for name, p in own.items() if p is not None and not is_quantized(p)}
    module._parameters.update({name: full_tensor(p.detach()) for name, p in plain.items()})
    try:
        yield
    finally:
        module._parameters.update(own)
