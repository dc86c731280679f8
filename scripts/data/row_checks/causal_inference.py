"""Checks of the causal-inference rows: what their texts claim, recomputed or run."""

import contextlib
import io
import itertools
import math

import numpy as np

from row_checks.maths import (
    normal_pdf,
    normal_tail,
    ols,
)
from row_checks.rows import (
    answer_has,
    blocks,
)


def check_causal_inference_02():
    r = np.random.default_rng(0)
    a, b = r.normal(size=(2, 200_000))
    hired = a + b > 1.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert np.corrcoef(a[hired], b[hired])[0, 1] < -0.4


def check_causal_inference_03():
    r = np.random.default_rng(1)
    n = 200_000
    u, z, m0 = r.normal(size=(3, n))
    t = z + u + r.normal(size=n)  # z predicts only the treatment, u unmeasured
    y = u + r.normal(size=n)  # no effect
    without, with_ = ols(y, t)[1], ols(y, t, z)[1]
    assert 0 < without < with_  # adjusting for z amplifies the bias
    t = m0  # now randomised
    med = t + r.normal(size=n)
    y = med + r.normal(size=n)
    assert abs(ols(y, t)[1] - 1) < 0.02
    assert abs(ols(y, t, med)[1]) < 0.02
    y = r.normal(size=n)  # collider
    c = t + y + r.normal(size=n)
    assert abs(ols(y, t)[1]) < 0.01
    assert ols(y, t, c)[1] < -0.3
    y0 = 2 * z + t + r.normal(size=n)  # precision from a predictor of y only

    def res(*c):
        return np.std(y0 - np.column_stack([np.ones(n), *c]) @ ols(y0, *c))

    assert res(t, z) < 0.6 * res(t)


def check_causal_inference_04():
    r = np.random.default_rng(2)
    n = 200_000
    u1, u2 = r.normal(size=(2, n))
    x = u1 + u2 + 0.5 * r.normal(size=n)
    t = u1 + r.normal(size=n)
    y = u2 + r.normal(size=n)
    assert abs(ols(y, t)[1]) < 0.01
    assert ols(y, t, x)[1] < -0.1


def check_causal_inference_07():
    y0, y1, t = np.array([10, 8, 4, 2]), np.array([12, 10, 8, 6]), np.array([1, 1, 0, 0]) == 1
    d = y1 - y0
    assert list(d) == [2, 2, 4, 4]
    assert d.mean() == 3
    assert d[t].mean() == 2
    naive = y1[t].mean() - y0[~t].mean()
    assert y1[t].mean() == 11
    assert y0[~t].mean() == 3
    assert naive == 8
    assert y0[t].mean() == 9
    assert naive == d[t].mean() + (y0[t].mean() - y0[~t].mean())


def check_causal_inference_09():
    r = np.random.default_rng(3)
    n = 400_000
    x = r.normal(size=n)
    e = 1 / (1 + np.exp(-x))
    t = (r.random(n) < e).astype(int)
    y = 1.0 * t + 2 * x + 5 + r.normal(size=n)
    g = {"np": np, "t": t, "e": e, "y": y}
    exec(blocks("causal-inference-09", "question")[0], g)
    assert abs(g["ate"] - 1) > 0.5
    exec(blocks("causal-inference-09")[0], g)
    assert abs(g["ate"] - 1) < 0.05
    assert abs((t / e).sum() / n - 1) < 0.02  # the weights of a group sum to about n


def check_causal_inference_13():
    assert abs((52 - 50) / (0.30 - 0.10) - 10) < 1e-9
    assert abs(1 - 0.3 - 0) - 0.7 < 1e-9


def check_causal_inference_14():
    r = np.random.default_rng(4)
    n, reps = 400, 400
    med, cover = {}, {}
    for K in (1, 10):
        b2, bo, F, cv = [], [], [], []
        for _ in range(reps):
            Z = r.normal(size=(n, K))
            u = r.normal(size=n)
            t = Z @ np.full(K, math.sqrt(2 / n)) + u + 0.3 * r.normal(size=n)
            y = u + r.normal(size=n)  # true effect 0
            Z, t, y = Z - Z.mean(0), t - t.mean(), y - y.mean()
            th = Z @ np.linalg.lstsq(Z, t, rcond=None)[0]
            F.append((th @ th / K) / ((t - th) @ (t - th) / (n - K - 1)))
            b = (th @ y) / (th @ t)
            b2.append(b)
            bo.append((t @ y) / (t @ t))
            cv.append(abs(b) < 1.96 * np.std(y - b * t) / math.sqrt(th @ th))
        assert 2 < np.mean(F) < 4
        med[K], cover[K] = np.median(b2), np.mean(cv)
        assert 0.02 < med[K] < np.mean(bo)  # pulled towards OLS
    assert med[10] > med[1]
    assert cover[10] < 0.85  # the interval misses


