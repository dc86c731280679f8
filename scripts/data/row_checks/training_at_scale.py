"""Checks of the training-at-scale rows: what their texts claim, recomputed or run."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    near,
    row_has,
)


def pipe(p, m, kind, tf=1, tb=2):
    """slots until the step is over and the most activations a stage holds"""
    orders = []
    for s in range(p):
        if kind == "gpipe":
            o = [("f", i) for i in range(m)] + [("b", i) for i in range(m)]
        else:
            w = min(p - s, m)
            o = [("f", i) for i in range(w)]
            for i in range(m):
                o.append(("b", i))
                if w + i < m:
                    o.append(("f", w + i))
        orders.append(o)
    done, clock, pos = {}, [0] * p, [0] * p
    while any(pos[s] < len(orders[s]) for s in range(p)):
        moved = False
        for s in range(p):
            while pos[s] < len(orders[s]):
                k, i = orders[s][pos[s]]
                dep = (k, i, s - 1) if k == "f" else (k, i, s + 1)
                if 0 <= dep[2] < p and dep not in done:
                    break
                if k == "b" and ("f", i, s) not in done:
                    break
                t0 = max(clock[s], done.get(dep, 0))
                clock[s] = done[(k, i, s)] = t0 + (tf if k == "f" else tb)
                pos[s] += 1
                moved = True
        assert moved
    hold = []
    for o in orders:
        c = mx = 0
        for k, _ in o:
            c += 1 if k == "f" else -1
            mx = max(mx, c)
        hold.append(mx)
    return max(clock), hold


def check_training_at_scale_01():
    assert 8 * 4 * 8 == 256
    assert 256 * 2048 == 524288
    near(1e9 / 524288, 1907, rel=0.001)
    assert 4 * 8 == 32


def check_training_at_scale_02():
    assert 2 + 2 + 4 + 8 == 16
    assert 7 * 16 == 112
    assert 112 / 4 == 28
    assert 7 * (8 - 2) == 42
    assert 7 * 2 == 14
    assert 4 + 8 == 12


def check_training_at_scale_03():
    torch.manual_seed(0)
    W, A, B, x = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.randn(5)
    torch.testing.assert_close(W @ x + 2.0 * (B @ (A @ x)), (W + 2.0 * B @ A) @ x)


def check_training_at_scale_04():
    n = [1000, 100, 100, 100]
    near(1 / 4 / n[0], 1 / 4000)
    near(1 / 4 / n[1], 1 / 400)
    assert sum(n) == 1300
    torch.manual_seed(0)
    W = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    X = [torch.randn(k, 6, dtype=torch.float64) for k in (20, 2, 2, 2)]
    Y = [torch.randint(7, (len(x),)) for x in X]

    def grad(losses):
        return torch.autograd.grad(sum(losses), W)[0]

    ce = F.cross_entropy
    true = grad([ce(torch.cat(X) @ W.T, torch.cat(Y))])
    bad = grad([ce(x @ W.T, y) / 4 for x, y in zip(X, Y, strict=False)])
    fix = grad([ce(x @ W.T, y, reduction="sum") / 26 for x, y in zip(X, Y, strict=False)])
    torch.testing.assert_close(fix, true)
    assert not torch.allclose(bad, true)
    ranks = [grad([ce(x @ W.T, y, reduction="sum") / 26 * 4]) for x, y in zip(X, Y, strict=False)]
    torch.testing.assert_close(sum(ranks) / 4, true)  # DDP averages: times the world size


def check_training_at_scale_05():
    near(2 * 7 / 8 * 14, 24.5)
    near(24.5 / 200 * 1e3, 123, rel=0.01)
    near(2 * 999 / 1000 * 14, 28, rel=0.002)
    rng = np.random.default_rng(0)
    n = 5
    x = rng.normal(size=(n, n, 3))
    b = x.copy()
    sent = 0
    for s in range(n - 1):
        m = [b[i, (i - s) % n].copy() for i in range(n)]
        sent += 1
        for i in range(n):
            b[(i + 1) % n, (i - s) % n] += m[i]
    for s in range(n - 1):
        m = [b[i, (i + 1 - s) % n].copy() for i in range(n)]
        sent += 1
        for i in range(n):
            b[(i + 1) % n, (i + 1 - s) % n] = m[i]
    for i in range(n):
        np.testing.assert_allclose(b[i], x.sum(0))
    assert sent == 2 * (n - 1)


def check_training_at_scale_06():
    f, b = torch.finfo(torch.float16), torch.finfo(torch.bfloat16)
    assert f.max == 65504
    assert b.eps == 2**-7
    near(2**-24, 6e-8, rel=0.01)
    near(1 + b.eps, 1.0078, rel=0.0001)
    assert torch.tensor(2e-8).half() == 0
    assert torch.tensor(2e-8).bfloat16() > 0


def check_training_at_scale_07():
    assert 0.5 * 65536 == 32768
    near(1 / 65536, 1.5e-5, rel=0.02)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_scale() == 65536
    x = torch.randn(8, 4)

    def norm():
        return math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))

    for fixed in (False, True):
        opt.zero_grad()
        loss = (model(x) - 3).pow(2).mean()
        scaler.scale(loss).backward()
        if fixed:
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        near(norm(), 1.0 if fixed else 1.5e-5, rel=0.03)


def check_training_at_scale_08():
    near(3 / 11, 0.27, rel=0.012)
    near(3 / 30, 0.1)
    assert 3 / 30 >= 0.1 > 3 / 31


def check_training_at_scale_09():
    near(8 * 2048 * 4096 * 2, 134e6, rel=0.003)
    near(32 * 134.2e6, 4.3e9, rel=0.002)
    near(4 / 3 - 1, 1 / 3)
    assert 34 / 2 > 10  # Korthikanti et al.: 34 bytes per position and width, without the scores


def check_training_at_scale_10():
    assert 13 * 16 == 208
    near(4 * 13 + 12 * 13 / 16, 62, rel=0.005)
    near(2 * 13 + 14 * 13 / 16, 37, rel=0.011)
    assert 208 / 16 == 13
    near(80 - 61.75, 18, rel=0.02)


def check_training_at_scale_11():
    w = torch.tensor(0.05, dtype=torch.bfloat16)
    near(2**-12, 2.4e-4, rel=0.02)
    up = torch.nextafter(w, torch.tensor(1.0, dtype=torch.bfloat16))
    assert (up - w).item() == 2**-12

    def moves(v):
        return (
            torch.tensor(v, dtype=torch.bfloat16) - torch.tensor(1e-5, dtype=torch.bfloat16)
        ) != torch.tensor(v, dtype=torch.bfloat16)

    assert not moves(0.05)
    assert not moves(0.0045)
    assert moves(0.0038)
    assert moves(0.002)
    assert 2**-13 / 1e-5 > 10


def check_training_at_scale_12():
    assert 13 * 2 == 26
    assert 13 * 0.5 == 6.5
    assert 32 / 64 == 0.5
    near(8 / 64 + 32 / (64 * 256), 0.127, rel=0.001)
    near(13e9 * 0.127 / 8, 0.2e9, rel=0.04)
    n = 40 * 16 * (4 * 10240 + 3 * (5120 + 13824))
    near(n * 16, 1e9, rel=0.02)
    near(6.5 + 0.2 + 1, 8, tol=0.5)


def check_training_at_scale_13():
    row_has("training-at-scale-13", "3 to 10 percent", "about 2,000", "well under 1 percent")
    p = torch.nn.Parameter(torch.zeros(3))
    opt = torch.optim.Adam([p], lr=1e-3)
    p.grad = torch.tensor([1e-5, -1e-2, 10.0])
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1e-3, 1e-3, -1e-3]), rtol=2e-3, atol=0)
    assert 2000 / 350000 < 0.01  # LLaMA-1: 1.4T tokens at 4M a step


def check_training_at_scale_14():
    near(math.sqrt(8), 2.8, rel=0.011)

    def s(r):
        return 1 + 1 / r

    assert s(1) == 2
    assert s(8) == 1.125
    near(8 * s(8) / s(1), 4.5)


def check_training_at_scale_15():
    assert 7 * 12 == 84
    assert 7 * 2 == 14


def check_training_at_scale_16():
    assert 70 * 16 == 1120
    assert 1120 / 16 == 70
    assert 70 * 4 / 16 == 17.5
    assert 70 * 12 / 16 == 52.5
    assert 64 / 16 == 4
    near(17.5 + 52.5 / 4, 31, rel=0.02)
    assert 1120 / 64 == 17.5


def check_training_at_scale_17():
    n = 2 * 8 * 4096
    assert n == 65536
    assert 64 * n == 4194304
    near(2 * 64 * n, 8.4e6, rel=0.002)
    near(64 * n / 7e9, 0.0006, rel=0.002)
    assert 1000 * 8.4e6 < 14e9


def check_training_at_scale_19():
    near(6 * 3e9 * 66500, 1.2e15, rel=0.003)
    near(16 * 312e12, 5.0e15, rel=0.002)
    near(6 * 3e9 * 66500 / (16 * 312e12), 0.24, rel=0.002)
    near(6 * 3e9 * 114000 / (16 * 312e12), 0.41, rel=0.005)
    near(24 / 0.8 * 4 / 3, 40)


def check_training_at_scale_21():
    assert 4096 // 400 == 10
    near(10 * 400**2 / 4096**2, 0.1, rel=0.06)
    torch.manual_seed(0)
    q = torch.randn(1, 1, 12, 8)
    blk = torch.arange(12) // 4
    m = (blk[:, None] == blk[None]) & torch.tril(torch.ones(12, 12)).bool()
    a = F.scaled_dot_product_attention(q, q, q, attn_mask=m)
    torch.testing.assert_close(
        a[:, :, 8:],
        F.scaled_dot_product_attention(q[:, :, 8:], q[:, :, 8:], q[:, :, 8:], is_causal=True),
    )


def check_training_at_scale_22():
    e = 15 / 16 * 3600 + 400 / 16
    assert e == 3400
    assert 4 * 500 == 2000
    near(1400 / 3400, 0.41, rel=0.005)
    near(3400 / 2000, 1.7)


def check_training_at_scale_23():
    t = math.sqrt(2 * 60 * 28800)
    near(t, 1859, rel=0.0005)
    near(t / 60, 31, rel=0.001)
    near(60 / t, 0.032, rel=0.01)
    near(60 / t + t / 57600, 0.065, rel=0.01)
    near(60 / 3600 + 3600 / 57600, 0.079, rel=0.003)
    u = math.sqrt(2 * 5 * 28800)
    near(u / 60, 9, rel=0.01)
    near(10 / u, 0.019, rel=0.03)
    assert 8 * 512 == 4096
    near(120 / math.sqrt(2 * 60 * 3600), 0.18, rel=0.02)


def check_training_at_scale_24():
    n = np.array([900000, 90000, 10000.0])
    near(n[2] / n.sum(), 0.01)
    near(1e6 / 3 / 1e4, 33, rel=0.011)
    p = np.sqrt(n) / np.sqrt(n).sum()
    np.testing.assert_allclose(p, [0.70, 0.22, 0.07], atol=0.005)
    np.testing.assert_allclose(1e6 * p / n, [0.8, 2.5, 7.4], atol=0.05)


def check_training_at_scale_25():
    assert 71 - 58 == 13
    torch.manual_seed(0)
    w = torch.tensor([-1.3, 0.04, 0.31, 0.9], requires_grad=True)
    s = 0.1
    q = s * torch.clip(torch.round(w / s), -8, 7)
    (g0,) = torch.autograd.grad(q.sum(), w)
    assert (g0 == 0).all()
    u = w / s
    c = torch.clip(u, -8, 7)
    ste = s * (c + (torch.round(c) - c).detach())
    (g1,) = torch.autograd.grad(ste.sum(), w)
    assert g1.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert torch.allclose(ste, q)


def check_training_at_scale_101():
    assert 4096 * 2 == 8192


def check_training_at_scale_103():
    assert 200e9 * 16 == 3.2e12
    assert 3.2e12 / 256 == 12.5e9
    assert 200 * 4 / 8 == 100
    assert 200 * 4 / 8 / 4 == 25
    assert 256 // (8 * 4) == 8


def check_training_at_scale_104():
    # E * sum f P per micro-batch punishes sequences that each prefer one expert; over the
    # batch it is balanced
    P = np.eye(4)
    f = P
    per = np.mean([4 * (f[i] * P[i]).sum() for i in range(4)])
    whole = 4 * (f.mean(0) * P.mean(0)).sum()
    assert per == 4
    assert whole == 1


def check_training_at_scale_105():
    P = 8
    work = [(r + 1) + (2 * P - r) for r in range(P)]
    assert work == [17] * 8


def check_training_at_scale_108():
    a, b = pipe(4, 8, "gpipe"), pipe(4, 8, "1f1b")
    assert a[0] == b[0] == (8 + 3) * 3
    assert a[1] == [8] * 4
    assert b[1] == [4, 3, 2, 1]


def check_training_at_scale_110():
    assert pipe(4, 8, "1f1b")[1] == [4, 3, 2, 1] == pipe(4, 16, "1f1b")[1]


def check_training_at_scale_112():
    # orthogonalising shards is not orthogonalising the matrix
    def orth(M):
        u, _, v = np.linalg.svd(M, full_matrices=False)
        return u @ v

    M = np.random.default_rng(0).normal(size=(8, 6))
    assert not np.allclose(orth(M), np.vstack([orth(M[:4]), orth(M[4:])]), atol=0.1)


def check_training_at_scale_114():
    assert 1024 % 64 == 0
    assert 1024 % 48 != 0


def check_training_at_scale_116():
    p = 0.98**256
    assert 0.005 < p < 0.006
    assert 100 / 50 == 2
    assert 0.19 < (1 - p) * 100 / (400 + (1 - p) * 100) < 0.21


def check_training_at_scale_120():
    # order as a pure function of the step: any rank count sees the same global batches; per-
    # source counters never skip
    def batch(step, B=12, seed=3):
        out, cnt = [], [0, 0]
        for s in range(step + 1):
            rng = random.Random(seed * 1000003 + s)
            row = []
            for _ in range(B):
                src = 0 if rng.random() < (0.7 if s < 5 else 0.4) else 1
                row.append((src, cnt[src]))
                cnt[src] += 1
            out = row
        return out

    b = batch(7)
    for ranks in (2, 3, 4):
        assert sorted(x for r in range(ranks) for x in b[r::ranks]) == sorted(b)
    allb = [x for s in range(8) for x in batch(s)]
    assert len(set(allb)) == len(allb)


def check_training_at_scale_122():
    assert 1792 / 14 == 128
    assert 1792 / 16 == 112


def check_training_at_scale_123():
    assert 4 / 100 == 0.04


def check_training_at_scale_124():
    assert 8 * 16 == 128
    assert 128 / 8 == 16
    assert 32 // 8 == 4
