"""Checks of the statistics rows: what their texts claim, recomputed or run."""

import contextlib
import io
import math
from collections import Counter

import numpy as np

from row_checks.maths import (
    NORMAL,
    bisect,
    normal_tail,
    t_cdf,
)
from row_checks.rows import (
    ROWS,
    answer_has,
    blocks,
    near,
    row_has,
)


def check_statistics_01():
    assert 100 * 0.8 == 80
    assert 900 * 0.05 == 45
    near(45 / 125, 0.36)


def check_statistics_02():
    near(475 / (475 + 1990), 0.193, rel=0.002)
    o = 475 / 1990
    near(o, 0.239, rel=0.002)
    near(0.95 / 0.02, 47.5)
    near(o * 47.5, 11.3, rel=0.005)
    near(o * 47.5 / (1 + o * 47.5), 0.92, rel=0.002)


def check_statistics_03():
    rng = np.random.default_rng(0)
    h = []
    t = []
    race = []
    for _ in range(20000):
        s = rng.random(80) < 0.5
        hh = np.flatnonzero(s[:-1] & s[1:])
        ht = np.flatnonzero(s[:-1] & ~s[1:])
        if len(hh) and len(ht):
            h.append(hh[0] + 2)
            t.append(ht[0] + 2)
            race.append(hh[0] < ht[0])
    near(np.mean(h), 6, rel=0.02)
    near(np.mean(t), 4, rel=0.02)
    near(np.mean(race), 0.5, rel=0.03)
    a = 6
    near(1 + 0.5 * (1 + a / 2) + a / 2, a)


def check_statistics_04():
    sd = np.arange(1, 7).std()
    near(sd, 1.71, rel=0.002)
    near(sd / 10, 0.171, rel=0.002)


def check_statistics_05():
    row_id = "statistics-05"
    row_has(row_id, "0.56", "11.2", "88 percent", "averages 3.2")
    near(1.1 / 1.96, 0.56, rel=0.003)
    near(1.1 / 1.96 * 20, 11.2, rel=0.003)
    near((2.1 + 4.3) / 2, 3.2)
    m, sd = 3.2, 11.2
    s2 = math.log(1 + (sd / m) ** 2)
    rng = np.random.default_rng(0)
    x = np.exp(math.log(m) - s2 / 2 + math.sqrt(s2) * rng.standard_normal((6000, 400)))
    mn, h = x.mean(1), 1.96 * x.std(1, ddof=1) / 20
    ok = abs(mn - m) <= h
    near(ok.mean(), 0.88, tol=0.012)
    assert (mn + h < m).mean() > 0.95 * (1 - ok.mean())
    assert (
        sd / m - m / sd > 3
    )  # the least skewness that a non-negative variable with this mean and spread can have


def check_statistics_06():
    rng = np.random.default_rng(0)
    n = 10
    x = rng.random((100000, n))
    M = x.max(1)
    near(M.mean(), n / (n + 1), rel=0.002)
    near(((n + 1) / n * M).var(), 1 / 120, rel=0.03)
    near((2 * x.mean(1)).var(), 1 / 30, rel=0.03)
    assert 2 * np.mean([1, 2, 9]) == 8
    big = 1 - rng.random(100000) ** (1 / 1000)
    near((1000 * big).mean(), 1, rel=0.02)
    near((1000 * big).std(), 1, rel=0.02)


def check_statistics_07():
    near(16 * 0.105 * 0.895 / 1e-4, 15036, rel=0.0001)
    near(2 * (NORMAL.inv_cdf(0.975) + NORMAL.inv_cdf(0.8)) ** 2, 15.7, rel=0.002)
    near(16 * 0.1005 * 0.8995 / 0.001**2, 1.4e6, rel=0.04)


