"""Checks of the interpretability rows: what their texts claim, recomputed or run."""

from itertools import permutations

import numpy as np
import torch

from row_checks.rows import (
    answer_has,
    blocks,
)


def check_interpretability_03():
    z = np.random.default_rng(0).normal(size=(5, 9))
    w = np.exp(z)
    w /= w.sum(1, keepdims=True)
    assert np.allclose(w.sum(1), 1)


def check_interpretability_05():
    g = torch.Generator().manual_seed(0)

    def rn(*s):
        return torch.randn(*s, generator=g)

    x, We, be, Wd, bd = rn(32, 8), rn(8, 24), rn(24), rn(24, 8), rn(8)

    def run(a):
        env = {
            "x": x,
            "We": We / a,
            "be": be / a,
            "Wd": Wd * a,
            "bd": bd,
            "relu": torch.relu,
            "lam": 1.0,
        }
        exec(blocks("interpretability-05", "question")[0], env)
        rec = ((x - env["xh"]) ** 2).sum(-1).mean()
        exec(blocks("interpretability-05")[0], env)
        return rec, env["loss"] - rec, env["l1"], (env["z"] > 0).float().mean()

    a, b = run(1.0), run(2.0)
    assert torch.allclose(a[0], b[0])
    assert torch.allclose(a[1], 2 * b[1], rtol=1e-4)
    assert torch.allclose(a[2], b[2], rtol=1e-4)
    assert a[3] == b[3]


def check_interpretability_11():

    def shap(v):
        o = {"A": 0.0, "B": 0.0}
        for p in permutations("AB"):
            s = frozenset()
            for k in p:
                o[k] += (v(s | {k}) - v(s)) / 2
                s = s | {k}
        return o

    both, add = lambda s: float(len(s) == 2), lambda s: 0.5 * len(s)
    assert shap(both) == shap(add) == {"A": 0.5, "B": 0.5}
    full = frozenset("AB")
    assert both(full) - both(full - {"A"}) == 1
    assert add(full) - add(full - {"A"}) == 0.5


def check_interpretability_12():
    r = np.random.default_rng(0)  # model reads only a; b is correlated with a
    a = r.normal(size=200_000)
    b = 0.9 * a + np.sqrt(1 - 0.81) * r.normal(size=a.size)

    def f(a):
        return a

    near = np.abs(b - 1) < 0.05
    assert abs(f(a[near]).mean() - 0.9) < 0.05  # conditional: knowing b alone moves the output
    assert abs(f(a).mean()) < 0.01  # drawn independently: b moves nothing


def check_interpretability_13():
    class S(dict):
        """A Series as far as needed: assigning matches by label."""

    col = S({0: 5, 1: 6, 2: 7})
    shuffled = S([(k, col[k]) for k in (2, 0, 1)])
    assert [shuffled[k] for k in (0, 1, 2)] == [5, 6, 7]
    answer_has("interpretability-13", ".to_numpy()")


def check_interpretability_14():
    def f(x):
        return 1 - np.maximum(0, 1 - x)

    assert f(0.0) == 0
    assert f(2.0) == 1
    assert (f(2 + 1e-6) - f(2 - 1e-6)) == 0
    t = (np.arange(1000) + 0.5) / 1000 * 2
    slope = (f(t + 1e-6) - f(t - 1e-6)) / 2e-6
    assert abs(slope.mean() - 0.5) < 1e-3
    assert abs(slope.mean() * 2 - (f(2.0) - f(0.0))) < 2e-3


def check_interpretability_18():
    grp = np.where(np.arange(1000) < 500, 1.0, -1.0)
    ice = np.array([grp * d for d in np.linspace(0, 3, 7)])
    assert np.abs(ice.mean(1)).max() < 1e-9
    assert np.abs(ice).max() == 3


def check_interpretability_19():
    r = np.random.default_rng(0)
    v = r.normal(size=(3000, 1000))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    c = v[:200] @ v[200:].T
    assert abs(c.std() - 0.0316) < 0.001
    few = [v[r.choice(np.arange(1, 3000), 30, replace=False)].sum(0) @ v[0] for _ in range(300)]
    assert np.std(few) < 0.25  # below a signal of 1


def check_interpretability_24():
    r = np.random.default_rng(0)
    y = r.integers(0, 2, 4000) * 2 - 1
    x = r.normal(size=(4000, 5)) + y[:, None] * np.array([2, 0, 0, 0, 0])
    s = r.choice([-1, 1], 4000)
    x[:, 1], x[:, 2] = (
        s * 3 + 0.1 * r.normal(size=4000),
        s * y * 3,
    )  # product of two coordinates tells y
    d = x[y > 0].mean(0) - x[y < 0].mean(0)
    d /= np.linalg.norm(d)
    p = x - np.outer(x @ d, d)
    w = np.linalg.lstsq(p, y, rcond=None)[0]
    assert (np.sign(p @ w) == y).mean() < 0.6
    assert (np.sign(p[:, 1] * p[:, 2]) == y).mean() > 0.9


def check_interpretability_25():
    env = {}
    exec(blocks("interpretability-25")[0], env)

    class L(torch.nn.Module):
        def __init__(self, tup):
            super().__init__()
            self.tup = tup

        def forward(self, x):
            y = x * 1
            return (y, None) if self.tup else y

    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for tup in (True, False):
        layer = L(tup)
        with torch.no_grad():
            h = env["steer"](layer, v, 4.0)
            o = layer(torch.zeros(3, 2))
            o = o[0] if tup else o
            assert torch.equal(o[0], torch.tensor([4.0, 8.0]))
            h.remove()
            o = layer(torch.zeros(3, 2))
            o = o[0] if tup else o
            assert o.abs().sum() == 0
