"""Checks of the evaluation rows: what their texts claim, recomputed or run."""

import collections
import json
import math
import re
from math import comb, log, sqrt

import numpy as np

from row_checks.maths import (
    binom_tail,
    normal_cdf,
)
from row_checks.rows import (
    blocks,
    near,
    row_has,
)


def check_evaluation_01():
    row_has("evaluation-01", "0.80", "0.67", "0.73", "0.94", "0.88", "0.08")
    tp, fp, fn, tn = 80, 20, 40, 860
    assert tp + fp + fn + tn == 1000
    assert tp / (tp + fp) == 0.8
    assert round(tp / (tp + fn), 2) == 0.67
    assert round(2 * tp / (2 * tp + fp + fn), 2) == 0.73
    assert (tp + tn) / 1000 == 0.94
    assert (tn + fp) / 1000 == 0.88
    near(1.96 * sqrt(2 / 3 * 1 / 3 / 120), 0.08, 0.005)


def check_evaluation_02():
    row_has(
        "evaluation-02", "900 of 1,000", "9,990", "900 / 10,890 = 8 percent", "eleven of twelve"
    )
    assert round(0.01 * 999000) == 9990
    assert round(100 * 900 / 10890) == 8
    assert round(10890 / 900) == 12


def check_evaluation_03():
    row_has(
        "evaluation-03", "900 errors", "catch 100 of the 1,000", "catch 800 with 700", "an easy way"
    )
    assert round(100000 * 0.009) == 900 == 1000 - 100 == (1000 - 800) + 700


def check_evaluation_04():
    row_has("evaluation-04", "above 0.01", "5 / 505 = 0.0099", "15 dollars")
    assert 5 / 500 == 0.01
    assert round(5 / 505, 4) == 0.0099
    assert 500 * 0.03 == 15
    assert 500 * 0.009 < 5


def check_evaluation_05():
    row_has("evaluation-05", "4 points", "about 1.8")
    near(100 * sqrt(0.16 / 100), 4, 1e-9)
    near(100 * sqrt(0.16 / 500), 1.8, 0.02)


def check_evaluation_06():
    row_has("evaluation-06", "about 80 percent", "gap=28")
    assert 1 - 1 / 5 == 0.8


def check_evaluation_07():
    row_has("evaluation-07", "5/6, about 0.83", "0.58")
    P, N = (0.9, 0.7, 0.4), (0.6, 0.3)

    def auc(P, N):
        return sum((p > n) + 0.5 * (p == n) for p in P for n in N) / (len(P) * len(N))

    near(auc(P, N), 5 / 6, 1e-12)
    near(auc([p / 10 for p in P], [n / 10 for n in N]), 5 / 6, 1e-12)
    near(auc([p > 0.5 for p in P], [n > 0.5 for n in N]), 0.58, 0.005)


def check_evaluation_08():
    row_has(
        "evaluation-08", "0.06 + 0.03 = 0.09", "2.0 and the second 1.26", "0.61 and -0.25", "0.45"
    )

    def lg(p):
        return log(p / (1 - p))

    near(0.4 * 0.15 + 0.6 * 0.05, 0.09, 1e-12)
    assert 300 / 400 == 0.75
    assert 150 / 600 == 0.25
    assert 450 / 1000 == 0.45
    near(lg(0.9) / lg(0.75), 2.0, 0.005)
    near(lg(0.2) / lg(0.25), 1.26, 0.005)
    s = (lg(0.75) - lg(0.25)) / (lg(0.9) - lg(0.2))
    i = lg(0.75) - s * lg(0.9)
    assert round(s, 2) == 0.61
    assert round(i, 2) == -0.25


def check_evaluation_09():
    row_has("evaluation-09", "= 4.0, p = 0.046", "p = 0.057", "= 0.5", "0.0 to 2.0", "0.95")
    assert (60 - 40) ** 2 / 100 == 4
    assert round(2 * (1 - normal_cdf(2)), 3) == 0.046
    assert round(2 * binom_tail(100, 60), 3) == 0.057
    near(100 * sqrt(100) / 2000, 0.5, 1e-12)
    near(1 - 1.96 * 0.5, 0, 0.05)
    near(1 + 1.96 * 0.5, 2, 0.05)
    near(100 * sqrt(2 * 0.9 * 0.1 / 2000), 0.95, 0.005)


