"""Checks of the system-design rows: what their texts claim, recomputed or run."""

import math

import numpy as np

from row_checks.maths import (
    NORMAL,
)
from row_checks.rows import (
    near,
    row_has,
)


def check_system_design_01():
    r = 50e6 * 10 / 86400
    near(r, 5800, rel=0.005)
    near(3 * r, 17400, rel=0.005)
    near(20e6 * 1e-5, 200)
    near(17400 * 1000, 17.4e6)
    near(17.4e6 * 1e-5, 174)
    near(17400 * 200 * 1e-5, 35, rel=0.01)
    near(200 * 1e-5, 0.002)


def check_system_design_02():
    assert 100e6 * 0.5 / 10e6 == 5
    near(1 / (5 * 0.001), 200)
    near(1 / (5 * 0.0001) / 365, 5.5, rel=0.01)


def check_system_design_03():
    f = 2 * 11e6 * 128
    near(f, 2.8e9, rel=0.01)
    near(f * 5e6, 14e15, rel=0.01)
    near(f * 5e6 / 40e12 / 60, 6, tol=0.2)
    near(50 * f, 0.14e12, rel=0.01)
    near(2000 * 50 * f / 40e12, 7, rel=0.01)


def check_system_design_04():
    row_id = "system-design-04"
    row_has(row_id, "0.168", "16.8 percent", "990 million", "1.2 billion", "20 times")
    w = 0.05

    def q(p):
        return p / (p + (1 - p) * w)

    near(q(0.01), 0.168, rel=0.002)
    near(q(0.01) / 0.01, 17, rel=0.02)
    near(q(1e-4) / 1e-4, 20, rel=0.01)
    for p in (0.001, 0.01, 0.3):
        near(q(p) / (q(p) + (1 - q(p)) / w), p)
    near(20e9 * 0.99 * 0.05, 990e6)
    near(20e9 * 0.01, 200e6)
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 49.5, 1000000)
    y = rng.random(1000000) < p
    keep = y | (rng.random(1000000) < w)
    near(q(p)[keep].mean(), y[keep].mean(), rel=0.02)
    near(y[keep].mean(), 0.168, rel=0.03)
    assert q(p).mean() < 0.168  # on live traffic the average is lower than on the sampled data


def check_system_design_05():
    assert 10000 * 50 * 1440 == 720e6
    t = 2 * (1 - NORMAL.cdf(3))
    near(t, 0.0027, rel=0.001)
    near(720e6 * t, 1.9e6, rel=0.03)
    near(720e6 * math.erfc(5.7 / math.sqrt(2)), 10, tol=2)


def check_system_design_06():
    near(0.4 / 108, 0.0037, rel=0.002)
    near(5.6 / 18, 0.31, rel=0.005)
    near(6 / 126, 0.048, rel=0.01)
    A, D, K = (lambda p: 120 * p), (lambda p: 6 * (1 - p)), (lambda p: 0.4 + 12 * p)
    for p in (0.001, 0.003):
        assert A(p) < min(D(p), K(p))
    for p in (0.005, 0.30):
        assert K(p) < min(A(p), D(p))
    assert D(0.32) < min(A(0.32), K(0.32))


def check_system_design_07():
    assert 200000 * 10 == 2e6
    near(2e6 * 768 * 4, 6.1e9, rel=0.01)
    near(20 * 0.05, 1)
    near(160 * 0.05, 8)
    near(1e5 * 3072, 300e6, rel=0.03)
    near(3.07e8 / 1e10, 0.03, rel=0.03)


def check_system_design_08():
    near(0.04 - 0.001 * 12, 0.028)
    near(0.015 - 0.002 * 12, -0.009)


def check_system_design_09():
    near(4 * 3.85, 15.4)
    near(24 * 0.5 / 15.4, 0.78, rel=0.002)
    near(0.001 * 24, 0.024)
    assert 0.024 / 15.4 < 0.002
    assert 100 * 86400 == 8.64e6
    near(1 / 8.64e6, 1.2e-7, rel=0.04)
    near(50 / 3600, 0.014, rel=0.01)
    near(0.98 * 0.97, 0.95, rel=0.001)


def check_system_design_10():
    near(6 * math.sqrt(80), 54, rel=0.01)
    assert 6 * 80 == 480


def check_system_design_11():
    near(0.9 * 20, 18)
    near(0.1 * 50000, 5000)
    n = 1.96**2 / (0.04 * 0.0005)
    near(n, 192000, rel=0.001)
    near(n / 30, 6400, rel=0.001)
    near(6400 / 400000, 0.016)


