"""Checks of the language-models rows: what their texts claim, recomputed or run."""

import itertools
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.maths import (
    softmax,
)
from row_checks.rows import (
    blocks,
    near,
    row_has,
    run_block,
)


def check_language_models_01():
    row_has("language-models-01", "10.8 nats")
    near(math.log(50000), 10.8, tol=0.05)


def check_language_models_02():
    row_id = "language-models-02"
    row_has(row_id, "11.3", "80,000 to 1", "80 percent among 512", "about fifteen times", "0.09")
    near(math.sqrt(128), 11.3, tol=0.05)
    near(math.exp(11.3), 80000, rel=0.02)
    near(1 / math.sqrt(128), 0.09, tol=0.005)
    d = 128
    out = {}
    for scale in (1, 1 / math.sqrt(d)):
        mx, g = [], []
        r2 = np.random.default_rng(1)
        for _ in range(1500):
            q, k = r2.normal(size=d), r2.normal(size=(512, d))
            p = softmax(k @ q * scale)
            up = r2.normal(size=512)
            mx.append(p.max())
            g.append(np.linalg.norm(scale * ((p * (up - p @ up)) @ k)))
        out[scale == 1] = np.array(mx), np.array(g)
    mx, g = out[True]
    _, gs = out[False]
    near(mx.mean(), 0.80, tol=0.03)
    near(np.median(g) / np.median(gs), 15, tol=1.5)
    sat = mx > 0.999
    assert sat.mean() > 0.05
    assert np.median(g[sat]) < 0.1 * np.median(gs)  # saturated: hardly any
    assert (g > gs.max()).mean() > 0.6  # most rows get much more than any scaled row


def check_language_models_03():
    row_id = "language-models-03"
    row_has(row_id, "3.36", "1.2 passes", "2.8", "1.6")

    def f(a):
        return sum(a**i for i in range(5))

    near(f(0.8), 3.36, rel=0.001)
    near(f(0.8) / 1.2, 2.8, rel=0.002)
    near(f(0.5) / 1.2, 1.6, rel=0.02)
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    rest = np.maximum(p - q, 0)
    acc = np.minimum(p, q)
    np.testing.assert_allclose(acc + (1 - acc.sum()) * rest / rest.sum(), p)


def check_language_models_04():
    row_id = "language-models-04"
    for T, want in ((1, (0.67, 0.24, 0.09)), (0.5, (0.87, 0.12, 0.02)), (2, (0.51, 0.31, 0.19))):
        p = softmax(np.array([2, 1, 0]) / T)
        for a, b in zip(p, want, strict=False):
            near(a, b, tol=0.005)
            row_has(row_id, f"{b:.2f}")


def check_language_models_05():
    row_has("language-models-05", "24,576", "8 percent")
    assert 6 * 4096 == 24576
    assert 2 * 4096 * 12 == 24576 * 4
    near(2 * 2048 / (12 * 4096), 0.08, tol=0.005)


def check_language_models_06():
    words = {"cat": 6, "cats": 3, "mat": 4, "at": 2}
    w = {tuple(k): v for k, v in words.items()}
    merges = []

    def apply(t, a, b):
        o, i = [], 0
        while i < len(t):
            if t[i : i + 2] == (a, b):
                o.append(a + b)
                i += 2
            else:
                o.append(t[i])
                i += 1
        return tuple(o)

    counts = []
    for _ in range(3):
        c = Counter()
        for t, n in w.items():
            for x in itertools.pairwise(t):
                c[x] += n
        counts.append(c)
        best = max(c, key=c.get)
        merges.append(best)
        w = {apply(t, *best): n for t, n in w.items()}
    assert merges == [("a", "t"), ("c", "at"), ("m", "at")]
    assert counts[0][("a", "t")] == 15
    assert counts[0][("c", "a")] == 9
    assert counts[0][("m", "a")] == 4
    assert counts[0][("t", "s")] == 3
    assert counts[1][("c", "at")] == 9
    assert counts[1][("m", "at")] == 4
    assert counts[1][("at", "s")] == 3
    assert counts[2][("m", "at")] == 4
    assert counts[2][("cat", "s")] == 3
    t = tuple("mats")
    for m in merges:
        t = apply(t, *m)
    assert t == ("mat", "s")


def check_language_models_07():
    row_has("language-models-07", "str, aw and berry", "two r's", "sixteen times")
    assert "str" + "aw" + "berry" == "strawberry"
    assert "berry".count("r") == 2
    assert 4**2 == 16