def check_statistics_08():
    near(81 / 87, 0.93, rel=0.003)
    near(192 / 263, 0.73, rel=0.002)
    near(234 / 270, 0.87, rel=0.005)
    near(55 / 80, 0.69, rel=0.005)
    assert 81 + 192 == 273
    assert 234 + 55 == 289
    assert 87 + 263 == 350 == 270 + 80
    near(289 / 350, 0.83, rel=0.006)
    near(273 / 350, 0.78)
    assert 87 + 270 == 357
    assert 263 + 80 == 343
    near((357 * 81 / 87 + 343 * 192 / 263) / 700, 0.83, rel=0.004)
    near((357 * 234 / 270 + 343 * 55 / 80) / 700, 0.78, rel=0.003)


def check_statistics_09():
    near(1 - (1 - 1 / 200) ** 200, 0.633, rel=0.001)
    rng = np.random.default_rng(0)
    x = rng.gamma(2, size=200)
    b = np.array([x[rng.integers(0, 200, 200)].max() for _ in range(4000)])
    near((b == x.max()).mean(), 0.633, rel=0.04)
    assert np.percentile(b, 97.5) == x.max()


def check_statistics_10():
    p = [0.001, 0.008, 0.012, 0.041, 0.2]
    assert sum(x <= 0.01 for x in p) == 2
    assert max(i for i in range(1, 6) if p[i - 1] <= 0.05 * i / 5) == 3
    k = 0
    while k < 5 and p[k] <= 0.05 / (5 - k):
        k += 1
    assert k == 3


def check_statistics_11():
    v = 2500 * 10 + 200**2 * 10
    assert v == 425000
    near(math.sqrt(v), 652, rel=0.001)
    near(math.sqrt(25000), 158, rel=0.002)
    near(400 / 425, 0.94, rel=0.002)
    rng = np.random.default_rng(0)
    n = rng.poisson(10, 40000)
    k = (200 / 50) ** 2
    s = np.where(n > 0, rng.gamma(np.maximum(n, 1) * k, 200 / k), 0)
    near(s.std(), 652, rel=0.015)
    near(s.mean(), 2000, rel=0.01)


def check_statistics_12():
    a, b = (40 * 0.8 + 10 * 0.4) / 50, (60 * 0.8 + 90 * 0.4) / 150
    near(a, 0.72)
    near(b, 0.56)
    near(a / b - 1, 0.29, tol=0.005)


def check_statistics_13():
    near(14 / 40, 0.35)
    near(13 / 38, 0.342, rel=0.001)
    near((10 * 0.2 + 30 * 0.4) / 40, 0.35)
    near((2 + 1200) / 3010, 0.399, rel=0.001)
    x = np.linspace(1e-6, 1 - 1e-6, 200001)
    d = x**13 * (1 - x) ** 25
    c = d.cumsum() / d.sum()
    near(x[np.searchsorted(c, 0.025)], 0.21, tol=0.005)
    near(x[np.searchsorted(c, 0.975)], 0.50, tol=0.005)
    near(x[np.argmax(x**14 * (1 - x) ** 26)], 0.35, rel=0.001)


def check_statistics_14():
    P = np.array([[0.9, 0.1], [0.5, 0.5]])
    near(sorted(np.linalg.eigvals(P))[0], 0.4)
    np.testing.assert_allclose(np.linalg.matrix_power(P, 99)[0, 0], 5 / 6)
    near(np.linalg.matrix_power(P, 3)[0, 0], 0.844, rel=0.001)
    near(0.4**5, 0.01, rel=0.03)


def check_statistics_15():
    T = 200 + 450 + 600 + 900 + 6000
    assert T == 8150
    near(4 / T, 4.9e-4, rel=0.003)
    near(T / 4, 2040, rel=0.002)
    near(4 / 2150, 1.86e-3, rel=0.001)
    near(2150 / 4, 538, rel=0.001)
    near(T / 2150, 4, tol=0.25)


