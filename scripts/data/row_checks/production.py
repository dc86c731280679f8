"""Checks of the production rows: what their texts claim, recomputed or run."""

import asyncio
import contextvars
import heapq
import math
import random
import sys
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from row_checks.maths import (
    NORMAL,
)
from row_checks.rows import (
    answer_has,
    blocks,
    near,
    row_has,
    shared_prefix,
)


def check_production_02():
    assert 1000 / 8 == 125
    assert 16 / 0.020 == 800
    near(500 / 800, 0.63, tol=0.006)
    assert 16 / 500 == 0.032
    assert abs(7.2 + 0.8 - 8) < 1e-9
    assert abs(7.2 + 0.8 * 16 - 20) < 1e-9
    near(0.5 * 7.2 / 0.6, 6)
    near(7.2 + 0.8 * 6, 12)

    def sim(arr):
        i, t, lat = 0, 0.0, []
        while i < len(arr):
            t = max(t, arr[i])
            j = i
            while j < len(arr) and j - i < 16 and arr[j] <= t:
                j += 1
            t += (7.2 + 0.8 * (j - i)) / 1e3
            lat += [t - x for x in arr[i:j]]
            i = j
        return np.array(lat) * 1e3

    rng = np.random.default_rng(0)
    near(np.percentile(sim(list(rng.exponential(1 / 500, 40000).cumsum())), 99), 30, tol=2)
    assert sim(list(np.arange(1, 5000) / 500)).max() <= 24.001


def check_production_03():
    x = np.array([5.0])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert x - x.mean() == 0
        assert np.isnan(x.std(ddof=1))
        assert np.isnan((x - x.mean()) / x.std(ddof=1))


def check_production_04():
    per = 2 * 32 * 8 * 128 * 2
    assert per == 131072 == 128 * 1024
    near(56e9 / per, 427000, rel=0.001)
    near(56e9 / per / 4096, 104, rel=0.004)
    near(56e9 / per / 1200, 350, rel=0.02)
    assert 72e9 / 3.35e12 > 0.021
    assert int(56e9 / (per * 4) / 4096) == 26
    assert 80 - 16 - 8 == 56


def check_production_05():
    near(1 / (10000 * 0.01 * 0.001), 10)


def check_production_06():
    near(50 * 0.08, 4)


def check_production_07():
    a = [20] * 98 + [3000] * 2
    near(np.mean(a), 80, rel=0.01)
    assert sorted(a)[98] == 3000
    near(1 - 0.99**10, 0.096, rel=0.005)


def check_production_08():
    assert (99 - 92) / (100 - 92) > 0.5  # most of the blocks are gone


def check_production_09():
    near(1.36 * math.sqrt(2 / 5e6), 0.0009, tol=0.00005)
    assert 200 * 0.05 == 10


def check_production_10():
    near(80e6 * 768 * 4 / 1e9, 246, rel=0.002)


def check_production_11():
    mean = 10e6 / (30 * 86400)
    near(mean, 3.86, rel=0.001)
    near(2.5 * mean, 9.6, rel=0.005)
    near(2.5 * mean / 4, 2.4, rel=0.006)
    assert 1400 / 350 == 4
    assert 4 * 720 * 2.5 == 7200
    assert 7200 / 10000 == 0.72
    assert 10e6 / 1000 * 0.9 == 9000
    near(2.5 / 14.4, 0.17, rel=0.03)
    near(0.72 / (2.5 / 14.4), 4, rel=0.05)
    near(mean / 16, 0.24, rel=0.01)
    assert math.ceil(25 * mean / 4) == 25
    near(90000 - 27 * 720 * 2.5, 41000, rel=0.02)


def check_production_12():
    assert 800 * 8 == 6400
    assert 800 + 7 * 100 == 1500
    near(1500 / 6400, 0.23, tol=0.005)
    near(6400 / 1500, 4.3, rel=0.01)


def check_production_13():
    near(312 / 2, 150, rel=0.05)
    assert 256 > 312 / 2  # already limited by arithmetic
    assert 16 / 4 == 4