def check_language_models_08():
    torch.manual_seed(0)
    T, d = 12, 8
    q, k, v = (torch.randn(1, T, d) for _ in range(3))
    tril_mask = torch.tril(torch.ones(T, T))
    sqrt, softmax = math.sqrt, torch.softmax

    def bad(q, k, v):
        w = softmax(q @ k.transpose(-2, -1) / sqrt(d), dim=-1) * tril_mask
        out = w @ v
        return out, w

    def good(q, k, v):
        s = (q @ k.transpose(-2, -1) / sqrt(d)).masked_fill(tril_mask == 0, -math.inf)
        w = softmax(s, dim=-1)
        return w @ v, w

    k2, v2, q2 = k.clone(), v.clone(), q.clone()
    for x in (k2, v2, q2):
        x[:, -1] = torch.randn(d)
    assert not torch.allclose(
        bad(q, k, v)[0][:, :-1], bad(q2, k2, v2)[0][:, :-1]
    )  # the test catches it
    assert torch.allclose(good(q, k, v)[0][:, :-1], good(q2, k2, v2)[0][:, :-1])
    assert bad(q, k, v)[1].sum(-1)[0, 0] < 0.9
    w = np.tril(np.full((1000, 1000), 1 / 1000)).sum(1)
    near(w[0], 0.001)
    near(w[-1], 1)


def check_language_models_09():
    s = [2.0 ** (-8 * i / 8) for i in range(1, 9)]
    assert s[0] == 1 / 2
    assert s[1] == 1 / 4
    assert s[-1] == 1 / 256


def check_language_models_11():
    row_id = "language-models-11"
    p = np.array([0.42, 0.23, 0.14, 0.09, 0.05, 0.04, 0.03])
    c = p.cumsum()
    near(p.sum(), 1)
    assert c[2] < 0.8 <= c[3]
    np.testing.assert_allclose(c[:4], [0.42, 0.65, 0.79, 0.88])
    np.testing.assert_allclose(p[:4] / 0.88, [0.48, 0.26, 0.16, 0.10], atol=0.005)
    np.testing.assert_allclose(p[:2] / p[:2].sum(), [0.65, 0.35], atol=0.005)
    row_has(row_id, "0.88", "0.48, 0.26, 0.16 and 0.10", "0.65 and 0.35", "39 oddities")


def check_language_models_12():
    near(math.log(2), 0.693, rel=0.001)
    near(-math.log(1 / (1 + math.exp(0))), 0.693, rel=0.001)
    rng = np.random.default_rng(0)
    ref = rng.dirichlet(np.ones(5))
    r = rng.normal(size=5)
    beta = 0.7
    pi = ref * np.exp(r / beta)
    Z = pi.sum()
    pi = pi / Z
    np.testing.assert_allclose(r, beta * np.log(pi / ref) + beta * math.log(Z))

    def objective(p):
        return p @ r - beta * (p * np.log(p / ref)).sum()

    assert all(
        objective(pi) >= objective(rng.dirichlet(np.ones(5))) for _ in range(500)
    )  # the closed form is the optimum


def check_language_models_13():
    row_has("language-models-13", "ten tokens score -5 and twenty score -10")
    assert 10 * -0.5 == -5
    assert 20 * -0.5 == -10


def check_language_models_14():
    a, b = math.log2(12) / 3.4, math.log2(18) / 4.3
    near(a, 1.05, rel=0.005)
    near(b, 0.97, rel=0.005)
    near(1 - b / a, 0.08, tol=0.005)


def check_language_models_15():
    row_id = "language-models-15"
    e = 3 * 4096 * 14336
    near(e, 176e6, rel=0.003)
    near(e * 8 * 32, 45.1e9, rel=0.002)
    near(e * 2 * 32, 11.3e9, rel=0.005)
    near(e * 256 * 2, 90e9, rel=0.005)
    assert 0.75**32 < 2e-4  # an expert that 32 tokens all miss
    f = P = np.full(8, 1 / 8)
    near(8 * (f @ P), 1)
    row_has(row_id, "176 million", "45.1 billion", "11.3 billion", "90 GB")


def check_language_models_18():
    assert 0.25 * 1 + 0.75 * 0 == 0.25


def check_language_models_19():
    near(1 - 0.80, 1 / 5)


def check_language_models_20():
    th = 10000 ** (-2 * np.arange(64) / 128)
    near(th[0], 1)
    near(th[-1], 1e-4, rel=0.2)
    near(th[-1] * 4096, 0.47, rel=0.01)
    near(th[-1] * 16384, 1.9, rel=0.01)
    q, k, m, n, t = 1.3 - 0.4j, -0.2 + 0.9j, 17, 5, 0.3
    a = (q * np.exp(1j * m * t) * np.conj(k * np.exp(1j * n * t))).real
    near(a, (q * np.conj(k) * np.exp(1j * (m - n) * t)).real, tol=1e-12)
    assert 16384 / 4 == 4096


