"""Checks of the responsible-ai rows: what their texts claim, recomputed or run."""

import math
from math import isclose

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.maths import (
    NORMAL,
    binom_cdf,
    bisect,
)
from row_checks.rows import (
    ROWS,
    blocks,
    near,
    row_has,
)


def check_responsible_ai_01():
    assert 0.8 * 60 == 48
    assert 0.8 * 30 == 24
    assert 50 - 24 == 26


def check_responsible_ai_03():
    def f(p):
        return p / (1 - p) * 0.2 / 0.8 * 0.7

    near(f(0.5), 0.175)
    near(f(0.2), 0.044, rel=0.01)
    near(f(0.5) / f(0.2), 4)
    for p in (0.5, 0.2):
        tp = p * 0.7
        fp = tp * 0.2 / 0.8
        near(tp / (tp + fp), 0.8)
        near(fp / (1 - p), f(p))


def check_responsible_ai_04():
    row_has("responsible-ai-04", "0.375", "0.75", "about 0.09", "0.80")
    assert 30 / 80 == 0.375
    assert 0.375 / 0.5 == 0.75
    near(32 / 80 / 0.5, 0.8)
    p = 80 / 180
    z = 0.125 / math.sqrt(p * (1 - p) * (1 / 100 + 1 / 80))
    near(2 * (1 - NORMAL.cdf(z)), 0.09, tol=0.005)


def check_responsible_ai_06():
    assert 2 / (1 / 256) == 512
    torch.manual_seed(0)
    B, C, sigma = 256, 1.0, 1.0
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    model = torch.nn.Linear(3, 1, bias=False)
    criterion = torch.nn.MSELoss(reduction="none")

    def g(x, y, noise=0.0):
        model.zero_grad()
        loss = criterion(model(x), y).mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), C)
        if noise:
            for p in model.parameters():
                p.grad += torch.randn_like(p.grad) * noise * C / B
        return model.weight.grad.clone()

    g(torch.randn(B, 3), torch.randn(B, 1), sigma)  # the question's code runs
    x, y = torch.randn(B, 3), torch.randn(B, 1)
    a = x.clone(), y.clone()
    b = x.clone(), y.clone()
    a[1][0] = 1e6
    b[1][0] = -1e6
    a[0][0] = b[0][0] = torch.ones(3)
    near((g(*a) - g(*b)).norm().item(), 2 * C, rel=0.01)


def check_responsible_ai_07():
    near(0.30 + 0.15 + 0.05 - 0.20, 0.30)