def check_evaluation_10():
    # without scikit-learn: F score of two classes, ridge-like logistic regression by Newton steps
    def fsel(X, y, k=20):
        a, b = X[y == 1], X[y == 0]
        t = (a.mean(0) - b.mean(0)) ** 2 / (a.var(0) / len(a) + b.var(0) / len(b))
        return np.argsort(-t)[:k]

    def fit(X, y):
        Z = np.c_[X, np.ones(len(X))]
        w = np.zeros(Z.shape[1])
        R = np.eye(len(w))
        R[-1, -1] = 0
        for _ in range(8):
            p = 1 / (1 + np.exp(-Z @ w))
            w -= np.linalg.solve((Z * (p * (1 - p))[:, None]).T @ Z + R, Z.T @ (p - y) + R @ w)
        return w

    acc = {True: [], False: []}
    for s in range(3):
        g = np.random.default_rng(s)
        X, y = g.normal(size=(100, 10000)), g.integers(0, 2, 100)
        fold = g.permutation(100) % 5
        for leak in (True, False):
            cols = fsel(X, y)
            for f in range(5):
                tr, te = fold != f, fold == f
                c = cols if leak else fsel(X[tr], y[tr])
                w = fit(X[tr][:, c], y[tr])
                acc[leak].append(((np.c_[X[te][:, c], np.ones(te.sum())] @ w > 0) == y[te]).mean())
    near(np.mean(acc[True]), 0.9, 0.06)
    near(np.mean(acc[False]), 0.5, 0.1)


def check_evaluation_11():
    row_has("evaluation-11", "sqrt(52) = 7.2", "256 of B's total of 260")
    A, B = [4] * 5, [1, 1, 1, 1, 16]
    assert sum(A) / 5 == sum(B) / 5 == 4
    assert sum(b * b for b in B) == 260
    assert 260 / 5 == 52
    assert round(sqrt(52), 1) == 7.2
    assert sorted(B)[2] == 1
    assert sqrt(sum(a * a for a in A) / 5) == 4


def check_evaluation_12():
    row_has("evaluation-12", "= 0.55", "= 0.58", "1.23 / 1.63 = 0.75", "1.13 / 1.63 = 0.69", "0.61")

    def d(r):
        return 1 / math.log2(r + 1)

    ideal = d(1) + d(2)
    assert (1 + 2 / 20) / 2 == 0.55
    assert round((1 / 2 + 2 / 3) / 2, 2) == 0.58
    assert round(ideal, 2) == 1.63
    assert round((d(1) + d(20)) / ideal, 2) == 0.75
    assert round((d(2) + d(3)) / ideal, 2) == 0.69
    assert round(d(1) / ideal, 2) == 0.61
    assert round(d(1) + d(20), 2) == 1.23
    assert round(d(2) + d(3), 2) == 1.13


def check_evaluation_13():
    row_has("evaluation-13", "0.91", "0.15")

    def rouge1(c, r):
        c, r = collections.Counter(c.lower().split()), collections.Counter(r.lower().split())
        o = sum((c & r).values())
        p, q = o / sum(c.values()), o / sum(r.values())
        return 2 * p * q / (p + q)

    ref = "The drug did not reduce mortality"
    assert round(rouge1("The drug did reduce mortality", ref), 2) == 0.91
    assert round(rouge1("Death rates were unchanged by the treatment", ref), 2) == 0.15


def check_evaluation_14():
    row_has("evaluation-14", "1.26 points", "1.87 standard deviations", "80 + 2.4", "halves it")
    se = 100 * sqrt(0.16 / 1000)
    near(se, 1.26, 0.006)
    x = np.linspace(-8, 8, 40001)
    cdf = np.array([normal_cdf(v) for v in x[::20]])
    Fn = cdf**20
    em = 8 - np.trapezoid(Fn, x[::20]) if hasattr(np, "trapezoid") else 8 - np.trapz(Fn, x[::20])
    near(em, 1.87, 0.005)
    near(em * se, 2.4, 0.05)
    assert sqrt(1 - 0.75) == 0.5


def check_evaluation_15():
    row_has("evaluation-15", "2.2 points", "54 to 62")
    se = 100 * sqrt(0.58 * 0.42 / 500)
    assert round(se, 1) == 2.2
    assert round(58 - 1.96 * se) == 54
    assert round(58 + 1.96 * se) == 62


