"""Checks of the deep-learning rows: what their texts claim, recomputed or run."""

from math import exp, log, sqrt

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    near,
    row_has,
)


def check_deep_learning_01():
    def r(v):
        return max(v, 0)

    assert [r(a + b) - 2 * r(a + b - 1) for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        0,
        1,
        1,
        0,
    ]
    g = np.random.default_rng(0)
    W1, b1, W2, b2, x = (
        g.normal(size=(3, 2)),
        g.normal(size=3),
        g.normal(size=(2, 3)),
        g.normal(size=2),
        g.normal(size=2),
    )
    assert np.allclose(W2 @ (W1 @ x + b1) + b2, (W2 @ W1) @ x + (W2 @ b1 + b2))


def check_deep_learning_02():
    row_has("deep-learning-02", "4 * 3 * 1 * 2 = 24", "2.8", "-0.7", "from 4 to 1", "-1.4")
    w1, w2 = torch.tensor(0.5, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    L = (w2 * torch.relu(w1 * 2) - 1) ** 2
    L.backward()
    assert L.item() == 4
    assert w1.grad.item() == 24
    assert w2.grad.item() == 4
    a, b = (
        torch.tensor(0.5 - 0.05 * 24, requires_grad=True),
        torch.tensor(3 - 0.05 * 4, requires_grad=True),
    )
    near(a.item(), -0.7, 1e-6)
    near(b.item(), 2.8, 1e-6)
    near(2 * a.item(), -1.4, 1e-6)
    L = (b * torch.relu(a * 2) - 1) ** 2
    L.backward()
    assert L.item() == 1
    assert a.grad.item() == 0
    assert b.grad.item() == 0


def check_deep_learning_03():
    row_has("deep-learning-03", "2^30, about a billion")
    near(2**30, 1e9, 1e8)
    g = np.random.default_rng(0)

    def grow(var, layers=6, n=400):
        x = np.maximum(g.normal(size=(200, n)), 0)
        v = []
        for _ in range(layers):
            z = x @ g.normal(0, sqrt(var / n), size=(n, n))
            v.append(z.var())
            x = np.maximum(z, 0)
        return (v[-1] / v[0]) ** (1 / (layers - 1))

    near(grow(2), 1, 0.1)
    near(grow(1), 0.5, 0.05)


def check_deep_learning_04():
    torch.manual_seed(0)
    y = F.dropout(torch.full((20000,), 3.0), 0.5, training=True)
    assert set(y.unique().tolist()) == {0.0, 6.0}
    near(y.mean().item(), 3, 0.1)
    assert F.dropout(torch.tensor([3.0]), 0.5, training=False).item() == 3


def check_deep_learning_05():
    row_has("deep-learning-05", "4 - 1 = 3", "0.58")
    near(1 / sqrt(3), 0.58, 0.003)
    torch.manual_seed(0)
    x = torch.randn(50000, 1) + 1
    near(F.dropout(x, 0.5).var().item(), 3, 0.1)
    bn, dr = nn.BatchNorm1d(1, affine=False), nn.Dropout(0.5)
    for _ in range(60):
        bn(dr(x[torch.randint(0, 50000, (2000,))]))
    bn.eval()
    near(bn(x).std().item(), 0.58, 0.03)


def check_deep_learning_06():
    row_has("deep-learning-06", "32 * 56 * 56 = 100,352", "64 means")
    assert 32 * 56 * 56 == 100352
    assert nn.BatchNorm2d(64).running_mean.shape == (64,)
    assert hasattr(nn, "RMSNorm")
    ln, x = nn.LayerNorm(8), torch.randn(4, 8)
    assert torch.allclose(ln(x)[:1], ln(x[:1]), atol=1e-6)


def check_deep_learning_07():
    row_has("deep-learning-07", "with c = 10 the limit is 0.2")
    assert 2 / 10 == 0.2
    for lr, stable in ((0.19, True), (0.21, False)):
        w = 1.0
        for _ in range(100):
            w -= lr * 10 * w
        assert (abs(w) < 1) == stable


def check_deep_learning_08():
    assert 56 - 20 == 36
    w = torch.zeros(3, 3)
    x = torch.randn(3)
    J = torch.autograd.functional.jacobian(lambda v: v + w @ v, x)
    assert torch.equal(J, torch.eye(3))


def check_deep_learning_09():
    row_has(
        "deep-learning-09",
        "= 112",
        "147",
        "9,408, or 9,472",
        "802,816",
        "118 million",
        "12,544",
        "3.2 MB",
        "38 KB",
    )
    c = nn.Conv2d(3, 64, 7, 2, 3)
    assert c(torch.zeros(1, 3, 224, 224)).shape == (1, 64, 112, 112)
    assert c.weight.numel() == 9408
    assert sum(p.numel() for p in c.parameters()) == 9472
    assert 112 * 112 * 64 == 802816
    assert round(802816 * 147 / 1e6) == 118
    assert 112 * 112 == 12544
    assert round(802816 * 4 / 1e6, 1) == 3.2
    assert round(9408 * 4 / 1000) == 38


def check_deep_learning_10():
    row_has("deep-learning-10", "0.1 / sqrt(0.001) = 3.2", "near 6.6 around step 12")
    near(0.1 / sqrt(0.001), 3.2, 0.05)
    f = {t: (1 - 0.9**t) / sqrt(1 - 0.999**t) for t in range(1, 200)}
    t = max(f, key=f.get)
    assert t == 12
    assert round(f[t], 1) == 6.6
    for g in (1e-3, 1e3):
        p = nn.Parameter(torch.zeros(1, dtype=torch.double))
        o = torch.optim.Adam([p], lr=0.01)
        p.grad = torch.full((1,), g, dtype=torch.double)
        o.step()
        near(p.item(), -0.01, 1e-6)


def check_deep_learning_11():
    row_has("deep-learning-11", "2e-7", "0.18", "at most 0.25")
    near(1e-7 / 0.5, 2e-7, 1e-15)
    near((2e-7) ** (1 / 9), 0.18, 0.001)
    s = 1 / (1 + np.exp(-np.linspace(-5, 5, 1001)))
    near((s * (1 - s)).max(), 0.25, 1e-9)


def check_deep_learning_12():
    row_has("deep-learning-12", "3.2 million", "reads 64")
    assert 50000 * 64 == 3.2e6
    W = torch.randn(7, 3)
    assert torch.equal(F.one_hot(torch.tensor(4), 7).float() @ W, W[4])


def check_deep_learning_13():
    mu, s = 0.7, 0.4
    q = torch.distributions.Normal(mu, s)
    near(
        torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).item(),
        0.5 * (mu**2 + s**2 - 1 - log(s**2)),
        1e-6,
    )


