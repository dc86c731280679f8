"""Checks of the retrieval rows: what their texts claim, recomputed or run."""

from math import isclose, log, log2

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    ROWS,
    answer_has,
    blocks,
)


def bm25(tf, dl, avg, k1, b):
    return tf * (k1 + 1) / (tf + k1 * (1 - b + b * dl / avg)) if tf else 0.0


def check_retrieval_01():
    assert bm25(10, 100, 100, 1.2, 0.75) - bm25(9, 100, 100, 1.2, 0.75) < 0.05 * (
        bm25(1, 100, 100, 1.2, 0.75)
    )


def check_retrieval_02():
    assert bm25(2, 5, 10, 1.2, 0) == bm25(2, 500, 10, 1.2, 0)
    assert bm25(2, 5, 10, 1.2, 0.75) > bm25(2, 500, 10, 1.2, 0.75)
    assert bm25(1, 9, 10, 0, 0.75) == bm25(7, 9, 10, 0, 0.75) == 1
    # b = 0 in a mixed collection: the manual with more occurrences wins
    assert bm25(40, 50000, 2000, 1.2, 0) > bm25(1, 15, 2000, 1.2, 0)
    assert bm25(40, 50000, 2000, 1.2, 0.75) < bm25(1, 15, 2000, 1.2, 0.75) * 1.2


def check_retrieval_03():
    ns = {}
    exec(blocks("retrieval-03")[0], ns)
    assert ns["rrf"]([["a", "b", "c"], ["b", "d", "a"]])[0] == "b"
    lists = [["x", *list("abcdefghi")], [*list("jklmnopqr"), "i"]]
    assert ns["rrf"](lists)[0] == "i"  # liked by both at rank 10 beats one rank 1
    assert isclose(0.9 - 0.6, 0.3)


def check_retrieval_05():
    q = np.array([[1, 0], [0, 1.0]])
    d = np.array([[0.8, 0.6], [0, 1], [0.6, 0.8]])
    assert isclose((q @ d.T).max(1).sum(), 1.8)
    assert 200 * 128 * 2 == 51200
    assert 768 * 2 == 1536
    assert np.allclose(np.linalg.norm(d, axis=1), 1)


def check_retrieval_11():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 32))
    q = rng.normal(size=(100, 32))
    c = x[rng.choice(4000, 40, False)]
    for _ in range(4):
        a = (
            ((x[:, None, :] - c) ** 2).sum(2).argmin(1)
            if False
            else (-2 * x @ c.T + (c**2).sum(1)).argmin(1)
        )
        c = np.array([x[a == i].mean(0) if (a == i).any() else c[i] for i in range(40)])
    a = (-2 * x @ c.T + (c**2).sum(1)).argmin(1)
    true = (-2 * q @ x.T + (x**2).sum(1)).argmin(1)
    order = (-2 * q @ c.T + (c**2).sum(1)).argsort(1)
    rec = [np.mean([a[t] in order[i, :n] for i, t in enumerate(true)]) for n in (1, 4, 16, 40)]
    assert rec[0] < 0.7
    assert rec[0] < rec[1] < rec[2] <= rec[3] == 1


def check_retrieval_12():
    assert 768 // 96 == 8
    assert 768 * 4 == 3072
    assert 3072 / 96 == 32
    assert log2(256) == 8
    rng = np.random.default_rng(0)
    q = rng.normal(size=768).reshape(96, 8)
    C = rng.normal(size=(96, 256, 8))
    codes = rng.integers(0, 256, 96)
    table = ((q[:, None] - C) ** 2).sum(2)
    rec = C[np.arange(96), codes]
    assert isclose(table[np.arange(96), codes].sum(), ((q - rec) ** 2).sum())
    ip = np.einsum("bd,bcd->bc", q, C)
    assert isclose(ip[np.arange(96), codes].sum(), (q * rec).sum())


