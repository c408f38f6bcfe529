"""Prepare a training: read the data, and build the policy and the loaders.

Training, `validate` and `inspect` all call `prepare`, so they report the same errors.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minitrain.config.schema import Config
from minitrain.data.loader import Data, MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.template import Template, make_template
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.errors import ConfigError
from minitrain.losses import Loss, add_features, create_loss
from minitrain.model.compiled import compile_blocks
from minitrain.model.decoder import find_blocks
from minitrain.model.diagnostics import log_warning
from minitrain.model.float8 import use_float8
from minitrain.model.load import CPU, META, build_policy, load_tokenizer
from minitrain.model.load_check import check_autocast, check_policy
from minitrain.model.offload import HostCopies
from minitrain.model.policy import GROUPS_NOTE, Policy
from minitrain.model.recompute import checkpoint_activations
from minitrain.model.save import check_saving, set_end_tokens
from minitrain.model.sequence_head import set_problem_type
from minitrain.model.weights import Weights

from .failpoints import failpoint
from .learning_rate import lr_warnings, with_defaults
from .optim import warmup_steps
from .step import Precision


@dataclass
class Preparation:
    """The data and the policy of a run.

    Attributes:
        config: The full config.
        loss: The loss.
        template: The chat template with its tokenizer.
        data: The tokenized training and evaluation data.
        policy: The policy, before it is moved to its devices.
        weights: The weights of parameters that are on the meta device.
        train_loader: The batches of this rank.
        eval_loader: The evaluation batches of this rank; None without evaluation data.
        retention_loader: The batches of `retention_datasets`; None without any.
        warmup: Number of warmup steps.
    """

    config: Config
    loss: Loss
    template: Template
    data: Data
    policy: Policy
    weights: Weights | None
    train_loader: MicrobatchLoader
    eval_loader: MicrobatchLoader | None
    retention_loader: MicrobatchLoader | None
    warmup: int

    @property
    def loaders(self) -> list[MicrobatchLoader]:
        return [self.train_loader] if self.eval_loader is None else [self.train_loader, self.eval_loader]

    @property
    def packing_note(self) -> str:
        """Return what is computed more than once, or in groups, in packed rows; "" if nothing is."""
        policy = self.policy
        if policy.groups_documents:
            return GROUPS_NOTE
        has_shared = any(cache.shared.any() for cache in self.data.train.caches)
        if not (self.config.packing and has_shared) or policy.supports_document_masking:
            return ""
        implementation = policy.model.config._attn_implementation
        return f"each document computes its shared prompt again, because attention is {implementation}, not sdpa"

    def meta_policy(self, packing: bool | None = None, quantized: bool = False) -> Policy:
        """Return another policy on the meta device.

        Args:
            packing: As the option (default: that of the config).
            quantized: Give quantized layers the size that they have in training.
        """
        config = self.config if packing is None else dataclasses.replace(self.config, packing=packing)
        return _build_policy(config, self.loss, self.template.tokenizer, META, quantized=quantized)[0]


def prepare(config: Config, loss: Loss, parallel: SingleDevice, meta: bool = False) -> Preparation:
    """Read the data, build the policy, and check everything that does not need its weights.

    Args:
        config: The full config.
        loss: The loss.
        parallel: The ranks. Local rank 0 of each machine tokenizes and downloads.
        meta: Build the policy on the meta device, without weights or quantized layers.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    loss.set_online(config)
    device = META if meta else parallel.device
    with parallel.local_rank0_first():
        template, data = read_data(config, loss)
        policy, weights = _build_policy(config, loss, template.tokenizer, device, parallel.loads_shards, not meta)
        failpoint("load.policy")
    rest = config, template.tokenizer, policy, parallel.rank, parallel.world_size, parallel.device.type == "cuda"
    train_loader = make_loader(data.train, *rest)
    eval_loader, retention_loader = (make_loader(part, *rest) if part else None for part in (data.eval, data.retention))
    if not loss.online and (too_long := train_loader.describe_too_long()):
        data.warnings.append(too_long)
    data.warnings += lr_warnings(config, policy, loss)
    warmup = warmup_steps(config, train_loader.total_steps)
    set_end_tokens(policy.model, template.end_ids())
    check_saving(policy.model, template.tokenizer)
    loaders = train_loader, eval_loader, retention_loader
    return Preparation(config, loss, template, data, policy, weights, *loaders, warmup)


