"""The FLOPs of training on a batch, and the peak of known GPUs, for the utilization in the log line (MFU).

Counted are the products that a step cannot do without: those of the blocks for each token, those of the LM head for
each target, and attention for each token and the tokens of its document before it. A product that is computed again, as
by activation checkpointing, counts once; the forward passes of a reference or a teacher do not count.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitrain.batch import Batch

from .experts import find_experts

# Dense bfloat16 products, in TFLOP/s; the first name in that of the device counts.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A10": 125,
    "RTX A6000": 155,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}
ELSEWHERE = re.compile(r"\bMIG\b|\bLaptop\b|4090 D\b|5090 D\b")  # parts and variants of a card, with another peak


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s of bfloat16 products that a GPU can do; None for a CPU and a GPU that is not in the table."""
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak FLOP/s of a GPU by the name that its driver gives it, or None."""
    known = [peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)]
    return 1e12 * known[0] if known and not ELSEWHERE.search(name) else None


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the forward and backward pass of a model.

    Attributes:
        token: Of a token in the blocks.
        target: Of a target in the LM head.
        pair: Of a token and one that it attends to, in one layer.
        windows: Number of layers with attention by the tokens that it reaches back; infinite for full attention.
    """

    token: float
    target: float
    pair: float
    windows: dict[float, int]

    def of(self, batch: Batch) -> float:
        """Return the FLOPs of training on a batch, without waiting for its device."""
        lengths = (batch.spans[:, 2] - batch.spans[:, 1]).double()  # [D]
        before = 0 * lengths if batch.prefixes is None else (batch.prefixes[:, 1] - batch.prefixes[:, 0]).double()
        pairs = sum(
            n_layers * float((_pairs(before + lengths, window) - _pairs(before, window)).sum())
            for window, n_layers in self.windows.items()
        )
        return self.token * float(lengths.sum()) + self.target * batch.n_targets + self.pair * pairs


def _pairs(lengths: Tensor, window: float) -> Tensor:
    """Return the number of pairs of a token and one before it, at most `window` back, of documents [D]."""
    near = lengths.clamp(max=window)
    return near * near / 2 + (lengths - near) * near


def count_flops(model: nn.Module, sizes: dict[str, int]) -> ModelFlops | None:
    """Count the FLOPs of a model with its adapter and frozen layers; None if its config does not tell those of a layer.

    An expert counts by the fraction of tokens that it computes on average.

    A trained matrix takes 6 FLOPs for each weight and token: 2 forward, and 2 each for the gradients of its input and
    of itself. A frozen one takes 4, or 2 if nothing before it is trained.

    Args:
        model: The model.
        sizes: Its `matrix_sizes` before it was quantized and adapted.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    excluded = {id(p) for m in (head, *_embeddings(model)) if m is not None for p in m.parameters()}
    chosen = getattr(config, "num_experts_per_tok", None)
    active = {name: min(1.0, chosen / n) if chosen else 1.0 for name, (n, _, _) in find_experts(model).items()}
    token, reached = 0.0, False
    for name, parameter in model.named_parameters():
        reached |= parameter.requires_grad
        is_matrix = name in sizes or (parameter.requires_grad and parameter.dim() > 1)
        if is_matrix and id(parameter) not in excluded:
            cost = 6 if parameter.requires_grad else 4 if reached else 2
            owner = next((share for stack, share in active.items() if name.startswith(stack)), 1.0)
            token += cost * owner * sizes.get(name, parameter.numel())
    weight = None if head is None else head.weight
    target = 0.0 if weight is None else (6.0 if weight.requires_grad else 4.0) * weight.numel()
    try:
        return ModelFlops(token, target, _pair_flops(config), _windows(config))
    except (AttributeError, RuntimeError):  # layers of several sizes, as in Gemma 4, or other names
        return None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _pair_flops(config) -> float:
    """Return the FLOPs of a query and a key in all heads: twice as many backward as forward."""
    n_heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // n_heads if n_heads else 0)
    of_keys, of_values = (getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    return 3.0 * 2 * n_heads * (of_keys + of_values)


def _windows(config) -> dict[float, int]:
    """Return the number of layers with attention for each window; layers of other kinds are left out."""
    full = float("inf")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reach = dict.fromkeys(("full_attention", "hybrid"), full)
    reach |= dict.fromkeys(("sliding_attention", "hybrid_sliding"), window or full)
    reach["chunked_attention"] = getattr(config, "attention_chunk_size", None) or full
    kinds = getattr(config, "layer_types", None)
    layers = [window or full] * config.num_hidden_layers if kinds is None else [reach[k] for k in kinds if k in reach]
    return dict(Counter(map(float, layers)))
