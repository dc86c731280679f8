"""Checks of the data-engineering rows: what their texts claim, recomputed or run."""

import datetime as dt
import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import zoneinfo

import numpy as np

from row_checks.rows import (
    message,
    near,
    row_has,
)


def check_data_engineering_02():
    db = sqlite3.connect(":memory:")
    db.executescript(
        "create table sales(store_id, amount, sale_date); create table d(store_id, s, day)"
    )
    db.executemany("insert into sales values(?,?,?)", [(1, 5, "2026-01-01"), (2, 7, "2026-01-01")])
    ins = (
        "insert into d select store_id, sum(amount), ? from sales where sale_date = ? "
        "group by store_id"
    )
    day = "2026-01-01"
    for _ in range(2):
        db.execute(ins, (day, day))
    assert db.execute("select count(*) from d").fetchone()[0] == 4  # the retry doubles
    for _ in range(5):
        with db:
            db.execute("delete from d where day = ?", (day,))
            db.execute(ins, (day, day))
    assert db.execute("select count(*) from d").fetchone()[0] == 2


def check_data_engineering_03():
    row_has("data-engineering-03", "about 15 GB")
    assert 300 * 6 / 120 == 15
    assert int("00123") == 123


def check_data_engineering_04():
    row_has("data-engineering-04", "0 to 31", "32 times", "Spark 3 and later")
    # all rows of one key hash to one task whatever the number of tasks; a salt spreads it
    # over up to 32
    for n in (200, 2000):
        assert len({hash((None,)) % n for _ in range(100)}) == 1
        k = len({int(hashlib.md5(f"corp-{s}".encode()).hexdigest(), 16) % n for s in range(32)})
        assert 20 < k <= 32


def check_data_engineering_05():
    db = sqlite3.connect(":memory:")
    db.execute("create table c(city, valid_from, valid_to)")
    db.executemany(
        "insert into c values(?,?,?)",
        [("Leeds", "2020-01-01", "2026-05-12"), ("York", "2026-05-12", "9999-12-31")],
    )
    q = "select city from c where ? >= valid_from and ? < valid_to"
    for t, city in (("2026-03-03", "Leeds"), ("2026-05-12", "York")):
        assert db.execute(q, (t, t)).fetchall() == [(city,)]


def check_data_engineering_06():
    row_has("data-engineering-06", "800,000", "576 windows", "at most 40,000")
    near(40e6 * 0.02, 800000, 1e-3)
    near(40e6 * 0.001, 40000, 1e-3)
    assert 2 * 24 * 60 // 5 == 576


def check_data_engineering_07():
    # features of day 2 contain the purchase labelled at 09:00 of day 2; available_at is after
    # midnight
    feats = [(1, 2.1, 10), (2, 3.1, 110)]  # (day, available_at in days, spend)
    ts = 2 + 9 / 24
    by_day = next(s for d, a, s in feats if d == int(ts))
    as_of = [s for d, a, s in feats if a <= ts][-1]
    assert by_day == 110
    assert as_of == 10


def check_data_engineering_08():
    row_has("data-engineering-08", "0.168", "0.947", "0.0039", "0.061", "95 percent", "6 percent")

    def f(s, r, b):
        return 1 - (1 - s**r) ** b

    assert 16 * 8 == 128
    assert round(0.8**8, 3) == 0.168
    assert round(f(0.8, 8, 16), 3) == 0.947
    assert round(0.5**8, 4) == 0.0039
    assert round(f(0.5, 8, 16), 3) == 0.061
    assert f(0.5, 16, 8) < f(0.5, 8, 16)
    assert f(0.8, 16, 8) < f(0.8, 8, 16)
    r = random.Random(0)
    A, B = set(range(90)), set(range(10, 100))  # Jaccard 0.8
    hit = 0
    for _ in range(3000):
        h = {i: r.random() for i in range(100)}
        hit += min(A, key=h.get) == min(B, key=h.get)
    near(hit / 3000, 0.8, 0.03)