def check_causal_inference_18():
    assert (230 - 200) - (165 - 150) == 15
    assert abs(165 / 150 - 1.1) < 1e-12
    assert abs(200 * 1.1 - 220) < 1e-9
    assert 230 - 220 == 10


def check_causal_inference_20():
    def twfe(start, T, eff):
        rows = [
            (c, m, float(m >= s), eff(m - s + 1) if m >= s else 0.0)
            for c, s in enumerate(start)
            for m in range(T)
        ]
        c, m, d, y = map(np.array, zip(*rows, strict=False))
        X = np.column_stack(
            [d] + [(c == k) for k in range(len(start))] + [(m == k) for k in range(1, T)]
        ).astype(float)
        return np.linalg.lstsq(X, y, rcond=None)[0][0], y[d == 1]

    b, effs = twfe([0 + 1, 4], 6, lambda k: float(k))  # growing effect
    assert b < effs.min()  # below every effect that occurred
    b, _ = twfe([1, 4], 6, lambda k: 3.0)  # constant effect: no harm
    assert abs(b - 3) < 1e-9
    b, effs = twfe([1, 6], 9, lambda k: k**2.0)  # contrived: wrong sign
    assert b < 0 < effs.min()
    b, effs = twfe([3, 3, 99], 6, lambda k: float(k))  # same start: mean of the effects
    assert abs(b - effs.mean()) < 1e-9


def check_causal_inference_21():
    answer_has("causal-inference-21", "eleven donor", "one in twelve")
    assert 1 / (11 + 1) == 1 / 12


def check_causal_inference_26():
    r = np.random.default_rng(5)
    n = 300_000
    t = r.integers(2, size=n)
    patience = r.normal(size=n)
    fin = (patience + 1.0 * t + r.normal(size=n) > 0.5).astype(float)
    y = 0.3 * t + patience + r.normal(size=n)  # tutorial itself does nothing, direct effect 0.3
    assert abs(ols(y, t)[1] - 0.3) < 0.02
    assert ols(y, t, fin)[1] < 0.1  # shrinks, though finishing explains nothing
    f = fin == 1
    assert patience[f & (t == 0)].mean() > patience[f & (t == 1)].mean() + 0.1


def check_causal_inference_27():
    r = np.random.default_rng(6)
    h = r.normal(size=100_000)
    alive, means = np.ones(100_000, bool), []
    for year in range(5):
        now = h - 0.1 * year  # everyone gets less happy
        means.append(now[alive].mean())
        alive &= now + 0.3 * r.normal(size=h.size) > -0.7
    assert all(b > a for a, b in itertools.pairwise(means[:3]))
    assert means[-1] > means[0]


def check_causal_inference_28():
    aov = (100 * 50 + 20 * 30) / 120
    assert 46 < aov < 47
    assert abs((100 * 50 + 20 * 30) / 5000 - 1.12) < 1e-12


def check_causal_inference_31():
    r = np.random.default_rng(7)
    fp = []
    for _ in range(300):
        w = np.repeat(r.normal(size=28), 200)
        y = w + 3 * r.normal(size=w.size)
        t = np.repeat(r.permutation(28) < 14, 200)
        d = y[t].mean() - y[~t].mean()
        fp.append(abs(d) / math.sqrt(y[t].var() / t.sum() + y[~t].var() / (~t).sum()) > 1.96)
    assert np.mean(fp) > 0.4


def check_causal_inference_32():
    assert 0.49 < 1 - 0.7**2 < 0.52
    r = np.random.default_rng(8)
    x = r.normal(size=200_000)
    y = 0.7 * x + math.sqrt(0.51) * r.normal(size=x.size)
    th = np.cov(y, x)[0, 1] / x.var(ddof=1)
    assert abs((y - th * (x - x.mean())).var() / y.var() - 0.51) < 0.01


