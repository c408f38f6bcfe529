"""The checks of `minitrain doctor` about runs that sample answers."""

import math
from itertools import pairwise
from statistics import fmean, pstdev

from minitrain.training.metrics_log import FEW_ENDED, LARGE_MISMATCH, History

from .findings import FLAT, MIN_LINES, RISE, Check, Finding, change, format_steps, trend_of

FIRST_ROUNDS = 3
ZERO_VARIANCE = 0.5
FEW_ANSWERS = 3  # largest num_generations with which rewards are often equal by chance
SOLVED = 0.5  # fraction of solved prompts above which a reward or an entropy need not change
FALL = 0.1  # relative fall of a metric that is evaluated on sampled answers
LONGER = 1.5
LOW_ENTROPY = 0.1  # nats
UNJUDGED = 0.1
NOT_COMPARED = ("sft", "dft", "kto", "kd", "value")  # losses that do not compare the answers to a prompt
READ = "read some answers with `minitrain rollouts`."


def equal_rewards(run: History) -> Finding | None:
    first = run.values("rollout/zero_variance")[:FIRST_ROUNDS]
    rewards = run.values("rollout/reward")[: len(first)]
    if not rewards or min(first) < 1 or not _compares(run):
        return None
    reward, failed = fmean(rewards), run.values("rollout/failed")[:1]
    return Finding(
        "At the start, all answers to a prompt have the same reward.",
        f"In the first {len(first)} rounds zero_variance is 1, and the mean reward is {reward:.3g}. So no prompt has a "
        "gradient.",
        "harder prompts."
        if failed == [0.0]
        else f"easier prompts, sft before, or rewards with more than two values; {READ}",
    )


def zero_variance(run: History) -> Finding | None:
    equal = run.values("rollout/zero_variance")
    if len(equal) < MIN_LINES or not _compares(run):
        return None
    solved, failed = (fmean(run.values(f"rollout/{name}") or [0.0]) for name in ("solved", "failed"))
    n = run.setting("rollout.num_generations", int) or math.inf
    few = n <= FEW_ANSWERS
    if fmean(equal) - (0 if few else solved) <= ZERO_VARIANCE:
        return None
    parts = f" ({solved:.0%} all right, {failed:.0%} all wrong)" if solved or failed else ""
    return Finding(
        "Most prompts have no gradient.",
        f"For {fmean(equal):.0%} of the prompts of all rounds, the answers have the same reward{parts}."
        + (f" With {n} answers to a prompt, this is often chance." if few else ""),
        "rollout.num_generations=8."
        if few
        else "easier prompts, sft before, rewards with more than two values, or rollout.zero_variance_groups=resample.",
    )


def flat_reward(run: History) -> Finding | None:
    values = run.values("rollout/reward")
    if len(values) < MIN_LINES or _is_solved(run) or falling_reward(run):
        return None
    trend = trend_of(values)
    in_first_round = trend.last - values[0] > max(FLAT * abs(values[0]), 2 * pstdev(values[1:]))
    if trend.last - trend.first > trend.threshold or in_first_round:
        return None
    return Finding(
        "The reward does not rise.",
        f"It is {trend.first:.4g} in the first third of the rounds and {trend.last:.4g} in the last.",
        f"an lr 3 to 10 times as high, more answers to a prompt, or larger rounds; {READ}",
    )


