"""How a run computes: its dtype, attention, compilation and recomputation, and what it leaves unused on a GPU."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from minitrain.config.schema import Config

if TYPE_CHECKING:
    from minitrain.model.policy import Policy


def with_dtype(config: Config, device: torch.device) -> Config:
    """Return the config with the dtype that `policy_dtype=auto` means on a device."""
    if config.model.policy_dtype != "auto":
        return config
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if is_native else "float32"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, policy_dtype=dtype))


def describe_compute(config: Config, policy: "Policy") -> str:
    """Return the dtype, the attention and what else decides speed and memory, in words."""
    attention = policy.model.config._attn_implementation
    compiled = "compiled" if config.compile else "not compiled"
    recomputed = f"activation_checkpointing {config.activation_checkpointing}"
    return f"{config.model.policy_dtype}, attention {attention}, blocks {compiled}, {recomputed}"


def speed_hints(config: Config, device: torch.device) -> list[str]:
    """Return the options that would make a run on a GPU faster, in words."""
    if device.type != "cuda":
        return []
    hints = []
    if config.model.policy_dtype == "float32" and torch.get_float32_matmul_precision() == "highest":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float16"
        precise = ", or torch.set_float32_matmul_precision('high') in Python" if has_bfloat16 else ""
        hints.append(f"model.policy_dtype={dtype}{precise}")
    if not config.compile:
        hints.append("compile=true")
    if not config.packing:
        hints.append("packing=true")
    return hints