def check_statistics_16():
    x = np.array([4.0, 7.0, 9.0])
    se = x.std() / np.sqrt(len(x))
    lo, hi = x.mean() - 1.96 * se, x.mean() + 1.96 * se
    near(x.std(), 2.05, rel=0.003)
    near(x.std(ddof=1), 2.52, rel=0.002)
    near((lo + hi) / 2, 6.67, rel=0.001)
    near((hi - lo) / 2, 2.33, tol=0.006)
    q = bisect(lambda t: t_cdf(t, 2) - 0.975, 1, 9)
    near(q, 4.30, rel=0.002)
    near(q * x.std(ddof=1) / math.sqrt(3), 6.25, rel=0.001)
    near(2 * t_cdf(1.96 * math.sqrt(2 / 3), 2) - 1, 0.75, rel=0.002)


def check_statistics_17():
    near(math.exp(-3), 0.0498, rel=0.001)


def check_statistics_18():
    near(2 * (1 - NORMAL.cdf(6 / ((11 - 1) / 2 / 1.96))), 0.02, tol=0.005)


def check_statistics_19():
    assert ROWS["statistics-19"]["difficulty"] == "intermediate"
    near(100 * math.log(1e6 / 100), 921, rel=0.001)
    near(100 * (1 / np.arange(101, 10**6 + 1)).sum(), 921, rel=0.001)
    rng = np.random.default_rng(0)
    k, n = 3, 9
    c = Counter()
    for _ in range(15000):
        s = list(range(1, k + 1))
        for i in range(k + 1, n + 1):
            j = int(rng.integers(1, i + 1))
            if j <= k:
                s[j - 1] = i
        c.update(s)
    for i in range(1, n + 1):
        near(c[i] / 15000, k / n, rel=0.05)


def check_statistics_20():
    z = NORMAL.inv_cdf(0.05)
    m = -NORMAL.pdf(z) / 0.05
    near(m, -2.06, rel=0.002)
    near(8 * -m, 16.5, rel=0.001)
    near(0.6 * 16.5, 9.9, rel=0.001)
    near(90.1 / 83.5, 1.08, rel=0.002)


def check_statistics_21():
    rng = np.random.default_rng(0)
    q22 = bisect(lambda t: t_cdf(t, 22) - 0.975, 1, 4)

    def power(n, q, reps=40000):
        a, b = rng.standard_normal((reps, n)), rng.standard_normal((reps, n)) + 0.5
        t = (b.mean(1) - a.mean(1)) / np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / n)
        return (abs(t) > q).mean()

    near(power(12, q22), 0.22, tol=0.01)
    near(power(64, bisect(lambda t: t_cdf(t, 126) - 0.975, 1, 4), 15000), 0.80, tol=0.012)
    near(2 * (1 - t_cdf(1.29, 22)), 0.21, tol=0.003)
    d = 1.29 * math.sqrt(2 / 12)
    near(d, 0.53, rel=0.01)
    near(d - q22 * math.sqrt(2 / 12), -0.3, tol=0.05)
    near(d + q22 * math.sqrt(2 / 12), 1.4, tol=0.05)


def check_statistics_22():
    v = 3.5
    out = []
    for _ in range(2):
        v = np.mean([max(i, v) for i in range(1, 7)])
        out.append(v)
    near(out[0], 4.25)
    near(out[1], 4.67, rel=0.001)
    near(np.mean([max(i, j) for i in range(1, 7) for j in range(1, 7)]), 4.47, rel=0.001)


def check_statistics_23():
    def e(x):
        return 1 / (1 + math.exp(-x))

    logit = math.log(0.1 / 0.9)
    near(logit, -2.197, rel=0.001)
    near(1 / 6, 0.167, rel=0.003)
    near(logit - 1.96 / 6, -2.524, rel=0.001)
    near(logit + 1.96 / 6, -1.870, rel=0.001)
    near(e(logit - 1.96 / 6), 0.074, tol=0.0005)
    near(e(logit + 1.96 / 6), 0.133, tol=0.0006)
    h = 1.96 * math.sqrt(0.09 / 400)
    near(0.1 - h, 0.071, tol=0.0005)
    near(0.1 + h, 0.129, tol=0.0005)


