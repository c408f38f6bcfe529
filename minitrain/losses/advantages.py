"""Advantages and returns of rollouts, computed once from the full data files before training starts.

Everything is float64 over the n response tokens of D concatenated rollouts. Other positions of a column are never read,
so they cannot affect a sum, a mean or a standard deviation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitrain.errors import DataError

from .base import AddedFeatures, DataFile

ADVANTAGES = ("grpo", "rloo", "reinforce++", "reinforce++-baseline", "gae", "given")
GROUPED = ("grpo", "rloo", "reinforce++-baseline")  # estimators that compare the rollouts of a prompt
DISCOUNTED = ("gae", "reinforce++")  # estimators whose advantages differ between the tokens of a rollout
ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # in nats; exp overflows float32 at 88, and then makes a gradient of 0 * inf = NaN (trl#6637)


class Rollouts:
    """The response tokens of several data files, concatenated.

    Attributes:
        masks: Which tokens of each file are response tokens, bool [T] each.
        lengths: Response tokens of each rollout, [D].
        stops: Index just after the last response token of each rollout, [D].
    """

    def __init__(self, files: Sequence[DataFile]):
        self.files = files
        self.masks = [file.mask.bool() for file in files]
        self.lengths = torch.cat([self._lengths(file) for file in files])
        self.stops = self.lengths.cumsum(0)

    @staticmethod
    def _lengths(file: DataFile) -> Tensor:
        """Return the number of response tokens of each rollout of a file -> [D of the file]."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), file.mask.long().cumsum(0)])  # [T + 1]
        return before[torch.from_numpy(file.offsets)].diff()

    def column(self, name: str, purpose: str) -> Tensor:
        """Return a token column -> [n]. Raise DataError, which names `purpose`, if a file does not have it."""
        for file in self.files:
            if name not in file.token_features:
                raise DataError(
                    f"{file.source}: {purpose} needs {name}, one number for each token of the response.", "invalid-row"
                )
        pairs = zip(self.files, self.masks, strict=True)
        return torch.cat([file.token_features[name][mask] for file, mask in pairs]).double()

    def rewards(self) -> Tensor:
        """Return the reward of each rollout -> [D]. Raise DataError if some of a file have none."""
        for file in self.files:
            if missing := int((file.doc_features["reward"] != file.doc_features["reward"]).sum()):
                raise DataError(
                    f"{file.source}: {missing} rows have no reward. Add rewards, or set "
                    "loss.advantage_estimator=given and add advantages (and returns, for a value head).",
                    "invalid-row",
                )
        return torch.cat([torch.from_numpy(file.doc_features["reward"]) for file in self.files]).double()

    def groups(self) -> Tensor:
        """Return the index of each rollout's prompt -> [D] int64."""
        values = torch.cat([torch.from_numpy(file.doc_features["group"]) for file in self.files])
        return values.unique(return_inverse=True)[1]

    def per_token(self, numbers: Tensor) -> Tensor:
        """Repeat a number of each rollout for its tokens, [D] -> [n]."""
        return numbers.repeat_interleave(self.lengths)

    def sums(self, numbers: Tensor) -> Tensor:
        """Sum over the tokens of each rollout, [n] -> [D]."""
        rollout = self.per_token(torch.arange(len(self.lengths)))  # [n]
        return numbers.new_zeros(len(self.lengths)).index_add(0, rollout, numbers)

    def as_features(self, **columns: Tensor) -> list[AddedFeatures]:
        """Return columns [n] as features of the files, 0 where there is no response."""
        lengths = [int(mask.sum()) for mask in self.masks]
        by_file = {name: numbers.float().split(lengths) for name, numbers in columns.items()}
        return [
            AddedFeatures(
                file,
                token_features={
                    name: torch.zeros(len(mask)).masked_scatter(mask, numbers[i]) for name, numbers in by_file.items()
                },
            )
            for i, (file, mask) in enumerate(zip(self.files, self.masks, strict=True))
        ]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), at most exp(MAX_LOG_RATIO). The gradient is 0 where the bound applies."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def kl_estimate(difference: Tensor, estimator: str) -> Tensor:
    """Estimate the KL at each sampled token from d = log p - log p_ref (Schulman 2020).

    k1 is d, k2 is d^2 / 2, k3 is exp(-d) + d - 1. k3 clamps d at -MAX_LOG_RATIO; its gradient is 0 below that.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    bounded = difference.clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


def token_rewards(rewards: Tensor, stops: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Return s_t = -kl_coef kl_t + [t is the last token] reward -> [n] (arXiv 1909.08593, eq. 2).

    Args:
        rewards: Reward of each rollout, [D].
        stops: Index just after the last token of each rollout, [D].
        kl: KL at each token, [n].
    """
    earned = rewards.new_zeros(int(stops[-1])) if kl is None else -kl_coef * kl  # [n]
    return earned.index_add(0, stops - 1, rewards)


