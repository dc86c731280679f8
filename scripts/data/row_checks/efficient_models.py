"""Checks of the efficient-models rows: what their texts claim, recomputed or run."""

import math

import numpy as np


def floats(e, m, bias, finite_top=None):
    out = set()
    for E in range(2**e):
        for M in range(2**m):
            if finite_top and not finite_top(E, M):
                continue
            v = M / 2**m * 2.0 ** (1 - bias) if E == 0 else (1 + M / 2**m) * 2.0 ** (E - bias)
            out.add(v)
    return sorted(out)


FP4 = np.array(floats(2, 1, 1))


def to_fp4(x):
    x = np.asarray(x, float)
    return np.sign(x) * FP4[np.abs(np.minimum(np.abs(x), 6)[..., None] - FP4).argmin(-1)]


def check_efficient_models_01():
    assert floats(4, 3, 7, lambda E, M: not (E == 15 and M == 7))[-1] == 448
    assert floats(5, 2, 15, lambda E, M: E < 31)[-1] == 57344


def check_efficient_models_02():
    assert FP4.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def check_efficient_models_03():
    assert 4 + 8 / 32 == 4.25


def check_efficient_models_04():
    assert 2.0 ** (math.floor(math.log2(7.9)) - 2) == 1
    assert to_fp4(7.9) == 6
    assert 8 / 16 == 0.5
    assert 8 / 32 == 0.25
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 32))
    s = 2.0 ** (np.floor(np.log2(np.abs(x).max(1, keepdims=True))) - 2)
    mx = ((to_fp4(x / s) * s - x) ** 2).mean()
    y = x.reshape(-1, 16)
    s = np.abs(y).max(1, keepdims=True) / 6
    s = (
        np.array(floats(4, 3, 7))[np.abs(s * 64 - np.array(floats(4, 3, 7))).argmin(1)][:, None]
        / 64
    )
    nv = ((to_fp4(y / s) * s - y) ** 2).mean()
    assert nv < mx


def check_efficient_models_07():
    # rotation cancels along the summed axis; nearest rounding kills small values, stochastic
    # does not
    H = np.array([[1.0]])
    for _ in range(4):
        H = np.block([[H, H], [H, -H]])
    H /= 4
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(3, 16)), rng.normal(size=(16, 5))
    assert np.allclose((A @ H) @ (H.T @ B), A @ B)
    v = np.full(20000, 0.2)
    assert to_fp4(v).sum() == 0
    sr = np.where(rng.random(20000) < 0.4, 0.5, 0.0)
    assert abs(sr.mean() - 0.2) < 0.01


def check_efficient_models_09():
    w = np.array([-2, 0.5, 0.1])
    s = w.max() / 127
    r = np.round(w / s)
    assert r[0] == -508
    assert int((int(r[0]) + 128) % 256 - 128) == 4

    def quant(w):
        s = max(np.abs(w).max() / 127, 1e-12)
        return np.clip(np.round(w / s), -127, 127).astype(np.int8), s

    q, s = quant(w)
    assert np.abs(q * s - w).max() <= s / 2 + 1e-12
    q, s = quant(np.zeros(3))
    assert (q == 0).all()


def check_efficient_models_10():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(64, 128))
    X[:, 3] *= 50
    W = rng.normal(size=(128, 32))
    s = np.abs(X).max(0) ** 0.5 / np.abs(W).max(1) ** 0.5
    Y = (X / s) @ (W * s[:, None])
    assert np.allclose(Y, X @ W)

    def q(a, ax):
        c = np.abs(a).max(ax, keepdims=True) / 127
        return np.round(a / c) * c

    e0 = np.abs(q(X, 1) @ q(W, 0) - X @ W).mean()
    e1 = np.abs(q(X / s, 1) @ q(W * s[:, None], 0) - X @ W).mean()
    assert e1 < e0


