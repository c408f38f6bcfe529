"""Rounds: data that is sampled while training.

A round has `prompts_per_round` prompts. The policy answers them, reward functions judge the answers, and they become
the examples of the next `num_iterations` epochs, one for each prompt. So the loop, the loader and the losses are those
of training on files, and the position in the data is the same integer.

A round depends only on the weights, the seed, its number and the number of prompts drawn before.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitrain.batch import Batch
from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.data.cache import TokenCache
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset
from minitrain.data.sampler import epoch_order
from minitrain.errors import DataError
from minitrain.io.system import CAN_FORK
from minitrain.losses import add_features
from minitrain.training.failpoints import failpoint
from minitrain.training.optim import warmup_steps
from minitrain.training.signals import Interrupted

from .checks import count_steps, is_one_step
from .documents import JudgedAnswer, as_cache, has_zero_variance, make_examples, tensors_of
from .engine import Engine, build_engine, refreshed
from .environments import build_environment
from .episodes import Episode, Player, Prompt
from .evaluation import exact_match, references
from .exchange import gather_groups
from .logps import add_logps
from .prompts import Prompts
from .reports import Group, answer_metrics, judged_answer, pass_at_k, prompt_result, stats_of
from .reward_models import build_judge
from .reward_workers import start_workers
from .rewards import Answer, Judgement, Reward, build_rewards, combine
from .round_log import RoundLog

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

TRAIN, EVAL = 1, 2  # the purpose in the key of random numbers
MAX_EMPTY_ROUNDS = 10  # in a row


class RoundData(TokenizedDataset):
    """The examples of a round: first those of its cache, then, up to `n`, those that have nothing to train on."""

    def __init__(self, cache: TokenCache | None, n: int):
        self.n = n
        if cache is None:
            self.caches, self.weights, self.selected, self.sizes = [], [], [], []
            self.starts, self.lengths = np.zeros(1, int), np.zeros(0, int)
            return
        super().__init__([cache], [1.0])

    @functools.cached_property
    def is_trained(self) -> np.ndarray:
        """Return which examples have targets -> [n]."""
        is_trained = np.zeros(self.n, bool)
        for cache in self.caches:
            is_trained[: len(cache)] = np.add.reduceat(cache.mask.numpy().astype(int), cache.bounds[:-1]) > 0
        return is_trained

    def digest(self, indices: list[int]) -> str:
        return super().digest([index for index in indices if index < len(self)])


class Rounds(MicrobatchLoader):
    """A loader whose epochs are passes over rounds that it samples."""

    def __init__(self, trainer: "Trainer", engine: Engine, rewards: Sequence[Reward], make_environment: Any):
        loader = trainer.train_loader
        rest = loader.config, loader.pad_token_id, loader.rank, loader.world_size
        super().__init__(RoundData(None, 0), *rest, loader.row_capacity, loader.shares_prompts, loader.prefetch)
        config = loader.config
        self.trainer, self.engine, self.options = trainer, engine, config.rollout
        self.prompts = Prompts(loader.examples, config.seed)
        self.eval_prompts: Prompts | None = None  # of the last evaluation
        self.rewards, self.make_environment = list(rewards), make_environment
        self.judges = [build_judge(reward, trainer) for reward in rewards]
        self.workers = start_workers(rewards, config, trainer.keep_alive)
        self.number: int | None = None  # of the current round
        self.drawn = 0  # prompts drawn before the current round
        self.n_drawn = 0  # prompts drawn in the current round
        self.next_round = 0  # that a resumed run samples first
        self.failures: Counter[str] = Counter()
        self.seconds_trained = 0.0  # since the current round was sampled, without evaluations
        self.log = RoundLog(self)

    # ------------------------------------------------------------------------------------- as a loader of epochs

    @property
    def epoch_size(self) -> int:
        """Number of examples in one pass over a round, over all ranks."""
        return self.options.prompts_per_round

    @property
    def is_one_step(self) -> bool:
        return is_one_step(self.config)

    @property
    def total_steps(self) -> int:
        return count_steps(self.config, len(self.prompts))

    def steps(self, consumed: int = 0) -> Iterator[tuple[list[int], list[Batch]]]:
        """Yield (indices of the step's examples, this rank's micro-batches), until a signal stops the sampling.

        Examples without anything to train on count as consumed with those of the next step that has some.
        """
        try:
            yield from self._steps(consumed)
        finally:
            self.workers.close()

    def _steps(self, consumed: int) -> Iterator[tuple[list[int], list[Batch]]]:
        skipped = self._rest_before_round(consumed)
        consumed += len(skipped)
        n_empty = 0  # rounds in a row
        while self.trainer.step < self.total_steps:
            epoch, position = divmod(consumed, self.epoch_size)
            number = epoch // self.options.num_iterations
            if self.number != number:
                try:
                    self._sample(number)
                except Interrupted:
                    self.n_drawn = 0  # the dropped round draws its prompts again
                    return
            n_empty = 0 if self.examples.is_trained.any() else n_empty + 1
            if n_empty == MAX_EMPTY_ROUNDS * self.options.num_iterations:
                raise DataError(
                    f"rollout: {MAX_EMPTY_ROUNDS} rounds in a row had nothing to train on. Read the warnings about "
                    "rewards and rollouts/ in the run directory, and check rollout.rewards.",
                    "unsuitable-data",
                )
            order = epoch_order([self.epoch_size], [1.0], self.config.seed, epoch)
            with contextlib.closing(self.prefetched(self._steps_of_pass(order[position:]))) as steps:
                for indices, batches in steps:
                    consumed += len(indices)
                    skipped += indices
                    if batches:
                        began = time.perf_counter()
                        yield skipped, batches
                        self.seconds_trained += time.perf_counter() - began
                        self.log.warn_of_mismatch(self.trainer.train_metrics)
                        skipped = []

    def _rest_before_round(self, consumed: int) -> list[int]:
        """Return the examples without targets at the end of a round, if a stop came after the next one was sampled."""
        start, rest = self.next_round * self.options.num_iterations * self.epoch_size, []
        while consumed + len(rest) < start:
            epoch, position = divmod(consumed + len(rest), self.epoch_size)
            rest += epoch_order([self.epoch_size], [1.0], self.config.seed, epoch)[position:].tolist()
        return rest

    def _steps_of_pass(self, order: np.ndarray) -> Iterator[tuple[list[int], list[Batch]]]:
        """Yield (indices of the step's examples, this rank's micro-batches of those with something to train on)."""
        for start in range(0, len(order), self.config.total_batch_size):
            indices = order[start : start + self.config.total_batch_size]
            trained = indices[self.examples.is_trained[indices]]
            yield indices.tolist(), self.micro_batches(trained) if len(trained) else []

    # ------------------------------------------------------------------------------------------- making a round

    def _sample(self, number: int) -> None:
        """Sample a round. Raise Interrupted after a signal."""
        options, n = self.options, self.epoch_size
        if self.number is not None:
            self.drawn += self.n_drawn
        seconds = {"train": self.seconds_trained} if self.seconds_trained > 0 else {}  # on the round before
        self.seconds_trained = 0.0
        groups: list[Group] = []
        everyone: list[Group] = []
        self.n_drawn = 0
        self._check_interrupted()
        while len(groups) < n:
            failpoint("round.draw")
            self.trainer.parallel.set_status(f"round {number + 1}")
            prompts = self.draw(n - len(groups))
            failpoint("round.sample")
            with _timed(seconds, "generate"):
                key, is_updated = (self.config.seed, TRAIN, number), not everyone
                episodes = self.play(prompts, key, options.num_generations, is_updated)
            failpoint("round.reward")
            with _timed(seconds, "judge"):
                judgements = self.judge(episodes)
            failpoint("round.gather")
            drawn = self._gather(episodes, judgements)
            everyone += drawn
            last = self.n_drawn >= n * options.max_draws or options.zero_variance_groups != "resample"
            groups += [group for group in drawn if last or not has_zero_variance(group[0])]
        self.number = number
        answers = [answers for answers, _ in groups]
        failpoint("round.logps")
        with _timed(seconds, "logps"):
            mismatch = self._set(answers, number)
        self.log(groups, everyone, seconds, mismatch)

    def draw(self, n: int) -> list[Prompt]:
        """Return this rank's part of the next n prompts."""
        first = self.n_drawn
        self.n_drawn += n
        mine = [number for number in range(first, first + n) if number % self.world_size == self.rank]
        return [self.prompts.in_order(self.drawn + number, number) for number in mine]

    def play(
        self, prompts: list[Prompt], key: tuple[int, ...], n: int, is_updated: bool = True, **changes: Any
    ) -> list[list[Episode]]:
        """Return n conversations for each prompt, sampled from the policy.

        Args:
            prompts: The prompts.
            key: Integers that determine the random numbers, together with the numbers of prompt and response.
            n: Conversations for each prompt.
            is_updated: Whether the weights can differ from those of the last call.
            changes: Options of rollouts that differ.

        Raises:
            Interrupted: A signal has arrived, on any rank.
        """
        options = dataclasses.replace(self.options, **changes)
        player = Player(self.trainer, self.engine, options, self.make_environment)
        episodes: list[list[Episode]] = []
        with refreshed(self.engine, is_updated):
            with contextlib.suppress(Interrupted):
                episodes = player.play(prompts, key, n)
            self.trainer.parallel.wait_for_ranks()
        self._check_interrupted()
        return episodes

    def judge(self, groups: list[list[Episode]]) -> list[list[Judgement]]:
        """Return the rewards of the conversations of each prompt. Raise Interrupted after a signal, on any rank."""
        episodes = [episode for group in groups for episode in group]
        judgements = [Judgement(0.0) for _ in episodes]
        if self.rewards:
            answers = [_answer(episode) for episode in episodes]
            results = []
            for reward, judge in zip(self.rewards, self.judges, strict=True):
                with contextlib.suppress(Interrupted):
                    results.append(judge(episodes) if judge else self.workers.call(reward, answers))
                self.trainer.parallel.wait_for_ranks()
                self._check_interrupted()
            judgements = combine(results, self.rewards, self.failures)
        for judgement, episode in zip(judgements, episodes, strict=True):
            judgement.total += sum(episode.token_rewards)
            if self.options.truncated == "zero" and not episode.ended:
                judgement.total, judgement.tokens = 0.0, []
                episode.token_rewards = [0.0] * len(episode.ids)
        remaining = iter(judgements)
        return [[next(remaining) for _ in group] for group in groups]

    def _check_interrupted(self) -> None:
        if self.trainer.is_interrupted():
            self.workers.close()  # they can be in a call
            raise Interrupted

    def _gather(self, groups: list[list[Episode]], judgements: list[list[Judgement]]) -> list[Group]:
        """Return the answers to the prompts of all ranks, in the order of the prompts."""
        pairs = [list(zip(group, of_group, strict=True)) for group, of_group in zip(groups, judgements, strict=True)]
        answers = gather_groups([[judged_answer(*pair) for pair in group] for group in pairs], self.trainer.parallel)
        of_ranks = self.trainer.parallel.gather([[stats_of(*pair) for pair in group] for group in pairs])
        everyone = list(zip(answers, itertools.chain(*of_ranks), strict=True))
        everyone.sort(key=lambda group: group[1][0]["group"])
        return everyone

    def _set(self, groups: list[list[JudgedAnswer]], number: int) -> dict[str, float]:
        """Make the examples of the round from its answers, and return the metrics of their log-probabilities."""
        loss = self.trainer.loss
        examples = make_examples(groups, loss.example_type, self.options, "teacher" in loss.requires)
        if not any(examples):
            self._use(None)
            return {}
        cache = as_cache(examples, *_names(number))
        self._use(cache)
        mismatch = add_logps(self, cache)
        add_features(loss, [cache])
        if self.is_one_step:  # they were needed for the KL in the rewards or the correction
            cache.token_features.pop("old_logps", None)
        if self.options.truncated == "mask":  # after the advantages, in which these answers count
            for document in np.flatnonzero(cache.doc_features["ended"] == 0):
                cache.mask[cache.offsets[document] : cache.offsets[document + 1]] = 0
        return mismatch

    def _use(self, cache: TokenCache | None) -> None:
        self.examples = RoundData(cache, self.epoch_size)
        for cached in ("lengths", "sizes"):
            vars(self).pop(cached, None)

    def evaluate(self, loader: MicrobatchLoader, results: list[dict[str, Any]] | None = None) -> dict[str, float]:
        """Return the metrics of answers to the prompts of a loader; {} after a signal. All ranks must call it.

        The random numbers are the same in each evaluation, so that differences are those of the policy. `results`
        receives those of each prompt.
        """
        began = time.perf_counter()
        try:
            metrics = self._evaluate(self._eval_prompts(loader), results)
        except Interrupted:
            return {}
        self.seconds_trained -= time.perf_counter() - began
        return {} if self.trainer.is_interrupted() else metrics

    def _evaluate(self, prompts: Prompts, results: list[dict[str, Any]] | None) -> dict[str, float]:
        options, key = self.options, (self.config.seed, EVAL)
        mine = [prompts.get(i, i) for i in range(self.rank, len(prompts.examples), self.world_size)]
        temperature = options.temperature if options.eval_temperature is None else options.eval_temperature
        episodes = self.play(mine, key, options.eval_generations, temperature=temperature)
        groups = [stats for _, stats in self._gather(episodes, self.judge(episodes))]
        self.log.warn_of_failures()
        metrics = answer_metrics(groups) | pass_at_k(groups)
        if results is not None:
            results += map(prompt_result, groups)
        if self.config.eval_generate.n_examples:
            metrics["exact_match"] = exact_match(self, prompts, key)
        return metrics

    def _eval_prompts(self, loader: MicrobatchLoader) -> Prompts:
        if self.eval_prompts is None or self.eval_prompts.examples is not loader.examples:
            self.eval_prompts = Prompts(loader.examples, self.config.seed)
        return self.eval_prompts

    def check_references(self, loader: MicrobatchLoader | None) -> None:
        """Raise DataError if an evaluation compares greedy answers with those of the rows, and a row has none."""
        if loader is not None and self.config.eval_generate.n_examples:
            references(self._eval_prompts(loader), self.config.eval_generate.n_examples)

    # ----------------------------------------------------------------------------------------------- checkpoints

    def state(self, consumed: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """Return what determines the next round and, within a round, the round itself."""
        number, position = divmod(consumed, self.epoch_size * self.options.num_iterations)
        if self.number is not None and (self.number, 0) >= (number, position):  # without a step: it is sampled again
            return {"drawn": self.drawn, "round": None, "next_round": self.number}, {}
        if position == 0:
            return {"drawn": self.drawn + self.n_drawn, "round": None}, {}
        state = {"drawn": self.drawn, "round": self.number, "n_drawn": self.n_drawn}
        return state, tensors_of(self.examples.caches[0]) if self.examples.caches else {}

    def restore(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        self.drawn, self.number = state["drawn"], state["round"]
        self.n_drawn, self.next_round = state.get("n_drawn", 0), state.get("next_round", 0)
        if self.number is not None:
            self._use(TokenCache(tensors, {}, [], *_names(self.number)) if tensors else None)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def _answer(episode: Episode) -> Answer:
    sampled = [token for token, own in zip(episode.ids, episode.mask, strict=True) if own]
    row, number = dict(episode.prompt.row), episode.prompt.number
    return Answer(episode.text, episode.messages, row, sampled, episode.ended, episode.turns, number)


def _names(number: int) -> tuple[str, Path]:
    """Return the source and the path of a round's cache, which has no file."""
    return f"round {number + 1}", Path(f"round-{number + 1}.safetensors")


def make_rounds(trainer: "Trainer", engine: Engine) -> Rounds:
    """Return the loader of a run's rounds, with its rewards and its environment.

    Raises:
        ConfigError: A reward or the environment is unknown or has invalid options.
    """
    issues = ConfigIssues(ConfigSource("rollout"))
    rewards = build_rewards(trainer.config.rollout.rewards, issues)
    make_environment = build_environment(trainer.config.rollout.environment, issues)
    issues.raise_if_any()
    return Rounds(trainer, engine, rewards, make_environment)


def sample_rounds(trainer: "Trainer") -> None:
    """Replace the loader of a trainer, which has the prompts, by one that samples the responses.

    Raises:
        ConfigError: A reward or the environment is unknown or has invalid options, or the model cannot be sampled from.
    """
    trainer.train_loader = make_rounds(trainer, build_engine(trainer))
    trainer.warnings += trainer.train_loader.prompts.without_reference(trainer.train_loader.rewards)
    if not CAN_FORK:
        trainer.warnings.append("rollout.reward_timeout: has no effect, because this system cannot fork processes")
    trainer.train_loader.check_references(trainer.eval_loader)
    trainer.total_steps = trainer.train_loader.total_steps
    trainer.warmup = warmup_steps(trainer.config, trainer.total_steps)
