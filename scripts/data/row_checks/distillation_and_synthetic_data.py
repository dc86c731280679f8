"""Checks of the distillation-and-synthetic-data rows: what their texts claim, recomputed or run."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    answer_has,
    blocks,
)


def check_distillation_and_synthetic_data_02():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(6, 9, generator=g)
    env = {"F": F, "s": t.clone(), "t": t, "T": 2.0}
    exec(blocks("distillation-and-synthetic-data-02", "question")[0], env)
    assert env["kd"] < -0.01  # negative although student and teacher agree
    env["s"] = torch.randn(6, 9, generator=g)
    exec(blocks("distillation-and-synthetic-data-02", "question")[0], env)
    assert env["kd"] < 0
    exec(blocks("distillation-and-synthetic-data-02")[0], env)
    assert env["kd"] > 0
    env["s"] = t.clone()
    exec(blocks("distillation-and-synthetic-data-02")[0], env)
    assert abs(env["kd"]) < 1e-6


def check_distillation_and_synthetic_data_03():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(4, 10, generator=g)

    def grad(T):
        s = torch.zeros(4, 10, requires_grad=True)
        F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean").backward()
        return s.grad.norm().item()

    assert abs(grad(20.0) / grad(40.0) - 4) < 0.2  # like 1 / T^2


def check_distillation_and_synthetic_data_04():
    x = np.linspace(-8, 8, 801)

    def n(m, s):
        return np.exp(-((x - m) ** 2) / 2 / s**2) / s

    p = n(-3, 0.7) + n(3, 0.7)
    p /= p.sum()
    best = {}
    for m in np.linspace(-4, 4, 33):
        for s in np.linspace(0.5, 4, 36):
            q = n(m, s) + 1e-300
            q /= q.sum()
            f, r = (p * np.log((p + 1e-300) / q)).sum(), (q * np.log(q / (p + 1e-300))).sum()
            for k, v in (("f", f), ("r", r)):
                if k not in best or v < best[k][0]:
                    best[k] = (v, m, s)
    assert abs(best["f"][1]) < 0.3
    assert best["f"][2] > 2.5  # stretched over both
    assert abs(abs(best["r"][1]) - 3) < 0.3
    assert best["r"][2] < 1  # on one bump


def check_distillation_and_synthetic_data_10():
    assert 128_000 * 2 == 256_000
    assert 256_000 * 2_000_000_000 == 512e12
    assert 32 * (4 + 2) == 192
    assert 192 * 2e9 < 400e9
    answer_has(
        "distillation-and-synthetic-data-10", "256 kB", "512 terabytes", "192 bytes", "under 400 GB"
    )
    # counts of draws are right on average
    r = np.random.default_rng(0)
    p = r.dirichlet(np.ones(50) * 0.3)
    c = r.multinomial(32, p, size=20000) / 32
    assert np.abs(c.mean(0) - p).max() < 0.003


def check_distillation_and_synthetic_data_13():
    env = {}
    code = blocks("distillation-and-synthetic-data-13")[0]
    assert len(code.strip().splitlines()) <= 10
    exec(
        code.replace("print(", "out("),
        dict(env, out=lambda g, s: env.setdefault("o", []).append(s)),
    )
    o = env["o"]
    assert len(o) == 5
    assert o[0] > 0.7
    assert o[-1] < 0.05


def check_distillation_and_synthetic_data_14():
    r = np.random.default_rng(0)
    sds = []
    for _ in range(20):  # keep the old data and add the new: no collapse
        pool = r.normal(size=50)
        for _g in range(300):
            pool = np.append(pool, r.normal(pool.mean(), pool.std(), size=50))
        sds.append(pool.std())
    assert np.mean(sds) > 0.7


def check_distillation_and_synthetic_data_17():
    class G:
        pass

    def sim(a, b):
        return len(set(a) & set(b)) / len(set(a) | set(b))

    env = {"sim": sim, "seeds": ["abc"], "generated": ["xyz"] * 1000}
    exec(blocks("distillation-and-synthetic-data-17", "question")[0], env)
    assert len(env["kept"]) == 1000
    exec(blocks("distillation-and-synthetic-data-17")[0], env)
    assert env["kept"] == ["xyz"]
    assert env["seeds"] == ["abc"]


def check_distillation_and_synthetic_data_19():
    assert abs(4 * 0.9 - 3.6) < 1e-9
    assert abs(4 * 0.1 - 0.4) < 1e-9
    assert abs(3.6 / 0.4 - 9) < 1e-9
    answer_has("distillation-and-synthetic-data-19", "3.6", "0.4", "Nine to one")


def check_distillation_and_synthetic_data_23():
    assert 250 + 50 + 200 == 500
    answer_has("distillation-and-synthetic-data-23", "250", "50", "200")


def check_distillation_and_synthetic_data_25():
    assert 16 / 4 == 4


def check_distillation_and_synthetic_data_34():
    def wrong(y):
        return y % 4 == 0

    def right(y):
        return y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)

    assert wrong(1900)
    assert not right(1900)


def check_distillation_and_synthetic_data_35():
    r = np.random.default_rng(0)
    p, q = r.dirichlet(np.ones(20), size=2)
    x = r.choice(20, p=q, size=200_000)
    acc = (r.random(200_000) < np.minimum(1, p[x] / q[x])).mean()
    ov = np.minimum(p, q).sum()
    assert abs(acc - ov) < 0.005
    assert abs(ov - (1 - np.abs(p - q).sum() / 2)) < 1e-12
