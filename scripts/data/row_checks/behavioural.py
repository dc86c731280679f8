"""Checks of the behavioural rows: what their texts claim, recomputed or run."""

from math import sqrt

import numpy as np

from row_checks.rows import (
    near,
    row_has,
)


def check_behavioural_01():
    row_has(
        "behavioural-01",
        "14.1 against 15.0",
        "23 percent of orders instead of 16",
        "pulls forecasts down",
    )
    # the constant with the lowest mean percentage error lies below the median
    x = np.exp(np.random.default_rng(0).normal(3, 0.5, 4000))
    g = np.linspace(5, 40, 351)
    best = g[np.argmin([np.mean(np.abs(x - c) / x) for c in g])]
    assert best < np.median(x)


def check_behavioural_02():
    row_has("behavioural-02", "140 scooters", "2,800 dollars")
    assert 2800 / 140 == 20


def check_behavioural_05():
    row_has(
        "behavioural-05",
        "120 schools",
        "the 40 primary schools",
        "the other 80",
        "week five of eight",
        "week seven",
    )
    assert 40 + 80 == 120


def check_behavioural_06():
    row_has("behavioural-06", "gap of 22 points", "93 down to 84", "71 up to 76", "other 8 points")
    assert 93 - 71 == 22 == (93 - 84) + (76 - 71) + 8
    assert 84 - 76 == 8


def check_behavioural_07():
    row_has("behavioural-07", "0.842 against 0.836", "0.001 to 0.011")
    near(0.842 - 0.836, (0.001 + 0.011) / 2, 1e-9)


def check_behavioural_08():
    row_has("behavioural-08", "off by 6.0", "by 6.1", "at least 5 percent below")
    assert 6.1 > 0.95 * 6.0


def check_behavioural_10():
    row_has("behavioural-10", "200 bins a night", "9 percent", "38 percent")
    assert 200 * 0.09 == 18
    assert 200 * 0.38 == 76
    assert 48000 > 200


def check_behavioural_11():
    row_has("behavioural-11", "18 percent", "8.5 percent", "2.1 to 1.3")
    assert round(18 / 8.5, 1) == 2.1


def check_behavioural_12():
    row_has(
        "behavioural-12",
        "40 days and I had 30",
        "3,000 of monthly value per day",
        "24,000 over 25 days, or 960",
        "five days early",
    )
    assert 10 + 25 + 5 == 40
    assert 6 * 5 == 30
    assert 30000 / 10 == 3000
    assert 80000 * 0.3 == 24000
    assert 24000 / 25 == 960
    assert 10 + 5 == 15
    assert 4 * 5 - 15 == 5
    assert 30 - 15 == 15


def check_behavioural_13():
    row_has(
        "behavioural-13",
        "38 comments",
        "31 were about style, five were questions, and two mattered",
    )
    assert 31 + 5 + 2 == 38


def check_behavioural_15():
    row_has(
        "behavioural-15",
        "41,200 and 38,650",
        "gap was 2,550",
        "1,480",
        "760",
        "310, net",
        "only that last part",
    )
    assert 41200 - 38650 == 2550 == 1480 + 760 + 310


def check_behavioural_19():
    row_has(
        "behavioural-19",
        "900 people, 40 minutes, 220 days and 45 euros an hour",
        "5.9 million",
        "8 minutes",
        "3 to 13",
        "1.2 million",
    )
    assert round(900 * 40 / 60 * 220 * 45 / 1e6, 1) == 5.9
    assert round(900 * 8 / 60 * 220 * 45 / 1e6, 1) == 1.2
    assert (3 + 13) / 2 == 8
    assert 310 > 240


def check_behavioural_20():
    row_has("behavioural-20", "17.8 to 13.9", "12 outpatient clinics")
    assert 17.8 > 17.5 > 13.9


def check_behavioural_21():
    row_has(
        "behavioural-21",
        "50 fresh contracts, and 11 summaries",
        "22 percent",
        "fixed set of 60 contracts",
        "fell to 8 percent",
    )
    assert 11 / 50 == 0.22
    assert round(100 * 5 / 60) == 8


def check_behavioural_23():
    row_has(
        "behavioural-23",
        "5 percent of loyalty members",
        "Of three million members, 2 percent are 60,000",
        "drop to 80,000",
        "another 80,000",
        "3.8 million",
    )
    assert 3_000_000 * 0.02 == 60000
    assert 200000 * 2 / 5 == 80000
    near(200000 / 0.05 * 0.95, 3.8e6, 1)  # profit of the 95 percent implied by the cost of the 5
    cv = 1.75  # spread of spending relative to its mean
    near(2.8 * cv / sqrt(60000), 0.02, 0.001)  # smallest change found with 80 percent power
    # two campaigns are worthless; a common control gives only the sum, hold-outs of each
    # campaign tell them apart
    eff = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    g = np.random.default_rng(0)
    T = (g.random((200000, 7)) > 0.02).astype(float)
    y = T @ eff + g.normal(0, 3, len(T))
    est = np.linalg.lstsq(np.c_[np.ones(len(T)), T], y, rcond=None)[0][1:]
    assert set(np.argsort(est)[:2]) == {2, 5}


def check_behavioural_24():
    row_has("behavioural-24", "55 to 33", "40 percent", "19 percent", "About half")
    assert round((55 - 33) / 55, 3) == 0.4
    near(19 / 40, 0.5, 0.03)


def check_behavioural_125():
    assert 2 + 1 + 1 + 1 == 5


def check_behavioural_138():
    assert 2 + 3 + 1 + 4 == 10
    assert 5 + 10 == 3 * 5


def check_behavioural_143():
    assert 6 * (1 / 6) == 1  # six times the price, a sixth of the labels