def check_efficient_models_12():
    # GPTQ-like compensation: output error falls although the weight error grows
    rng = np.random.default_rng(1)
    d, n = 24, 400
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    w = rng.normal(size=(40, d))
    s = 0.5
    rtn = np.round(w / s) * s
    U = np.linalg.cholesky(np.linalg.inv(X.T @ X + 1e-3 * np.eye(d))).T
    g = w.copy()
    out = np.zeros_like(w)
    for j in range(d):
        out[:, j] = np.round(g[:, j] / s) * s
        err = (g[:, j] - out[:, j]) / U[j, j]
        g[:, j:] -= err[:, None] * U[j, j:][None]

    def o(q):
        return (((q - w) @ X.T) ** 2).mean()

    assert o(out) < o(rtn)
    assert ((out - w) ** 2).mean() > ((rtn - w) ** 2).mean()


def check_efficient_models_17():
    assert 14 * 4 == 7 * 8


def check_efficient_models_19():
    assert 4 + 32 / 64 == 4.5
    assert 39 < 70 * 4.5 / 8 < 39.5
    assert 70 * 4 / 8 == 35


def check_efficient_models_25():
    def turn(base):
        return 2 * math.pi * base ** (126 / 128)

    assert 53e3 < turn(1e4) < 55e3
    assert 2.4e6 < turn(5e5) < 3e6


def check_efficient_models_26():
    assert 4096 * 32 == 131072


def check_efficient_models_27():
    tok = 2 * 8 * 128 * 2
    assert tok == 4096
    assert 48 // 6 == 8
    assert 48 - 8 == 40
    assert 8 * 131072 * tok == 4 * 2**30
    assert 1024 * tok == 4 * 2**20
    assert 40 * 4 == 160
    assert 48 * 131072 * tok == 24 * 2**30


def check_efficient_models_28():
    rng = np.random.default_rng(0)
    Wq, Wk, h, c = (
        rng.normal(size=(8, 16)),
        rng.normal(size=(8, 4)),
        rng.normal(size=16),
        rng.normal(size=(6, 4)),
    )
    assert np.allclose((c @ Wk.T) @ (Wq @ h), c @ (Wk.T @ (Wq @ h)))


def check_efficient_models_33():
    def parallel(Q, K, V):
        return np.tril(Q @ K.T) @ V

    def recurrent(Q, K, V):
        S, out = np.zeros((K.shape[1], V.shape[1])), []
        for q, k, v in zip(Q, K, V, strict=False):
            S += np.outer(k, v)
            out.append(q @ S)
        return np.array(out)

    Q, K, V = np.random.default_rng(0).normal(size=(3, 12, 5))
    assert np.allclose(parallel(Q, K, V), recurrent(Q, K, V))


def check_efficient_models_34():
    k = np.array([0.6, 0.8])
    a, b = np.array([1.0, 2, 3]), np.array([5.0, 0, 1])
    S = np.zeros((2, 3))
    for v in (a, b):
        S += np.outer(k, v - k @ S)
    assert np.allclose(k @ S, b)
    assert np.allclose(k @ (np.outer(k, a) + np.outer(k, b)), a + b)


def check_efficient_models_38():
    def propose(ids, n=3, k=8):
        tail = ids[-n:]
        for i in range(len(ids) - n - 1, -1, -1):
            if ids[i : i + n] == tail:
                return ids[i + n : i + n + k]
        return []

    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3], k=3) == [4, 5, 9]
    assert propose([1, 2, 3, 4, 5]) == []
    assert propose([7, 7, 7, 7]) == [7]
    assert propose([1]) == []


def check_efficient_models_41():
    assert math.comb(8, 2) == 28
    assert math.comb(64, 16) > 1e14


def check_efficient_models_43():
    rng = np.random.default_rng(0)
    W, x, r = rng.normal(size=(6, 6)), rng.normal(size=6), rng.normal(size=(8, 6))
    s = r @ x
    top = np.argsort(s)[-2:]
    g = np.exp(s[top])
    g /= g.sum()
    assert np.allclose(sum(gi * np.maximum(W @ x, 0) for gi in g), np.maximum(W @ x, 0))


def check_efficient_models_45():
    assert 66 < 100 / (3 * 0.5) < 67