def check_evaluation_16():
    row_has("evaluation-16", "Kappa is 0.60", "= 0.50", "p = 0.04", "0.94", "0.37", "0.905")

    def kappa(gg, bb, ab, ba):
        n = gg + bb + ab + ba
        a, b = (gg + ab) / n, (gg + ba) / n
        po, pe = (gg + bb) / n, a * b + (1 - a) * (1 - b)
        return po, pe, (po - pe) / (1 - pe)

    po, pe, k = kappa(45, 35, 15, 5)
    near(po, 0.8, 1e-9)
    near(pe, 0.5, 1e-9)
    near(k, 0.6, 1e-9)
    assert round(2 * binom_tail(20, 15), 2) == 0.04
    po, pe, k = kappa(92, 2, 3, 3)
    near(po, 0.94, 1e-9)
    near(pe, 0.905, 1e-9)
    near(k, 0.37, 0.005)


def check_evaluation_17():
    g = np.random.default_rng(0)
    assert (
        np.max(g.normal(80, 0.5, size=(500, 50)), axis=1).mean() > 80.9
    )  # the best of 50 noisy looks flatters


def check_evaluation_18():
    row_has("evaluation-18", "0.42", "0.30", "0.21")
    q = 0.7

    def br(p):
        return q * (1 - p) ** 2 + (1 - q) * p**2

    def ab(p):
        return q * (1 - p) + (1 - q) * p

    near(ab(0.7), 0.42, 1e-9)
    near(ab(1), 0.30, 1e-9)
    near(br(0.7), 0.21, 1e-9)
    near(br(1), 0.30, 1e-9)
    g = np.linspace(0, 1, 1001)
    near(g[np.argmin(br(g))], 0.7, 1e-9)
    near(g[np.argmin(ab(g))], 1.0, 1e-9)


def check_evaluation_19():
    row_has(
        "evaluation-19",
        "0.946",
        "0.72",
        "880 / 908",
        "58 / 77",
        "8 / 15",
        "0.97",
        "0.74",
        "0.46",
        "nearly 8 points",
    )

    def mf(M):
        return [2 * M[i][i] / (sum(M[i]) + sum(r[i] for r in M)) for i in range(3)]

    M = [[880, 15, 5], [20, 58, 2], [8, 4, 8]]
    f = mf(M)
    assert [round(v, 2) for v in f] == [0.97, 0.74, 0.46]
    assert round(sum(f) / 3, 2) == 0.72
    assert (880 + 58 + 8) / 1000 == 0.946
    assert [sum(r[i] for r in M) for i in range(3)] == [908, 77, 15]
    assert sum(M[0]) == 900
    M[2] = [2, 4, 14]
    assert 0.07 < sum(mf(M)) / 3 - sum(f) / 3 < 0.08


def check_evaluation_20():
    row_has("evaluation-20", "1,200 requests", "about 1.5 points", "nearly five", "92.3 to 93.3")
    assert round(20000 * 0.06) == 1200
    se = 100 * sqrt((0.88 * 0.12 + 0.81 * 0.19) / 1200)
    near(se, 1.5, 0.05)
    assert 4.5 < 7 / se < 5
    assert 20 * 2 * (1 - normal_cdf(7 / se)) < 0.001
    assert round((92.0 - 0.06 * 88) / 0.94, 1) == 92.3
    assert round((92.6 - 0.06 * 81) / 0.94, 1) == 93.3


def check_evaluation_21():
    row_has(
        "evaluation-21", "8/9", "0.1 + 1/9 = 0.211", "sqrt(2.11) = 1.45", "3.25", "2.24", "0.052"
    )
    near(0.1 + 1 / 9, 0.211, 5e-4)
    near(sqrt(2.11), 1.45, 0.005)
    near(3.25 / sqrt(2.111), 2.24, 0.005)

    def p_t(t, df):
        x = np.linspace(t, 400, 2_000_001)
        c = math.gamma((df + 1) / 2) / (sqrt(df * math.pi) * math.gamma(df / 2))
        y = c * (1 + x * x / df) ** (-(df + 1) / 2)
        return 2 * float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())

    near(p_t(3.25, 9), 0.01, 0.0005)
    near(p_t(2.24, 9), 0.052, 0.0006)
    # two training sets of ten folds: 80 of 90 rows in common
    assert 80 / 90 == 8 / 9


def check_evaluation_22():
    row_has("evaluation-22", "up 0.3 percent", "-0.5 to 1.1", "1.4 percent, interval 0.6 to 2.2")
    near((-0.5 + 1.1) / 2, 0.3, 1e-9)
    near((0.6 + 2.2) / 2, 1.4, 1e-9)