def check_data_engineering_10():
    stamp, commit, polls = 0, 20, (10, 30, 50)  # seconds after 10:00:00

    def polled(overlap):
        mark = -1
        for now in polls:
            if commit <= now and stamp > mark - overlap:
                return True
            mark = now
        return False

    assert not polled(0)
    assert polled(120)


def check_data_engineering_11():
    row_has(
        "data-engineering-11",
        "about 5 million files a day of 8 KB",
        "160 files of 256 MB",
        "at least 365",
        "256 buckets",
        "4.7 GB a month in about 18 files",
        "little more than a dozen",
    )
    assert 40e9 / 5e6 == 8000
    assert round(40e9 / 256e6, -1) == 160
    month = 40 * 30 / 256
    assert round(month, 1) == 4.7
    assert int(month * 1e9 / 256e6) == 18
    near(40e9 / 256, 156e6, 1e6)  # the daily file of one bucket is not small
    # one bucket of one month, sorted by user: min/max leave one or two of the 18 files
    g = np.random.default_rng(0)
    users = np.sort(g.integers(0, 5_000_000 // 256, 300_000))
    files = np.array_split(users, 18)
    probe = g.integers(0, 5_000_000 // 256, 200)
    cnt = [sum(f[0] <= u <= f[-1] for f in files) for u in probe]
    assert max(cnt) <= 2
    assert 1 <= np.mean(cnt) < 1.1
    assert 12 <= 12 * np.mean(cnt) < 14
    # a day sorted by user still costs one file each day
    assert 365 * 1 == 365


def check_data_engineering_14():
    row_has("data-engineering-14", "730 x 12 / 5 = 1,752", "29 hours")
    assert 730 * 12 / 5 == 1752
    assert 8 - 3 == 5
    assert 29 < 1752 / 60 < 29.5


def check_data_engineering_15():
    row_has("data-engineering-15", "1e10", "1e9", "ten seconds")
    assert 1e10 / 1e9 == 10
    target = hashlib.sha256(b"0000042").hexdigest()
    assert (
        next(i for i in range(100000) if hashlib.sha256(f"{i:07d}".encode()).hexdigest() == target)
        == 42
    )


def check_data_engineering_16():
    row_has(
        "data-engineering-16",
        "20,000 x 86,400 = 1.73 billion",
        "518 GB",
        "41 GB",
        "72 million",
        "1.7 GB",
    )
    n = 20000 * 86400
    assert round(n / 1e9, 2) == 1.73
    assert round(n * 300 / 1e9) == 518
    assert int(n * 24 / 1e9) == 41
    assert 20000 * 3600 == 72e6
    assert round(72e6 * 24 / 1e9, 1) == 1.7


def check_data_engineering_17():
    row_has(
        "data-engineering-17",
        "30 MB a second",
        "2.59 TB a day",
        "233 TB",
        "233,280 GB x 0.023 = 5,365",
        "39 TB and 894",
        "1,166",
        "more than six times",
    )
    assert 50000 * 600 == 30e6
    assert round(30e6 * 86400 / 1e12, 2) == 2.59
    gb = 30e6 * 86400 * 90 / 1e9
    near(gb, 233280, 0.01)
    assert round(gb * 0.023) == 5365
    assert round(gb / 6000) == 39
    assert round(gb / 6 * 0.023) == 894
    assert round(gb / 1000 * 5) == 1166
    assert 6 < gb / 1000 * 5 * 30 / (gb * 0.023) < 7


def check_data_engineering_20():
    # Avro's resolution by field name, in small
    def read(record, reader):
        out = {}
        for name, default in reader.items():
            if name in record:
                out[name] = record[name]
            elif default is not None:
                out[name] = default
            else:
                raise KeyError(name)
        return out

    old, new = {"a": None, "b": "x", "c": None}, {"a": None, "d": 0, "c2": None}
    assert read({"a": 1, "b": 2, "c": 3}, {"a": None, "d": 0}) == {"a": 1, "d": 0}
    assert read({"a": 1, "c": 3, "d": 9}, old) == {"a": 1, "b": "x", "c": 3}
    message(lambda: read({"a": 1, "b": 2, "c": 3}, new), KeyError)  # a rename breaks


def check_data_engineering_21():
    row_has(
        "data-engineering-21",
        "about 20 positives",
        "6,000 of the 10,000",
        "about 300",
        "about 4.",
        "1.96 million",
        "20 in the first group and 980 in the second",
    )
    assert 2e6 * 0.005 == 10000
    assert 4000 * 0.005 == 20
    assert 2000 * 6000 / 40000 == 300
    assert round(2000 * 4000 / 1.96e6) == 4
    assert 40000 / 2000 == 20
    assert 1.96e6 / 2000 == 980


def check_data_engineering_22():
    doc = (
        "Title\nA sentence.\nfor i in x:\n    f(i);\n- item\n"
        'He said "yes."\n\u4f60\u597d\u3002\nReally?'
    )
    keep = [line for line in doc.split("\n") if line.strip().endswith((".", "!", "?"))]
    assert keep == ["A sentence.", "Really?"]


def check_data_engineering_23():
    env = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}
    a = {
        subprocess.run(
            [sys.executable, "-S", "-E", "-c", "print([hash('u%d'%i) % 10 for i in range(20)])"],
            env=env,
            capture_output=True,
            text=True,
        ).stdout
        for _ in range(2)
    }
    assert len(a) == 2

    def f(u):
        return int(hashlib.md5(("split-v1:" + u).encode()).hexdigest(), 16) % 10

    share = sum(f(f"u{i}") == 0 for i in range(5000)) / 5000
    near(share, 0.1, 0.015)
    row_has("data-engineering-23", "About 90 percent")


def check_data_engineering_24():
    row_has(
        "data-engineering-24",
        "= 0.972",
        "0.81 + 0.01 = 0.82",
        "0.08 = 2 x (0.1 - c)",
        "c is 0.06 instead of 0.01",
        "at most 94 percent",
    )
    near(0.9**3 + 3 * 0.9**2 * 0.1, 0.972, 1e-12)
    near(0.9**2 + 0.1**2, 0.82, 1e-12)
    c = 0.1 - 0.08 / 2
    near(c, 0.06, 1e-12)
    worst = 1.0
    for t in np.linspace(0.02, c, 50):  # t: all three wrong
        pw = 3 * (c - t) + t
        worst = min(worst, pw)
    near(1 - worst, 0.94, 1e-9)


def check_data_engineering_103():

    assert 0.04 < 1 / 24 < 0.045
    z = zoneinfo.ZoneInfo("Europe/Berlin")

    def h(d):
        return (
            dt.datetime.combine(d + dt.timedelta(1), dt.time(), z).astimezone(dt.UTC)
            - dt.datetime.combine(d, dt.time(), z).astimezone(dt.UTC)
        ).total_seconds() / 3600

    assert h(dt.date(2026, 3, 29)) == 23
    assert h(dt.date(2026, 10, 25)) == 25


def check_data_engineering_111():
    assert sum([0.1] * 10) != 1
    assert np.spacing(np.float32(131072)) > 0.01 > np.spacing(np.float32(131071))
    assert sum([1e16, 1, -1e16]) != sum([1e16, -1e16, 1])
    assert float(np.float32(19.99)) != 19.99


def check_data_engineering_113():

    h = [int.from_bytes(hashlib.md5(str(i).encode()).digest()[:4], "big") for i in range(5000)]
    assert np.mean([x % 6 != x % 12 for x in h]) > 0.45
    assert np.mean([x % 6 != x % 10 for x in h]) > 0.6


def check_data_engineering_115():
    table, seen = [], []
    arrivals = {0: [("a", 0)], 1: [("b", 1)], 2: [("c", 2), ("late", 0)]}
    for _day, ev in arrivals.items():
        seen += ev
        mx = max([d for _, d in table], default=-1)
        table += [e for e in ev if e[1] > mx]
    assert ("late", 0) not in table
    assert len(seen) - len(table) == 1
