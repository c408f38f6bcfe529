"""What a model does between its last hidden states and its logits, measured on the model itself.

The options of a config do not tell: `logits_scaling` divides in Granite and multiplies in HyperCLOVA.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .decoder import decoder_of

SMALL, LARGE = 2.0**-10, 2.0**40  # products of the head: a softcap leaves one as it is and bounds the other


class OutputForm(NamedTuple):
    """logits = softcap * tanh(z / softcap), z = scale * head(layers(hidden)), for the first n tokens.

    Attributes:
        scale: Factor of the logits.
        softcap: Bound of the logits.
        n_tokens: Number of logits; fewer than the head has in models that pad their vocabulary.
        layers: Modules between the decoder and the head.
    """

    scale: float = 1.0
    softcap: float | None = None
    n_tokens: int | None = None
    layers: tuple[nn.Module, ...] = ()


class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """The output of a decoder of any kind; fields that it lacks are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def measure_output(model: nn.Module) -> OutputForm:
    """Run a model with a decoder of ones and a head of known products. Its weights are not used.

    The model can be on the meta device. If it does not run, its form is not known, and the load check will tell.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    ones = torch.ones(1, 1, head.weight.shape[-1], dtype=torch.float64, device="cpu")  # [1, 1, H]
    products = torch.full((len(head.weight),), LARGE, dtype=torch.float64, device="cpu")
    products[0] = SMALL
    between, called = _modules_between(model, decoder, head), []

    def identity(module: nn.Module) -> Callable:
        return lambda states, *_, **__: called.append(module) or states

    with contextlib.ExitStack() as stack:
        stack.enter_context(_calling(decoder, lambda *_, **__: _Output(last_hidden_state=ones)))
        stack.enter_context(_calling(head, lambda states, *_, **__: states[..., :1].double().cpu() * products))
        for module in between:
            stack.enter_context(_calling(module, identity(module)))
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0, 0].double()  # [V]
        except Exception:  # an architecture that is called differently
            return OutputForm()
    scale, largest = float(logits[0]) / SMALL, float(logits[1])
    n_tokens = None if len(logits) == len(products) else len(logits)
    if abs(scale - 1.0) < 1e-6:
        scale = 1.0  # a tanh in float32 rounds it
    softcap = largest if largest < LARGE * scale / 2 else None
    return OutputForm(scale, softcap, n_tokens, tuple(called))


def _modules_between(model: nn.Module, decoder: nn.Module, head: nn.Module) -> list[nn.Module]:
    """Return the children of a model with parameters, but without its decoder and its head."""
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    return [child for child in children if not {decoder, head} & set(child.modules())]


@contextlib.contextmanager
def _calling(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within the context, calls of a module call a function instead."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
