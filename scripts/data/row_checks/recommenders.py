"""Checks of the recommenders rows: what their texts claim, recomputed or run."""

from math import exp, isclose, log

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    ROWS,
    blocks,
)


def check_recommenders_03():
    ns = {"torch": torch, "F": F}
    exec(blocks("recommenders-03")[0], ns)
    # one context, 3 items with log frequencies q: uncorrected optimum is log(p / q),
    # corrected log p
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    q = np.array([0.6, 0.3, 0.1])
    p = np.array([0.6, 0.3, 0.1])  # everybody alike: p = q, so the uncorrected score is flat

    def fit(corr):
        s = torch.zeros(3, requires_grad=True)
        opt = torch.optim.Adam([s], 0.05)
        lq = torch.tensor(np.log(q), dtype=torch.float32)
        for _ in range(250):
            i = torch.tensor(rng.choice(3, 256, p=p))
            U = torch.ones(256, 1)
            V = s[i][:, None]
            loss = ns["sampled_softmax"](U, V, lq[i] if corr else 0 * lq[i], tau=1.0)
            opt.zero_grad()
            loss.backward()
            opt.step()
        return s.detach().numpy()

    a, b = fit(False), fit(True)
    assert abs(a[0] - a[2]) < 0.2
    assert abs((b[0] - b[2]) - log(6)) < 0.25


def check_recommenders_08():
    assert 3 / 12 == 0.25
    assert 12 / 3 == 4


def check_recommenders_09():
    assert 2**10 == 1024


def check_recommenders_10():
    rng = np.random.default_rng(0)
    mu = np.array([0.5, 0.3, 0.2])
    pi = np.array([0.1, 0.2, 0.7])
    a = rng.choice(3, 200000, p=mu)
    assert abs((pi[a] / mu[a]).mean() - 1) < 0.02
    assert abs((pi[a] / np.array([0.3, 0.3, 0.4])[a]).mean() - 1) > 0.1  # wrong propensities


def check_recommenders_13():
    ns = {}
    exec(blocks("recommenders-13")[0], ns)
    s = [0.9, 0.89, 0.88, 0.5]
    sim = np.array([[1, 0.99, 0.98, 0], [0.99, 1, 0.99, 0], [0.98, 0.99, 1, 0], [0, 0, 0, 1]])
    assert ns["mmr"](s, sim, 4, 1.0) == [0, 1, 2, 3]
    assert ns["mmr"](s, sim, 2, 0.5) == [0, 3]
    assert len(ns["mmr"](s, sim, 9)) == 4


def check_recommenders_14():
    p = np.array([0.7, 0.3])
    assert np.isclose((p * np.log(p / np.array([7, 3]) * 10)).sum(), 0)


def check_recommenders_15():
    losses = np.array([-2, 0.5, 1.0])
    assert (np.argsort(losses) == np.argsort(2 * losses)).all()


def check_recommenders_17():
    class S(np.ndarray):
        def quantile(self, q):
            return np.quantile(np.asarray(self), q)

    class DF:
        def __init__(self, ts):
            self.ts = np.asarray(ts, float)

        def __getitem__(self, k):
            return self.ts.view(S) if isinstance(k, str) else DF(self.ts[np.asarray(k)])

    ns = {"interactions": DF(np.random.default_rng(0).permutation(100))}
    exec(blocks("recommenders-17")[0], ns)
    assert ns["train"].ts.max() < ns["test"].ts.min()
    assert len(ns["train"].ts) == 80
    try:
        import pandas as pd  # noqa: PLC0415

        ns = {"interactions": pd.DataFrame({"ts": range(100)})}
        exec(blocks("recommenders-17")[0], ns)
        assert len(ns["test"]) == 20
    except ImportError:
        pass


def check_recommenders_18():
    assert round(100 * 499 / 9999) == 5
    rng = np.random.default_rng(0)
    above = rng.hypergeometric(499, 9500, 100, 20000)
    assert (above < 10).mean() > 0.95
    assert abs(above.mean() + 1 - 6) < 0.05
    assert (rng.hypergeometric(999, 9000, 100, 20000) < 10).mean() > 0.4  # rank 1000: about a coin
    assert (rng.hypergeometric(79, 9920, 100, 20000) < 10).mean() > 0.999


def check_recommenders_21():
    g = 200e6 * 64 * 4 / 1e9
    assert round(g) == 51
    assert round(3 * g) == 154
    assert 2 * 64 == 128


def check_recommenders_22():
    alone = (1 - 1e-6) ** 999999
    assert round(alone, 2) == 0.37 == round(exp(-1), 2)
    assert round(1 - alone, 2) == 0.63
    k = 1000
    assert len({(i // k, i % k) for i in range(10**6)}) == 10**6
    A = np.random.default_rng(0).normal(size=(1001, 4))
    B = A[::-1]
    item_id = 123456
    ns = {"A": A, "B": B, "k": k, "item_id": item_id}
    line = next(
        part for part in ROWS["recommenders-22"]["answer"].split("\n") if part.startswith("    ")
    ).strip()
    exec(line, ns)
    assert ns["vec"].shape == (4,)


def check_recommenders_27():
    rng = np.random.default_rng(0)
    Y = rng.normal(size=(50, 5))
    c = np.ones(50)
    p = np.zeros(50)
    t = [3, 8, 20]
    c[t] += 40 * np.array([1, 2, 5])
    p[t] = 1
    full = np.linalg.solve(Y.T @ (c[:, None] * Y) + 0.1 * np.eye(5), Y.T @ (c * p))
    G = Y.T @ Y
    fast = np.linalg.solve(
        G + Y[t].T @ ((c[t] - 1)[:, None] * Y[t]) + 0.1 * np.eye(5), Y[t].T @ c[t]
    )
    assert np.allclose(full, fast)


def check_recommenders_28():
    ns = {"np": np}
    exec(blocks("recommenders-28")[0], ns)
    R = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0.0]])
    with np.errstate(all="ignore"):
        X = R / np.linalg.norm(R, axis=0)
        S = X.T @ X
        top = np.argsort(-S, axis=1)[:, :10]
    assert top[0, 0] in (0, 1)
    assert np.isnan(S[3]).all()
    assert top[0, -1] == 3
    assert isclose(S[0, 0], 1)
    nb = ns["neighbours"](R, 2)
    assert nb.shape == (4, 2)
    assert all(i not in nb[i] for i in range(4))
    assert nb[0, 0] == 1
    R = np.array([[1, 1], [0, 0.0]])
    X = R / np.linalg.norm(R, axis=0)
    assert isclose((X.T @ X)[0, 1], 1)
    try:
        import scipy.sparse as sp  # noqa: PLC0415

        try:
            np.linalg.norm(sp.csr_matrix(R), axis=0)
            raise AssertionError()
        except (ValueError, TypeError, IndexError):
            pass
    except ImportError:
        pass


def check_recommenders_39():
    ana, ben = np.array([1, 0]), np.array([0.5, 0.5])
    F = np.array([[5, 1], [1, 5]])
    assert list(F @ ana) == [5, 1]
    assert list(F @ ben) == [3, 3]


def check_recommenders_42():
    def f(d):
        return -log(1 / (1 + exp(-d)))

    for d in (-2, 0, 3):
        assert isclose((f(d + 1e-5) - f(d - 1e-5)) / 2e-5, -(1 - 1 / (1 + exp(-d))), rel_tol=1e-4)


def check_recommenders_45():
    assert 40 - 6 == 34
    assert 40 - 1 == 39