def dry_run(config: Config) -> Preparation:
    """Prepare a run on one device, without reading the model's weights."""
    loss = create_loss(**config.loss)
    config = with_defaults(config, pick_device(config.device), loss)
    return prepare(config, loss, SingleDevice(CPU), meta=True)


def _build_policy(
    config: Config, loss: Loss, tokenizer, device: torch.device, sharded: bool = False, quantized: bool = True
) -> tuple[Policy, Weights | None]:
    labels = loss.head_labels
    policy, weights = build_policy(config, tokenizer, device, sharded, labels, "values" in loss.requires, quantized)
    if labels is not None and len(labels) > 1:
        set_problem_type(policy.model, loss.multi_label)
    return policy, weights


def read_data(config: Config, loss: Loss) -> tuple[Template, Data]:
    """Return the template with the tokenizer, and the data with the features that the loss adds.

    Raises ConfigError or DataError.
    """
    tokenizer = load_tokenizer(config.model, scores=loss.head_labels is not None)
    template = make_template(tokenizer, config, loss.example_type)
    data = load_data(config, template, loss.data_kind, loss.uses_partners)
    if not loss.online:
        add_features(loss, data.train.caches, data.eval.caches if data.eval else [])
    return template, data


def prepare_policy(
    policy: Policy,
    weights: Weights | None,
    config: Config,
    parallel: SingleDevice,
    precision: Precision,
    dropout: bool = True,
    warn: Callable[[str], None] = log_warning,
) -> Policy:
    """Move the policy to its devices, shard it, and check its architecture.

    Args:
        policy: The policy.
        weights: The weights of a policy on the meta device; None if it has them.
        config: The full config.
        parallel: The ranks.
        precision: The dtype in which the policy computes.
        dropout: Use dropout in training.
        warn: Reports a line if compiled blocks run partly in Python.

    Raises:
        ConfigError: The architecture is not supported.
    """
    blocks, recomputed = find_blocks(policy.model), []
    if config.activation_checkpointing != "none":
        recomputed = checkpoint_activations(policy.model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(blocks, warn)
        policy.compiles_head = parallel.device.type == "cuda"
    if config.activation_offload:
        policy.host_copies = HostCopies(parallel.device)
        for block in recomputed:
            policy.host_copies.offload(block)
    policy = parallel.wrap(policy, blocks, precision.dtype)
    if weights is not None:
        parallel.load_shards(policy, lambda name, *rows: weights.rows(name.removeprefix("model."), *rows))
    # A sharded policy computes in policy_dtype, and other dtypes may need autocast; else float32 is more exact.
    is_float32 = not parallel.loads_shards and {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    with contextlib.nullcontext() if is_float32 else precision.autocast():
        check_policy(policy, config.packing, parallel.device, lambda: parallel.unsharded(policy))
    if is_float32 and precision.dtype != torch.float32:
        check_autocast(policy, precision.autocast())
    parallel.reshard(policy)  # a gathered parameter is not the one that the optimizer updates
    parallel.prefetch_blocks(blocks)  # the checks above have skipped some
    if config.model.float8 is not None:
        use_float8(policy.model, config.model.float8)
    return policy.train(dropout)


def make_loader(
    examples: TokenizedDataset,
    config: Config,
    tokenizer,
    policy: Policy,
    rank: int = 0,
    world_size: int = 1,
    prefetch: bool = False,
) -> MicrobatchLoader:
    """Return the loader of one rank, with batch rows that suit the policy's attention.

    Raises:
        ConfigError: An example is longer than the policy supports.
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
        prefetch=prefetch,
    )


def check_lengths(examples: TokenizedDataset, policy: Policy) -> None:
    """Raise ConfigError for an example that is too long, or whose outputs would depend on the rest of the batch."""
    lengths = examples.per_example(lambda cache: np.diff(cache.offsets), np.maximum)  # [E]
    longest, name = int(lengths.argmax()), type(policy.model).__name__
    limits = (
        (policy.position_limit, f"{name} has positions for"),
        (policy.rotary_limit, f"the rotary frequencies of {name} (rope_type) depend on the full batch above"),
    )
    for limit, reason in limits:
        if lengths[longest] > limit:
            message = f"max_length: {examples.where(longest)} has {lengths[longest]} tokens, but {reason} {limit}."
            raise ConfigError(f"{message} Set max_length={limit}.", "too-large")
