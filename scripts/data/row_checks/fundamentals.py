"""Checks of the fundamentals rows: what their texts claim, recomputed or run."""

import math
from math import comb, exp, log, sqrt

import numpy as np

from row_checks.rows import (
    near,
    row_has,
)


def check_fundamentals_01():
    row_has("fundamentals-01", "gap of 18 points")
    assert 99 - 81 == 18


def check_fundamentals_02():
    row_has("fundamentals-02", "L2 leaves 0.15 and L1 leaves nothing")
    b, lam = 0.3, 0.5
    g = np.linspace(-1, 1, 20001)
    near(g[np.argmin((g - b) ** 2 / 2 + lam * g**2)], 0.15, 1e-4)
    near(g[np.argmin((g - b) ** 2 / 2 + lam * np.abs(g))], 0, 1e-4)
    near(b / (1 + 2 * lam), 0.15, 1e-12)


def check_fundamentals_03():
    row_has("fundamentals-03", "0.002", "0.999", "about 6,900", "about 200")
    assert 2 / 1000 == 0.002
    assert 1 - 0.001 * 1000 == 0
    assert round(log(1000) / 0.001, -2) == 6900
    k = sqrt(1000)
    lr, mu = 4 / (k + 1) ** 2, ((k - 1) / (k + 1)) ** 2  # the textbook tuning of heavy ball
    h, e, v, t = np.array([1000.0, 1]), np.ones(2), np.zeros(2), 0
    while np.linalg.norm(e) > 1e-3 * sqrt(2):
        v = mu * v - lr * h * e
        e = e + v
        t += 1
    near(t, 200, 15)


def check_fundamentals_04():
    row_has("fundamentals-04", "about 1,000.4")
    assert 1000.4 <= sqrt(30**2 + 1000**2) < 1000.5


def check_fundamentals_05():
    g = np.random.default_rng(0)
    X, y, w = g.normal(size=(30, 3)), g.integers(0, 2, 30), g.normal(size=3)

    def loss(w):
        p = 1 / (1 + np.exp(-X @ w))
        return -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum()

    p = 1 / (1 + np.exp(-X @ w))
    grad, H = X.T @ (p - y), (X * (p * (1 - p))[:, None]).T @ X
    for j in range(3):
        d = np.zeros(3)
        d[j] = 1e-5
        near((loss(w + d) - loss(w - d)) / 2e-5, grad[j], 1e-5)
    assert np.linalg.eigvalsh(H).min() > 0
    # squared error on p is not convex: its second derivative along z changes sign
    z = np.linspace(-6, 6, 1201)
    s = 1 / (1 + np.exp(-z))
    assert np.diff((1 - s) ** 2, 2).min() < 0 < np.diff((1 - s) ** 2, 2).max()


def check_fundamentals_06():
    g = np.random.default_rng(0)
    n, d = 50, 3
    X = g.normal(size=(n, d))
    y = X @ np.array([1.0, 2, 3])
    for lr, sign, ok in ((0.01, 1, False), (0.05, 1, False), (0.01, -1, True)):
        w = np.zeros(d)
        for _t in range(2000):
            w = w + sign * lr * X.T @ (X @ w - y) / n
        assert (np.abs(w).max() < 10) == ok


def check_fundamentals_08():
    row_has("fundamentals-08", "4 x 25 = 100", "4 x 0.25 = 1")
    P = np.array([[0, 0], [10, 0], [0, 1], [10, 1.0]])

    def lloyd(C):
        for _ in range(10):
            a = ((P[:, None] - C) ** 2).sum(-1).argmin(1)
            C = np.array([P[a == k].mean(0) for k in (0, 1)])
        return ((P - C[a]) ** 2).sum()

    assert lloyd(np.array([[5, 0], [5, 1.0]])) == 100
    assert lloyd(np.array([[0, 0.2], [10, 0.7]])) == 1


def check_fundamentals_09():
    row_has("fundamentals-09", "1.2 + 2.8 / 100 = 1.228", "0.6 + 0.034 = 0.634")

    def f(s, r, B):
        return r * s + (1 - r) * s / B

    near(f(4, 0.3, 100), 1.228, 1e-12)
    near(f(4, 0.15, 100), 0.634, 1e-12)
    near(f(4, 0.3, 1e6), 1.2, 1e-4)
    S = 4 * (0.3 * np.ones((100, 100)) + 0.7 * np.eye(100))
    near(S.mean(), 1.228, 1e-9)


