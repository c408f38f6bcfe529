"""The router of a mixture of experts: the load of the experts, and the auxiliary loss that balances it.

The auxiliary loss is that of transformers on all tokens of an optimizer step: ``E * sum over e of f_e * P_e``. f_e is
the mean number of times that a token chooses expert e, and P_e the mean of its router probability, over all layers,
micro-batches and ranks. f has no gradient, so P of a micro-batch needs f of the full step.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitrain.batch import Batch, to_device
from minitrain.errors import ConfigError

FUNCTION = "load_balancing_loss_func"  # of transformers, in the module of each model that has this loss
OPTION = "model.router_aux_loss_coef"


class AuxLoss(NamedTuple):
    """The auxiliary loss of a model.

    Attributes:
        coef: What it is multiplied by.
        n_experts: E.
        top_k: Number of experts that a token chooses.
        from_config: Whether the config of the model sets it, not an option of the run.
    """

    coef: float
    n_experts: int
    top_k: int
    from_config: bool = False


@dataclass
class RouterRecord:
    """What the router did in the forward passes of a micro-batch; a token counts once in each layer.

    Attributes:
        load: Tokens that each expert computed, int64, shape [L, E]; None if no layer's choices were seen.
        choices: Tokens that chose each expert by its router probability, int64, shape [E].
        probs: Sums of router probabilities, float32, shape [E], with gradients.
        n_tokens: Number of tokens, int64, shape [].
        only_choices: Record only `choices` and `n_tokens`, also without gradients.
    """

    load: Tensor | None = None
    choices: Tensor | None = None
    probs: Tensor | None = None
    n_tokens: Tensor | None = None
    only_choices: bool = False


class Routing:
    """Records the routing of a policy inside `recording`."""

    def __init__(self, experts: Sequence[nn.Module], aux_loss: AuxLoss | None):
        self.n_layers, self.n_experts = len(experts), max(map(_n_experts, experts), default=0)
        self.aux_loss = aux_loss
        self.record: RouterRecord | None = None
        self.tokens: Tensor | None = None  # [R * T] how often each position counts, during a forward pass
        for layer, module in enumerate(experts):
            module.register_forward_pre_hook(functools.partial(self._count_load, layer), with_kwargs=True)

    @contextlib.contextmanager
    def recording(self, only_choices: bool = False) -> Iterator[RouterRecord]:
        """Record the forward passes inside the context, except those without gradients, as of a reference."""
        self.record = RouterRecord(only_choices=only_choices)
        try:
            yield self.record
        finally:
            self.record = None

    def through(self, decoder: nn.Module, batch: Batch, n_before: int) -> Callable:
        """Return a function that calls the decoder with a batch and records it; the decoder if nothing is recorded.

        Args:
            n_before: Number of positions before each batch row, as of a soft prompt.
        """
        is_recorded = self.record is not None and (torch.is_grad_enabled() or self.record.only_choices)
        return functools.partial(self._call, decoder, batch, n_before) if is_recorded else decoder

    def _call(self, decoder: nn.Module, batch: Batch, n_before: int, **inputs):
        tokens = _count_tokens(batch, n_before).flatten()  # [R * T]
        self.tokens = None if self.record.only_choices else tokens
        options = {} if self.aux_loss is None else {"output_router_logits": True}
        try:
            outputs = decoder(**inputs, **options)
        finally:
            self.tokens = None
        if self.aux_loss is not None:
            self._add(outputs.router_logits, tokens)
        return outputs

    def _add(self, router_logits: Sequence[Tensor], tokens: Tensor) -> None:
        """Add the router logits of the layers, each [R * T, E], to the record."""
        record, aux = self.record, self.aux_loss
        if record.n_tokens is None:
            record.n_tokens = tokens.new_zeros(())
            record.choices, record.probs = tokens.new_zeros(aux.n_experts), tokens.new_zeros(aux.n_experts).float()
        with torch.autocast(tokens.device.type, enabled=False):
            for logits in router_logits:
                probs = logits.reshape(-1, aux.n_experts).float().softmax(-1)  # [R * T, E]
                record.choices += _count(probs.topk(aux.top_k).indices, tokens, aux.n_experts)
                record.probs = record.probs + tokens.float() @ probs
                record.n_tokens += tokens.sum()

    def _count_load(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.tokens is None:  # not recorded, or a block is recomputed in the backward pass
            return
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        chosen = next((each for each in inputs if not each.is_floating_point()), None)  # [R * T, k]
        if chosen is not None and len(chosen) == len(self.tokens):
            if self.record.load is None:
                self.record.load = self.tokens.new_zeros(self.n_layers, self.n_experts)
            self.record.load[layer] += _count(chosen, self.tokens, self.n_experts)


def _count_tokens(batch: Batch, n_before: int) -> Tensor:
    """Return how often each position counts: 0 in padding, and once for each document that has it, shape [R, T]."""
    counts = (batch.doc_ids >= 0).long()  # [R, T]
    if batch.prefixes is not None:
        (rows, _, _), (start, stop) = batch.spans.T, batch.prefixes.T
        edges = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.long)  # [R, T + 1]
        one = torch.ones_like(rows)
        edges = edges.index_put((rows, start), one, accumulate=True).index_put((rows, stop), -one, accumulate=True)
        counts = counts + to_device(edges.cumsum(1)[:, :-1], counts.device)
    before = (counts.amax(1, keepdim=True) > 0).long().expand(-1, n_before)  # [R, n] not of an empty row
    return torch.cat([before, counts], 1)


@torch.no_grad()
def _count(chosen: Tensor, tokens: Tensor, n_experts: int) -> Tensor:
    """Return the number of tokens with each expert among their choices [n, k], shape [E]; ids from E on are none."""
    counts = tokens.new_zeros(n_experts + 1)
    index = chosen.long().clamp(max=n_experts).flatten()
    return counts.index_add_(0, index, tokens.repeat_interleave(chosen.shape[-1]))[:-1]


# ------------------------------------------------------------------------------------------------- the model's own loss


def make_routing(model: nn.Module, coef: float | None) -> Routing | None:
    """Return the routing of a model; None if it has no experts.

    Args:
        model: The transformers model.
        coef: `model.router_aux_loss_coef`. None is what the config of the model says.

    Raises:
        ConfigError: An auxiliary loss is set, and the model has none that can be computed over a step.
    """
    experts = [module for module in model.modules() if _receives_choices(type(module)) and _n_experts(module)]
    aux_loss = _aux_loss(model, coef)
    return Routing(experts, aux_loss) if experts or aux_loss else None


@functools.cache
def _receives_choices(module: type[nn.Module]) -> bool:
    """Return whether modules of a class are the experts of a layer, which receive the choices of the router."""
    return bool({"top_k_index", "router_indices"} & set(inspect.signature(module.forward).parameters))


def _n_experts(experts: nn.Module) -> int:
    """Return the number of experts in a module; with LongCat's experts that compute nothing."""
    return getattr(experts, "num_experts", None) or getattr(experts, "total_experts", 0)


