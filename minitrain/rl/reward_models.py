"""Rewards from frozen models: the score of a reward model, and a teacher's log-probabilities."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitrain.batch import Batch, Document, collate
from minitrain.config.option import option
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.data.examples import Conversation
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError, MinitrainError
from minitrain.inference.generate import model_config
from minitrain.inference.resolve import find_model
from minitrain.model.load import (
    CPU,
    DTYPES,
    META,
    build_frozen,
    load_merged,
    load_model,
    load_tokenizer,
    trained_outputs,
)
from minitrain.model.load_check import check_policy
from minitrain.model.policy import Policy
from minitrain.model.positions import batches_by_length
from minitrain.model.quantize import quantize_model
from minitrain.model.sequence_head import make_policy
from minitrain.model.vocabulary import count_ids
from minitrain.training.aux_models import FrozenModel, Teacher, build_teacher

from .episodes import Episode
from .rewards import Failed, Reward, register_reward

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

Judge = Callable[[Sequence[Episode]], list[Any]]  # conversations -> the result for each


def build_judge(reward: Reward, trainer: "Trainer") -> Judge | None:
    """Return the model of a reward; None if it is a function."""
    if not reward.function.is_model:
        return None
    with _naming(reward):
        return reward.function.function(reward.options, trainer)


def build_on_meta(reward: Reward, config: Config, tokenizer) -> tuple[Policy, torch.dtype] | None:
    """Return the model of a reward without its weights, and the dtype it computes in; None if it is a function."""
    if not reward.function.is_model:
        return None
    with _naming(reward):
        policy = reward.function.function.build(reward.options, config.model, tokenizer, META)
    return policy, DTYPES[reward.options.dtype or config.model.policy_dtype]


@contextlib.contextmanager
def _naming(reward: Reward) -> Iterator[None]:
    try:
        yield
    except MinitrainError as error:
        raise error.at(f"rollout.rewards: {reward.name}") from None


def _batches(
    documents: Sequence[Document | None], size: int, limit: int, pad_token_id: int, trainer: "Trainer"
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches with the indices of their documents. All ranks have the same number of them, with padding."""
    indices = [i for i, document in enumerate(documents) if document is not None]
    batches = batches_by_length([len(documents[i].ids) for i in indices], size, limit)
    n = int(trainer.parallel.max(len(batches)))
    for batch in [*batches, *[[]] * (n - len(batches))]:
        chosen = sorted(indices[i] for i in batch)
        yield chosen, collate([[documents[i]] for i in chosen], pad_token_id).to(trainer.device)


# ---------------------------------------------------------------------------------------------- reward models


@dataclass
class RewardModelOptions:
    name_or_path: str = option(
        MISSING, "Run directory, folder or Hub model: a reward model of loss.name=pairwise, or a sequence classifier."
    )
    label: str | None = option(None, "Class whose probability is the reward, if the model has several.")
    dtype: str | None = option(
        None, "Dtype of its weights and compute (default: model.policy_dtype).", choices=tuple(DTYPES)
    )
    quantization: str = option(
        "none", "Quantize its linear layers with bitsandbytes.", choices=("none", "4bit", "8bit")
    )
    chat_template: str = option("auto", "Its chat template, as the option chat_template.")
    batch_size: int = option(16, "Conversations in a batch.", ge=1)


def _find(options: RewardModelOptions, trust_remote_code: bool = False) -> tuple[ModelConfig, list[str]]:
    """Return the model options of a reward model, and the labels of its head. Raises ConfigError."""
    config = model_config(find_model(options.name_or_path), trust_remote_code)
    labels = trained_outputs(config)
    if labels is None:
        message = f"{options.name_or_path} returns text, not scores. Train a reward model with loss.name=pairwise."
        raise ConfigError(message, "unsupported-model")
    return config, labels


def _check(options: RewardModelOptions) -> list[tuple[str, str, str]]:
    """Return the problems of a reward model in a folder; those of one on the Hub are found when it is loaded."""
    try:
        if Path(find_model(options.name_or_path)).is_dir():
            _label(options, _find(options)[1])
    except ConfigError as error:
        return [("name_or_path", error.code, error.message)]
    return []