def check_language_models_21():
    per = 2 * 24 * 16 * 128 * 2 * 4096
    assert per == 768 * 2**20
    assert per / 4 == 192 * 2**20
    assert 18 * 2**30 // per == 24
    assert 18 * 2**30 // (per // 4) == 96
    near(12 * (16 * 128) ** 2 * 24 + 50000 * 2048, 1.3e9, rel=0.02)


def check_language_models_22():
    n = math.sqrt(1e21 / 120)
    near(n, 2.9e9, rel=0.01)
    near(20 * n, 58e9, rel=0.01)
    near(1e21 / 6e9, 167e9, rel=0.005)
    near(1e9 / n, 1 / 3, tol=0.02)

    def loss(n, d):
        return (
            1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
        )  # Hoffmann et al., to see that the loss rises only a little

    assert 0 < loss(1e9, 167e9) - loss(n, 20 * n) < 0.02


def check_language_models_23():
    near(math.exp(0.02), 1.02, rel=0.001)
    torch.manual_seed(0)
    V = 20
    cross_entropy = F.cross_entropy
    ids = torch.randint(V, (2, 9))
    logits = 10 * F.one_hot(ids, V).float()  # the copier
    loss = cross_entropy(logits.view(-1, V), ids.view(-1))
    assert loss < 0.02
    assert cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)) > 3
    try:
        logits[:, :-1].view(-1, V)
        raise AssertionError("view should fail")
    except RuntimeError:
        pass


def check_language_models_25():
    rng = np.random.default_rng(0)
    s, v = rng.normal(size=40) * 3, rng.normal(size=(40, 5))
    m, total, o = -np.inf, 0, np.zeros(5)
    for i in range(0, 40, 8):
        m2 = max(m, s[i : i + 8].max())
        c = np.exp(m - m2)
        e = np.exp(s[i : i + 8] - m2)
        total = c * total + e.sum()
        o = c * o + e @ v[i : i + 8]
        m = m2
    np.testing.assert_allclose(o / total, softmax(s) @ v)
    near(8192**2 * 2, 134e6, rel=0.005)


def check_language_models_103():
    assert 128000 / 8 == 16000  # bytes of a bitmask


def check_language_models_106():
    rng = np.random.default_rng(0)
    logits = np.array([5.0, 4.0, -3.0, -4.0])
    allowed = {2, 3}
    old = run_block("language-models-106", {"np": np}, "question")["pick"]
    new = run_block("language-models-106", {"np": np})["pick"]
    try:
        old(logits, allowed, 2, rng)
        failed = False
    except ValueError:
        failed = True
    assert failed
    assert {int(new(logits, allowed, 2, rng)) for _ in range(50)} == {2, 3}
    assert new(logits, allowed, 1, rng) == 2


def check_language_models_108():
    a, b = 0.9 * 0.01, 0.1 * 1.0
    assert abs(a - 0.009) < 1e-12
    assert round(100 * b / (a + b)) == 92
    # masked draws 0.9 / 0.1, weighted by the mass let through (0.01 and 1), give the conditional
    w = np.array([0.9 * 0.01, 0.1 * 1.0])
    assert abs(w[1] / w.sum() - b / (a + b)) < 1e-12


def check_language_models_113():
    assert abs(0.03 * 0.03 - 0.0009) < 1e-12


def check_language_models_114():
    compile(blocks("language-models-114", "answer")[0], "x", "exec")
    compile(blocks("language-models-114", "question")[0], "x", "exec")


def check_language_models_117():
    assert abs(0.1 * 0.8 - 0.08) < 1e-12
    assert abs(0.1 * 0.05 - 0.005) < 1e-12


def check_language_models_119():
    s = "1234567"
    assert [s[i : i + 3] for i in range(0, 7, 3)] == ["123", "456", "7"]
    assert f"{1234567:,}".split(",") == ["1", "234", "567"]


def check_language_models_120():
    e = "\U0001f600".encode()
    assert len(e) == 4
    toks = [b"Hi ", e[:2], e[2:3], e[3:], b"!"]
    for where, want in (("question", None), ("answer", "Hi \U0001f600!")):
        got = []
        run_block(
            "language-models-120",
            {"stream": toks, "token_bytes": lambda t: t, "send": got.append},
            where,
        )
        if want:
            assert "".join(got) == want
        else:
            assert "\ufffd" in "".join(got)