def check_fundamentals_10():
    row_has("fundamentals-10", "9e8", "144", "900 and 144", "86 percent", "70 percent")
    assert 30000**2 == 9e8
    assert 12**2 == 144
    assert 9e8 / (9e8 + 144) > 0.9999
    assert round(100 * 900 / 1044) == 86
    near(np.linalg.eigvalsh([[1, 0.4], [0.4, 1]])[-1] / 2, 0.7, 1e-12)


def check_fundamentals_11():
    row_has(
        "fundamentals-11",
        "41/102 and 1/102",
        "16/302 and 91/302",
        "= 7.6",
        "= 0.033",
        "0.082",
        "8 percent",
        "7.6^2 = 58",
    )
    f, m = (41 / 102) / (16 / 302), (1 / 102) / (91 / 302)
    assert round(f, 1) == 7.6
    assert round(m, 3) == 0.033
    assert round(41 / 102, 3) == 0.402
    assert round(16 / 302, 3) == 0.053
    o = 100 / 300 * f * m
    assert round(o, 3) == 0.082
    assert round(100 * o / (1 + o)) == 8
    assert round(7.6**2) == 58


def check_fundamentals_12():
    row_has("fundamentals-12", "3.5", "4.67")

    def cross(x, y):
        s, i = np.polyfit(x, y, 1)
        return (0.5 - i) / s

    near(cross([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1]), 3.5, 1e-9)
    near(cross([1, 2, 3, 4, 5, 6, 50], [0, 0, 0, 1, 1, 1, 1]), 4.67, 0.005)
    assert (3 - 1) ** 2 == (-1 - 1) ** 2 == 4


def check_fundamentals_13():
    row_has("fundamentals-13", "C(103, 3) = 176,851", "80 GB")
    assert comb(103, 3) == 176851
    assert 100000**2 * 8 == 80e9

    def ph(x):
        return np.array(
            [x[0] ** 2, x[1] ** 2, sqrt(2) * x[0] * x[1], sqrt(2) * x[0], sqrt(2) * x[1], 1]
        )

    x, z = np.array([0.3, -1.2]), np.array([2.0, 0.7])
    near(ph(x) @ ph(z), (x @ z + 1) ** 2, 1e-12)


def check_fundamentals_14():
    row_has("fundamentals-14", "2 x 0.18 x 0.82 = 0.30")
    near(2 * 0.18 * 0.82, 0.30, 0.005)


def check_fundamentals_15():
    row_has("fundamentals-15", "the mean, 28", "the median, 12", "5 x 28 = 140", "budget 60")
    v = [10, 11, 12, 13, 94]
    assert sum(v) / 5 == 28
    assert sorted(v)[2] == 12
    assert sum(v) == 140 == 5 * 28
    assert 5 * 12 == 60


def check_fundamentals_16():
    row_has("fundamentals-16", "0.32", "0.18", "0.469", "0.375", "0.125")

    def g(a, b):
        return 1 - (a / (a + b)) ** 2 - (b / (a + b)) ** 2

    assert g(10, 10) == 0.5
    near(g(8, 2), 0.32, 1e-9)
    near(0.5 - g(8, 2), 0.18, 1e-9)
    near(g(10, 6), 0.469, 5e-4)
    near(0.8 * g(10, 6), 0.375, 1e-9)
    near(0.5 - 0.375, 0.125, 1e-9)


def check_fundamentals_17():
    row_has("fundamentals-17", "more than 99 times in 100")

    def sep(N, d):
        return (
            2 * sum(comb(N - 1, k) for k in range(d)) / 2**N
        )  # Cover: homogeneous in d dimensions

    assert sep(60, 40) > 0.99
    assert sep(60, 41) > 0.99


def check_fundamentals_18():
    row_has("fundamentals-18", "0.631", "95.5 percent", "1e11")
    near(0.01**0.1, 0.631, 5e-4)
    near(0.01**0.01, 0.955, 5e-4)
    near(10 / 0.1**10 / 1e11, 1, 1e-9)
    g = np.random.default_rng(0)
    rs = []
    for d in (10, 1000):
        q = ((g.random((500, d)) - g.random((500, d))) ** 2).sum(1)
        rs.append(q.std() / q.mean())
    near(rs[0] / rs[1], 10, 1.5)


def check_fundamentals_19():
    row_has("fundamentals-19", "0.212 to 0.213")
    assert 400 > 140 > 35


def check_fundamentals_20():
    assert max(0, 1 - 1.0) == 0
    assert log(1 + exp(-5)) > 0