@register_reward("model", RewardModelOptions, is_model=True, check=_check)
class RewardModel:
    """Scores conversations with a frozen model that has a sequence head, sharded like the policy."""

    def __init__(self, options: RewardModelOptions, trainer: "Trainer"):
        self.options, self.trainer, parallel = options, trainer, trainer.parallel
        config, labels = _find(options, trainer.config.model.trust_remote_code)
        self.label = _label(options, labels)
        self.template = Template(load_tokenizer(config, scores=True), options.chat_template)
        dtype = DTYPES[options.dtype or trainer.config.model.policy_dtype]
        with parallel.local_rank0_first():
            policy = self.build(options, trainer.config.model, self.template.tokenizer, trainer.device)
        self.model = FrozenModel(policy, parallel, dtype)
        with self.model.precision.autocast():
            check_policy(policy, False, trainer.device, lambda: parallel.unsharded(self.model.policy))
        parallel.reshard(self.model.policy)

    @staticmethod
    def build(options: RewardModelOptions, trained: ModelConfig, tokenizer, device: torch.device) -> Policy:
        """Return the frozen model.

        Args:
            options: Its options.
            trained: The options of the model in training.
            tokenizer: Its tokenizer (on the meta device, any other one).
            device: Device of quantized layers; the rest is on the CPU. On the meta device, no weights are read.
        """
        config, labels = _find(options, trained.trust_remote_code)
        dtype = DTYPES[options.dtype or trained.policy_dtype]
        if device.type == "meta":
            model = load_model(config, load_tokenizer(config, scores=True), 0, dtype, labels, device)
        elif config.adapter:
            model = load_merged(config, tokenizer).to(dtype)
        else:
            model = load_model(config, tokenizer, 0, dtype, labels)
        if options.quantization != "none":
            quantize_model(model, options.quantization, dtype, device)
        return make_policy(model.eval().requires_grad_(False))

    def __call__(self, episodes: Sequence[Episode]) -> list[Any]:
        """Return the score of each conversation, `Failed` if it is too long or the chat template rejects it."""
        results: list[Any] = [self._document(episode) for episode in episodes]
        documents = [None if isinstance(result, Failed) else result for result in results]
        pad_token_id, limit = self.template.tokenizer.pad_token_id, self.model.policy.rotary_limit
        for chosen, batch in _batches(documents, self.options.batch_size, limit, pad_token_id, self.trainer):
            scores = self.model(batch).scores.float()  # [D, L]
            scores = scores[:, 0] if self.label is None else scores.softmax(1)[:, self.label]  # [D]
            for i, score in zip(chosen, scores.tolist()[: len(chosen)], strict=True):
                results[i] = score
        self.trainer.parallel.reshard(self.model.policy)
        return results

    def _document(self, episode: Episode) -> Document | Failed:
        try:
            tokens = self.template.encode(Conversation(episode.messages, variables=dict(episode.prompt.variables)))
        except DataError as error:
            return Failed(error.message)
        n, limit = len(tokens.ids), self.model.policy.n_positions
        if n > limit:
            return Failed(f"the conversation has more than the {limit} tokens of the reward model")
        columns = {name: torch.tensor(column) for name, column in tokens.token_features.items()}
        return Document(torch.tensor(tokens.ids), torch.tensor(tokens.mask), token_features=columns)


def _label(options: RewardModelOptions, labels: list[str]) -> int | None:
    """Return the index of the class whose probability is the reward; None for a model with one output."""
    if len(labels) == 1 and options.label is None:
        return None
    if options.label not in labels or len(labels) == 1:
        message = f"label: expected one of the classes of {options.name_or_path} ({', '.join(labels)}), got "
        raise ConfigError(f"{message}{options.label}. Change it.", "not-a-choice")
    return labels.index(options.label)


# ---------------------------------------------------------------------------------------------------- teachers


@dataclass
class TeacherOptions:
    name_or_path: str = option(MISSING, "Folder or Hub model with the tokenizer of the policy.")
    dtype: str | None = option(
        None, "Dtype of its weights and compute (default: model.policy_dtype).", choices=tuple(DTYPES)
    )
    batch_size: int = option(16, "Conversations in a batch.", ge=1)


@register_reward("teacher", TeacherOptions, is_model=True)
class TeacherReward:
    """Returns log p_T - log p_S for each sampled token: minus an unbiased estimate of the KL of the policy S to T."""

    def __init__(self, options: TeacherOptions, trainer: "Trainer"):
        self.options, self.trainer = options, trainer
        tokenizer, parallel, trained = trainer.tokenizer, trainer.parallel, trainer.config.model
        with parallel.local_rank0_first():
            policy = self.build(options, trained, tokenizer, CPU)
        dtype = DTYPES[options.dtype or trained.policy_dtype]
        self.model = Teacher(policy, parallel, dtype, count_ids(tokenizer), packing=False)

    @staticmethod
    def build(options: TeacherOptions, trained: ModelConfig, tokenizer, device: torch.device) -> Policy:
        """Return the frozen model. On the meta device, no weights are read.

        Args:
            options: Its options.
            trained: The options of the model in training.
            tokenizer: The tokenizer of both.
            device: The CPU or the meta device.
        """
        config = ModelConfig(
            options.name_or_path,
            policy_dtype=options.dtype or trained.policy_dtype,
            attn_implementation=trained.attn_implementation,
            trust_remote_code=trained.trust_remote_code,
        )
        load = functools.partial(build_frozen, device=device)
        return build_teacher(config, tokenizer, False, load, key="name_or_path")

    def __call__(self, episodes: Sequence[Episode]) -> list[Any]:
        """Return the rewards of the sampled tokens of each conversation."""
        results: list[Any] = [Failed("the conversation is too long for the teacher")] * len(episodes)
        documents = [_tokens(episode, self.model.policy.position_limit) for episode in episodes]
        pad_token_id, limit = self.trainer.tokenizer.pad_token_id, self.model.policy.rotary_limit
        temperature = episodes[0].temperature if episodes else 1.0
        for chosen, batch in _batches(documents, self.options.batch_size, limit, pad_token_id, self.trainer):
            logps = iter(self.model(batch, temperature=temperature).logps.tolist())
            for i in chosen:
                own = [logp for logp, sampled in zip(episodes[i].logps, episodes[i].mask, strict=True) if sampled]
                results[i] = [next(logps) - logp for logp in own]
        self.trainer.parallel.reshard(self.model.policy)
        return results


def _tokens(episode: Episode, limit: int) -> Document | None:
    """Return the token ids of a conversation; None if it is longer than a limit."""
    ids, mask = episode.prompt.ids + episode.ids, [False] * len(episode.prompt.ids) + episode.mask
    return Document(torch.tensor(ids), torch.tensor(mask, dtype=torch.uint8)) if len(ids) <= limit else None
