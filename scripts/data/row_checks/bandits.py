"""Checks of the bandits rows: what their texts claim, recomputed or run."""

import random

import numpy as np

from row_checks.rows import (
    blocks,
)


def check_bandits_02():

    src = blocks("bandits-02", "question")[0]

    def run(code, seed):
        random.seed(seed)
        k, eps, p = 2, 0.05, [0.3, 0.6]
        g = {
            "np": np,
            "random": random,
            "k": k,
            "eps": eps,
            "total": np.zeros(k),
            "count": np.ones(k),
        }
        pulls = np.zeros(k)

        def pull(a):
            pulls[a] += 1
            return float(random.random() < p[a])

        g["pull"] = pull
        code = compile(code, "x", "exec")
        for _ in range(300):
            exec(code, g)
        return pulls[1] / pulls.sum()

    bad = np.mean([run(src, s) for s in range(40)])
    good = np.mean([run(src.replace("count += 1", "count[a] += 1"), s) for s in range(40)])
    assert good > 0.6
    assert bad < good - 0.2


def check_bandits_04():
    r = np.random.default_rng(14)
    g = {"np": np, "k": 3}
    exec(blocks("bandits-04")[0], g)
    p = [0.05, 0.06, 0.12]
    pulls = np.zeros(3)
    for _ in range(6000):
        a = g["choose"](r)
        pulls[a] += 1
        g["update"](a, r.random() < p[a])
    assert pulls.argmax() == 2
    assert pulls[2] > 3600
    assert pulls.sum() == g["wins"].sum() + g["losses"].sum() - 6


def check_bandits_07():
    g = {"wins": np.array([500.0, 20.0]), "losses": np.array([9000.0, 400.0])}
    for _ in range(20_000):
        exec(blocks("bandits-07")[0], g)
        g["losses"][0] += 1
    n = sum(g["wins"]) + sum(g["losses"])
    assert abs(n - 1000) < 5
    r = np.random.default_rng(15)
    assert ((lambda d: (d < 0.01) | (d > 0.99))(r.beta(0.01, 0.05, 1000))).mean() > 0.9  # wild


def check_bandits_09():
    rows = [
        ("A", 0.5, 1, "A"),
        ("B", 0.25, 0, "B"),
        ("A", 0.5, 0, "B"),
        ("C", 0.25, 1, "C"),
        ("A", 0.5, 1, "C"),
    ]
    w = [(1 / p if s == c else 0) for s, p, r, c in rows]
    assert w == [2, 4, 0, 4, 0]
    assert [a * r[2] for a, r in zip(w, rows, strict=False)] == [
        2,
        0,
        0,
        4,
        0,
    ]
    assert 6 / 5 == sum(a * r[2] for a, r in zip(w, rows, strict=False)) / 5 == 1.2
    assert abs(6 / sum(w) - 0.6) < 1e-12


def check_bandits_11():
    r = np.random.default_rng(16)
    n, k = 200_000, 4
    x = r.normal(size=n)
    truth = 0.5 + 0.1 * np.arange(k) + 0.2 * x[:, None]
    mu = np.tile([0.4, 0.3, 0.2, 0.1], (n, 1))
    pi = np.tile([0.1, 0.1, 0.2, 0.6], (n, 1))
    a = (r.random(n)[:, None] > mu.cumsum(axis=1)).sum(axis=1)
    rew = truth[np.arange(n), a] + 0.1 * r.normal(size=n)
    want = (pi * truth).sum(axis=1).mean()
    for q, m in (
        (truth, mu),
        (truth + 0.3, mu),
        (truth, np.full((n, k), 0.25)),
    ):  # right, wrong model, wrong propensities
        g = {"np": np, "n": n, "pi": pi, "mu": m, "q": q, "a": a, "r": rew}
        exec(blocks("bandits-11")[0], g)
        assert abs(g["v"].mean() - want) < 0.01
    g = {"np": np, "n": n, "pi": pi, "mu": mu, "q": truth, "a": a, "r": rew}
    exec(blocks("bandits-11")[0], g)
    ips = pi[np.arange(n), a] / mu[np.arange(n), a] * rew
    assert g["v"].var() < 0.5 * ips.var()


def check_bandits_13():
    r = np.random.default_rng(17)
    R_, T = 4000, 100
    s, f = np.ones((R_, 2)), np.ones((R_, 2))
    p = np.array([0.5, 0.4])
    i = np.arange(R_)
    for _ in range(T):
        a = r.beta(s, f).argmax(axis=1)
        hit = r.random(R_) < p[a]
        s[i, a] += hit
        f[i, a] += ~hit
    n = s + f - 2
    m = np.where(n > 0, (s - 1) / np.maximum(n, 1), np.nan)
    bias = np.nanmean(m, axis=0) - p
    assert bias[0] < 0
    assert bias[1] < -0.02
    assert bias[1] < bias[0]  # low, the neglected arm most


def check_bandits_14():
    assert 900 * 0.02 == 18
    assert 100 * 0.06 == 6
    assert 24 / 1000 == 0.024
    assert 100 * 0.02 == 2
    assert 900 * 0.06 == 54
    assert 56 / 1000 == 0.056
    assert 0.056 > 2 * 0.024


def check_bandits_17():
    assert 0.99**200 > 0.1


def check_bandits_19():
    eps, gaps = 0.1, np.array([0, 0.1, 0.2])
    T = np.array([1e3, 1e4, 1e5])
    assert np.allclose(eps * gaps.mean() * T / T, 0.01)


def check_bandits_20():
    n = 1_000_000 * 0.02
    assert n == 20_000
    assert abs(n * 0.02 - 400) < 1e-9
    assert 1_000_000 * 0.05 == 50_000
    assert 400 / 50_000 < 0.01