def check_fundamentals_21():
    row_has("fundamentals-21", "1 / (1 + 1) = 0.5", "log(3) = 1.10", "0.0099")
    y = np.array([1, 1, 1, 0])
    p = 0.5
    G, H = (p - y).sum(), 4 * p * (1 - p)
    assert G == -1
    assert H == 1
    assert -G / (H + 1) == 0.5
    assert -G / H == 1
    near(log(3), 1.10, 0.005)
    near(0.99 * 0.01, 0.0099, 1e-12)
    v = np.linspace(0, 2, 20001)
    L = 3 * np.log(1 + np.exp(-v)) + np.log(1 + np.exp(v))
    near(v[np.argmin(L)], log(3), 1e-3)


def check_fundamentals_22():
    assert round(500000 * 1.3) == 650000


def check_fundamentals_23():
    row_has("fundamentals-23", "from 4 to 0.4", "2 s2")
    g = np.random.default_rng(0)
    x, xt = np.sort(g.random(4000)), g.random(4000)
    y, yt = 2 * g.normal(size=4000), 2 * g.normal(size=4000)
    i = np.abs(x[None] - xt[:, None]).argmin(1)
    near(np.mean((y[i] - yt) ** 2), 8, 0.6)
    assert 4 / 10 == 0.4


def check_fundamentals_24():
    row_has(
        "fundamentals-24",
        "100 / 109 = 0.917",
        "9 / 18 = 0.5",
        "1 / 10 = 0.1",
        "1.52",
        "100 times",
        "s2 / 100",
        "90 percent",
    )
    f = [d * d / (d * d + 9) for d in (10, 3, 1)]
    assert [round(v, 3) for v in f] == [0.917, 0.5, 0.1]
    assert round(sum(f), 2) == 1.52
    near((1 / 1) / (1 / 100), 100, 1e-9)
    near(f[2] ** 2, 1 / 100, 1e-12)


def check_fundamentals_25():
    row_has("fundamentals-25", "= 25", "five times", "+0.4", "unless there are very many rows")
    vif = 1 / (1 - 0.98**2)
    assert round(vif) == 25
    assert round(sqrt(vif)) == 5
    assert round(5.1 - 4.7, 1) == 0.4
    C = np.linalg.inv([[1, 0.98], [0.98, 1]])
    assert C.sum() < 0.06 * (
        C[0, 0] + C[1, 1] - 2 * C[0, 1]
    )  # the sum is pinned down, the difference is not
    n = 1000
    A = n * np.array([[1, 0.98], [0.98, 1]])
    b = A @ np.array([5.1, -4.7])
    w = np.linalg.solve(A + 1000 * np.eye(2), b)
    near(w.sum() / 2, 0.2, 0.1)
    # and with very many rows both signs would be beyond doubt: standard error of one
    # coefficient at noise 1
    assert 4.7 / (sqrt(vif) / sqrt(1e6)) > 100


def check_fundamentals_105():
    r = np.random.default_rng(24)
    pc = r.integers(4000, size=4000)
    y = r.integers(2, size=4000).astype(float)  # pure noise
    enc = (np.bincount(pc, y, 4000) / np.maximum(np.bincount(pc, minlength=4000), 1))[pc]
    single = np.bincount(pc, minlength=4000)[pc] == 1
    assert (enc[single] == y[single]).all()
    assert single.sum() > 1000
    assert np.corrcoef(enc, y)[0, 1] > 0.6  # the leak, also in rows used for validation


def check_fundamentals_107():
    assert 3**6 == 729


def check_fundamentals_114():
    x = np.linspace(-8, 8, 3201)
    dx = x[1] - x[0]

    def n(m, s):
        return np.exp(-((x - m) ** 2) / 2 / s**2) / s / math.sqrt(2 * math.pi)

    p = 0.5 * n(-3, 0.7) + 0.5 * n(3, 0.7) + 1e-12
    best = {}
    for m in np.linspace(-4, 4, 17):
        for s in np.linspace(0.4, 4, 19):
            q = n(m, s) + 1e-300
            for k, v in (
                ("pq", (p * np.log(p / q)).sum() * dx),
                ("qp", (q * np.log(q / p)).sum() * dx),
            ):
                if k not in best or v < best[k][0]:
                    best[k] = (v, m, s)
    assert abs(best["pq"][1]) < 0.1
    assert best["pq"][2] > 2.5  # covers both humps
    assert abs(abs(best["qp"][1]) - 3) < 0.1
    assert best["qp"][2] < 1  # sits on one