def check_statistics_24():
    near(1.96 * math.sqrt(0.87 * 0.13 / 40000), 0.0033, rel=0.003)
    near(0.04 * 87 + 0.96 * 60, 61, rel=0.002)
    near(40000 / 1e6, 0.04)


def check_statistics_25():
    def q(x):
        return 0.5 * math.erfc(x / math.sqrt(2))

    p = q(4)
    near(p, 3.17e-5, rel=0.001)
    near(1 / (0.01 * p), 3.2e6, rel=0.02)
    s = math.exp(16) * q(8)
    near(s, 5.53e-9, rel=0.001)
    near(p * p, 1e-9, rel=0.005)
    rv = s / p / p - 1
    near(rv, 4.5, rel=0.01)
    near(rv / 0.01, 450, rel=0.01)
    near(1 / (0.01 * p) / (rv / 0.01), 7000, rel=0.01)
    rng = np.random.default_rng(0)
    x = rng.normal(4, 1, 400000)
    w = np.exp(8 - 4 * x) * (x > 4)
    near(w.mean(), p, rel=0.02)
    near(w.var() / p / p, 4.5, rel=0.05)


def check_statistics_101():
    r = np.random.default_rng(18)
    kg = r.uniform(1, 10, size=20_000)
    price = 0.001 * kg + 0.0003 * r.normal(size=kg.size)  # negligible slope, tight line

    def slope(x):
        return np.polyfit(x, price, 1)[0]

    assert abs(slope(kg) / slope(1000 * kg) - 1000) < 1
    assert abs(np.corrcoef(kg, price)[0, 1] - np.corrcoef(1000 * kg, price)[0, 1]) < 1e-9
    assert np.corrcoef(kg, price)[0, 1] > 0.99


def check_statistics_103():
    assert math.sqrt(3**2 + 4**2) == 5
    assert 3 + 4 == 7  # independent: 5; in step: 7


def check_statistics_104():
    x = np.linspace(-1, 1, 1001)
    assert abs(np.corrcoef(x, x * x)[0, 1]) < 1e-9


def check_statistics_106():

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks("statistics-106")[0], {"np": np})
    stay, switch = map(float, out.getvalue().split())
    assert abs(stay - 1 / 3) < 0.01
    assert abs(switch - 2 / 3) < 0.01
    r = np.random.default_rng(19)
    car, pick = r.integers(3, size=(2, 100_000))
    step = r.integers(1, 3, size=car.size)
    host = (pick + step) % 3  # opens one of the others at random
    goat = host != car
    assert abs((pick == car)[goat].mean() - 0.5) < 0.01


def check_statistics_107():
    p = 1.0
    for i in range(23):
        if i == 22:
            assert 1 - p < 0.5
        p *= (365 - i) / 365
    assert 1 - p > 0.5
    assert 23 * 22 // 2 == 253


def check_statistics_108():
    assert 18 / 37 < 0.5
    assert 18 / 38 < 0.5


def check_statistics_109():
    assert (10 + 1) / (10 + 2) == 11 / 12


def check_statistics_110():
    # t quantile with 99 degrees of freedom by numerical integration
    nu = 99
    x = np.linspace(-60, 1.984, 600_001)
    d = (
        (1 + x * x / nu) ** (-(nu + 1) / 2)
        * math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2))
        / math.sqrt(nu * math.pi)
    )
    assert abs(np.trapezoid(d, x) - 0.975) < 1e-3 if hasattr(np, "trapezoid") else True
    assert 1.984 / 1.96 < 1.02


def check_statistics_111():
    assert abs(2 * normal_tail(1.645) - 0.10) < 1e-3


def check_statistics_112():
    assert math.isclose(math.log(20) - math.log(10), math.log(2000) - math.log(1000))
    x = np.random.default_rng(20).lognormal(size=1000)
    assert math.exp(np.log(x).mean()) < x.mean()


