"""What comes before the first step: the data, the policy and the loaders that fit it.

Training, `validate` and `inspect` all go through `prepare`, so that they refuse the same things.
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from minitrain.config.schema import Config
from minitrain.data.loader import Data, MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.template import Template, make_template
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import ConfigError
from minitrain.losses import Loss, add_features, create_loss
from minitrain.model.load import CPU, META, build_policy, load_tokenizer
from minitrain.model.policy import Policy, check_policy, checkpoint_activations, find_blocks
from minitrain.model.save import check_saving, set_end_tokens
from minitrain.model.weights import Weights

from .failpoints import failpoint
from .optim import warmup_steps
from .step import Precision


@dataclass
class Preparation:
    """The data and the policy of a training.

    Attributes:
        config: The full config.
        loss: The loss.
        template: The chat template with its tokenizer.
        data: The tokenized training and evaluation data.
        policy: The policy, not on its devices yet.
        weights: What fills parameters that are on the meta device.
        train_loader: The batches of this rank.
        eval_loader: Those of the evaluation, if there is one.
        warmup: Steps in which the learning rate rises.
    """

    config: Config
    loss: Loss
    template: Template
    data: Data
    policy: Policy
    weights: Weights | None
    train_loader: MicrobatchLoader
    eval_loader: MicrobatchLoader | None
    warmup: int

    @property
    def loaders(self) -> list[MicrobatchLoader]:
        return [self.train_loader] if self.eval_loader is None else [self.train_loader, self.eval_loader]

    def meta_policy(self, packing: bool | None = None, quantized: bool = False) -> Policy:
        """Return another policy on the meta device.

        Args:
            packing: As the option; the config's by default.
            quantized: Quantized layers have the size that they have in training.
        """
        config = self.config if packing is None else dataclasses.replace(self.config, packing=packing)
        return _build_policy(config, self.loss, self.template.tokenizer, META, quantized=quantized)[0]


def prepare(config: Config, loss: Loss, parallel: SingleDevice, meta: bool = False) -> Preparation:
    """Read the data, build the policy, and check all that can be checked without its weights.

    Args:
        config: The full config.
        loss: The loss.
        parallel: The ranks. The first one of each machine tokenizes and downloads.
        meta: Read no weights; the policy is on the meta device, and none of its layers are quantized.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    device = META if meta else parallel.device
    with parallel.local_rank0_first():
        template, data = read_data(config, loss)
        policy, weights = _build_policy(config, loss, template.tokenizer, device, parallel.loads_shards, not meta)
        failpoint("load.policy")
    rest = config, template.tokenizer, policy, parallel.rank, parallel.world_size
    train_loader = make_loader(data.train, *rest)
    eval_loader = make_loader(data.eval, *rest) if data.eval else None
    warmup = warmup_steps(config, train_loader.total_steps)
    set_end_tokens(policy.model, template.end_ids())
    check_saving(policy.model, template.tokenizer)
    return Preparation(config, loss, template, data, policy, weights, train_loader, eval_loader, warmup)


def dry_run(config: Config) -> Preparation:
    """Prepare a training on one device without its weights: only the model's config is read."""
    return prepare(config, create_loss(**config.loss), SingleDevice(CPU), meta=True)


def _build_policy(
    config: Config, loss: Loss, tokenizer, device: torch.device, sharded: bool = False, quantized: bool = True
) -> tuple[Policy, Weights | None]:
    if not quantized:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))
    return build_policy(config, tokenizer, device, sharded, loss.head_labels, "values" in loss.requires)


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
    # A sharded policy computes in policy_dtype, and layers of several dtypes need autocast; else float32 is more exact.
    is_mixed = parallel.loads_shards or len({parameter.dtype for parameter in policy.parameters()}) > 1
    with precision.autocast() if is_mixed else contextlib.nullcontext():
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
    lengths = examples.per_example(lambda cache: np.diff(cache.offsets), np.maximum)  # [E]
    longest, name = int(lengths.argmax()), type(policy.model).__name__
    limits = (
        (policy.position_limit, f"{name} has positions for"),
        (policy.rotary_limit, f"the rotary frequencies of {name} (rope_type) depend on the whole batch beyond"),
    )
    for limit, reason in limits:
        if lengths[longest] > limit:
            too_long = f"{examples.where(longest)} has {lengths[longest]} tokens, and {reason} {limit}"
            raise ConfigError(f"max_length: {too_long}. Set max_length={limit}.", "too-large")