def discounted(numbers: Tensor, lengths: Tensor, stops: Tensor, factor: float) -> Tensor:
    """Return y_t = x_t + factor y_{t+1} within each rollout, [n] -> [n]."""
    result = numbers.clone()
    for back in range(1, int(lengths.max())):
        tokens = stops[lengths > back] - 1 - back
        result[tokens] += factor * result[tokens + 1]
    return result


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, stops: Tensor, gamma: float, lam: float) -> Tensor:
    """Return A_t = delta_t + gamma lam A_{t+1}, delta_t = s_t + gamma V_{t+1} - V_t (arXiv 1506.02438, eq. 16).

    V after the last token is 0, because the rollout ends there.

    Args:
        rewards: s, reward of each token, [n].
        values: V, value of each token, [n].
        lengths: Tokens of each rollout, [D].
        stops: Index just after the last token of each rollout, [D].

    Returns:
        The advantages, [n].
    """
    following = values.roll(-1).index_fill(0, stops - 1, 0.0)  # [n]
    return discounted(rewards + gamma * following - values, lengths, stops, gamma * lam)


def group_relative(scores: Tensor, groups: Tensor, scale: str = "none") -> Tensor:
    """Return (R - group mean) / standard deviation (n - 1) -> [D]; 0 in a group of one (arXiv 2402.03300).

    Args:
        scores: R of each rollout, [D].
        groups: Index of the prompt of each rollout, [D].
        scale: group: the deviation within the group. batch: that of all R (arXiv 2508.08221). none: 1.
    """
    sums, counts = _per_group(scores, groups)
    centered = scores - (sums / counts)[groups]
    if scale == "none":
        return centered
    if scale == "batch":
        return centered / (scores.std(correction=min(1, len(scores) - 1)) + 1e-6)
    squares, _ = _per_group(centered**2, groups)
    return centered / ((squares / (counts - 1).clamp_min(1)).sqrt() + 1e-6)[groups]


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Return R - mean of the rest of its group -> [D]; 0 in a group of one (arXiv 2402.14740)."""
    sums, counts = _per_group(scores, groups)
    others = (sums[groups] - scores) / (counts[groups] - 1).clamp_min(1)
    return torch.where(counts[groups] > 1, scores - others, 0.0)


def whiten(numbers: Tensor) -> Tensor:
    """Scale to mean 0 and standard deviation 1, [n] -> [n]."""
    centered = numbers - numbers.mean()
    return centered / ((centered**2).sum() / max(1, len(numbers) - 1) + 1e-8).sqrt()


def _per_group(numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and the count of each group."""
    empty = numbers.new_zeros(int(groups.max()) + 1)
    return empty.index_add(0, groups, numbers), empty.index_add(0, groups, torch.ones_like(numbers))


def common_columns(files: Sequence[DataFile]) -> frozenset[str]:
    """Return the token columns of the files. Raise DataError unless all files have the same ones."""
    for file in files:
        if different := sorted(set(file.token_features) ^ set(files[0].token_features)):
            raise DataError(
                f"{file.source} and {files[0].source}: only one of them has {', '.join(different)}. Add the column to "
                "all files, or remove it.",
                "mismatch",
            )
    return frozenset(files[0].token_features)


def split_held_out(train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> list[Sequence[DataFile]]:
    """Return the files whose statistics are computed together: those of training, then those of evaluation alone."""
    held_out = [file for file in evaluation if not any(file is other for other in train)]
    return [files for files in (train, held_out) if files]


def penalized_rewards(rollouts: Rollouts, kl_coef: float, estimator: str) -> Tensor:
    """Return token rewards minus the KL of the sampling policy to the reference, from the files' columns -> [n].

    What a file's column `token_rewards` does not give to a token of a rollout belongs to its last one.

    Raises:
        DataError: If kl_coef is above 0 and a file has no old_logps or ref_logps.
    """
    kl = None
    if kl_coef > 0:
        old, ref = (rollouts.column(name, "a KL penalty in the rewards") for name in ("old_logps", "ref_logps"))
        kl = kl_estimate(old - ref, estimator)
    rewards = rollouts.rewards()
    if all("token_rewards" in file.token_features for file in rollouts.files):
        of_tokens = rollouts.column("token_rewards", "token_rewards")
        return of_tokens + token_rewards(rewards - rollouts.sums(of_tokens), rollouts.stops, kl, kl_coef)
    return token_rewards(rewards, rollouts.stops, kl, kl_coef)


def estimate(
    rollouts: Rollouts, rewards: Tensor, estimator: str, gamma: float, lam: float, scale: str
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns.

    Args:
        rewards: Reward of each token, [n].
        estimator: One of `ADVANTAGES`, but not "given".
        scale: The standard deviation that grpo divides by: group, batch or none.

    Returns:
        Advantages [n] and returns [n]. The returns are A + V with gae, else the discounted sum of later rewards.

    Raises:
        DataError: For gae if a file has no values.
    """
    if estimator == "gae":
        values = rollouts.column("values", "gae")
        advantages = gae(rewards, values, rollouts.lengths, rollouts.stops, gamma, lam)
        return advantages, advantages + values
    returns = discounted(rewards, rollouts.lengths, rollouts.stops, gamma)
    if estimator == "reinforce++":  # arXiv 2501.03262, eq. 5
        return returns, returns
    scores, groups = rollouts.sums(rewards), rollouts.groups()  # [D], [D]
    if estimator == "rloo":
        return rollouts.per_token(leave_one_out(scores, groups)), returns
    return rollouts.per_token(group_relative(scores, groups, scale if estimator == "grpo" else "none")), returns
