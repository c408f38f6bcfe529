"""What comes before the first step: the data read, a loaded policy made ready and tried out, the loader that fits it.

Training, `validate` and `inspect` all go through here, so that they refuse the same things.
"""

import contextlib

import numpy as np
import torch

from minitrain.config.schema import Config
from minitrain.data.loader import Data, MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.template import Template, make_template
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import ConfigError
from minitrain.losses import Loss, add_features
from minitrain.model.load import load_tokenizer
from minitrain.model.policy import Policy, check_policy, checkpoint_activations, find_blocks
from minitrain.model.weights import Weights

from .step import Precision


def read_data(config: Config, loss: Loss) -> tuple[Template, Data]:
    """Return the template over the tokenizer, and the data, which the loss has seen.

    Raises ConfigError or DataError.
    """
    tokenizer = load_tokenizer(config.model, scores=loss.head_labels is not None)
    template = make_template(tokenizer, config, loss.example_type)
    data = load_data(config, template, loss.example_type)
    add_features(loss, data.train.caches, data.eval.caches if data.eval else [])
    return template, data


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
    if config.activation_checkpointing:
        checkpoint_activations(policy.model)
    if config.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    policy = parallel.wrap(policy, blocks, precision.dtype)
    if weights is not None:
        parallel.load_shards(policy, lambda name, *rows: weights.rows(name.removeprefix("model."), *rows))
    # A sharded policy and frozen blocks compute in policy_dtype, and autocast goes with it; else float32 is more exact.
    with precision.autocast() if parallel.loads_shards or config.freeze_layers else contextlib.nullcontext():
        check_policy(policy, config.packing, parallel.device, lambda: parallel.unsharded(policy))
    return policy.train(dropout)


def make_loader(
    examples: TokenizedDataset, config: Config, tokenizer, policy: Policy, rank: int = 0, world_size: int = 1
) -> MicrobatchLoader:
    """The loader of one rank, with rows as the policy's attention likes them.

    Raises ConfigError for an example that is longer than the policy can read.
    """
    check_lengths(examples, policy)
    return MicrobatchLoader(
        examples,
        config,
        tokenizer.pad_token_id,
        rank,
        world_size,
        row_capacity=config.max_length if policy.attention_is_quadratic_in_row else None,
        shares_prompts=policy.supports_document_masking,
    )


def check_lengths(examples: TokenizedDataset, policy: Policy) -> None:
    """Raise ConfigError for an example that is longer than a policy, or a teacher, reads alike in every batch."""
    lengths = examples.of_documents(lambda cache: np.diff(cache.offsets)).max(1)  # [E]
    longest, name = int(lengths.argmax()), type(policy.model).__name__
    limits = (
        (policy.position_limit, f"{name} has positions for"),
        (policy.rotary_limit, f"the rotary frequencies of {name} (rope_type) depend on the whole batch beyond"),
    )
    for limit, reason in limits:
        if lengths[longest] > limit:
            too_long = f"{examples.where(longest)} has {lengths[longest]} tokens, and {reason} {limit}"
            raise ConfigError(f"max_length: {too_long}. Set max_length={limit}.", "too-large")