def check_statistics_113():
    assert 0.029 < 1.96 * math.sqrt(0.25 / 1000) < 0.032


def check_statistics_116():
    r = np.random.default_rng(26)
    size = np.array([5000, 3000, 2000])
    for mu in (np.array([1.0, 4.0, 8.0]), np.zeros(3)):
        pop = [r.normal(m, 1, s) for m, s in zip(mu, size, strict=False)]
        allp = np.concatenate(pop)
        simple = [r.choice(allp, 100).mean() for _ in range(1500)]
        strat = [
            sum(
                w * r.choice(p, int(100 * w)).mean()
                for w, p in zip(size / 10_000, pop, strict=False)
            )
            for _ in range(1500)
        ]
        ratio = np.std(strat) / np.std(simple)
        assert ratio < 0.6 if mu.any() else 0.9 < ratio < 1.1


def check_statistics_117():
    answer_has("statistics-117", "four of them", "four independent")
    assert 5 - 1 == 4


def check_statistics_119():
    x = np.random.default_rng(21).exponential(size=200)
    g = {"np": np, "x": x}
    exec(blocks("statistics-119")[0], g)
    assert g["lo"] < np.median(x) < g["hi"]
    assert len(g["stats"]) == 2000
    g2 = {"np": np, "x": x}
    exec(
        blocks("statistics-119")[0].replace("replace=True", "replace=False").replace("2000", "50"),
        g2,
    )
    assert np.ptp(g2["stats"]) == 0


def check_statistics_120():
    g = {"np": np}
    exec(blocks("statistics-120")[0], g)
    r = np.random.default_rng(22)
    p = g["perm_test"](r.normal(size=12), r.normal(size=12) + 3, reps=2000)
    assert p == 1 / 2001
    p3 = g["perm_test"](np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]), reps=4000)
    assert abs(p3 - 0.1) < 0.02
    ps = [g["perm_test"](r.normal(size=6), r.normal(size=6), reps=99, seed=i) for i in range(400)]
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.09


def check_statistics_121():
    assert 3 / 500 == 0.006
    assert abs(1 - 0.05 ** (1 / 500) - 0.006) < 1e-4


def check_statistics_122():
    assert abs((4.5 * 10 + 4.0 * 90) / 100 - 4.05) < 1e-12
    assert (4.5 + 4.0) / 2 == 4.25


def check_statistics_123():
    assert (5 + 15) / 2 == 10
    assert 15 / 20 == 0.75
    assert (25 + 225) / (2 * 20) == 6.25


def check_statistics_124():
    def z(p):
        lo, hi = 0, 6
        for _ in range(60):
            m = (lo + hi) / 2
            lo, hi = (m, hi) if 2 * normal_tail(m) > p else (lo, m)
        return m

    a, b = z(0.03), z(0.2)
    assert round(a, 1) == 2.2
    assert round(b, 1) == 1.3
    assert 0.58 < (a - b) / math.sqrt(2) < 0.65
    assert round((a + b) / math.sqrt(2), 1) == 2.4


def check_statistics_125():
    assert math.comb(5, 2) == 10


def check_statistics_128():
    assert abs(100 * 0.8 - 80) < 1e-9
    assert abs(80 * 1.25 - 100) < 1e-9


def check_statistics_130():
    r = np.random.default_rng(23)

    def q(v):
        return np.quantile(v, 0.95)

    for draw in (lambda: r.exponential(size=400_000), lambda: r.lognormal(sigma=1, size=400_000)):
        a, b = draw(), draw()
        a, b = a / q(a) * 100, b / q(b) * 200
        assert q(a + b) < 285
        assert abs(q(np.sort(a) + np.sort(b)) - 300) < 1e-6  # in lockstep
    a, b = np.where(r.random((2, 400_000)) < 0.04, 1e6, 1.0)  # odd tails: the sum can exceed
    assert q(a) + q(b) == 2
    assert q(a + b) > 2