def check_deep_learning_14():
    row_has(
        "deep-learning-14",
        "ln(10) = 2.30",
        "ln(1 + 9 / e) = 1.46",
        "2.46",
        "0.97 * 1.46 + 0.03 * 2.46 = 1.49",
    )

    def ce(v, y):
        return F.cross_entropy(torch.tensor([v]), torch.tensor([y])).item()

    right = [1.0] + [0.0] * 9
    near(ce([0.1] * 10, 0), 2.30, 0.005)
    near(ce(right, 0), 1.46, 0.005)
    near(ce(right, 1), 2.46, 0.005)
    near(0.97 * 1.46 + 0.03 * 2.46, 1.49, 0.005)
    z = torch.tensor([[12.0] + [0.0] * 9], requires_grad=True)
    (g1,) = torch.autograd.grad(F.cross_entropy(torch.softmax(z, 1), torch.tensor([1])), z)
    (g2,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([1])), z)
    assert g1.abs().max() < 1e-4
    assert g2.abs().max() > 0.99


def check_deep_learning_15():
    row_has(
        "deep-learning-15",
        "3.5e-5",
        "0.99^200 = 0.13",
        "0.82",
        "0.73",
        "below 1e-27",
        "near 4.6, a gate of 0.99",
    )

    def sg(b):
        return 1 / (1 + exp(-b))

    near(0.95**200, 3.5e-5, 0.05e-5)
    near(0.99**200, 0.13, 0.005)
    near(0.999**200, 0.82, 0.005)
    assert round(sg(1), 2) == 0.73
    assert 0.73**200 < 1e-27
    assert sg(1) ** 200 < 1e-27
    assert sg(0) == 0.5
    assert round(sg(4.6), 2) == 0.99


def check_deep_learning_16():
    row_has("deep-learning-16", "120,000", "120 million", "= 1,792")
    assert 200 * 200 * 3 == 120000
    assert 120000 * 1000 == 120e6
    assert sum(p.numel() for p in nn.Conv2d(3, 64, 3).parameters()) == 1792 == 3 * 3 * 3 * 64 + 64


def check_deep_learning_17():
    row_has("deep-learning-17", "about 2,000")
    assert 10000 * 2 / 10 == 2000


