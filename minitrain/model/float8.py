"""Compute the matrix products of linear layers in FP8 with torchao (the extra `torchao`).

Weights, gradients and the optimizer keep their dtypes, and saved models are the same. Untried on a GPU.
"""

import dataclasses
import logging

from torch import nn

from minitrain.errors import ConfigError

from . import experts
from .decoder import find_blocks

MULTIPLE = 16  # of the sizes of a matrix, for the FP8 products of CUDA


def use_float8(model: nn.Module, recipe: str, emulate: bool = False) -> int:
    """Let the trained linear layers of a model's blocks compute in FP8, and return their number.

    The head, routers, frozen layers and layers with an adapter stay as they are: torchao would compute gradients of
    frozen weights. Call it after the checks of a model, which compare outputs more closely than FP8 rounds.

    Args:
        model: The transformers model, also sharded.
        recipe: `tensorwise` or `rowwise`, the scales of torchao.
        emulate: Round to FP8, but compute in float32, which any device can.

    Raises:
        ConfigError: No layer has suitable sizes.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns if its kernels do not fit the version of torch
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=emulate, pad_inner_dim=True)  # batch rows have any length
    layers = _suitable_layers(model)
    if not layers:
        raise ConfigError(
            f"model.float8: {type(model).__name__} has no trained linear layer in its blocks whose sizes are multiples "
            f"of {MULTIPLE}. Remove it.",
            "unsupported-model",
        )
    for layer in layers:
        (converted,) = convert_to_float8_training(nn.Sequential(layer), config=config)
        vars(layer).update(vars(converted) | vars(layer))  # in place, because a sharding wrapper knows the layer
        layer.__class__ = type(converted)
    return len(layers)


def _suitable_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the trained linear layers of the blocks, except those beside experts, which choose them."""
    beside = {name.rpartition(".")[0].rpartition(".")[0] for name in experts.find_experts(model)}
    routers = {id(child) for name in beside for child in model.get_submodule(name).children()}
    return [
        layer
        for block in find_blocks(model)
        for layer in block.modules()
        if type(layer) is nn.Linear and layer.weight.requires_grad and id(layer) not in routers
        if layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    ]
