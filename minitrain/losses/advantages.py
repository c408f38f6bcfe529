"""How much better than expected each token of a rollout was: made once of whole data files, before training begins.

All in float64 over the response tokens alone, n of them in D rollouts side by side. What stands at other places of a
column is never read, so it has no part in a sum, a mean or a deviation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitrain.errors import DataError

from .base import AddedFeatures, DataFile

ADVANTAGES = ("grpo", "rloo", "reinforce++", "gae", "given")
DISCOUNTED = ("gae", "reinforce++")  # those that tell one token of a rollout from another
ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # in nats; exp overflows float32 at 88, and then makes a gradient of 0 * inf = NaN (trl#6637)


class Rollouts:
    """The response tokens of several data files, one rollout after another."""

    def __init__(self, files: Sequence[DataFile]):
        self.files = files
        self.places = [file.mask.bool() for file in files]  # [T] of each file
        self.lengths = torch.cat([self._lengths(file) for file in files])  # [D]
        self.stops = self.lengths.cumsum(0)  # [D]

    @staticmethod
    def _lengths(file: DataFile) -> Tensor:
        """Response tokens of each of its rollouts -> [D of the file]."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), file.mask.long().cumsum(0)])  # [T + 1]
        return before[torch.from_numpy(file.offsets)].diff()

    def column(self, name: str, use: str) -> Tensor:
        """Numbers of the tokens -> [n]. Raises DataError where a file has none; `use` is what they are needed for."""
        for file in self.files:
            if name not in file.token_features:
                raise DataError(
                    f"{file.source}: {use} needs {name}, one number for each token of the response.", "invalid-row"
                )
        pairs = zip(self.files, self.places, strict=True)
        return torch.cat([file.token_features[name][places] for file, places in pairs]).double()

    def rewards(self) -> Tensor:
        """What each rollout earned -> [D]. Raises DataError where some of a file have no reward."""
        for file in self.files:
            if missing := int((file.doc_features["reward"] != file.doc_features["reward"]).sum()):
                raise DataError(
                    f"{file.source}: {missing} rows have no reward. Give them one, or with "
                    "loss.advantage_estimator=given an advantage (and returns, for a value head).",
                    "invalid-row",
                )
        return torch.cat([torch.from_numpy(file.doc_features["reward"]) for file in self.files]).double()

    def groups(self) -> Tensor:
        """The number of each rollout's prompt -> [D] int64."""
        values = torch.cat([torch.from_numpy(file.doc_features["group"]) for file in self.files])
        return values.unique(return_inverse=True)[1]

    def of_tokens(self, numbers: Tensor) -> Tensor:
        """[D] -> [n], the number of its rollout for each token."""
        return numbers.repeat_interleave(self.lengths)

    def sums(self, numbers: Tensor) -> Tensor:
        """[n] -> [D]."""
        which = self.of_tokens(torch.arange(len(self.lengths)))  # [n]
        return numbers.new_zeros(len(self.lengths)).index_add(0, which, numbers)

    def as_features(self, **columns: Tensor) -> list[AddedFeatures]:
        """Return columns [n] as features of the files, 0 where there is no response."""
        lengths = [int(places.sum()) for places in self.places]
        parts = {name: numbers.float().split(lengths) for name, numbers in columns.items()}
        return [
            AddedFeatures(
                file,
                token_features={name: torch.zeros(len(at)).masked_scatter(at, part[i]) for name, part in parts.items()},
            )
            for i, (file, at) in enumerate(zip(self.files, self.places, strict=True))
        ]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), at most exp(MAX_LOG_RATIO); what is bounded has gradient 0."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def kl_estimate(difference: Tensor, estimator: str) -> Tensor:
    """KL of each sampled token from d = log p - log p_ref: k1 d, k2 d^2 / 2, k3 exp(-d) + d - 1 (Schulman 2020).

    k3 takes d to be at least -MAX_LOG_RATIO, and has gradient 0 below it.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    bounded = difference.clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


def token_rewards(rewards: Tensor, stops: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """s_t = -kl_coef kl_t + [t is the last] reward -> [n] (arXiv 1909.08593, eq. 2)."""
    earned = rewards.new_zeros(int(stops[-1])) if kl is None else -kl_coef * kl  # [n]
    return earned.index_add(0, stops - 1, rewards)


def discounted(numbers: Tensor, lengths: Tensor, stops: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1} within each rollout -> [n]."""
    result = numbers.clone()
    for back in range(1, int(lengths.max())):
        places = stops[lengths > back] - 1 - back
        result[places] += factor * result[places + 1]
    return result


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, stops: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = s_t + gamma V_{t+1} - V_t -> [n] (arXiv 1506.02438, eq. 16).

    V behind the last token is 0: a rollout has ended there.
    """
    following = values.roll(-1).index_fill(0, stops - 1, 0.0)  # [n]
    return discounted(rewards + gamma * following - values, lengths, stops, gamma * lam)


def group_relative(scores: Tensor, groups: Tensor, scale: bool) -> Tensor:
    """(R - mean of the group) / its deviation (of a sample: n - 1) -> [D]; 0 in a group of one (arXiv 2402.03300)."""
    sums, counts = _per_group(scores, groups)
    centred = scores - (sums / counts)[groups]
    if not scale:
        return centred
    squares, _ = _per_group(centred**2, groups)
    return centred / ((squares / (counts - 1).clamp_min(1)).sqrt() + 1e-6)[groups]


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the others of its group -> [D]; 0 in a group of one (arXiv 2402.14740)."""
    sums, counts = _per_group(scores, groups)
    others = (sums[groups] - scores) / (counts[groups] - 1).clamp_min(1)
    return torch.where(counts[groups] > 1, scores - others, 0.0)