def check_deep_learning_18():
    row_has("deep-learning-18", "about 4e-5", "a few by distillation")
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    near(a[-1], 4e-5, 0.1e-5)
    g = np.random.default_rng(0)
    x = np.full(50000, 2.0)
    b = np.linspace(1e-4, 0.02, 1000)[:300]
    for t in range(300):
        x = sqrt(1 - b[t]) * x + sqrt(b[t]) * g.normal(size=len(x))
    near(x.mean(), sqrt(a[299]) * 2, 0.02)
    near(x.var(), 1 - a[299], 0.02)


def check_deep_learning_19():
    row_has("deep-learning-19", "10 g at 0.9 and 100 g at 0.99", "0.01", "2 (1 + mu) / c")
    near(1 / (1 - 0.9), 10, 1e-9)
    near(1 / (1 - 0.99), 100, 1e-9)
    near(0.1 * 0.01 / 0.1, 0.01, 1e-12)
    for mu in (0.5, 0.9):
        for f, stable in ((0.98, True), (1.02, False)):
            c = 3.0
            lr = f * 2 * (1 + mu) / c
            w, v = 1.0, 0.0
            for _ in range(3000):
                v = mu * v + c * w
                w -= lr * v
                if abs(w) > 1e6:
                    break
            assert (abs(w) < 1) == stable


def check_deep_learning_20():
    row_has("deep-learning-20", "2,048 * 2 + 2 = 4,098")
    assert sum(p.numel() for p in nn.Linear(2048, 2).parameters()) == 4098


def check_deep_learning_21():
    row_has(
        "deep-learning-21",
        "ln(511) = 6.24",
        "ln(1 + 510 e^-2) = 4.25",
        "ln(1 + 510 e^-10) = 0.02",
        "512 in all",
    )
    assert round(log(511), 2) == 6.24
    assert round(log(1 + 510 * exp(-2)), 2) == 4.25
    assert round(log(1 + 510 * exp(-10)), 2) == 0.02
    assert 1 / 0.5 == 2
    assert 1 / 0.1 == 10
    assert 2 * 256 - 1 == 511


def check_deep_learning_22():
    # the best linear code spans the PCA subspace: alternating least squares reaches the PCA error
    g = np.random.default_rng(0)
    X = g.normal(size=(300, 6)) * np.array([5, 3, 1, 0.5, 0.3, 0.2])
    X -= X.mean(0)
    V = np.linalg.svd(X, full_matrices=False)[2][:2].T
    pca = ((X - X @ V @ V.T) ** 2).sum()
    D = g.normal(size=(2, 6))
    for _ in range(200):
        Z = X @ np.linalg.pinv(D)
        D = np.linalg.pinv(Z) @ X
    near(((X - Z @ D) ** 2).sum() / pca, 1, 1e-3)


def check_deep_learning_23():
    row_has("deep-learning-23", "multiplies it by c / n", "99th percentile of 0.8", "1.0")
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    nn.utils.clip_grad_norm_([p], 1.0)
    assert torch.allclose(p.grad, torch.tensor([0.6, 0.8]), atol=1e-5)
    assert 0.8 < 1.0 < 40  # hence fewer than 1 percent of steps are touched


def check_deep_learning_24():
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]

    def train(const):
        model = nn.Sequential(nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 1))
        for p in model.parameters():
            torch.nn.init.constant_(p, const)
        o = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(200):
            o.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            o.step()
        return model

    m = train(0.1)
    assert m[0].weight.std(dim=0).max() < 1e-5
    assert not torch.allclose(m[0].weight, torch.full_like(m[0].weight, 0.1))
    m = train(0.0)
    assert m[0].weight.abs().max() == 0
    assert m[0].bias.abs().max() == 0
    assert m[2].weight.abs().max() == 0
    assert m[2].bias.abs().max() > 0


def check_deep_learning_25():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    w = torch.randn(4, 3, 3, 3)
    t = torch.randn(16, 4, 6, 6)

    def out_grad(a):
        v = (a * w).requires_grad_()
        o = F.batch_norm(F.conv2d(x, v), None, None, training=True, eps=1e-10)
        (g,) = torch.autograd.grad((o * t).sum(), v)
        return o.detach(), g

    o1, g1 = out_grad(1.0)
    o2, g2 = out_grad(2.0)
    assert torch.allclose(o1, o2, atol=1e-4)
    assert torch.allclose(g1 / 2, g2, atol=1e-3)
    assert abs((g1 * w).sum().item()) < 1e-2 * (g1.norm() * w.norm()).item()
    assert (1 / 2) ** 2 == 1 / 4
