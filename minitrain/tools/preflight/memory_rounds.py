"""Estimate the memory of rounds: of the largest step on sampled answers, of the sampling, and of models that judge.

The lengths of answers are not known before they are sampled. So every answer is as long as it can be.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitrain.batch import Document, collate
from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.config.schema import Config
from minitrain.config.sections import RolloutConfig
from minitrain.data.loader import TokenizedDataset
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.inference.choice import Chooser, Request, TokenChoice
from minitrain.inference.decode_graph import CUDAGraph, DecodeGraphs
from minitrain.inference.slots import AHEAD_FRACTION, REFILL_FRACTION, SlotLoop, fitting_slots
from minitrain.losses import Loss, add_features
from minitrain.model.load import DTYPES
from minitrain.model.policy import Policy
from minitrain.rl.documents import JudgedAnswer, as_cache, make_examples
from minitrain.rl.reward_models import build_on_meta
from minitrain.rl.rewards import build_rewards
from minitrain.rl.vllm import N_REQUESTS, VLLMOptions
from minitrain.training.aux_models import FrozenModel
from minitrain.training.step import Precision, inference

from .memory_tracker import MemoryTracker

KEYS_AND_VALUES, PROMPTS, COPY, JUDGES = "keys and values", "prompts", "sampler", "reward models"
PARTS = (KEYS_AND_VALUES, PROMPTS, COPY)


def longest_round(prompts: TokenizedDataset, config: Config, loss: Loss, limit: int) -> TokenizedDataset:
    """Return the examples of a round of the prompts with the longest answers, which all reach their limit.

    Args:
        limit: Maximum length of a conversation, in tokens.
    """
    n, options = config.rollout.num_generations, config.rollout
    rewards, groups = _rewards(loss.example_type, n, options.min_reward), []
    n_new = _n_new(config, prompts.lengths, limit)  # [E]
    order = np.argsort(-(prompts.lengths + n * n_new), kind="stable")
    for index in order[: options.prompts_per_round].tolist():
        prompt, k = prompts[index][0].ids.tolist(), int(n_new[index])
        groups.append([JudgedAnswer(prompt, [0] * k, [True] * k, [-1.0] * k, reward, True) for reward in rewards])
    examples = make_examples(groups, loss.example_type, options, "teacher" in loss.requires)
    cache = as_cache(examples, "round 1", Path("round-1"))
    zeros = torch.zeros(len(cache.ids))
    cache.token_features |= {name: zeros.clone() for name in _columns(config, loss)}
    add_features(loss, [cache])
    return TokenizedDataset([cache], [1.0])


def _n_new(config: Config, n_prompt: np.ndarray, limit: int) -> np.ndarray:
    """Return the largest number of tokens that can be sampled after a prompt of each length."""
    return np.minimum(config.rollout.max_turns * config.rollout.max_new_tokens, limit - n_prompt)


def _longest_conversation(prompts: TokenizedDataset, config: Config, limit: int) -> int:
    return int((prompts.lengths + _n_new(config, prompts.lengths, limit)).max())


def _rewards(kind: str, n: int, min_reward: float | None) -> list[float]:
    """Return rewards with which as many answers as possible are trained on."""
    if kind == "conversation":
        return [1.0 if min_reward is None else min_reward + 1.0] * n
    return [float(i % 2) for i in range(n)]


def _columns(config: Config, loss: Loss) -> list[str]:
    if loss.example_type != "rollout":
        return []
    correction = ["importance_weights"] if config.rollout.importance_correction != "none" else []
    return ["old_logps", "ref_logps", *correction, *(["values"] if "values" in loss.requires else [])]


# -------------------------------------------------------------------------------------------------------- sampling


class _TrackedLoop(SlotLoop):
    """A loop whose tensors belong to parts: the prompts, and the keys and values of the slots."""

    def __init__(self, policy: Policy, n_slots: int, tracker: MemoryTracker, with_graphs: bool):
        super().__init__(policy, n_slots)
        self.tracker = tracker
        if with_graphs and self.makes_masks:
            self.graphs = _TrackedGraphs(self, _Replayed)

    def _compute_prompts(self, *args) -> None:
        self.tracker.part = PROMPTS
        super()._compute_prompts(*args)
        self.tracker.part = KEYS_AND_VALUES

    def _have_space(self, *args) -> bool:
        return False  # so that two batches are held

    def _decode(self, *args):
        self.tracker.part = "activations"
        return super()._decode(*args)


class _Replayed(CUDAGraph):
    """Stands in for a CUDA graph, and runs the step again."""

    def __init__(self, step: Callable[[], Tensor], other: CUDAGraph | None):
        self.replay = step


class _TrackedGraphs(DecodeGraphs):
    """Decode steps of a tracked loop. Their memory belongs to the keys and values."""

    def __init__(self, loop: _TrackedLoop, *args):
        super().__init__(loop, *args)
        self.tracker = loop.tracker

    def _take(self, *args) -> None:
        self.tracker.part = KEYS_AND_VALUES
        super()._take(*args)
        self.tracker.part = "activations"


class _TrackedChoice(TokenChoice):
    """A choice of tokens whose tensors belong to the head."""

    def __init__(self, policy: Policy, choose: Chooser, tracker: MemoryTracker):
        super().__init__(policy, choose, set())
        self.tracker = tracker

    def from_states(self, *args) -> tuple[Tensor, int]:
        self.tracker.part = "head"
        return super().from_states(*args)


class _FirstToken(Chooser):
    """Chooses as `Chooser` does, and returns the first token, since fake logits have no values."""

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        super().__call__(logits, uniforms)
        return torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits))


def simulate_sampling(
    policy: Policy,
    prompts: TokenizedDataset,
    config: Config,
    parallel: SingleDevice,
    precision: Precision,
    tracker: MemoryTracker,
    with_graphs: bool = False,
) -> None:
    """Sample the first and the last tokens of the longest answers, and leave the peaks in the tracker.

    Args:
        with_graphs: Decode as on a GPU, which rounds rows and columns up to those of a graph.
    """
    options, limit = config.rollout, conversation_limit(config, policy)
    choose = _FirstToken(options.temperature, options.top_p, options.top_k)
    length = _longest_conversation(prompts, config, limit)
    n_slots = options.num_slots or fitting_slots(policy, length)
    last = _last_requests(length, n_slots, options, parallel.world_size)
    tracker.reset_peaks()
    dtype = options.sampler_dtype
    for requests in (_first_requests(prompts, n_slots, options), last):
        weights = parallel.unsharded(policy) if dtype is None else _copied(policy, dtype, tracker)
        with tracker, inference(policy), weights, precision.autocast():
            choice = _TrackedChoice(policy, choose, tracker)
            rows = list(itertools.chain(*choice.rows(requests)))
            _TrackedLoop(policy, n_slots, tracker, with_graphs).run(rows, choice)
    parallel.reshard(policy)


@contextlib.contextmanager
def _copied(policy: Policy, dtype: str, tracker: MemoryTracker) -> Iterator[None]:
    """Allocate the copy of the weights that samples."""
    tracker.part = COPY
    copy = [local_shard(p)[0].new_empty(p.shape, dtype=DTYPES[dtype]) for p in policy.model.parameters()]
    yield
    del copy


def conversation_limit(config: Config, policy: Policy) -> int:
    """Return the maximum length of a conversation, in tokens."""
    return min(config.max_length, policy.position_limit)


def _first_requests(prompts: TokenizedDataset, n_slots: int, options: RolloutConfig) -> list[Request]:
    """Return the longest prompts, as many as are computed before the first token."""
    free = n_slots + n_slots // AHEAD_FRACTION
    requests = []
    for index in np.argsort(-prompts.lengths, kind="stable")[: options.prompts_per_round].tolist():
        n = min(free, options.num_generations)
        if n:
            requests.append(Request(prompts[index][0].ids.tolist(), [(i,) for i in range(n)], 1))
        free -= n
    return requests


def _last_requests(length: int, n_slots: int, options: RolloutConfig, world_size: int) -> list[Request]:
    """Return requests that fill the slots near their longest length, and exchange rows there: both batches are held."""
    n_answers = -(-options.prompts_per_round // world_size) * options.num_generations
    n_slots = min(n_slots, n_answers)
    n_ending = n_slots // REFILL_FRACTION + 1
    n_waiting = min(n_ending, n_answers - n_slots)
    requests = [(length - 3, n_slots - n_ending, 3), (length - 4, n_ending + n_waiting, 1)]
    return [
        Request([0] * max(1, n), [(i,) for i in range(n_keys)], limit) for n, n_keys, limit in requests if n_keys > 0
    ]


# --------------------------------------------------------------------------------------------------------- judging


class Judge(NamedTuple):
    """The model of a reward, with the number of answers in its batches."""

    model: FrozenModel
    batch_size: int


def build_judges(config: Config, tokenizer, parallel: SingleDevice, to_fake: Callable[[Policy], Policy]) -> list[Judge]:
    """Return the models of the rewards without weights. `to_fake` replaces the meta tensors of a model."""
    judges, issues = [], ConfigIssues(ConfigSource("rollout"))
    for reward in build_rewards(config.rollout.rewards, issues):
        if built := build_on_meta(reward, config, tokenizer):
            judges.append(Judge(FrozenModel(to_fake(built[0]), parallel, built[1]), reward.options.batch_size))
    issues.raise_if_any()
    return judges


def simulate_judging(
    judges: Sequence[Judge],
    prompts: TokenizedDataset,
    config: Config,
    policy: Policy,
    parallel: SingleDevice,
    tracker: MemoryTracker,
) -> None:
    """Judge a batch of the longest conversations with each model, and leave the peaks in the tracker."""
    n_new = _n_new(config, prompts.lengths, conversation_limit(config, policy))  # [E]
    longest = int((prompts.lengths + n_new).argmax())
    n_prompt, n_tokens = int(prompts.lengths[longest]), int(prompts.lengths[longest] + n_new[longest])
    n_answers = -(-config.rollout.prompts_per_round // parallel.world_size) * config.rollout.num_generations
    tracker.reset_peaks()
    for judge in judges:
        n = min(n_tokens, judge.model.policy.n_positions)
        document = Document(torch.zeros(n, dtype=torch.int64), (torch.arange(n) >= n_prompt).to(torch.uint8))
        batch = collate([[document]] * min(judge.batch_size, n_answers), 0)
        with tracker:
            tracker.part = "activations"
            judge.model(batch)
        parallel.reshard(judge.model.policy)


# ----------------------------------------------------------------------------------------------------------- words


def can_simulate(config: Config, policy: Policy) -> bool:
    """Return whether `simulate_sampling` samples as a training does."""
    return config.rollout.engine == "local" and SlotLoop.supports(policy)


def describe_sampling(prompts: TokenizedDataset, config: Config, policy: Policy) -> str:
    """Return what samples how many answers of what length at the same time, in words."""
    options, limit = config.rollout, conversation_limit(config, policy)
    longest = _longest_conversation(prompts, config, limit)
    length = f"{longest:,} tokens"
    n_answers = options.prompts_per_round * options.num_generations
    if options.engine == "vllm":
        url = options.engine_args.get("url", VLLMOptions.url)
        n = min(options.num_slots or N_REQUESTS, options.prompts_per_round)
        return f"by the vLLM server at {url}, {n} prompts at the same time, up to {length}; its memory is not estimated"
    slots = f"{min(options.num_slots or fitting_slots(policy, longest), n_answers)} slots of {length}"
    loop = "with the slower loop of transformers, whose memory is not estimated; "
    return slots if can_simulate(config, policy) else loop + slots