def check_production_14():
    row_id = "production-14"
    row_has(row_id, "28 ms", "650", "54 percent", "now take 42 ms")
    near(0.35 * 2 + 0.65 * 42, 28)
    near(1000 / 650, 1.54, rel=0.002)

    def p99(servers, hit, seed=0):
        rng = np.random.default_rng(seed)
        arr = rng.exponential(1, 60000).cumsum()
        free = [0.0] * servers
        lat = []
        hits = rng.random(60000) < hit
        for t, h in zip(arr, hits, strict=False):
            if h:
                lat.append(2)
                continue
            t0 = t + (2 if hit else 0)
            s = max(t0, heapq.heappop(free))
            heapq.heappush(free, s + 40)
            lat.append(s + 40 - t)
        return np.percentile(lat[5000:], 99)

    before, same, cut = p99(43, 0), p99(43, 0.35), p99(28, 0.35)
    assert same < before
    assert cut >= before - 1


def check_production_17():
    w = 2 * 8e9 * 30000
    near(w, 4.8e14)
    near(w / 4e14, 1.2)
    near(1.2 / 0.02, 60)
    step = 20 + 2 * 8e9 * 1024 / 4e14 * 1e3
    assert 60 <= step <= 100
    near(128 * 1024 * 30000, 3.9e9, rel=0.01)


def check_production_20():
    s = math.sqrt(1e5 * 0.25)
    near(s, 158, rel=0.002)
    z = 600 / s
    near(z, 3.8, rel=0.005)
    near(2 * (1 - NORMAL.cdf(z)), 0.00015, rel=0.03)
    assert 50600 + 49400 == 100000


def check_production_21():
    # an hourly value from hh:00 is out from hh:20 to hh+1:20
    ages = [(m - 20) % 60 + 20 for m in range(60)]
    assert min(ages) == 20
    assert max(ages) == 79
    near(np.mean(ages) + 0.5, 50)


def check_production_23():
    row_has("production-23", "divide by 0.35", "200 payments a day")
    rng = np.random.default_rng(0)
    n = 400000
    score = rng.random(n)
    y = rng.random(n) < score**3
    pi = np.where(score > 0.8, 0.3, 0.02)
    pick = rng.random(n) < pi
    near(
        (y[pick] / pi[pick]).sum() / n, y.mean(), rel=0.05
    )  # known probabilities give an honest estimate


def check_production_24():
    row_has("production-24", "within 1e-5", "1e-2")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 1),
    )
    for layer in net:
        if hasattr(layer, "weight"):
            torch.nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    X = torch.randn(1000, 64)
    with torch.no_grad():
        ref = torch.sigmoid(net.double()(X.double()))
        d = {
            t: (torch.sigmoid(net.to(t)(X.to(t))).double() - ref).abs().max().item()
            for t in (torch.float32,)
        }
        net.double()
        for t in (torch.bfloat16, torch.float16):
            d[t] = (torch.sigmoid(net.to(t)(X.to(t))).double() - ref).abs().max().item()
            net.double()
    assert d[torch.float32] < 1e-5
    assert all(1e-5 * 10 < d[t] < 1e-2 for t in (torch.bfloat16, torch.float16))
    near(-math.log10(2**-8), 2.4, tol=0.05)
    near(-math.log10(2**-11), 3.3, tol=0.05)


def check_production_25():
    near(1 - 126 / 210, 0.40)


def check_production_102():
    common = []
    for key in ("question", "answer"):
        ns = {}
        exec(blocks("production-102", key)[0], ns)
        a = ns["build"]("I" * 500, "why?", "12:00:01")
        b = ns["build"]("I" * 500, "how?", "12:00:02")
        common.append(shared_prefix(a, b))
    assert common[0] < 20
    assert common[1] > 500


def check_production_103():
    assert 1000 // 16 == 62
    assert 62 * 16 == 992
    assert 1000 - 992 == 8
    assert 15 // 16 == 0
    answer_has("production-103", "992 tokens", "62 of them", "remaining 8")


def check_production_105():
    # a partly sharded cache: round robin over 8 small LRU caches against routing by conversation

    def run(route):
        rng = random.Random(0)
        caches = [OrderedDict() for _ in range(8)]
        hit = 0
        for t in range(8000):
            c = rng.randrange(200)
            k = route(t, c)
            cache = caches[k]
            hit += c in cache
            cache[c] = 1
            cache.move_to_end(c)
            if len(cache) > 30:
                cache.popitem(last=False)
        return hit / 8000

    assert run(lambda t, c: c % 8) > 2 * run(lambda t, c: t % 8)