def check_system_design_12():
    near(500e6 / 65536, 7600, rel=0.005)
    near(4 * 500e6 / 65536, 30500, rel=0.001)
    assert 16 * 500e6 * 4 == 32e9
    rng = np.random.default_rng(0)
    for _ in range(300):
        bits = rng.choice(64, 3, replace=False)
        assert len({b // 16 for b in bits}) < 4


def check_system_design_13():
    near(0.999**5, 0.995, rel=0.0001)
    near((1 - 0.999**5) * 720, 3.6, rel=0.003)
    near(0.001 * 720 * 60, 43, rel=0.01)
    assert 5 * 40 == 200


def check_system_design_14():
    near(1e9 * 768 * 2, 1.54e12, rel=0.003)
    assert 64 * 4 * 1e9 == 256e9
    near(1.536 + 0.256, 1.8, rel=0.005)
    assert 68 * 1e9 == 68e9
    near(1e9 / 262144, 3800, rel=0.005)
    near(64e9 / 262144, 244000, rel=0.001)
    near(64 * 64e9 / 262144, 15.6e6, rel=0.002)
    near(2000 * 15.6e6, 31e9, rel=0.01)
    assert 2000 * 200 == 400000


def check_system_design_15():
    assert 40e6 * 200 * 8 == 64e9
    near(64e9 * 365, 23e12, rel=0.02)
    assert 5e6 * 1600 == 8e9
    near(8e9 * 365, 2.9e12, rel=0.01)


def check_system_design_16():
    assert 4 * 4 == 16
    assert 200 * 16 == 3200
    near(200 * 1.1, 220)


def check_system_design_17():
    n = 16 * 0.04 * 0.96 / 0.0004**2
    near(n, 3.84e6)
    near(2 * n / 200000, 38, rel=0.02)
    assert 8e6 / 40 == 200000


def check_system_design_18():
    near(7 / 3350 * 1e3, 2.1, rel=0.01)
    near(30 * 7 / 3.35, 63, rel=0.01)
    near(2 * 7e9 * 2000, 28e12)
    near(28 / 400 * 1e3, 70)
    near(63 + 70 + 50, 185, rel=0.02)
    near(70 / 6.7, 10.4, rel=0.006)
    near(30 * 70 / 6.7, 313, rel=0.002)
    near(280 / 800 * 1e3, 350)


def check_system_design_19():
    def pr(p, e=3):
        return (p - 20) * p**-e

    assert 20 * 3 / 2 == 30
    assert 20 * 2 / 1 == 40
    near(1 - pr(40) / pr(30), 0.156, rel=0.003)
    near(1 - pr(31.5) / pr(30), 0.0066, rel=0.01)
    near(1 - pr(28.5) / pr(30), 0.0086, rel=0.01)
    c = 0.1 * ((1 - pr(31.5) / pr(30)) + (1 - pr(28.5) / pr(30))) / 2
    near(c, 0.0008, rel=0.06)
    assert c < 0.156 / 100
    g = np.linspace(21, 90, 6901)
    near(g[np.argmax(pr(g))], 30, rel=0.001)


def check_system_design_20():
    near(300000 * 0.004, 1200)
    near(300000 * 0.02, 6000)
    near(600 * 5, 3000)
    near(0.004 / 0.5, 0.008)
    near(120000 * 0.004, 480)
    near(120000 * 0.004 * 0.1 * 5, 240)


def check_system_design_21():
    near(300 / 640, 0.47, rel=0.003)
    assert 0.2 / (300 / 640) < 0.5
    near(0.2 / 3, 0.067, rel=0.006)
    near(300 / (0.2 / 3), 4500)
    near(4500**2, 20e6, rel=0.02)
    near(0.2 / 3 / 1000 * 1e6, 67, rel=0.006)
    assert 64 * 3 == 192
    near(1000 / 3, 333, rel=0.002)
    assert 8 * 640 > 4500


def check_system_design_22():
    near(0.98**12, 0.785, rel=0.001)
    assert 1 - 0.98**12 > 0.2
    assert 300000 * 3 / 60 == 15000
    near(300000 * 0.3, 90000)
    assert 90000 * 1.5 / 60 == 2250
    assert 210000 * 0.005 == 1050
    near(15000 / 2250, 100 / 15, rel=0.001)


def check_system_design_23():
    assert 50 * 8 == 400
    assert 20e6 * 400 == 8e9


def check_system_design_24():
    assert 2000 * 16 == 32000
    assert 32000 / 80 == 400
    r = 16
    n = 32 * r * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    near(n, 42e6, rel=0.002)
    near(2 * n, 84e6, rel=0.002)
    near(2000 * 2 * n, 168e9, rel=0.002)
    near(2 * n / 25e9, 0.0034, rel=0.02)
    assert 16 * 8 == 128
    near(n * 16, 0.7e9, rel=0.05)


def check_system_design_25():
    near(1.5 / 2.5, 0.6)
    near(1.5 / 1.52, 0.987, rel=0.001)
    near(20 + 6 * NORMAL.inv_cdf(0.6), 22, tol=0.5)
    near(20 + 6 * NORMAL.inv_cdf(1.5 / 1.52), 33, tol=0.5)


def check_system_design_112():
    assert 500 * 5 == 2500
    assert 2500 / 50 == 50
    assert 2 < 50 / 24 < 3
    assert 300 / 50 == 6


def check_system_design_117():
    assert round(30000 * 512 / 1e6) == 15
