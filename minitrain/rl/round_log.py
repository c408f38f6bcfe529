"""The log of rounds: metrics, a line on the console, warnings, and answers in `rollouts/` of the run directory."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minitrain.data.cache import TokenCache
from minitrain.training.after_step import warn
from minitrain.training.atomic_dir import replace_file
from minitrain.training.metrics_log import FEW_ENDED, LARGE_MISMATCH, ROLLOUTS, round_file

from .documents import EQUAL
from .engine import MAX_CORRECTED
from .reports import Group, Stats, answer_metrics, group_metrics

if TYPE_CHECKING:
    from .rounds import Rounds

OF_REWARDS = ("reward", "reward_std", "zero_variance", "solved", "failed", "unjudged")


class RoundLog:
    """Logs each round when it has been sampled and judged."""

    def __init__(self, rounds: "Rounds"):
        self.rounds = rounds
        self.has_warned_of_mismatch = False
        is_distillation = "teacher" in rounds.trainer.loss.requires
        self.has_rewards = bool(rounds.rewards) or (rounds.make_environment is not None and not is_distillation)

    def __call__(
        self, trained: Sequence[Group], drawn: Sequence[Group], seconds: dict[str, float], more: dict[str, float]
    ) -> None:
        """Log the current round.

        Args:
            trained: The answers to each prompt of the round.
            drawn: The answers to each prompt that was drawn.
            seconds: The time of each part.
            more: Other metrics.
        """
        trainer, number = self.rounds.trainer, self.rounds.number
        if trainer.logger is None or trainer.parallel.rank > 0:
            return
        keys = [reward.key for reward in self.rounds.rewards]
        stats = [one for _, of_group in drawn for one in of_group]
        metrics = {"round": number + 1} | answer_metrics([of_group for _, of_group in drawn])
        metrics |= group_metrics(drawn, keys) | {"drawn": self.rounds.n_drawn} | more
        metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
        metrics["tokens_per_second"] = sum(one["tokens"] for one in stats) / max(seconds["generate"], 1e-9)
        if not self.has_rewards:
            metrics = {name: value for name, value in metrics.items() if name not in OF_REWARDS}
        trainer.logger.log(trainer.step, "rollout", metrics)
        if self._is_shown(number):
            trainer.logger.info(round_line(number + 1, self._n_rounds(), metrics))
        self.warn_of_failures()
        self._warn_if_few_ended(metrics)
        self.warn_of_mismatch(metrics)
        if self.rounds.options.save_samples:
            if self.rounds.examples.caches:
                add_advantages(trained, self.rounds.examples.caches[0])
            self._save(number, drawn)

    def warn_of_failures(self) -> None:
        """Print how often reward functions have failed since the last call, and why."""
        for problem, count in self.rounds.failures.items():
            warn(self.rounds.trainer, f"warning: reward {problem} ({count} answers)")
        self.rounds.failures.clear()

    def warn_of_mismatch(self, metrics: dict[str, float]) -> None:
        """Warn once if sampling and training differ, by metrics of a round, or of training in rounds of one step."""
        if metrics.get("mismatch", 0.0) > LARGE_MISMATCH and not self.has_warned_of_mismatch:
            self.has_warned_of_mismatch = True
            advice = "Set rollout.importance_correction, or model.policy_dtype=float32"
            if self.rounds.options.engine == "vllm" and metrics["mismatch"] > MAX_CORRECTED:
                advice = "The server does not have the current weights: see its log, or use rollout.engine=local"
            warn(
                self.rounds.trainer,
                f"warning: log-probabilities in sampling and in training differ by {metrics['mismatch']:.2g} per token "
                f"(mismatch). {advice}",
            )

    def _steps_per_round(self) -> int:
        return self.rounds.steps_per_epoch * self.rounds.options.num_iterations

    def _n_rounds(self) -> int:
        return math.ceil(self.rounds.trainer.total_steps / self._steps_per_round())

    def _is_shown(self, number: int) -> bool:
        """Return whether the round is the first, or has a step after which the console gets a line."""
        trainer, every = self.rounds.trainer, self.rounds.config.log_every_steps
        last = trainer.step + self._steps_per_round()
        return number == 0 or last // every > trainer.step // every or last >= trainer.total_steps

    def _warn_if_few_ended(self, metrics: dict[str, float]) -> None:
        if metrics["round"] == 1 and metrics["ended"] < FEW_ENDED:
            self.rounds.trainer.logger.warning(
                f"warning: only {metrics['ended']:.0%} of the answers ended by themselves. Raise "
                f"rollout.max_new_tokens={self.rounds.options.max_new_tokens}, or set rollout.stop"
            )

    def _save(self, number: int, groups: Sequence[Group]) -> None:
        """Write the first answers of the round, in full groups."""
        trainer, n = self.rounds.trainer, self.rounds.options.save_samples
        n_groups = len(groups) if n < 0 else math.ceil(n / self.rounds.options.num_generations)
        file = round_file(trainer.run.path, number + 1)
        rows = [
            {"round": number + 1, "step": trainer.step} | {key: _plain(value) for key, value in one.items()}
            for _, stats in groups[:n_groups]
            for one in stats
        ]
        try:
            file.parent.mkdir(exist_ok=True)
            replace_file(file, [(json.dumps(row) + "\n").encode() for row in rows])
        except OSError as error:
            trainer.logger.warning(f"warning: {ROLLOUTS}/{file.name} cannot be written: {error.strerror}")


def add_advantages(groups: Sequence[Group], cache: TokenCache) -> None:
    """Add `advantage` to what is logged about each answer whose tokens all have the same advantage.

    Args:
        groups: The answers to each prompt of the round.
        cache: The documents of the round. Those of a group are its answers with a reward, in their order.
    """
    if "advantages" not in cache.token_features or "group" not in cache.doc_features:
        return
    remaining = [
        iter([one for answer, one in zip(*group, strict=True) if not math.isnan(answer.reward)]) for group in groups
    ]
    of_tokens, targets = cache.token_features["advantages"].numpy(), cache.mask.numpy() > 0  # [T], [T]
    for document, number in enumerate(cache.doc_features["group"].astype(int)):
        stats: Stats = next(remaining[number])
        span = slice(cache.offsets[document], cache.offsets[document + 1])
        advantages = of_tokens[span][targets[span]]
        if len(advantages) and advantages.max() - advantages.min() < EQUAL:
            stats["advantage"] = float(advantages[0])


def round_line(number: int, total: int, metrics: dict[str, float]) -> str:
    """Return the console line of a round."""
    parts = [f"round {number:>{len(str(total))}}/{total}"]
    formats = {"reward": ".4g", "reward_std": ".2g", "zero_variance": ".0%", "ended": ".0%", "length": ".1f"}
    parts += [f"{name} {metrics[name]:{form}}" for name, form in formats.items() if name in metrics]
    if metrics.get("unjudged"):
        parts.append(f"unjudged {metrics['unjudged']:.0%}")
    return "  ".join([*parts, f"sampled {metrics['tokens_per_second']:,.0f} tok/s"])


def _plain(value: object) -> object:
    """Return a value that every JSON parser reads; None for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