def check_production_107():
    b = 8000 * 128 * 1024
    assert abs(b / 1e9 - 1) < 0.06
    assert 0.019 < b / 50e9 < 0.022
    assert 0.8 < b / 1.25e9 < 0.9
    assert 400 / 8 == 50


def check_production_109():
    p, d = 3000 / 20000, 300 / 2500
    assert abs(p - 0.15) < 1e-12
    assert abs(d - 0.12) < 1e-12
    assert abs(p / d - 5 / 4) < 1e-9
    assert abs(p / (2 * d) - 5 / 8) < 1e-9


def check_production_112():
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    s1 = np.float32(0)
    for v in x:
        s1 += v
    parts = x.reshape(64, 64)
    s2 = np.float32(0)
    for row in parts:
        t = np.float32(0)
        for v in row:
            t += v
        s2 += t
    assert s1 != s2
    assert abs(s1 - s2) < 1e-2


def check_production_113():
    # closed system with N inside and a fixed rate: time doubles with N
    def latency(n, rate=10.0, steps=2000):
        q = [0.0] * n
        t = 0.0
        out = []
        for _ in range(steps):
            t += 1 / rate
            out.append(t - q.pop(0))
            q.append(t)
        return np.mean(out[steps // 2 :])

    assert abs(latency(40) / latency(20) - 2) < 0.01


def check_production_114():
    async def trial(fixed):
        src = blocks("production-114", "question")[0]
        if fixed:
            head = src[: src.index("    while not")]
            src = head + blocks("production-114", "answer")[0]
        state = {"cancelled": False, "done": False}

        class Engine:
            async def generate(self, prompt):
                try:
                    await asyncio.sleep(0.2)
                    state["done"] = True
                    return "text"
                except asyncio.CancelledError:
                    state["cancelled"] = True
                    raise

        class A:  # short sleeps
            create_task = staticmethod(asyncio.create_task)

            @staticmethod
            async def sleep(s):
                await asyncio.sleep(0.01)

        ns = {"asyncio": A, "engine": Engine(), "heartbeat": lambda: "."}
        exec(src, ns)
        g = ns["chat"]("p")
        await g.__anext__()
        await g.__anext__()
        await g.aclose()
        await asyncio.sleep(0.3)
        out = [x async for x in ns["chat"]("p")]
        assert out[-1] == "text"
        return state

    async def first(fixed):
        return await trial(fixed)

    s = asyncio.run(first(False))
    assert not s["cancelled"]
    s = asyncio.run(first(True))
    assert s["cancelled"]


def check_production_118():
    def boom():
        raise RuntimeError

    ns = {}
    exec(blocks("production-118", "question")[0], ns)
    b = ns["Breaker"]()
    for _ in range(3):
        assert b.call(boom, lambda: "b") == "b"
    assert b.call(lambda: "p", lambda: "b") == "b"
    assert b.fails == 3
    exec(blocks("production-118", "answer")[0], ns)
    ns["Breaker"].call = ns["call"]
    now = [0.0]
    b = ns["Breaker"]()
    b.until, b.pause, b.clock = 0, 30, lambda: now[0]
    for _ in range(3):
        b.call(boom, lambda: "b")
    assert b.call(lambda: "p", lambda: "b") == "b"
    now[0] = 31
    assert b.call(lambda: "p", lambda: "b") == "p"
    assert b.fails == 0
    for _ in range(3):
        b.call(boom, lambda: "b")
    now[0] = 62
    assert b.call(boom, lambda: "b") == "b"  # trial fails, opens again
    assert b.call(lambda: "p", lambda: "b") == "b"


def check_production_119():
    assert abs(0.05**2 - 1 / 400) < 1e-12
    rng = np.random.default_rng(1)
    a = rng.random((400000, 2)) < 0.05
    assert abs(a.all(1).mean() - 1 / 400) < 5e-4


def check_production_120():
    assert abs(1 + 0.3 * 20 - 7) < 1e-9
    assert abs(0.3 * 20 + 0.7 * 1 - 6.7) < 1e-9


def check_production_121():
    # inverse probability weights on a randomised slice recover the value of another policy
    rng = np.random.default_rng(2)
    n = 200000
    hard = rng.random(n) < 0.4
    act = rng.random(n) < 0.5  # True = large model
    p = np.where(act, 0.9, np.where(hard, 0.3, 0.85))
    y = rng.random(n) < p
    target = ~hard & False  # always the small model
    est = np.mean((act == target) * y / 0.5)
    assert abs(est - (0.4 * 0.3 + 0.6 * 0.85)) < 0.01
    # old policy: hard ones always to the large model, so the small one's logged mean is far
    # too good
    old = hard
    yo = rng.random(n) < np.where(old, 0.9, np.where(hard, 0.3, 0.85))
    assert yo[~old].mean() > 0.8


def check_production_123():
    var = contextvars.ContextVar("req", default=None)

    def search(q):
        time.sleep(0.01)
        return var.get()

    queries = list(range(8))
    var.set("r1")
    ns = {"ThreadPoolExecutor": ThreadPoolExecutor, "search": search, "queries": queries}
    exec(blocks("production-123", "question")[0], ns)
    plain = ns["docs"]
    if sys.version_info < (3, 14):
        assert plain == [None] * 8
    exec(blocks("production-123", "answer")[0], ns)
    assert ns["docs"] == ["r1"] * 8

    async def both():
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(search, 1), await loop.run_in_executor(None, search, 1)

    a, b = asyncio.run(both())
    assert a == "r1"
    assert b is None or sys.version_info >= (3, 14)
    ctx = contextvars.copy_context()
    try:
        ctx.run(lambda: ctx.run(int))
        raise AssertionError()
    except RuntimeError:
        pass


def check_production_124():
    assert 200000 / 10000 == 20
    assert 0.99**20 > 0.8


def check_production_129():
    assert sum(800 * i for i in range(1, 21)) == 168000 == 800 * 20 * 21 // 2
    assert 800 * 20 == 16000
    assert 3.8 < (40 * 41) / (20 * 21) < 4


def check_production_135():
    assert 8 * 2 == 16
    assert 40 * 16 == 640
    assert abs(16 / 25 - 2 / 3) < 0.03


def check_production_138():
    class R:
        def __init__(self, st):
            self.status, self.headers = st, {"retry-after": "2"}

    seq = iter([R(429), R(429), R(200)])
    slept = []

    class T:
        sleep = staticmethod(slept.append)

    exec(
        blocks("production-138", "question")[0], {"post": lambda b: next(seq), "body": 0, "time": T}
    )
    assert slept == [2, 2]
    slept.clear()
    for _ in range(50):
        exec(blocks("production-138", "answer")[0], {"r": R(429), "time": T, "random": random})
    assert min(slept) >= 2
    assert max(slept) <= 5
    assert len(set(slept)) == 50


def check_production_139():
    # one queue against a queue per customer, one unit of work per tick
    def run(fair):
        waits = []
        done_big = 0
        big, small, t = 10000, [], 0
        turn = 0
        while big or small or t < 2000:
            if t < 2000 and t % 20 == 0:
                small.append(t)
            if fair:
                if small and (turn or not big):
                    waits.append(t - small.pop(0))
                    turn = 0
                elif big:
                    big -= 1
                    turn = 1
            else:
                if big:
                    big -= 1
                elif small:
                    waits.append(t - small.pop(0))
            if big == 0 and not done_big:
                done_big = t
            t += 1
            if t > 13000:
                break
        return max(waits), done_big

    wf, bf = run(True)
    w0, b0 = run(False)
    assert wf <= 2
    assert w0 > 7000
    assert bf < 1.02 * b0


def check_production_140():
    assert 128 / 16 == 8


def check_production_143():
    rng = np.random.default_rng(3)
    w = rng.normal(0, 0.02, 64 * 4000).reshape(-1, 64)
    step = np.abs(w).max(1, keepdims=True) / 7
    d = rng.normal(0, 0.0005, w.shape)
    changed = np.round(w / step) != np.round((w + d) / step)
    assert 0.005 < changed.mean() < 0.2


def check_production_150():
    assert abs(1 - 0.95**10 - 0.40) < 0.005
    assert 0.05**10 < 1e-9