def check_evaluation_23():
    row_has("evaluation-23", "4,368 / 15,504 = 0.72", "1 - 0.8^5 = 0.67")
    assert comb(16, 5) == 4368
    assert comb(20, 5) == 15504
    assert round(1 - 4368 / 15504, 2) == 0.72
    assert round(1 - 0.8**5, 2) == 0.67
    p, n, k = 0.2, 20, 5
    w = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    near(sum(a * (1 - comb(n - c, k) / comb(n, k)) for c, a in enumerate(w)), 1 - 0.8**5, 1e-12)
    assert sum(a * (1 - (1 - c / n) ** k) for c, a in enumerate(w)) < 1 - 0.8**5


def check_evaluation_24():
    row_has("evaluation-24", "about 7 points", "780 decisive", "nearly 1,000", "115 wins", "0.04")
    near(196 * sqrt(0.25 / 200), 7, 0.1)
    n = ((1.96 * 0.5 + 0.8416 * sqrt(0.55 * 0.45)) / 0.05) ** 2
    near(n, 780, 6)
    assert 950 < n / 0.8 < 1000
    assert round(2 * binom_tail(200, 115), 2) == 0.04
    assert 2 * binom_tail(200, 114) > 0.05
    assert binom_tail(200, 115, 0.55) < 0.5  # a true 55 percent usually goes undetected


def check_evaluation_25():
    row_has(
        "evaluation-25",
        "from 78 to 61",
        "60 to 58",
        "loses 44 problems and gains 10",
        "sqrt(54 - 34^2 / 200) / 200 = 3.5 points",
    )
    n, b, c = 200, 44, 10
    assert round(0.78 * n) - round(0.61 * n) == b - c == 34
    assert 34 / n == 0.17
    near(100 * sqrt(54 - 34**2 / 200) / 200, 3.5, 0.05)
    d = np.r_[np.ones(b), -np.ones(c), np.zeros(n - b - c)]
    near(100 * d.std() / sqrt(n), 3.5, 0.05)
    assert round(0.78 * n) >= b
    assert n - round(0.78 * n) >= c
    assert 17 / 3.5 > 4.5
    assert (78 - 60) - (61 - 58) == 15 > 18 / 2  # most of the lead is gone


def check_evaluation_103():
    def e(d):
        return 1 / (1 + 10 ** (-d / 400))

    assert round(e(35), 2) == 0.55
    assert round(e(100), 2) == 0.64
    assert abs(e(400) / (1 - e(400)) - 10) < 1e-9


def check_evaluation_108():
    assert 0.84 * 500 - 0.83 * 500 == 5
    assert 40 - 35 == 5
    assert round(500 / 35) == 14
    prompts = list(range(500))
    new = {p: p < 420 for p in prompts}
    old = {p: p >= 35 and p < 450 for p in prompts}
    g = {"prompts": prompts, "old": old, "new": new}
    exec(blocks("evaluation-108")[0], g)
    assert len(g["won"]) - len(g["lost"]) == 5
    assert len(g["won"]) == 35
    assert len(g["lost"]) == 30


def check_evaluation_112():
    assert 0.32 < 0.8**5 < 0.34


def check_evaluation_118():
    g = (0.78 - 0.25) / (0.90 - 0.25)
    assert round(g, 3) == 0.815
    assert abs(0.9 * g + 0.25 * (1 - g) - 0.78) < 1e-12
    assert 1.96 * math.sqrt(0.25 * 0.75 / 100) > 0.08


def check_evaluation_120():
    q = blocks("evaluation-120", "question")[0]

    def old(reply):
        g = {"re": re, "reply": reply}
        exec(q, g)
        return g["score"], g["passed"]

    assert old("On a scale of 1 to 5 I give it a 4") == (1, False)
    assert old("It names 7 sources, but two are wrong, so 2") == (7, True)
    assert old("I cannot grade this.") == (0, False)

    def new(reply):
        g = {"json": json, "reply": reply}
        exec(blocks("evaluation-120")[0], g)
        return g["ok"]

    assert new('{"reason": "fine", "score": 4}') is True
    for bad in ("no", '{"score": 9}', '{"score": "4"}', '{"score": true}', "{}", "[1]", "3"):
        assert new(bad) is False, bad
