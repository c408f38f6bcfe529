"""A loaded policy made ready to train: frozen, recomputing, compiled, sharded, given its weights, and tried out.

And the loader whose batches fit it.
"""

import contextlib

import torch

from .data.loader import Examples, Loader
from .engine.parallel import SingleDevice
from .engine.precision import Precision
from .model.load import freeze_layers
from .model.policy import Policy, check_policy, checkpoint_activations, find_blocks
from .model.weights import Weights
from .schema import Config


def prepare_policy(
    policy: Policy,
    weights: Weights | None,
    config: Config,
    parallel: SingleDevice,
    precision: Precision,
    dropout: bool = True,
) -> Policy:
    """The policy on its devices. `weights` gives the rows of one that was built empty. Raises ConfigError.

    `dropout`: whether it is on in training.
    """
    blocks = find_blocks(policy.model.base_model)
    freeze_layers(policy.model, config.freeze_layers, precision.dtype)
    if config.activation_checkpointing:
        checkpoint_activations(policy.model)
    if config.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    policy = parallel.wrap(policy, blocks, precision.dtype)
    if weights is not None:
        parallel.fill(policy, lambda name, *rows: weights.rows(name.removeprefix("model."), *rows))
    # A sharded policy and frozen blocks compute in policy_dtype, and autocast goes with it; else float32 is more exact.
    with precision.autocast() if parallel.reads_rows or config.freeze_layers else contextlib.nullcontext():
        check_policy(policy, config.packing, parallel.device, lambda: parallel.gathered(policy))
    return policy.train(dropout)


def make_loader(
    examples: Examples, config: Config, tokenizer, policy: Policy, rank: int = 0, world_size: int = 1
) -> Loader:
    """The loader of one rank, with rows as the policy's attention likes them."""
    return Loader(
        examples,
        config,
        tokenizer.pad_token_id,
        rank,
        world_size,
        row_capacity=config.max_length if policy.pays_for_long_rows else None,
        shares_prompts=policy.keeps_documents_apart,
    )
