"""Build the frozen models of a loss: the reference model and the teacher model.

The reference is the policy at the start of training: a snapshot of the trainable parameters (`InitialPolicySnapshot`),
a second model (`FrozenModel`), or a file of log-probabilities (`PrecomputedRefLogps`). All are called like the policy
and return a `PolicyOutput` without gradients. Only a snapshot can move during training. A `Teacher` is another model
with the same tokenizer.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from minitrain.batch import Batch, PolicyOutput
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.data.cache import cache_folder
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.errors import ConfigError
from minitrain.io.checksum import PLACEHOLDER, is_intact, seal
from minitrain.io.temp_files import new_file
from minitrain.io.tensor_files import save_file
from minitrain.losses import Loss, Models
from minitrain.model.adapter_config import has_adapter
from minitrain.model.decoder import find_blocks
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.load import DTYPES, build_frozen, load_tokenizer
from minitrain.model.load_check import check_policy
from minitrain.model.logprobs import LMHead
from minitrain.model.policy import Policy
from minitrain.model.vocabulary import count_ids

from .setup import check_lengths
from .step import Precision, inference

Load = Callable[[ModelConfig, Any, torch.dtype, bool, torch.dtype], Policy]  # the signature of `build_frozen`
REF_LOGPS = "ref_logps"  # token feature with precomputed log-probabilities


class InitialPolicySnapshot:
    """A copy of the trainable parameters at the start; of a sharded policy, of this rank's shards.

    With an adapter, only the adapter is copied. A new LoRA adapter changes nothing, so the reference is the base model.
    If a trained adapter is loaded, the reference includes it, unlike the base model with the adapter off (trl#1193).
    """

    def __init__(self, policy: nn.Module, parallel: SingleDevice):
        self.policy, self.parallel = policy, parallel
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        # `.data`: a copy into it does not invalidate what the policy's last forward pass saved.
        self.shards = [local_shard(parameter)[0].data for parameter in trained]
        self.initial = [shard.clone() for shard in self.shards]

    def __call__(self, batch: Batch, **options) -> PolicyOutput:
        with self.restored(), inference(self.policy):
            return self.policy(batch, **options)

    def target_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, LMHead]:
        """Return the hidden states that predict the targets, shape [N, H], and the LM head."""
        with self.restored(), inference(self.policy):
            hidden_states, head = self.policy.target_hidden_states(batch)
            tensors = {name: value for name, value in head._asdict().items() if isinstance(value, torch.Tensor)}
            # Outside of this context, a trained tensor has its current values again, and a sharded one is dropped.
            kept = {n: t.clone() for n, t in tensors.items() if t.requires_grad or self.parallel.loads_shards}
        return hidden_states, head._replace(**kept)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Give the policy its initial parameters inside the context."""
        current = [torch.empty_like(shard) for shard in self.shards]
        torch._foreach_copy_(current, self.shards)
        self._copy_to_policy(self.initial)
        try:
            yield
        finally:
            self._copy_to_policy(current)

    def move(self, weight: float) -> None:
        """Replace the reference by the mean of itself and the policy, which has this weight."""
        torch._foreach_lerp_(self.initial, self.shards, weight)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors in memory."""
        return self.initial

    def _copy_to_policy(self, values: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self.shards, values)
        self.parallel.reshard(self.policy)


class FrozenModel:
    """A frozen model, sharded like the policy, with its own dtype."""

    def __init__(self, policy: Policy, parallel: SingleDevice, dtype: torch.dtype):
        self.policy = parallel.wrap(policy, find_blocks(policy.model), dtype)
        self.precision = Precision(dtype, parallel.device)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors in memory."""
        return [*self.policy.parameters(), *self.policy.buffers()]

    def __call__(self, batch: Batch, **options) -> PolicyOutput:
        with torch.no_grad(), self.precision.autocast():
            return self.policy(batch, **options)

    def target_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, LMHead]:
        """Return the hidden states that predict the targets, shape [N, H], and the LM head."""
        with torch.no_grad(), self.precision.autocast():
            return self.policy.target_hidden_states(batch)


