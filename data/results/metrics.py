"""Metrics: each a number from probabilities and truths, and their intervals.

symbol  name here    meaning                                                     source
PGR     pgr          performance gap recovered, of accuracies on test            Burns et al. 2023, section 3
ECE     ece          expected calibration error, ten bins of equal count         arXiv 1706.04599
AUROC   auroc        P(a positive ranks above a negative), ties half

Shapes: N items, S seeds. p (N,) is a probability of y = 1, y (N,) is 0/1; right is 0/1.
"""
import numpy as np
import torch
from torch import Tensor

from data import column_of


def true_labels(items: list) -> Tensor:
    """(n,) ground truth of items of D_l."""
    return torch.tensor([float(item.label) for item in items])


def hidden_truth(part) -> Tensor:
    """(n,) ground truth of any part (selw2s.Part): for the ceiling, the oracle and the metrics only."""
    return true_labels(part.items)


def right_option(config, items: list, questions: list) -> Tensor:
    """(n,) the right answer's column of `belief`; beyond D_l it is hidden truth: for metrics only."""
    if config.own == "judge":
        return torch.tensor([item.label for item in items])
    return torch.tensor([column_of(q.options, q.answer) for q in questions])


def own_right(config, part) -> Tensor:
    """(n,) 1 where the strong model's own answer is right; beyond D_l for metrics only."""
    return (part.belief.argmax(1) == right_option(config, part.items, part.questions)).float()


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of items with (p > 1/2) = y; p (N,) probability, y (N,) 0/1."""
    return float(((p > 0.5) == (y > 0.5)).double().mean())


def cross_entropy(p: Tensor, y: Tensor) -> float:
    """Mean cross-entropy in nats of p (N,) against y (N,) in [0, 1]; p is kept 1e-12 away from 0 and 1."""
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())


def pgr(weak: float, student: float, ceiling: float) -> float | None:
    """Performance gap recovered, (student - weak) / (ceiling - weak); None unless ceiling > weak."""
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def auroc(p: Tensor, y: Tensor) -> float | None:
    """P(p of a positive > p of a negative), ties count half (average ranks); None with one class only."""
    y = (y > 0.5).double()
    _, which, count = p.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0)[which]                     # (N,) average rank, from 1
    n1 = float(y.sum())
    n0 = len(y) - n1
    return float((rank * y).sum() - n1 * (n1 + 1) / 2) / (n1 * n0) if n1 and n0 else None


def brier(p: Tensor, y: Tensor) -> float:
    """Mean squared difference of p (N,) and y (N,)."""
    return float(((p - y).double() ** 2).mean())


def reliability(p: Tensor, y: Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean p, mean y, count) of equal-count bins in increasing p: the reliability diagram. Equal p stay in
    their order; the first len(p) mod bins bins hold one more."""
    order = p.argsort(stable=True)
    parts = order.tensor_split(bins)
    return [(float(p[b].double().mean()), float(y[b].double().mean()), len(b)) for b in parts if len(b)]


def ece(p: Tensor, y: Tensor, bins: int = 10) -> float:
    """Expected calibration error over equal-count bins: sum of n_b/N |mean p - mean y|."""
    return sum(n * abs(mean_p - mean_y) for mean_p, mean_y, n in reliability(p, y, bins)) / len(p)


def squared_error(right, group) -> float:
    """Squared standard error of the mean of right (N,) 0/1, items of a group (N,) being right or wrong
    together."""
    _, which = np.unique(group, return_inverse=True)
    right = np.asarray(right, float)
    return float((np.bincount(which, right - right.mean()) ** 2).sum() / len(right) ** 2)


def bootstrap(right: np.ndarray, group: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired bootstrap over test items and seeds: right (methods, seeds, N) 0/1, group (N,) -> accuracies
    (draws, methods).

    Items of one group (one passage, one fact in several wordings) are drawn together: they are right or wrong
    together. Every draw resamples groups once for all methods and seeds, and seeds once for all methods, so
    differences of columns are differences on the same items."""
    rng = np.random.default_rng(seed)
    methods, seeds, _ = right.shape
    _, which, size = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((methods, seeds, len(size)))
    np.add.at(sums, (slice(None), slice(None), which), right)
    out = np.empty((draws, methods))
    for i in range(draws):
        weight = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        out[i] = (sums @ weight)[:, rng.integers(seeds, size=seeds)].mean(1) / (size @ weight)
    return out


def sign_flip(differences: list[float]) -> float:
    """Two-sided sign-flip p-value of per-seed differences; with S seeds it cannot go below 2 / 2^S. Exact up
    to 16 seeds, beyond by 2^16 random flips, to which the one observed counts."""
    d, least = np.asarray(differences), abs(sum(differences)) - 1e-12
    if len(d) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
        return float((np.abs(signs @ d) >= least).mean())
    signs = np.random.default_rng(0).choice((-1, 1), (2 ** 16, len(d)))
    return float(((np.abs(signs @ d) >= least).sum() + 1) / (2 ** 16 + 1))


def ratio(part: Tensor, whole: Tensor) -> float | None:
    """Share of `whole` (bool) that is in `part` (bool); None of nothing."""
    return float(part.sum() / whole.sum()) if whole.any() else None


def interval(draws: np.ndarray) -> list[float]:
    """95 % interval of bootstrap draws."""
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])]


def pgr_interval(rise: np.ndarray, gap: np.ndarray) -> list[float] | None:
    """95 % interval of rise / gap over draws; a draw without a gap counts as +-infinite."""
    span = interval(np.where(gap > 0, rise / np.where(gap > 0, gap, 1), np.copysign(np.inf, rise)))
    return span if np.isfinite(span).all() else None


def mean_of(rows: list[dict], key: str) -> float:
    """Mean over seeds of those that have the number."""
    return float(np.mean([row[key] for row in rows if row[key] is not None] or [np.nan]))