def whiten(numbers: Tensor) -> Tensor:
    """To mean 0 and deviation 1 -> [n]."""
    centred = numbers - numbers.mean()
    return centred / ((centred**2).sum() / max(1, len(numbers) - 1) + 1e-8).sqrt()


def _per_group(numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of each group."""
    empty = numbers.new_zeros(int(groups.max()) + 1)
    return empty.index_add(0, groups, numbers), empty.index_add(0, groups, torch.ones_like(numbers))


def common_columns(files: Sequence[DataFile]) -> frozenset[str]:
    """The columns that all files have. Raises DataError where some have what others have not."""
    for file in files:
        if unlike := sorted(set(file.token_features) ^ set(files[0].token_features)):
            raise DataError(
                f"{file.source} and {files[0].source}: one has {', '.join(unlike)} and the other has not; "
                "all files have to.",
                "mismatch",
            )
    return frozenset(files[0].token_features)


def apart(train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> list[Sequence[DataFile]]:
    """What is prepared together: files to train on, and those that only an evaluation sees."""
    held_out = [file for file in evaluation if not any(file is other for other in train)]
    return [files for files in (train, held_out) if files]


def penalised_rewards(rollouts: Rollouts, kl_coef: float, estimator: str) -> Tensor:
    """`token_rewards` with the KL of the sampling policy to the reference, as the files tell it -> [n].

    Raises DataError where kl_coef is above 0 and a file has no old_logps or ref_logps.
    """
    kl = None
    if kl_coef > 0:
        old, ref = (rollouts.column(name, "a KL penalty in the rewards") for name in ("old_logps", "ref_logps"))
        kl = kl_estimate(old - ref, estimator)
    return token_rewards(rollouts.rewards(), rollouts.stops, kl, kl_coef)


def estimate(
    rollouts: Rollouts, rewards: Tensor, kind: str, gamma: float, lam: float, scale: bool
) -> tuple[Tensor, Tensor]:
    """(advantages [n], returns [n]) from rewards [n]; `kind` is one of `ADVANTAGES`, but not given.

    With gae the returns are A + V, else what was earned from each token on, discounted. Raises DataError for gae of
    files that have no values.
    """
    if kind == "gae":
        values = rollouts.column("values", "gae")
        advantages = gae(rewards, values, rollouts.lengths, rollouts.stops, gamma, lam)
        return advantages, advantages + values
    returns = discounted(rewards, rollouts.lengths, rollouts.stops, gamma)
    if kind == "reinforce++":  # arXiv 2501.03262, eq. 5
        return returns, returns
    scores, groups = rollouts.sums(rewards), rollouts.groups()  # [D], [D]
    relative = group_relative(scores, groups, scale) if kind == "grpo" else leave_one_out(scores, groups)
    return rollouts.of_tokens(relative), returns
