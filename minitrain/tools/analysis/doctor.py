"""Diagnose problems in the logged metrics of a run: `minitrain doctor`.

Each diagnosis is a small function over the metrics, and a line in CHECKS.
"""

import math
import shutil
import textwrap
import time
from itertools import pairwise
from statistics import fmean, median, pstdev

from minitrain.training.atomic_dir import checkpoints, step_of
from minitrain.training.metrics_log import KINDS, History

from .doctor_drift import DRIFT_CHECKS
from .doctor_rollouts import ROLLOUT_CHECKS
from .findings import FLAT, MIN_LINES, RISE, Check, Finding, change, format_steps, trend_of

SPIKE = 8  # times the running median
CLIPPED = 2  # times max_grad_norm: median norm of a run whose gradients are always clipped
CLIP_FRACTION = 0.3
RATIOS = (0.8, 1.25)
PADDING = 0.3
SLOWER = 0.7
WIDTH = 100


def run_checks(run: History) -> tuple[dict[str, Finding], list[str]]:
    """Run all checks that apply; return the findings by code, and the names of the checks without one."""
    findings, passed = {}, []
    for check in CHECKS:
        if not check.applies(run):
            continue
        finding = check.find(run)
        if finding is None:
            passed.append(check.name)
        else:
            findings[check.code] = finding
    return findings, passed


def report(run: History) -> str:
    """Return the full report, wrapped for the terminal."""
    findings, passed = run_checks(run)
    n = {
        kind: max((len(p) for name, p in run.metrics.items() if name.startswith(f"{kind}/")), default=0)
        for kind in KINDS
    }
    rounds = f", {n['rollout']} rounds" if n["rollout"] else ""
    paragraphs = [
        _wrap(f"{run.folder}: {n['train']} train and {n['eval']} eval lines{rounds}, up to step {run.last_step}")
    ]
    for code, (problem, evidence, advice) in findings.items():
        paragraphs.append(
            "\n".join([_wrap(f"{problem} [{code}]"), _wrap(evidence, "  "), _wrap(f"Try: {advice}", "  ")])
        )
    names = ", ".join(passed)
    if names:
        paragraphs.append(_wrap(f"{'No problem found in' if findings else 'No problems found. Checked'}: {names}."))
    return "\n\n".join(paragraphs)


# --------------------------------------------------------------------------------------------------- the findings


def flat_loss(run: History) -> Finding | None:
    name = _loss_metric(run)
    values, evals = run.values(f"train/{name}"), run.values(f"eval/{name}")
    if len(values) < MIN_LINES:
        return None
    trend = trend_of(values)
    in_first_line = abs(values[0] - trend.last) > max(FLAT * abs(values[0]), 2 * pstdev(values[1:]))
    in_evals = len(evals) > 1 and evals[0] - evals[-1] > FLAT * abs(evals[0])
    if abs(trend.first - trend.last) > trend.threshold or in_first_line or in_evals:
        return None
    return Finding(
        "The loss does not move.",
        f"The train {name} is {trend.first:.4g} in the first third of the lines and {trend.last:.4g} in the last, "
        f"up to step {run.last_step}; the largest lr was {max(run.values('train/lr'), default=math.nan):.3g}.",
        "an lr 3 to 10 times as high; then check that parameters are trained (freeze_layers, lora.rank) and that "
        "the right tokens are targets (train_on).",
    )


def diverging_loss(run: History) -> Finding | None:
    name = _loss_metric(run)
    points = run.points(f"train/{name}")
    if len(points) < MIN_LINES:
        return None
    values = [point.value for point in points]
    smooth = [median(values[i - 1 : i + 2]) for i in range(1, len(values) - 1)]
    noise = median(abs(after - before) for before, after in pairwise(values))
    lowest, end = min(smooth), smooth[-1]
    if end - lowest <= max(RISE * max(abs(lowest), values[0] - lowest), 2 * noise):
        return None
    best = points[1 + smooth.index(lowest)]
    return Finding(
        "The loss rises again.",
        f"The train {name} was about {lowest:.4g} around step {best.step} and is about {end:.4g} at the end, "
        f"step {points[-1].step}.",
        "a lower lr or a longer warmup_ratio; a checkpoint from before the rise is still good.",
    )


def not_finite(run: History) -> Finding | None:
    # With loss scaling, overflows are normal: they adjust the scale.
    scaled = run.setting("model.policy_dtype", str) == "float16"
    names = ["train/loss", "eval/loss"] + ([] if scaled else ["train/grad_norm"])
    bad = {name: [p for p in run.metrics.get(name, []) if not p.finite] for name in names}
    steps_by_metric = "; ".join(f"{name} at {format_steps(points)}" for name, points in bad.items() if points)
    if not steps_by_metric:
        return None
    return Finding(
        "Metrics are infinite or NaN.",
        f"{steps_by_metric}. A train line covers all steps since the previous line; such a step is skipped.",
        "a lower lr or a longer warmup_ratio; bfloat16 or float32 instead of float16; debug=true, which names the "
        "operation. If it recurs at the same examples, inspect them.",
    )