def describe_aux_loss(routing: Routing | None) -> str:
    """Return what auxiliary loss is added, and who says so; "" without one."""
    if routing is None or routing.aux_loss is None:
        return ""
    reason = "the model's config, output_router_logits" if routing.aux_loss.from_config else OPTION
    return f"auxiliary loss times {routing.aux_loss.coef:g} ({reason})"


def _aux_loss(model: nn.Module, coef: float | None) -> AuxLoss | None:
    name, shape = type(model).__name__, model.config.get_text_config()
    has_own = FUNCTION in inspect.unwrap(type(model).forward).__code__.co_names
    from_config = coef is None
    if from_config:
        coefs = [
            getattr(each, key, None) for each in (model, shape) for key in ("router_aux_loss_coef", "aux_loss_coef")
        ]
        is_on = has_own and any(getattr(each, "output_router_logits", False) for each in (model.config, shape))
        coef = next((each for each in coefs if each is not None), 0.0) if is_on else 0.0
    if not coef:
        return None
    if not has_own:
        reason = f"transformers has no auxiliary loss for {name}, which has other balancing or no experts. Remove it."
        raise ConfigError(f"{OPTION}: {reason}", "unsupported-model")
    n_experts, top_k = (
        getattr(model, key, None) or getattr(shape, key, None) for key in ("num_experts", "num_experts_per_tok")
    )
    if not _is_usual(getattr(sys.modules[type(model).__module__], FUNCTION), n_experts, top_k):
        raise ConfigError(
            f"{OPTION}: {name} computes its auxiliary loss in another way, which is not supported. Set it to 0.",
            "unsupported-model",
        )
    return AuxLoss(coef, n_experts, top_k, from_config)


def _is_usual(function: Callable, n_experts: int | None, top_k: int | None) -> bool:
    """Return whether a model's function computes the loss of this module, tried on some logits."""
    generator = torch.Generator().manual_seed(0)
    try:
        logits = torch.randn(2, 12, n_experts, generator=generator)  # [L, R * T, E]
        mask = torch.ones(3, 4).index_fill(1, torch.tensor([3]), 0)  # [R, T]
        theirs = float(function(tuple(logits), n_experts, top_k, mask))
    except (TypeError, RuntimeError, ValueError):
        return False
    probs = logits.softmax(-1)[:, mask.flatten().bool()].flatten(0, 1)  # [n, E]
    choices = torch.bincount(probs.topk(top_k).indices.flatten(), minlength=n_experts)
    return abs(theirs - float(n_experts * (choices / len(probs)) @ probs.mean(0))) < 1e-4