def falling_reward(run: History) -> Finding | None:
    points = run.points("rollout/reward")
    values, n = [point.value for point in points], max(len(points) // MIN_LINES, 1)
    if len(values) < MIN_LINES:
        return None
    means = [fmean(values[i : i + n]) for i in range(0, len(values) - n + 1, n)]
    best, end = max(means), fmean(values[-n:])
    differences = [after - before for before, after in pairwise(values)]
    noise = pstdev(differences) / math.sqrt(n)  # of the difference of two means
    if best - end <= max(RISE * (best - means[0]), FLAT * abs(best), 3 * noise):
        return None
    step = points[means.index(best) * n].step
    return Finding(
        "The reward falls again.",
        f"It was about {best:.4g} around step {step} and is about {end:.4g} at the end, step {points[-1].step}.",
        "a lower lr, a longer warmup_ratio, or loss.kl_coef; a checkpoint from before the fall is still good.",
    )


def reward_hacking(run: History) -> Finding | None:
    reward = trend_of(run.values("rollout/reward"))
    if reward.last - reward.first <= reward.threshold:
        return None
    for name in ("eval/exact_match", "eval/reward/exact_match", "eval/reward", "rollout/reward/exact_match"):
        if len(run.values(name)) < 2:
            continue
        other = change(run, name)
        if other.first - other.last > max(other.threshold, FALL * abs(other.first)):
            return Finding(
                f"The reward rises while {name} falls.",
                f"The reward went from {reward.first:.3g} in the first third of the rounds to {reward.last:.3g} in the "
                f"last, {name} from {other.first:.3g} to {other.last:.3g}.",
                f"rewards that cannot be earned otherwise, loss.kl_coef, or early_stopping.metric; {READ}",
            )
    return None


def truncated_answers(run: History) -> Finding | None:
    ended = trend_of(run.values("rollout/ended"))
    if ended.last >= FEW_ENDED:
        return None
    n = run.setting("rollout.max_new_tokens", int)
    return Finding(
        "Most answers are cut off.",
        f"{ended.first:.0%} of the answers ended by themselves in the first third of the rounds, {ended.last:.0%} in "
        f"the last{f'; the others reached max_new_tokens={n} or max_length' if n else ''}.",
        "a larger rollout.max_new_tokens, rollout.stop, or the reward overlong; check with "
        "`minitrain rollouts` that the model ends its answers.",
    )


def length_grows(run: History) -> Finding | None:
    names = ("length", "ended", "reward")
    length, ended, reward = (trend_of(run.values(f"rollout/{name}") or [0.0]) for name in names)
    if len(run.values("rollout/length")) < MIN_LINES or length.last <= LONGER * length.first + length.threshold:
        return None
    if ended.first - ended.last <= FALL and reward.last - reward.first > reward.threshold:
        return None  # longer answers that are worth more
    return Finding(
        "The answers become longer and longer.",
        f"Their mean length went from {length.first:.0f} tokens in the first third of the rounds to "
        f"{length.last:.0f} in the last, the reward from {reward.first:.3g} to {reward.last:.3g}, "
        f"and the fraction that ended from {ended.first:.0%} to {ended.last:.0%}.",
        "the reward overlong, loss.loss_aggregation=dr_grpo, or rollout.truncated=zero.",
    )


def entropy_collapse(run: History) -> Finding | None:
    values = run.values("train/entropy")
    if len(values) < MIN_LINES or _is_solved(run):
        return None
    trend = trend_of(values)
    first = max(trend.first, values[0])
    if trend.last >= LOW_ENTROPY or trend.last > first / 3:
        return None
    distinct = run.values("rollout/distinct")
    of_answers = f", and {distinct[-1]:.0%} of the answers to a prompt are distinct" if distinct else ""
    return Finding(
        "The entropy collapses.",
        f"It went from {first:.3g} to {trend.last:.3g} nats per token{of_answers}, so the policy no longer explores.",
        "a lower lr, loss.clip_eps_high=0.28, loss.entropy_coef=0.001, or loss.kl_coef.",
    )


def mismatch(run: History) -> Finding | None:
    points = run.points("rollout/mismatch") or run.points("train/mismatch")
    large = [point for point in points if point.value > LARGE_MISMATCH]
    if not large:
        return None
    worst = max(large, key=lambda point: point.value)
    return Finding(
        "Sampling and training give different log-probabilities.",
        f"They differed by {points[0].value:.2g} per token at step {points[0].step}, and by {worst.value:.2g} at step "
        f"{worst.step} (mismatch). It is above {LARGE_MISMATCH} at {format_steps(large)}.",
        "rollout.importance_correction=tis, or model.policy_dtype=float32.",
    )


def unjudged(run: History) -> Finding | None:
    names = [name for name in run.metrics if name.startswith("rollout/unjudged") and run.values(name)]
    worst = max(names, key=lambda name: fmean(run.values(name)))
    fraction = fmean(run.values(worst))
    if fraction <= UNJUDGED:
        return None
    function = worst.removeprefix("rollout/unjudged").removeprefix("/")
    return Finding(
        "Many answers have no reward.",
        f"{fraction:.0%} of the answers could not be judged{f' by {function}' if function else ''}.",
        "the warnings of the run, which count the failures; a longer rollout.reward_timeout. exact_match cannot judge "
        "rows without a reference.",
    )


ROLLOUT_CHECKS = [
    Check("equal-rewards", "rewards at the start", equal_rewards, ("rollout/zero_variance",)),
    Check("zero-variance", "prompts with equal rewards", zero_variance, ("rollout/zero_variance",)),
    Check("flat-reward", "the reward rises", flat_reward, ("rollout/reward",)),
    Check("falling-reward", "the reward does not fall", falling_reward, ("rollout/reward",)),
    Check("reward-hacking", "what the reward stands for", reward_hacking, ("rollout/reward",)),
    Check("truncated-answers", "answers end", truncated_answers, ("rollout/ended",)),
    Check("length-grows", "length of answers", length_grows, ("rollout/length",)),
    Check("entropy-collapse", "entropy", entropy_collapse, ("train/entropy",)),
    Check("mismatch", "mismatch of sampling and training", mismatch, ("rollout/ended",)),
    Check("unjudged-answers", "reward functions", unjudged, ("rollout/unjudged",)),
]


# -------------------------------------------------------------------------------------------------------- helpers


def _compares(run: History) -> bool:
    """Return whether the loss compares the answers to a prompt, so that equal rewards have no gradient."""
    estimator = run.setting("loss.advantage_estimator", str)
    return run.setting("loss.name", str) not in NOT_COMPARED and estimator not in ("gae", "reinforce++")


def _is_solved(run: History) -> bool:
    """Return whether most prompts are solved in the last third of the rounds."""
    solved = run.values("rollout/solved")
    return bool(solved) and trend_of(solved).last > SOLVED