class Teacher(FrozenModel):
    """A frozen model with the same tokenizer."""

    def __init__(self, policy: Policy, parallel: SingleDevice, dtype: torch.dtype, n_tokens: int, packing: bool):
        """
        Args:
            policy: The teacher's policy.
            parallel: The ranks.
            dtype: The dtype it computes in.
            n_tokens: Size of the tokenizer. Further rows of the LM head are padding and are ignored.
            packing: As the option.

        Raises:
            ConfigError: The architecture is not supported.
        """
        super().__init__(policy, parallel, dtype)
        self.n_tokens = n_tokens
        with self.precision.autocast():
            check_policy(self.policy, packing, parallel.device, lambda: parallel.unsharded(self.policy))
        parallel.reshard(self.policy)

    def target_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, LMHead]:
        hidden_states, lm_head = super().target_hidden_states(batch)
        return hidden_states, lm_head.first(self.n_tokens)


class PrecomputedRefLogps:
    """Log-probabilities of the initial policy, stored with the tokens."""

    def tensors(self) -> list[torch.Tensor]:
        """Return no tensors: each batch has its log-probabilities."""
        return []

    def __call__(self, batch: Batch, **options) -> PolicyOutput:
        return PolicyOutput(batch.target_feature(REF_LOGPS), batch.target_docs, batch.n_docs)


def build_aux_models(
    loss: Loss,
    config: Config,
    policy: Policy,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    loaders: list[MicrobatchLoader],
    load: Load | None = None,
) -> Models:
    """Return the policy with the reference and teacher models that a loss requires.

    Args:
        loss: The loss.
        config: The full config.
        policy: The policy, on its devices.
        tokenizer: Its tokenizer.
        parallel: The ranks.
        precision: The dtype in which the policy computes.
        loaders: The loaders of the training and evaluation data, if they are known.
        load: Builds a frozen model (default: `build_frozen`).

    Raises:
        ConfigError: A model does not fit the policy or its tokenizer.
    """
    teacher, reference, load = None, None, load or build_frozen
    if "teacher" in loss.requires:
        teacher = load_teacher(loss, config, tokenizer, parallel, load)
        for loader in loaders:
            check_lengths(loader.examples, teacher.policy)
    if "reference" in loss.requires:
        reference = _build_reference(loss, config, policy, tokenizer, parallel, precision, loaders, load)
    return Models(policy, reference, teacher)


def _build_reference(
    loss: Loss,
    config: Config,
    policy: Policy,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    loaders: list[MicrobatchLoader],
    load: Load,
) -> InitialPolicySnapshot | PrecomputedRefLogps | FrozenModel:
    caches = list({id(cache): cache for loader in loaders for cache in loader.examples.caches}.values())
    if caches and all(REF_LOGPS in cache.token_features for cache in caches):  # from the data rows
        return PrecomputedRefLogps()
    kind = reference_kind(loss, config)
    if kind == "adapter":
        return InitialPolicySnapshot(policy, parallel)
    if kind == "precomputed":
        for cache in caches:
            logps = _load_or_compute_ref_logps(cache, loss, policy, config, parallel, precision, loaders[0])
            cache.token_features[REF_LOGPS] = logps
        return PrecomputedRefLogps()
    reference = load_reference(config, policy, tokenizer, parallel, precision, load)
    if loaders:
        _check_reference_matches_policy(policy, reference, loaders[0], parallel, precision)
    return reference


def reference_kind(loss: Loss, config: Config) -> str:
    """Return the kind of reference that a loss uses: model, adapter or precomputed."""
    kind = loss.options.reference
    return kind if kind != "auto" else "adapter" if has_adapter(config) or sync_steps(loss) else "model"


