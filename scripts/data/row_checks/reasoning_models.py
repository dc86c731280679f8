"""Checks of the reasoning-models rows: what their texts claim, recomputed or run."""

import math
import sqlite3

import numpy as np

from row_checks.rows import (
    after_blank_line,
    answer_has,
    blocks,
    near,
)


def check_reasoning_models_03():
    r = np.array([1] * 2 + [0] * 6, float)
    adv = (r - r.mean()) / r.std()
    near(r.std(), 0.433, 0.0005)
    near(adv[0], 1.73, 0.005)
    near(adv[-1], -0.58, 0.005)
    near(adv.sum(), 0, 1e-9)
    r = np.array([1] * 7 + [0], float)
    adv = (r - r.mean()) / r.std()
    near(adv[0], 0.38, 0.005)
    near(adv[-1], -2.65, 0.005)
    answer_has("reasoning-models-03", "0.433", "1.73", "-0.58", "0.38", "-2.65")


def check_reasoning_models_05():
    def f(p):
        return p**8 + (1 - p) ** 8

    assert f(0.5) < 0.01
    near(f(0.9), 0.43, 0.005)
    near(f(0.1), 0.43, 0.005)


def check_reasoning_models_09():
    batch, G = ["a", "b", "c"], 2
    assert np.array(batch * G).reshape(-1, G).tolist() == [["a", "b"], ["c", "a"], ["b", "c"]]
    ns = {"batch": batch, "G": G, "rewards": np.zeros(6)}
    exec(blocks("reasoning-models-09")[0], ns)
    assert np.array(ns["prompts"]).reshape(ns["r"].shape).tolist() == [
        ["a", "a"],
        ["b", "b"],
        ["c", "c"],
    ]
    q = {
        "batch": batch,
        "G": G,
        "np": np,
        "generate": lambda p: p,
        "reward": lambda t: float(t == "a"),
    }
    exec(after_blank_line("reasoning-models-09"), q)
    assert q["adv"].any()  # noise from mixing prompts


def check_reasoning_models_10():
    near(0.7**5, 0.17, 0.005)
    near(1 - 0.7**5, 0.83, 0.005)


def check_reasoning_models_12():
    g = np.random.default_rng(0)
    for p in ([0.4, 0.45, 0.15], [0.4, 0.45, 0.05, 0.05, 0.05]):
        c = g.multinomial(101, p, 50000)
        near((c.argmax(1) == 1).mean(), 0.7, 0.03)
    c = g.multinomial(5001, p, 5000)
    assert (c.argmax(1) == 1).mean() > 0.99


def check_reasoning_models_15():
    i, v, t = 900e-6, 250 * 5e-6, 3000 * 5e-6
    near(i + v + t, 0.01715, 1e-9)
    near(i + v, 0.00215, 1e-9)
    near((i + v + t) / (i + v), 8, 0.05)
    near(i / (i + v + t), 0.05, 0.005)


def check_reasoning_models_16():
    near((1 / 4000) / (1 / 200), 1 / 20, 1e-12)


def check_reasoning_models_17():
    old, new = {}, {}
    exec(after_blank_line("reasoning-models-17"), old)
    exec(blocks("reasoning-models-17")[0], new)
    o, n = old["reward"], new["reward"]
    assert (
        o("it is 3.5", "3.5")
        == o("so -7", "-7")
        == o("1,200", "1200")
        == o("12 (see step 3)", "12")
        == o("12", "12.0")
        == 0
    )
    try:
        o("none", "1")
        raise AssertionError
    except IndexError:
        pass
    for s, g in (
        ("3.5", "3.5"),
        ("-7", "-7"),
        ("1,200", "1200"),
        ("12 (see step 3)", "12"),
        ("12.", "12.0"),
        (".5", "0.5"),
    ):
        assert n("x 9 ANSWER: " + s, g) == 1, s
    assert n("no marker 12", "12") == 0


def check_reasoning_models_22():
    near(100 * math.sqrt(20.5 / 30 * 9.5 / 30 / 30), 9, 0.6)
    near(300 / 30, 10, 1e-9)


def check_reasoning_models_28():
    assert 47 * 86 == 4042


def check_reasoning_models_31():
    near(0.05 * 900, 45, 1e-9)
    answer_has("reasoning-models-31", "69 percent", "45", "one in six")
    near(100 / 145, 0.69, 0.005)
    near(0.05 * 990, 49.5, 1e-9)
    near(10 / 59.5, 1 / 6, 0.005)


def check_reasoning_models_32():
    assert 10 * 8 == 80


def check_reasoning_models_33():
    near(0.95**8, 0.66, 0.005)
    near(0.95**20, 0.36, 0.005)


def check_reasoning_models_39():
    def kl(n):
        return math.log(n) - (n - 1) / n

    near(math.log(16), 2.77, 0.005)
    near(15 / 16, 0.94, 0.005)
    near(kl(16), 1.8, 0.05)
    near(kl(256), 4.5, 0.06)
    # exact for a large uniform base without ties; below the bound for a base with ties
    for N, eq in ((4000, True), (5, False)):
        F = np.arange(N + 1) / N
        q = np.diff(F**16)
        d = (q * np.log(np.maximum(q, 1e-300) * N)).sum()
        assert d <= kl(16) + 1e-9
        assert (abs(d - kl(16)) < 0.01) == eq


def check_reasoning_models_42():
    c = sqlite3.connect(":memory:")
    assert c.execute("SELECT 1 WHERE 1 = 0").fetchall() == []


def check_reasoning_models_45():
    p = 1 - 0.999**16
    near(p, 0.016, 0.0005)
    near(64 * p, 1, 0.05)
    near(0.001 / (0.001 + 0.999 * 0.001), 0.5, 0.01)
