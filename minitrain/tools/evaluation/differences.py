"""Paired differences between the results of two models on the same examples."""

from typing import Any, NamedTuple

import numpy as np

from minitrain.errors import ConfigError

N_RESAMPLES, BATCH = 9999, 100


class Difference(NamedTuple):
    """The difference of a metric between two models on one data set.

    Attributes:
        n: Number of examples that both have.
        a, b: The metric of each model on them.
        low, high: Bounds of the 95% confidence interval of b - a; None with fewer than two examples.
        higher, lower: Number of examples on which b is higher and lower.
        p_value: Of the sign test: that higher and lower are equally likely.
    """

    data: str
    metric: str
    n: int
    a: float
    b: float
    low: float | None
    high: float | None
    higher: int
    lower: int
    p_value: float


def paired_differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[Difference]:
    """Return the differences b - a of all metrics that are means over examples, for each data set.

    Args:
        a, b: Results of examples, as `evaluate_model` returns them and --output writes them.

    Raises:
        ConfigError: No example is in both.
    """
    ours, theirs = ({(row["data"], row["line"]): row for row in rows} for rows in (a, b))
    keys = [key for key in ours if key in theirs]
    if not keys:
        raise ConfigError("--compare: no example is in both results. Evaluate both on the same files.", "mismatch")
    differences = []
    for data in dict.fromkeys(data for data, _ in keys):
        pairs = [(ours[key], theirs[key]) for key in keys if key[0] == data]
        names = dict.fromkeys(name for pair in pairs for row in pair for name in row["weights"])
        for name in names:
            both = [pair for pair in pairs if all(name in row["weights"] for row in pair)]
            if both:
                differences.append(_difference(data, name, both))
    return differences


def _difference(data: str, name: str, pairs: list[tuple[dict, dict]]) -> Difference:
    from scipy.stats import binomtest, bootstrap

    values = np.array([[row[name] for row in pair] for pair in pairs], float)  # [n, 2]
    weights = np.array([[row["weights"][name] for row in pair] for pair in pairs], float)  # [n, 2]
    sums = (values * weights).T  # [2, n]

    def mean_difference(a, b, weights_a, weights_b, axis=-1):
        """Return the difference of the weighted means."""
        return b.sum(axis) / weights_b.sum(axis) - a.sum(axis) / weights_a.sum(axis)

    low = high = None
    if len(pairs) > 1:
        options = dict(n_resamples=N_RESAMPLES, batch=BATCH, method="percentile", rng=np.random.default_rng(0))
        interval = bootstrap((*sums, *weights.T), mean_difference, paired=True, **options).confidence_interval
        low, high = float(interval.low), float(interval.high)
    higher, lower = int((values[:, 1] > values[:, 0]).sum()), int((values[:, 1] < values[:, 0]).sum())
    p_value = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    a, b = (sums.sum(1) / weights.sum(0)).tolist()
    return Difference(data, name, len(pairs), a, b, low, high, higher, lower, p_value)