def sync_steps(loss: Loss) -> int:
    """Return the number of updates after which the reference moves towards the policy; 0 if it never does."""
    return getattr(loss.options, "reference_sync_steps", 0)


def moving_reference(loss: Loss, models: Models) -> list[torch.Tensor] | None:
    """Return this rank's shards of a reference that moves, in the order of the trained parameters."""
    return models.reference.tensors() if sync_steps(loss) else None


def move_reference(loss: Loss, models: Models, updates: int) -> None:
    """Move the reference towards the policy if that is due after this many updates."""
    if sync_steps(loss) and updates % sync_steps(loss) == 0:
        models.reference.move(loss.options.reference_mixup)


def load_teacher(loss: Loss, config: Config, tokenizer, parallel: SingleDevice, load: Load = build_frozen) -> Teacher:
    """Load the teacher of a loss. Raises ConfigError if its tokenizer differs."""
    if loss.options.teacher is None:
        raise ConfigError("loss.teacher: is missing. Set it to a folder or a Hub model.", "missing-option")
    teacher = teacher_config(loss, config)
    with parallel.local_rank0_first():
        policy = build_teacher(teacher, tokenizer, config.packing, load)
    return Teacher(policy, parallel, DTYPES[teacher.policy_dtype], count_ids(tokenizer), config.packing)


def build_teacher(
    teacher: ModelConfig, tokenizer, packing: bool, load: Load = build_frozen, key: str = "loss.teacher"
) -> Policy:
    """Build the policy of a teacher, which the option `key` names. Raises ConfigError if its tokenizer differs."""
    check_teacher_tokenizer(teacher, tokenizer, key)
    return load(teacher, tokenizer, DTYPES[teacher.policy_dtype], packing, torch.float32)


def teacher_config(loss: Loss, config: Config) -> ModelConfig:
    """Return the model options of the teacher. It does not inherit the policy's revision, archive and adapter."""
    return ModelConfig(
        loss.options.teacher,
        policy_dtype=loss.options.teacher_dtype or config.model.policy_dtype,
        attn_implementation=config.model.attn_implementation,
        trust_remote_code=config.model.trust_remote_code,
    )


def check_teacher_tokenizer(teacher: ModelConfig, tokenizer, key: str = "loss.teacher") -> None:
    """Raise ConfigError if the teacher's tokenizer has other tokens or ids than the policy's."""
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if differing := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = differing[0]
        raise ConfigError(
            f"{key}: {teacher.name_or_path} has another tokenizer: {len(differing)} tokens differ. For example, "
            f"{token!r} has the id {ours.get(token)} in the model's and {theirs.get(token)} in the teacher's. Choose a "
            "teacher with the model's tokenizer.",
            "mismatch",
        )


def load_reference(
    config: Config, policy: Policy, tokenizer, parallel: SingleDevice, precision: Precision, load: Load
) -> FrozenModel:
    """Load the model of a config in another copy, without its adapter."""
    dtype = DTYPES[config.model.reference_dtype or config.model.policy_dtype]
    residual = policy.model.get_input_embeddings().weight.dtype
    with parallel.local_rank0_first():
        frozen = load(dataclasses.replace(config.model, adapter=None), tokenizer, dtype, config.packing, residual)
    frozen.groups_documents = policy.groups_documents
    # Compute like the policy, except that weights in 16 bits need inputs of their dtype.
    return FrozenModel(frozen, parallel, dtype if precision.dtype == torch.float32 else precision.dtype)