def gradient_spikes(run: History) -> Finding | None:
    points, spikes = run.points("train/grad_norm"), []
    for i in range(MIN_LINES - 1, len(points)):
        usual = median(point.value for point in points[max(0, i - 20) : i])
        if points[i].value > SPIKE * usual > 0:
            spikes.append((points[i].value / usual, points[i]))
    if not spikes:
        return None
    times, worst = max(spikes)
    return Finding(
        "The gradient norm has spikes.",
        f"It was {worst.value:.3g} at step {worst.step}, {times:.0f} times the median of the lines before. Above "
        f"{SPIKE} times: {format_steps([point for _, point in spikes])}.",
        "a lower lr, a longer warmup_ratio, or a max_grad_norm near the usual norm; check the examples of these steps.",
    )


def always_clipped(run: History) -> Finding | None:
    limit, norms = run.setting("max_grad_norm", int | float), run.values("train/grad_norm")
    if not limit or len(norms) < MIN_LINES or min(norms) <= limit or median(norms) <= CLIPPED * limit:
        return None
    return Finding(
        "Gradients are always clipped.",
        f"The norm was above max_grad_norm ({limit:g}) in all {len(norms)} lines, by the median {median(norms):.3g}, "
        "so every step has the same length, whatever its gradient.",
        f"max_grad_norm={median(norms):.2g}, so that only unusual steps are clipped, or larger batches.",
    )


def overfitting(run: History) -> Finding | None:
    name = _loss_metric(run)
    evals, trains = run.points(f"eval/{name}"), run.points(f"train/{name}")
    if len(evals) < 2 or len(trains) < 2:
        return None
    best, last = min(evals, key=lambda point: point.value), evals[-1]
    until = [p.value for p in trains if p.step <= best.step][-3:] or [trains[0].value]
    before, after = fmean(until), fmean([p.value for p in trains if p.step > best.step][-3:] or until)
    gained = max(abs(best.value), evals[0].value - best.value)
    if last.value - best.value <= FLAT * gained or before - after <= FLAT * abs(before):
        return None
    return Finding(
        "The model overfits.",
        f"The eval {name} was best at step {best.step} ({best.value:.4g}) and is {last.value:.4g} at step {last.step}, "
        f"while the train {name} kept falling, from {before:.4g} to {after:.4g}.",
        "fewer epochs (or early_stopping.patience), save_best=true to keep the best model, a lower lr, more data, or "
        "LoRA with lora.dropout.",
    )


def chosen_falls(run: History) -> Finding | None:
    names = ("logps/chosen", "rewards/margins")
    split = "eval" if all(len(run.values(f"eval/{name}")) > 1 for name in names) else "train"
    if split == "train" and len(run.values("train/logps/chosen")) < MIN_LINES:
        return None
    chosen, margins = (change(run, f"{split}/{name}") for name in names)
    if chosen.first - chosen.last <= chosen.threshold or margins.last - margins.first <= margins.threshold:
        return None
    return Finding(
        "The chosen responses become less likely while margins rise.",
        f"In {split} lines logps/chosen went from {chosen.first:.4g} to {chosen.last:.4g} and rewards/margins from "
        f"{margins.first:.3g} to {margins.last:.3g}: both responses become less likely, the rejected one faster.",
        "a lower lr, a larger loss.beta, or loss.sft_weight=0.1 to 1.",
    )


def high_clip_fraction(run: History) -> Finding | None:
    sides = [run.values(f"train/clip_fraction/{side}") for side in ("high", "low")]
    fractions = [trend_of(values).last for values in sides if values]
    if sum(fractions) <= CLIP_FRACTION:
        return None
    return Finding(
        "Much of the data is clipped.",
        f"In the last third of the lines, {sum(fractions):.0%} of the tokens had no gradient (clip_fraction).",
        "a lower lr, fewer epochs over the same rollouts, or fresh rollouts.",
    )


def bounded_ratios(run: History) -> Finding | None:
    bounded = [point for point in run.points("train/bounded_fraction") if point.value > 0]
    if not bounded:
        return None
    worst = max(bounded, key=lambda point: point.value)
    return Finding(
        "Some log-ratios are so large that they were bounded.",
        f"At step {worst.step} {worst.value:.1%} of the tokens had no gradient (bounded_fraction). "
        f"It is above 0 at {format_steps(bounded)}.",
        "a lower lr; check that old_logps and ref_logps were computed with this model, template and loss.temperature.",
    )


def far_ratio(run: History) -> Finding | None:
    low, high = RATIOS
    far = [point for point in run.points("train/ratio") if not low <= point.value <= high]
    if not far:
        return None
    worst = max(far, key=lambda point: abs(math.log(max(point.value, 1e-9))))
    at_once = far[0].step == run.points("train/ratio")[0].step
    return Finding(
        "The policy is far from the one that sampled.",
        f"The mean ratio was {worst.value:.3g} at step {worst.step}; outside {low} to {high}: {format_steps(far)}.",
        "old_logps of this model, template and loss.temperature, since the ratio is far off from the first line on."
        if at_once
        else "a lower lr, fewer epochs over the same rollouts, or fresh rollouts.",
    )


