"""Checks of the multimodal rows: what their texts claim, recomputed or run."""

import math
from types import SimpleNamespace as S

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from row_checks.rows import (
    ROWS,
    blocks,
    run_block,
)


def check_multimodal_03():
    mm = 336 / 300
    assert 1 <= mm < 1.2
    assert round(2 * mm) == 2
    assert mm < 336 / 80


def check_multimodal_05():
    assert 1680 / 28 == 60
    assert 2352 / 28 == 84
    assert 60 * 84 == 5040
    assert (840 // 28) * (1176 // 28) == 5040 // 4


def check_multimodal_07():
    # half yes; says yes to 62 %: the false yes are at least 12 % of all, and 12 % is all the
    # error there is at 88 %
    fp_min = 0.62 - 0.50
    assert abs(fp_min - (1 - 0.88)) < 1e-12


def check_multimodal_08():

    torch.manual_seed(0)
    n = 4
    ns = {
        "torch": torch,
        "F": F,
        "n": n,
        "cross_entropy": F.cross_entropy,
        "x": torch.randn(n, 3),
        "t": torch.randn(n, 3),
        "encode_image": lambda v: v * 5,
        "encode_text": lambda v: v * 2 + 1,
        "log_scale": torch.tensor(math.log(1 / 0.07)),
    }
    run_block("multimodal-08", ns, "question")
    assert ns["loss"].dim() == 0
    run_block("multimodal-08", ns)
    assert ns["loss"].dim() == 0
    assert torch.allclose(ns["img"].norm(dim=-1), torch.ones(n))


def check_multimodal_09():
    assert abs(4096 / 4096**2 - 1 / 4096) < 1e-15


def check_multimodal_16():

    torch.manual_seed(0)
    c = torch.tensor([2.0, -1.0])
    n, d = 64, 2

    class Const:  # exact velocity for data = c: (c - x) / (1 - t)
        def __call__(self, x, t):
            return (c - x) / (1 - t).clamp_min(1e-6)

    good = run_block("multimodal-16", {"torch": torch, "n": n, "d": d, "model": Const()})["x"]
    assert (good - c).norm(dim=1).max() < 1e-3
    src = ROWS["multimodal-16"]["question"].split("# sampling")[1].split("```")[0]
    ns = {"torch": torch, "n": n, "d": d, "model": Const()}
    exec(src, ns)
    assert (ns["x"] - c).norm(dim=1).min() > 0.5
    train = blocks("multimodal-16", "question")[0].split("# sampling")[0]
    ns = {"torch": torch, "batch": c.expand(n, d), "model": Const()}
    exec(train, ns)
    assert ns["loss"] < 1e-3


def check_multimodal_17():
    for w, want in ((0, 3.0), (1, 5.0), (2, 7.0)):
        ns = {"eps_uncond": 3.0, "eps_cond": 5.0, "w": w}
        run_block("multimodal-17", ns)
        assert ns["eps"] == want


def check_multimodal_20():
    assert 512 * 512 * 3 == 786432
    assert 64 * 64 * 4 == 16384
    assert 786432 / 16384 == 48


def check_multimodal_22():
    assert 5.4 < 1 / 0.18215 < 5.6
    assert "vae.config.scaling_factor" in blocks("multimodal-22", "answer")[0]
    compile(blocks("multimodal-22", "answer")[0], "x", "exec")
    compile(blocks("multimodal-22", "question")[0], "x", "exec")


def check_multimodal_23():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's "scaled linear"
    assert abs(np.sqrt(np.prod(1 - betas)) - 0.068) < 0.002


def check_multimodal_27():
    # Frechet distance of a sample from its own distribution N(0, I): always positive, and
    # falls with the sample size
    rng = np.random.default_rng(0)
    d = 32

    def fd(n):
        x = rng.standard_normal((n, d))
        ev = np.linalg.eigvalsh(np.cov(x.T))
        return (x.mean(0) ** 2).sum() + (ev + 1 - 2 * np.sqrt(ev)).sum()

    a, b, c = fd(64), fd(256), fd(4096)
    assert a > b > c > 0


def check_multimodal_31():
    s, t = 3, 0.5
    assert s * t / (1 + (s - 1) * t) == 0.75
    assert (1024 // 256) ** 2 == 16
    assert 1 / math.sqrt(16) == 0.25


def check_multimodal_32():
    rng = np.random.default_rng(0)
    x, e = rng.standard_normal(2)
    th = 0.7
    a, s = math.cos(th), math.sin(th)
    z = a * x + s * e
    v = a * e - s * x
    assert abs(a * z - s * v - x) < 1e-12
    assert abs(s * z + a * v - e) < 1e-12


def check_multimodal_33():
    assert abs(30 * 0.3 - 9) < 1e-9


def check_multimodal_36():
    ref, hyp = ["hello", "there"], ["hello", "there", "thank", "you", "for", "watching"]
    d = np.zeros((len(ref) + 1, len(hyp) + 1), int)
    d[:, 0] = range(len(ref) + 1)
    d[0] = range(len(hyp) + 1)
    for i in range(1, len(ref) + 1):
        for j in range(1, len(hyp) + 1):
            d[i, j] = min(
                d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (ref[i - 1] != hyp[j - 1])
            )
    assert d[-1, -1] == 4
    assert d[-1, -1] / len(ref) == 2.0


def check_multimodal_38():
    assert 30 * 16000 == 480000
    assert 480000 // 160 == 3000
    assert (3000 + 2 * 1 - 3) // 2 + 1 == 1500
    assert 30000 / 1500 == 20


def check_multimodal_41():
    assert math.log2(1024) == 10
    assert 75 * 8 * 10 == 6000
    assert 75 * 8 == 600
    assert 600 * 10 == 6000


def check_multimodal_45():
    assert 600 / 8 == 75
    assert 600 / 7 > 60


def check_multimodal_47():
    assert 1280 // 8 == 160
    assert 720 // 8 == 90
    assert 80 * 45 == 3600
    assert 5 * 24 // 4 == 30
    assert 3600 * 30 == 108000
    # per layer and token, multiply-adds: projections and a 4d feed-forward 12 d^2, attention
    # 2 n d; equal at n = 6 d
    assert 108000 > 6 * 5120


def check_multimodal_48():
    assert 61 - 45 == 16
    assert 61 - 25 == 36


def check_multimodal_50():

    got = []
    small = S(width=1280, height=720)
    shot = S(width=2560, height=1440, resize=lambda s: small)
    ns = {
        "screen": S(grab=lambda: shot),
        "model": S(locate=lambda im, w: (600, 350)),
        "mouse": S(click=lambda x, y: got.append((x, y))),
    }
    run_block("multimodal-50", ns, "question")
    run_block("multimodal-50", ns)
    assert got == [(600, 350), (1200, 700)]