def check_responsible_ai_08():
    assert 5e6 * 4 == 20e6
    assert 500 * 20e6 == 10e9
    e = torch.nn.Embedding(30, 4)
    lin = torch.nn.Linear(4, 30)
    ids = torch.tensor([3, 7, 9])
    F.cross_entropy(lin(e(ids)), torch.tensor([7, 9, 1])).backward()
    assert set(e.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == {3, 7, 9}


def check_responsible_ai_10():
    def s(i, m, y):
        return 0.02 * i - 0.8 * m + 0.3 * y

    near(s(50, 1, 4), 1.4)
    near(s(80, 1, 4), 2.0)
    near(s(50, 1, 6), 2.0)
    assert s(50, 0, 4) >= 2
    near(s(65, 1, 5), 2.0)


def check_responsible_ai_12():
    near(1 - 0.99**100, 0.63, rel=0.01)


def check_responsible_ai_13():
    assert 1 / 0.5 == 2
    near(2 * math.sqrt(2), 2.8, rel=0.02)
    near(2 * math.log(20), 6, rel=0.01)
    near(2 * math.sqrt(2) / math.sqrt(10), 0.9, rel=0.01)
    near(math.exp(0.5), 1.65, rel=0.001)
    near(math.exp(5), 148, rel=0.005)
    rng = np.random.default_rng(0)
    x = rng.laplace(scale=2, size=100000)
    near((abs(x) < 6).mean(), 0.95, rel=0.003)


def check_responsible_ai_14():
    assert 3 / 0.01 == 300
    assert 0.99**300 < 0.05
    near(40000 * 0.005 * 0.01, 2)
    near(40000 * 0.005, 200)


def check_responsible_ai_15():
    e = 512 * 0.7 * 480 * 1.2 / 1000
    near(e, 206, rel=0.003)
    near(e * 0.4, 83, rel=0.006)
    near(e * 0.05, 10, rel=0.04)
    near(10e6 * 0.3 / 1e6, 3)
    near(e / 3, 69, rel=0.003)


def check_responsible_ai_16():
    near(0.5 + (0.99 - 0.82) / 2, 0.585)
    near(0.02 / 0.001, 20)


def check_responsible_ai_17():
    assert 8 * 3600 / 480 == 60
    near(1.5 / 6, 0.25)
    assert 480 * (0.06 - 0.015) > 21
    assert 6 * 60 / 60 == 6


def check_responsible_ai_19():
    a, b = 11, 10
    for _ in range(30):
        if a >= b:
            a += 5
        else:
            b += 5
    assert (a, b) == (161, 10)
    near(a / b, 16, rel=0.01)


def check_responsible_ai_20():
    near(120 / 10000, 0.012)
    near(math.log2(1e9), 29.9, rel=0.001)

    def bits(p):
        return -math.log2(p) / math.log(2)

    near(bits(0.01), 9.6, rel=0.002)
    near(1e10 * bits(0.01) / 8 / 1e9, 12, rel=0.005)
    near(bits(1e-6), 28.8, rel=0.002)
    near(1e10 * bits(1e-6) / 8 / 1e9, 36, rel=0.003)
    assert 1 - 0.99**500 > 0.99
    near(1 / (1 - (1 - 1e-6) ** 500), 2000, rel=0.001)


def check_responsible_ai_21():
    near(20 * (1 - 0.95**30), 15.7, rel=0.001)
    near(1 - 15.7 / 20, 0.2, tol=0.02)
    assert 1 / 20 == 0.05


def check_responsible_ai_22():
    near(0.95 * 2 + 0.05 * 30, 3.4)
    n, p, z = 50, 0.3, 1.96
    c = (p + z * z / 2 / n) / (1 + z * z / n)
    h = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    near(c - h, 0.19, tol=0.005)
    near(c + h, 0.44, tol=0.005)


def check_responsible_ai_23():
    near(2 * binom_cdf(18, 60, 0.5), 0.003, tol=0.0005)
    near((42 - 18) / 2000, 0.012)


def check_responsible_ai_24():
    assert ROWS["responsible-ai-24"]["difficulty"] == "advanced"
    near(3 / 300 * 4000, 40)
    lo = bisect(lambda p: (1 - binom_cdf(2, 300, p)) - 0.025, 1e-6, 0.1)
    hi = bisect(lambda p: binom_cdf(3, 300, p) - 0.025, 1e-6, 0.2)
    near(lo * 4000, 8, tol=0.5)
    near(hi * 4000, 116, tol=0.5)


def check_responsible_ai_25():
    ill = 20000 * 0.02
    assert ill == 400
    assert 0.8 * ill == 320
    fp = (20000 - ill) * 0.1
    near(fp, 1960)
    near((320 + fp) / 365, 6, rel=0.05)
    near((320 + fp) / 320, 7, rel=0.02)
    near(1.96 * math.sqrt(0.16 / 100), 0.08, rel=0.03)
    near(1.96 * math.sqrt(0.16 / 15), 0.20, rel=0.02)
    assert 0.15 * 100 == 15
    row_has(
        "responsible-ai-25",
        "320 caught",
        "1,960",
        "8 points",
        "20 points",
        "15 patients",
        "first sign of suspicion",
    )


def check_responsible_ai_108():
    ft, pre = 6 * 8e9 * 50e6, 6 * 8e9 * 15e12
    assert isclose(ft, 2.4e18)
    assert isclose(pre, 7.2e23)
    assert 3e-6 < ft / pre < 3.5e-6
    assert ft / pre < 1 / 3


def check_responsible_ai_117():
    rows = [{"licence": name} for name in ("", "cc-by", "2.0", "MIT", "cc-by-nc-4.0", "gpl-3.0")]
    ns = {"rows": list(rows)}
    exec("\n".join(ROWS["responsible-ai-117"]["question"].split("\n")[1:]), ns)
    assert [r["licence"] for r in ns["rows"]] == ["", "cc-by", "2.0", "MIT"]
    ns = {"rows": list(rows)}
    exec(blocks("responsible-ai-117")[0], ns)
    assert [r["licence"] for r in ns["rows"]] == ["MIT"]


def check_responsible_ai_122():
    ns = {}
    src = blocks("responsible-ai-122")[0]
    exec(src, ns)
    assert len([line for line in src.split("\n") if line.strip()]) <= 20

    def fresh():
        log = []
        for i in range(5):
            ns["append"](log, {"id": i, "refused": i % 2 == 0})
        return log

    chain = fresh()
    assert ns["intact"](chain)
    assert ns["intact"]([])
    chain[2]["record"]["refused"] = False
    assert not ns["intact"](chain)
    chain = fresh()
    del chain[2]
    assert not ns["intact"](chain)
    chain = fresh()
    chain.insert(2, dict(chain[1]))
    assert not ns["intact"](chain)
    chain = fresh()[:3]
    assert ns["intact"](chain)  # truncation passes
    chain = fresh()
    chain[2]["record"]["refused"] = False
    records = [entry["record"] for entry in chain]
    chain = []
    for record in records:
        ns["append"](chain, record)
    assert ns["intact"](chain)  # recomputing passes


def check_responsible_ai_127():
    assert isclose(1 - 0.95, 1 / 20)


def check_responsible_ai_130():
    assert isclose(3600 / 45 * 0.12, 9.6)
    assert int(3600 / 70) == 51
    assert round(3600 / 70 * 0.12, 2) == 6.17
    x = 3600 / 70 * 0.12 * 0.95 * 50 / 60
    assert round(x, 2) == 4.89
    assert abs(x / 9.6 - 0.5) < 0.02


def check_responsible_ai_132():
    kwh = 1.5 * 8760
    assert kwh == 13140
    assert round(kwh * 0.5 / 1000, 1) == 6.6
    assert 7 < 4000 / (kwh * 0.5) * 12 < 7.5
    assert 7.5 < 4000 / (kwh * 0.04) < 7.7
