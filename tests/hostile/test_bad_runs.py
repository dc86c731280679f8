"""Runs that cannot be: every fault is a ConfigError that names the file, the key, got, expected."""

import pytest
from refusals import Bad, check


def toml(name: str, text: str | bytes, *says: str) -> Bad:
    data = text if isinstance(text, bytes) else text.encode()
    return Bad(
        name,
        lambda folder: (folder / "run.toml").write_bytes(data),
        "train --run IN/run.toml",
        "ConfigError",
        ("IN/run.toml", *says),
    )


def override(name: str, words: str, *says: str) -> Bad:
    return Bad(name, lambda _: None, f"train {words}", "ConfigError", says)


def got(value: str, expected: str) -> str:
    return f"got {value}, expected {expected}"


WHOLE, NUMBER = "a whole number", "a number"
RUNS = [
    # types
    toml("text for a rank", '[lora]\nrank = "8"', "lora.rank: " + got("'8'", WHOLE)),
    toml("float for a rank", "[lora]\nrank = 8.0", "lora.rank: " + got("8.0", WHOLE)),
    toml("bool for a rank", "[lora]\nrank = true", "lora.rank: " + got("True", WHOLE)),
    toml("list for a rank", "[lora]\nrank = [8]", "lora.rank: " + got("[8]", WHOLE)),
    toml("date for a seed", "[train]\nseed = 2024-01-01", "train.seed: got datetime.date", WHOLE),
    toml("text for a rate", '[train]\nlearning_rate = "1e-4"', got("'1e-4'", NUMBER)),
    toml("bool for a rate", "[train]\nlearning_rate = false", got("False", NUMBER)),
    toml("number for a base", "[model]\nbase = 7", "model.base: " + got("7", "a string")),
    toml("number for a bool", "[lora]\nrslora = 1", "lora.rslora: " + got("1", "true or false")),
    toml(
        "number in targets",
        "[lora]\ntargets = [1]",
        got("[1]", "attention, all-linear, or a list of names"),
    ),
    toml(
        "no targets", "[lora]\ntargets = []", got("[]", "attention, all-linear, or a list of names")
    ),
    toml("empty target", '[lora]\ntargets = [""]', "lora.targets: " + got("['']", "attention")),
    toml("table for a key", "[lora.rank]\nx = 1", "lora.rank: " + got("{'x': 1}", WHOLE)),
    toml("key for a table", "lora = 8", "lora: " + got("8", "a table")),
    toml("list of tables", "[[lora]]\nrank = 1", "lora: " + got("[{'rank': 1}]", "a table")),
    # ranges
    toml("rank 0", "[lora]\nrank = 0", "lora.rank: " + got("0", "at least 1")),
    toml("rank below 0", "[lora]\nrank = -8", "lora.rank: " + got("-8", "at least 1")),
    toml("alpha 0", "[lora]\nalpha = 0", "lora.alpha: " + got("0.0", "above 0")),
    toml("alpha NaN", "[lora]\nalpha = nan", "lora.alpha: " + got("nan", "above 0")),
    toml("dropout 1", "[lora]\ndropout = 1", "lora.dropout: " + got("1.0", "from 0 to below 1")),
    toml("dropout NaN", "[lora]\ndropout = nan", got("nan", "from 0 to below 1")),
    toml("batch of 0", "[train]\nbatch_size = 0", "train.batch_size: " + got("0", "at least 1")),
    toml("accumulation 0", "[train]\ngrad_accumulation = 0", got("0", "at least 1")),
    toml("epochs below 0", "[train]\nepochs = -1", "train.epochs: " + got("-1.0", "above 0")),
    toml("rate 0", "[train]\nlearning_rate = 0.0", got("0.0", "above 0")),
    toml("rate below 0", "[train]\nlearning_rate = -1e-4", got("-0.0001", "above 0")),
    toml("rate NaN", "[train]\nlearning_rate = nan", got("nan", "above 0")),
    toml("rate infinite", "[train]\nlearning_rate = inf", got("inf", "above 0")),
    toml("rate beyond floats", "[train]\nlearning_rate = 1e999", got("inf", "above 0")),
    toml("rate of 400 digits", "[train]\nlearning_rate = 1" + "0" * 400, "a number of at most"),
    toml("warmup above 1", "[train]\nwarmup_ratio = 1.5", got("1.5", "from 0 to 1")),
    toml("warmup below 0", "[train]\nwarmup_ratio = -0.1", got("-0.1", "from 0 to 1")),
    toml("decay infinite", "[train]\nweight_decay = inf", got("inf", "at least 0")),
    toml("clipping NaN", "[train]\nmax_grad_norm = nan", got("nan", "at least 0")),
    toml("seed of 33 bits", "[train]\nseed = 4294967296", got("4294967296", "from 0 to 2**32 - 1")),
    toml("seed below 0", "[train]\nseed = -1", "train.seed: " + got("-1", "from 0 to 2**32 - 1")),
    toml("rows of 7 tokens", "[data]\nmax_length = 7", got("7", "at least 8")),
    toml("unknown schedule", '[train]\nschedule = "cos"', got("'cos'", "one of linear, cosine")),
    toml(
        "unknown dtype", '[model]\ndtype = "int8"', "model.dtype: " + got("'int8'", "one of auto")
    ),
    toml("unknown loss", '[data]\ntrain_on = "q"', "data.train_on: " + got("'q'", "one of answer")),
    toml("empty base", '[model]\nbase = " "', "model.base: " + got("' '", "a name or a path")),
    toml("patience below 0", "[validate]\nearly_stop_patience = -1", got("-1", "at least 0")),
    # keys
    toml("misspelt key", "[lora]\nrnak = 8", "unknown key lora.rnak; did you mean lora.rank?"),
    toml("misspelt table", "[lroa]\nrank = 8", "unknown table [lroa]; did you mean lora?"),
    toml("key of another table", "[lora]\nepochs = 3", "unknown key lora.epochs"),
    toml("key outside", "rank = 8", "rank: " + got("8", "it in [lora]")),
    toml("control characters", '"a\\u001b[2J" = 1', "a\\x1b[2J: " + got("1", "a table")),
    toml("a long key", "[lora]\n" + "k" * 60_000 + " = 1", "unknown key lora.kkk"),
    # TOML
    toml("not TOML", "[lora\nrank = 8", "is not TOML: ", "at line 1, column 6"),
    toml("JSON", '{"lora": {"rank": 8}}', "is not TOML: ", "at line 1, column 1"),
    toml("key twice", "[lora]\nrank = 8\nrank = 9", "is not TOML: Cannot overwrite a value"),
    toml("table twice", "[lora]\nrank = 8\n[lora]\nalpha = 9", "is not TOML: ", "at line 3"),
    toml("deep list", "a = " + "[" * 20_000, "is not TOML: nested too deeply"),
    toml("deep table", "a = " + "{a=" * 10_000, "is not TOML: nested too deeply"),
    toml("number of 5000 digits", "[lora]\nrank = " + "9" * 5000, "is not TOML", "4300 digits"),
    toml(
        "hexadecimal of 5000 digits",
        "[lora]\nrank = 0x" + "f" * 5000,
        "lora.rank: got a very large int, expected a whole number of at most 64 bits",
    ),
    toml("Latin-1", "# é".encode("latin-1"), "is not UTF-8 at byte 2", "Save it as UTF-8"),
    toml("UTF-16", "[lora]".encode("utf-16"), "is not UTF-8 at byte 0"),
    toml("surrogate", b'[model]\nbase = "\xed\xa0\x80"', "is not UTF-8 at byte 16"),
    toml("zeros", bytes(100), "is not TOML", "at line 1, column 1"),
    toml("too large", b"#" * (1 << 17), "it is larger than 64 kB"),
    Bad(
        "folder for a run",
        lambda folder: (folder / "run.toml").mkdir(),
        "train --run IN/run.toml",
        "ConfigError",
        ("IN/run.toml is not a file", "Give the path of a .toml file"),
    ),
    Bad(
        "link into nothing",
        lambda folder: (folder / "run.toml").symlink_to("nowhere"),
        "train --run IN/run.toml",
        "ConfigError",
        ("Cannot read the run IN/run.toml: No such file", "Give a .toml file"),
    ),
    # --set
    override("unknown key", "--set lora.rnak=1", "The run A", "lora.rnak", "did you mean"),
    override("no value", "--set lora.rank", "lora.rank: expected table.key=value"),
    override("no table", "--set rank=1", "rank=1: expected table.key=value"),
    override("rank of 5000 digits", "--set lora.rank=" + "9" * 5000, got("'9999999999", "")[:15]),
    override("deep value", "--set lora.rank=" + "[" * 5000, "lora.rank: got '[[[", WHOLE),
    override("second key", "--set 'lora.rank=1\nalpha = 2'", "lora.rank: got '1\\nalpha", WHOLE),
    override("NaN", "--set train.learning_rate=nan", got("nan", "above 0")),
    override(
        "several at once",
        "--set lora.rank=0 --set train.epochs=x --set x.y=1",
        "train.epochs: got 'x'",
        "unknown table [x]",
        "lora.rank: got 0",
    ),
    override(
        "no such run",
        "--run D",
        "No run 'D': expected A, B, C, mini, alpaca, dpo, or the path of a .toml file",
    ),
    override("a path of 5000 letters", f"--run {'a' * 5000}.toml", "File name too long"),
]


@pytest.mark.parametrize("bad", RUNS, ids=str)
def test_bad_run_is_refused(bad, tmp_path):
    check(bad, tmp_path)