def much_padding(run: History) -> Finding | None:
    fractions = run.values("train/padding")
    if run.setting("packing", bool) or not fractions or fmean(fractions) <= PADDING:
        return None
    return Finding(
        "Much of the computation is padding.",
        f"{fmean(fractions):.0%} of the positions are padding, up to {max(fractions):.0%} between two lines.",
        "packing=true, or group_by_length=true for a model that cannot separate the documents of a row.",
    )


def slower(run: History) -> Finding | None:
    speeds = run.values("train/tokens_per_second")[1:]  # the first line includes the start
    if len(speeds) < MIN_LINES:
        return None
    before, after, threshold = trend_of(speeds)
    if after >= SLOWER * before or before - after <= threshold:
        return None
    memory = run.values("train/memory_gb")
    used = f"; memory_gb went from {memory[0]:.3g} to {memory[-1]:.3g}" if memory else ""
    return Finding(
        "Training became slower.",
        f"{before:,.0f} tokens per second in the first third of the lines, {after:,.0f} in the last{used}.",
        "ending other work on the device; check for heat, swapping, and hooks that keep tensors.",
    )


def zero_lr(run: History) -> Finding | None:
    zeros = []
    for point in reversed(run.points("train/lr")):
        if point.value != 0:
            break
        zeros.append(point)
    if len(zeros) < min(2, len(run.points("train/lr"))):
        return None
    return Finding(
        "The learning rate is 0.",
        f"lr is 0 from step {zeros[-1].step} to {zeros[0].step}, so the weights do not change there.",
        "another lr or lr_scheduler; a run that continues past its schedule needs a larger n_steps or n_epochs.",
    )


def never_evaluated(run: History) -> Finding | None:
    if any(name.startswith("eval/") for name in run.metrics):
        return None
    held_out = run.setting("eval_datasets", list) or run.setting("validation_split", int | float)
    return Finding(
        "The model was never evaluated.",
        f"There is no eval line up to step {run.last_step}, so overfitting cannot be detected.",
        "eval_every_steps=100, or another interval shorter than the run."
        if held_out
        else "eval_datasets, or validation_split=0.05, with eval_every_steps.",
    )


def unfinished(run: History) -> Finding | None:
    if run.end is not None and run.end[0] >= run.last_step:
        return None
    written = time.localtime((run.folder / "metrics.jsonl").stat().st_mtime)
    left = run.values("train/eta_seconds")
    saved = checkpoints(run.folder / "checkpoints")
    return Finding(
        "The run has not finished.",
        f"Its last line is for step {run.last_step}, written at {time.strftime('%Y-%m-%d %H:%M', written)}"
        + (f", with {left[-1] / 60:.0f} minutes of training left." if left else "."),
        f"the same command again, unless it is still running: it resumes from step {step_of(saved[-1])}."
        if saved
        else "the same command again, unless it is still running: it starts over, as there is no checkpoint.",
    )


CHECKS = [
    Check("zero-lr", "lr", zero_lr, ("train/lr",)),
    # The value of a policy loss means nothing.
    Check("flat-loss", "the loss moves", flat_loss, ("train/loss",), skipped_with="train/advantage"),
    Check("rising-loss", "the loss does not rise", diverging_loss, ("train/loss",), skipped_with="train/advantage"),
    Check("not-finite", "finite metrics", not_finite),
    Check("gradient-spikes", "gradient spikes", gradient_spikes, ("train/grad_norm",)),
    Check("clipped-gradients", "gradient clipping", always_clipped, ("train/grad_norm",)),
    Check("overfitting", "overfitting", overfitting, ("train/loss", "eval/loss"), skipped_with="train/advantage"),
    *DRIFT_CHECKS,
    Check(
        "chosen-falls",
        "log-probabilities of chosen responses",
        chosen_falls,
        ("train/logps/chosen", "train/rewards/margins"),
    ),
    Check("clip-fraction", "clip fractions", high_clip_fraction, ("train/clip_fraction/high",)),
    Check("bounded-ratios", "bounded log-ratios", bounded_ratios, ("train/bounded_fraction",)),
    Check("off-policy", "distance from the sampling policy", far_ratio, ("train/ratio",)),
    *ROLLOUT_CHECKS,
    Check("padding", "padding", much_padding, ("train/padding",)),
    Check("slower", "speed", slower, ("train/tokens_per_second",)),
    Check("no-evaluation", "evaluations", never_evaluated),
    Check("unfinished", "the end of the run", unfinished),
]


# -------------------------------------------------------------------------------------------------------- helpers


def _loss_metric(run: History) -> str:
    """Return the metric that falls while a model learns; the loss of dft can rise."""
    return "perplexity" if "train/dft_alpha" in run.metrics else "loss"


def _wrap(text: str, indent: str = "") -> str:
    width = min(WIDTH, shutil.get_terminal_size().columns)
    options = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.fill(text, width, break_long_words=False, **options)
