"""Findings about how far a model is from its start, and what it forgets."""

from minitrain.training.metrics_log import History

from .findings import FLAT, Check, Finding

PROGRESS = {"eval/reward": -1, "eval/perplexity": 1, "eval/loss": 1}  # metric -> 1 if lower is better, else -1


def forgetting(run: History) -> Finding | None:
    kept = run.points("eval/retention/loss")
    first, last, progress = kept[0].value, kept[-1].value, ""
    if last - first <= FLAT * abs(first):
        return None
    is_measured = "train/advantage" not in run.metrics  # the value of a policy loss means nothing
    names = [name for name in PROGRESS if len(run.values(name)) > 1 and (is_measured or name == "eval/reward")]
    if names:
        values = run.values(names[0])
        if PROGRESS[names[0]] * (values[0] - values[-1]) <= FLAT * abs(values[0]):
            return None  # nothing improves, which other findings report
        progress = f", while {names[0].replace('/', ' ')} went from {values[0]:.4g} to {values[-1]:.4g}"
    return Finding(
        "The model forgets.",
        f"The loss on retention_datasets rose from {first:.4g} at step {kept[0].step} to {last:.4g} at step "
        f"{kept[-1].step}{progress}.",
        "a lower lr, fewer epochs, LoRA, a stronger KL to the reference (loss.kl_coef or loss.beta), or training on "
        "rows like those of retention_datasets, too.",
    )


def far_from_start(run: History, name: str = "kl_to_start", largest: float = 1.0) -> Finding | None:
    last = run.points(f"eval/{name}")[-1]
    if last.value <= largest:
        return None
    return Finding(
        "The model is far from its start.",
        f"At step {last.step}, {name} is {last.value:.3g} nats per token, more than {largest:g}.",
        "a lower lr or fewer epochs, if the start was a good model; retention_datasets show what it forgets.",
    )


def changed_elsewhere(run: History) -> Finding | None:
    finding = far_from_start(run, "retention/kl_to_start", 0.3)
    return finding and finding._replace(problem="The model is far from its start on retention_datasets.")


DRIFT_CHECKS = [
    Check("forgetting", "forgetting", forgetting, ("eval/retention/loss",)),
    Check("far-from-start", "distance from the start", far_from_start, ("eval/kl_to_start",)),
    Check("far-on-retention", "distance on retention data", changed_elsewhere, ("eval/retention/kl_to_start",)),
]