def check_causal_inference_33():
    r = np.random.default_rng(9)
    n = 200_000
    t = r.integers(2, size=n)
    u = r.normal(size=n)
    x = u + 0.5 * t
    y = 2 * u + 1.0 * t + r.normal(size=n)
    g = {"np": np, "x": x, "y": y}
    exec(blocks("causal-inference-33", "question")[0], g)

    def d(v):
        return v[t == 1].mean() - v[t == 0].mean()

    assert abs(d(y) - 1) < 0.03
    assert d(g["y_adj"]) < 0.2
    g = {"np": np, "x": u, "y": y}  # a window before exposure
    exec(blocks("causal-inference-33", "question")[0], g)
    assert abs(d(g["y_adj"]) - 1) < 0.03


def check_causal_inference_34():
    r = np.random.default_rng(10)
    g = {"np": np}
    exec(blocks("causal-inference-34")[0], g)
    n = 3000
    s = 1 + r.poisson(4, size=n)
    c = r.binomial(s, r.beta(1, 4, size=n))
    se = g["ratio_se"](c, s)
    bs = []
    for _ in range(600):
        i = r.integers(n, size=n)
        bs.append(c[i].sum() / s[i].sum())
    assert abs(se / np.std(bs) - 1) < 0.12
    p = c.sum() / s.sum()
    assert se > 1.2 * math.sqrt(p * (1 - p) / s.sum())  # the naive error bar is too small


def check_causal_inference_36():

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks("causal-inference-36")[0], {"np": np})
    v = float(out.getvalue())
    assert 0.205 < v < 0.235, v


def check_causal_inference_37():
    # O'Brien-Fleming, 4 looks: find the constant, the last boundary, and the sample size inflation
    r = np.random.default_rng(11)
    w = r.normal(size=(400_000, 4)).cumsum(axis=1) / np.sqrt(np.arange(1, 5))
    k = np.sqrt(4 / np.arange(1, 5))
    c = np.quantile((abs(w) / k).max(axis=1), 0.95)
    assert 1.96 < c < 2.06
    assert c * k[0] > 3.9

    def drift(th):
        return (abs(w + th * np.sqrt(np.arange(1, 5) / 4)) / k).max(axis=1) > c

    th = 1.96 + 0.8416
    lo, hi = th, th * 1.1
    for _ in range(12):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if drift(mid).mean() < 0.8 else (lo, mid)
    assert 1.0 < (lo / th) ** 2 < 1.06


def check_causal_inference_39():
    lo, hi = 0.1, 3
    for _ in range(60):
        d = (lo + hi) / 2
        lo, hi = (d, hi) if normal_tail(1.96 - d) + normal_tail(1.96 + d) < 0.2 else (lo, d)
    assert 1.75 < 1.96 / d < 1.77
    # mean of |estimate| given significance, relative to the truth
    m = (
        d * normal_tail(1.96 - d)
        + normal_pdf(1.96 - d)
        - d * normal_tail(1.96 + d)
        + normal_pdf(1.96 + d)
    ) / 0.2
    assert 2.2 < m / d < 2.4
    assert 3.7 < 9 / (m / d) < 4.2


def check_causal_inference_41():
    r = np.random.default_rng(12)
    a, b = r.normal(size=(2, 400_000))
    z1, z2 = a, (math.sqrt(2) * a + b) / math.sqrt(3)  # two weeks, then a third
    fp = (abs(z1) > 1.96) | ((abs(z1) > 1.645) & (abs(z2) > 1.96))
    assert fp.mean() > 0.055


def check_causal_inference_42():
    n_trig = 1 / 0.03  # all users needed, relative to triggered users needed
    n_all = 1 / 0.03**2
    assert 33 < n_all / n_trig < 33.5


def check_causal_inference_44():
    r = np.random.default_rng(13)
    true = r.normal(0, 1, size=20_000)
    est = true + r.normal(0, 1, size=20_000)
    win = est > 1.96
    assert est[win].mean() > true[win].mean() + 0.5
    near = (est > 1.96) & (est < 2.2)
    assert (est[near] > 0).all()