def _check_reference_matches_policy(
    policy: Policy, reference: FrozenModel, loader: MicrobatchLoader, parallel: SingleDevice, precision: Precision
) -> None:
    """Raise ConfigError if the logps of policy and reference differ before the first step."""
    batch = loader.micro_batches(loader.order(0)[: parallel.world_size])[0].to(parallel.device)
    with torch.no_grad(), precision.autocast():
        ours, theirs = (model(batch).logps for model in (policy, reference))
    difference = (ours - theirs).abs().mean() if ours.numel() else ours.sum()
    parallel.reshard(policy)
    if parallel.max(float(difference)) > _tolerance(precision, policy, reference.policy):
        raise ConfigError(
            "loss.reference: before the first step, log-probabilities of reference and policy differ by "
            f"{float(difference):.2g} per token. Set model.reference_dtype to model.policy_dtype, or "
            "loss.reference=precomputed.",
            "mismatch",
        )


def _tolerance(precision: Precision, *policies: Policy) -> float:
    """Return the largest mean difference between logps that are equal up to rounding."""
    exact = precision.dtype == torch.float32 and all(policy.model.dtype == torch.float32 for policy in policies)
    return 1e-3 if exact else 0.1


def _load_or_compute_ref_logps(
    cache,
    loss: Loss,
    policy: Policy,
    config: Config,
    parallel: SingleDevice,
    precision: Precision,
    loader: MicrobatchLoader,
) -> torch.Tensor:
    """Return the policy's log-probability of each target of a data file, shape [T] float32, 0 for other tokens."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "lora", "soft_prompt")}
    settings = [cache.key, model_fingerprint(config.model), parts, config.seed, loss.temperature]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    file = cache_folder(config) / f"{key}-reference.safetensors"
    loader = dataclasses.replace(loader, examples=TokenizedDataset([cache], [1.0]))
    cached = _read_ref_logps(file, len(cache.ids))
    if parallel.max(int(cached is None)) == 0 and _match_policy(
        cached, cache, loss, policy, parallel, precision, loader
    ):
        return cached
    logps = torch.zeros(len(cache.ids))  # [T]
    quiet = True if parallel.rank or config.quiet else None  # None: show the bar on a terminal only
    with inference(policy), precision.autocast():
        batches = iter_batches_with_positions(cache, loader)
        for batch, positions in tqdm(batches, desc="reference", unit=" batches", disable=quiet, leave=False):
            output = policy(batch.to(parallel.device), temperature=loss.temperature)
            logps[positions] = output.logps.float().cpu()
    parallel.reshard(policy)
    logps = parallel.sum(logps)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with new_file(file) as temporary:
            save_file({REF_LOGPS: logps}, temporary, PLACEHOLDER)
            seal(temporary)
    return logps


def _match_policy(
    cached: torch.Tensor,
    cache,
    loss: Loss,
    policy: Policy,
    parallel: SingleDevice,
    precision: Precision,
    loader: MicrobatchLoader,
) -> bool:
    """Return whether cached logps equal the policy's for the first batch of a data file, on all ranks."""
    difference = 0.0
    with (
        inference(policy),
        precision.autocast(),
        contextlib.closing(iter_batches_with_positions(cache, loader)) as batches,
    ):
        for batch, positions in itertools.islice(batches, 1):
            logps = policy(batch.to(parallel.device), temperature=loss.temperature).logps.float().cpu()
            difference = float((logps - cached[positions]).abs().mean()) if len(logps) else 0.0
    parallel.reshard(policy)
    return parallel.max(difference) <= _tolerance(precision, policy)


def iter_batches_with_positions(cache, loader: MicrobatchLoader) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield this rank's batches of a data file, each with the positions of its targets in the file, shape [N]."""
    cache.token_features["position"] = torch.arange(len(cache.ids))
    try:
        for batch in loader.eval_batches():
            yield batch, batch.target_feature("position").long()
    finally:
        del cache.token_features["position"]


def _read_ref_logps(file: Path, n_tokens: int) -> torch.Tensor | None:
    if not file.exists():
        return None
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        if is_intact(file) and (logps := load_file(file)[REF_LOGPS]).shape == (n_tokens,):  # [T]
            return logps
    tqdm.write(f"{file}: damaged reference log-probabilities. Computing them again. [damaged-file]")
    return None
