"""Distributions and small fits, so that the checks need no SciPy."""

import math
from collections.abc import Callable
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()


def normal_pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / sqrt(2)))


def normal_tail(x: float) -> float:
    """The chance of more than x; exact far out, where 1 - normal_cdf(x) is not."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def t_cdf(x: float, df: float) -> float:
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    grid = np.linspace(0, abs(x), 20001)
    half = np.trapezoid(scale * (1 + grid * grid / df) ** (-(df + 1) / 2), grid)
    return 0.5 + math.copysign(half, x)


def binom_cdf(k: int, n: int, p: float) -> float:
    """The chance of at most k."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def binom_tail(n: int, k: int, p: float = 0.5) -> float:
    """The chance of at least k."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function changes its sign between `low` and `high`."""
    for _ in range(200):
        middle = (low + high) / 2
        if (function(middle) > 0) == (function(low) > 0):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.asarray(logits, float) - np.max(logits))
    return weights / weights.sum()


def ols(y: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Least squares: the constant, then one coefficient a column."""
    design = np.column_stack([np.ones(len(y)), *columns])
    return np.linalg.lstsq(design, y, rcond=None)[0]