def check_retrieval_13():
    rng = np.random.default_rng(1)
    d = rng.normal(size=(500, 16))
    d[:3] *= 8
    q = rng.normal(size=(200, 16))
    raw = (q @ d.T).argmax(1)
    nd = d / np.linalg.norm(d, axis=1, keepdims=True)
    cos = (q @ nd.T).argmax(1)
    assert np.mean(raw < 3) > 0.7
    assert np.mean(cos < 3) < 0.05
    qn = q / np.linalg.norm(q, axis=1, keepdims=True)
    assert (cos == (qn @ nd.T).argmax(1)).all()


def check_retrieval_14():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 9))
    a /= np.linalg.norm(a)
    b /= np.linalg.norm(b)
    assert isclose(((a - b) ** 2).sum(), 2 - 2 * a @ b)


def check_retrieval_19():
    # idf from two copies that hold different numbers of dead documents
    def idf(n, df):
        return log(1 + (n - df + 0.5) / (df + 0.5))

    assert idf(1000, 3) > idf(1000, 5)
    assert abs(idf(10**6, 3000) - idf(10**6, 3005)) < 0.01


def check_retrieval_22():
    ns = {"log2": log2}
    exec(ROWS["retrieval-22"]["question"].split("\n", 1)[1], ns)
    assert ns["ndcg"]([1] + [0] * 9, 10) == 1.0
    try:
        ns["ndcg"]([0] * 10, 10)
        raise AssertionError()
    except ZeroDivisionError:
        pass
    exec(blocks("retrieval-22")[0], ns)
    assert round(ns["ndcg"]([1] + [0] * 9, [1] * 10, 10), 2) == 0.22
    assert ns["ndcg"]([0, 0], [0, 0, 0], 10) is None
    assert ns["ndcg"]([2, 1], [1, 2], 10) == 1


def check_retrieval_25():
    ns = {}
    exec(blocks("retrieval-25")[0], ns)
    src = (
        "The tenant may\nterminate this contract, with three months' notice. Infor-\nmation is due."
    )
    q = ns["quoted"]
    assert q("tenant may terminate this contract with", src)
    assert q("The TENANT may terminate this contract,", src)
    assert not q("the contract", src)
    assert not q("enant may terminate this contract with", src)
    assert not q("The tenant may ... three months' notice", src)
    assert not q("three months notice information is due", src)
    greek = (
        "\u03b1\u03b2\u03b3 \u03b4\u03b5\u03b6 \u03b1\u03b2 \u03b3\u03b4 \u03b5\u03b6 \u03b7\u03b8"
    )
    assert ns["norm"](greek) == ""
    assert not q(greek, greek)


def check_retrieval_37():
    ns = {"torch": torch, "F": F}
    exec(blocks("retrieval-37")[0], ns)
    torch.manual_seed(0)
    Q = F.normalize(torch.randn(4, 8), dim=1)
    D = F.normalize(torch.randn(4, 8), dim=1)
    D[1] = D[0]
    Q[1] = Q[0] = D[0]
    ids = torch.tensor([7, 7, 8, 9])
    plain = {"Q": Q, "D": D, "F": F, "torch": torch}
    exec("\n".join(ROWS["retrieval-37"]["question"].split("\n")[1:]), plain)
    a, b = ns["loss_fn"](Q, D, ids), plain["loss"]
    assert torch.isfinite(a)
    assert a < b  # the copies no longer count as errors
    assert isclose(ns["loss_fn"](Q, D, torch.arange(4)).item(), b.item(), rel_tol=1e-5)


def check_retrieval_39():
    rng = np.random.default_rng(3)
    x = rng.normal(size=768)
    x /= np.linalg.norm(x)
    assert np.linalg.norm(x[:256]) < 0.9  # a cut vector needs normalising again


def check_retrieval_41():
    assert 100 - 84 == 16
    assert abs(400 * 0.39 - 150) < 10  # wrong at the start, of 400


def check_retrieval_43():
    assert (88 - 78, 74 - 70, 91 - 88, 74 - 69, 60 - 20) == (10, 4, 3, 5, 40)
    assert [round(a / r, 2) for a, r in ((70, 78), (74, 88), (69, 91))] == [0.9, 0.84, 0.76]
    answer_has("retrieval-43", "0.90 to 0.84 to 0.76")


def check_retrieval_49():
    assert 15 + 8 + 50 * 2 + 700 == 823
    answer_has("retrieval-49", "823")
