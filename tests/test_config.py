"""A run's TOML: the shipped runs, the refusals and their messages, the way back from `to_toml`."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from interviewmate_mlx.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
    ValidateConfig,
    load_run,
    override_run,
    parse_run,
    shipped,
    shipped_runs,
    to_toml,
)
from interviewmate_mlx.errors import ConfigError


@pytest.fixture
def write_run(tmp_path: Path):
    def write(content: str | bytes, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refusal(run: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_run(run, overrides)
    return str(refused.value)


# what is shipped


# Of the original project: learning rate, rank, alpha, number of trained parameters.
ORIGINAL = {
    "A": (2e-4, 8, 16, 1_572_864),
    "B": (1e-4, 4, 8, 786_432),
    "C": (5e-5, 2, 4, 393_216),
}


def test_shipped_runs_are_the_three_original_ones_and_two_more():
    assert list(shipped_runs()) == [*ORIGINAL, "mini", "alpaca", "dpo"]


def test_alpaca_is_run_a_with_another_template():
    a, alpaca = load_run("A"), load_run("alpaca")
    assert alpaca == replace(a, name="alpaca", data=replace(a.data, template="alpaca"))


@pytest.mark.parametrize(("letter", "original"), ORIGINAL.items())
def test_shipped_run_has_the_values_of_the_original(letter, original):
    learning_rate, rank, alpha, num_trainable = original
    run = load_run(letter)
    assert run.name == f"run_{letter}"
    assert run.model.base == "tiiuae/falcon-rw-1b"
    assert (run.train.learning_rate, run.lora.rank, run.lora.alpha) == (learning_rate, rank, alpha)
    assert run.lora.targets == ("attention",)
    channels, layers = 2048, 24
    assert layers * run.lora.rank * (channels + 3 * channels) == num_trainable
    assert (run.train.batch_size, run.train.grad_accumulation, run.train.epochs) == (1, 4, 3)
    assert run.train.effective_batch == 4
    assert (run.data.path, run.data.train_on) == ("interview", "answer")


def test_shipped_runs_differ_in_rank_alpha_and_learning_rate_alone():
    a = load_run("A")
    for letter, (learning_rate, rank, alpha, _) in ORIGINAL.items():
        same = replace(
            a,
            name=f"run_{letter}",
            lora=replace(a.lora, rank=rank, alpha=float(alpha)),
            train=replace(a.train, learning_rate=learning_rate),
        )
        assert load_run(letter) == same


def test_run_for_mini_is_run_a_except_for_base_and_learning_rate():
    a, mini = load_run("A"), load_run("mini")
    assert (mini.name, mini.model.base) == ("mini", "mini")
    assert mini.train.learning_rate > a.train.learning_rate
    own = replace(a.train, learning_rate=mini.train.learning_rate)
    assert mini == replace(a, name="mini", model=replace(a.model, base="mini"), train=own)


def test_defaults_are_run_a(write_run):
    assert replace(RunConfig(), name="run_A") == load_run("A")
    assert load_run(write_run("")) == RunConfig(name="mine")


@pytest.mark.parametrize("letter", ["a", "A"])
def test_shipped_run_is_found_in_either_case_under_one_name(letter):
    assert load_run(letter) == load_run("A")
    assert load_run(letter).name == "run_A"


def test_file_with_a_shipped_runs_name_is_the_users(write_run):
    path = write_run("[lora]\nrank = 3\n", name="A.toml")
    assert load_run(path) == replace(RunConfig(), name="A", lora=LoraConfig(rank=3))


def test_shipped_file_is_found_without_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/run_a.toml").is_file()
    assert load_run("A").lora.rank == 8


# a user's file


def test_every_key_of_a_file_is_read(write_run):
    path = write_run(
        """
        [model]
        base = "models/mine"
        dtype = "bfloat16"
        untested_base = true
        [lora]
        rank = 16
        alpha = 32
        dropout = 0
        targets = ["dense", "query_key_value"]
        layers = [0, 2]
        rslora = true
        dora = true
        bias = "lora_only"
        plus_ratio = 16
        start_from = "adapters/mine"
        [data]
        path = "rows"
        max_length = 128
        train_on = "all"
        template = "chatml"
        pack = false
        [train]
        method = "orpo"
        weights = "lora"
        epochs = 5
        max_steps = 11
        batch_size = 2
        grad_accumulation = 3
        learning_rate = 1
        schedule = "cosine"
        floor = 0.1
        warmup_ratio = 0.5
        warmup_steps = 3
        optimizer = "adamw"
        weight_decay = 0.01
        max_grad_norm = 0
        save_every = 7
        keep_checkpoints = 3
        gradient_checkpointing = true
        memory_gb = 6.5
        seed = 0
        [preference]
        beta = 0.3
        [validate]
        every = 10
        early_stop_patience = 2
        """
    )
    run = load_run(path)
    assert run == RunConfig(
        name="mine",
        model=ModelConfig("models/mine", "bfloat16", True),
        lora=LoraConfig(
            16,
            32.0,
            0.0,
            ("dense", "query_key_value"),
            (0, 2),
            True,
            True,
            "default",
            "lora_only",
            16.0,
            "adapters/mine",
        ),
        data=DataConfig("rows", 128, "all", "chatml"),
        train=TrainConfig(
            "orpo",
            "lora",
            5.0,
            11,
            2,
            3,
            1.0,
            "cosine",
            0.1,
            0.5,
            3,
            "adamw",
            0.01,
            0.0,
            7,
            3,
            True,
            6.5,
            0,
        ),
        preference=PreferenceConfig(0.3),  # a method asks for some of its keys, not for all
        validate=ValidateConfig(10, 2),
    )
    defaults = RunConfig()
    for table in ("model", "lora", "data", "train", "validate"):
        mine, theirs = asdict(getattr(run, table)), asdict(getattr(defaults, table))
        # With all weights, and Muon, there may be no LoRA, whose keys are tried here, nor two first
        # values; with preferences no packing.
        tried = theirs.keys() - {"weights", "init", "optimizer", "pack"}
        assert all(mine[key] != theirs[key] for key in tried), "a key was not tried"
    assert load_run("A", ["lora.init=olora"]).lora.init == "olora"
    run_of_all = load_run("A", ["train.weights=all", "train.optimizer=muon", "data.pack=true"])
    assert (run_of_all.train.weights, run_of_all.train.optimizer) == ("all", "muon")
    assert run_of_all.data.pack
    assert [str(r.folder) for r in (run, run_of_all)] == ["adapters/mine", "models/run_A-trained"]
    # A whole number is allowed where any number is.
    assert (type(run.lora.alpha), type(run.train.learning_rate)) == (float, float)


def test_file_with_a_byte_order_mark_and_windows_line_ends_is_read(write_run):
    assert load_run(write_run(b"\xef\xbb\xbf[lora]\r\nrank = 3\r\n")).lora.rank == 3


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("nowhere/mine.toml", "Cannot read the run nowhere/mine.toml: No such file or directory."),
        ("D", "No run 'D': expected A, B, C, mini, alpaca, dpo, or the path of a .toml file."),
        ("", "No run '': expected A, B, C, mini, alpaca, dpo, or the path of a .toml file."),
        (
            "../run_a",
            "No run '../run_a': expected A, B, C, mini, alpaca, dpo, or the path of a .toml file.",
        ),
    ],
)
def test_run_that_is_not_there_is_refused(run, said):
    assert refusal(run).startswith(said)


def test_folder_that_ends_in_toml_is_refused(tmp_path):
    (tmp_path / "x.toml").mkdir()
    assert refusal(str(tmp_path / "x.toml")).endswith(
        "is not a file.\nGive the path of a .toml file."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[lora]\nrank 8\n", "is not TOML: Expected '=' after a key in a key/value pair (at line"),
        (b"[lora]\nrank = 8\nrank = 9\n", "is not TOML: Cannot overwrite a value (at line 3"),
        (b"[data]\npath = '\xff'\n", "is not UTF-8 at byte 15.\nSave it as UTF-8."),
    ],
)
def test_file_that_cannot_be_parsed_is_refused_with_the_place(write_run, content, said):
    path = write_run(content)
    assert refusal(path).startswith(f"{path} {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[lora]\nrnak = 8", "unknown key lora.rnak; did you mean lora.rank?"),
        ("[train]\nlr = 1", "unknown key train.lr; expected one of method, weights, epochs"),
        ("[lorra]\nrank = 8", "unknown table [lorra]; did you mean lora?"),
        ("[optimizer]\nx = 8", "unknown table [optimizer]; expected one of model, lora, data,"),
        ("lora = 8", "lora: got 8, expected a table"),
        ("[[lora]]\nrank = 8", "lora: got [{'rank': 8}], expected a table"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest_one(write_run, content, said):
    path = write_run(content)
    assert refusal(path).startswith(f"The run {path} is not valid:\n  {said}")


# types and ranges


WRONG_TYPES = [
    ("lora.rank", "8.0", "got 8.0, expected a whole number"),
    ("lora.rank", "true", "got True, expected a whole number"),
    ("lora.rank", '"8"', "got '8', expected a whole number"),
    ("lora.alpha", '"8"', "got '8', expected a number"),
    ("lora.alpha", "true", "got True, expected a number"),
    ("lora.layers", "true", "got True, expected a number of at least 1, or a list"),
    ("lora.layers", "[0, 1.5]", "got [0, 1.5], expected a number of at least 1, or a list"),
    ("lora.rslora", "1", "got 1, expected true or false"),
    ("data.pack", "1", "got 1, expected true or false"),
    ("lora.dora", "1", "got 1, expected true or false"),
    ("preference.length_normalized", "1", "got 1, expected true or false"),
    ("train.gradient_checkpointing", "1", "got 1, expected true or false"),
    (
        "lora.targets",
        "[]",
        'got [], expected attention, all-linear, or a list of names, as in ["query_key_value"]',
    ),
    (
        "lora.targets",
        '["dense", 1]',
        "got ['dense', 1], expected attention, all-linear, or a list of names",
    ),
    ("lora.targets", '[""]', "got [''], expected attention, all-linear, or a list of names"),
    ("model.untested_base", "1", "got 1, expected true or false"),
    ("data.path", "8", "got 8, expected a string"),
    ("train.seed", "1979-05-27", "got datetime.date(1979, 5, 27), expected a whole number"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG_TYPES)
def test_value_of_another_type_is_refused(write_run, key, value, said):
    table, name = key.split(".")
    assert f"\n  {key}: {said}" in refusal(write_run(f"[{table}]\n{name} = {value}"))


BLOCKS = "a number of at least 1, or a list of different numbers of blocks from 0"
# The last value that is allowed, and the first that is not, at each end of a range.
RANGES = [
    ("lora.rank", "1", "0", "at least 1"),
    ("lora.alpha", "1e-9", "0", "above 0"),
    ("lora.alpha", "1e9", "inf", "above 0"),
    ("lora.alpha", "0.5", "nan", "above 0"),
    ("lora.dropout", "0", "-0.1", "from 0 to below 1"),
    ("lora.dropout", "0.99", "1", "from 0 to below 1"),
    ("lora.start_from", "x", "' '", "an adapter's folder"),
    ("lora.layers", "1", "0", BLOCKS),
    ("lora.layers", "[0, 3]", "[3, 3]", BLOCKS),
    ("lora.layers", "[]", "[-1]", BLOCKS),
    ("data.max_length", "8", "7", "at least 8"),
    ("data.train_on", "all", "question", "one of answer, answers, last, all"),
    ("data.path", "x", "' '", "a name or a path, in Unicode"),
    ("data.template", "my.jinja", "' '", "a name or a path, in Unicode"),
    ("data.path", "x", "\udcff", "a name or a path, in Unicode"),
    ("model.base", "x", "", "a name or a path, in Unicode"),
    ("model.dtype", "float16", "fp16", "one of auto, float32, bfloat16, float16"),
    ("train.method", "sft", "ppo", "one of sft, dpo, ipo, orpo, simpo, kto"),
    ("train.epochs", "0.01", "0", "above 0"),
    ("train.epochs", "1e6", "inf", "above 0"),
    ("train.max_steps", "0", "-1", "at least 0"),
    ("train.batch_size", "1", "0", "at least 1"),
    ("train.grad_accumulation", "1", "0", "at least 1"),
    ("train.learning_rate", "1e-9", "-1e-9", "above 0"),
    ("train.schedule", "constant", "constant2", "one of linear, cosine, constant"),
    ("train.warmup_ratio", "0", "-0.1", "from 0 to 1"),
    ("train.warmup_ratio", "1", "1.1", "from 0 to 1"),
    ("train.warmup_steps", "0", "-1", "at least 0"),
    ("train.floor", "0", "1.1", "from 0 to 1"),
    ("lora.plus_ratio", "1", "0.9", "at least 1"),
    ("lora.init", "pissa", "svd", "one of default, pissa, olora"),
    ("lora.bias", "all", "some", "one of none, lora_only, all"),
    ("train.weights", "all", "some", "one of lora, all"),
    ("train.optimizer", "adamw", "sgd", "one of adamw, muon"),
    ("train.weight_decay", "0", "-0.1", "at least 0"),
    ("train.max_grad_norm", "0", "-0.1", "at least 0"),
    ("train.save_every", "0", "-1", "at least 0"),
    ("train.keep_checkpoints", "1", "0", "at least 1"),
    ("train.memory_gb", "0", "-1", "at least 0"),
    ("train.seed", "0", "-1", "from 0 to 2**32 - 1"),
    ("train.seed", "4294967295", "4294967296", "from 0 to 2**32 - 1"),
    ("preference.beta", "0.1", "0", "above 0"),
    ("preference.label_smoothing", "0", "0.5", "from 0 to below 0.5"),
    ("preference.target_margin", "0.5", "-0.1", "at least 0"),
    ("validate.every", "0", "-1", "at least 0"),
    ("validate.early_stop_patience", "0", "-1", "at least 0"),
]


@pytest.mark.parametrize(("key", "allowed", "refused", "expected"), RANGES)
def test_value_out_of_range_is_refused(key, allowed, refused, expected):
    load_run("A", [f"{key}={allowed}"])
    said = refusal("A", f"{key}={refused}")
    assert said.startswith(f"The run A is not valid:\n  {key}: got ")
    assert said.endswith(f", expected {expected}")


def test_every_key_has_a_refusal():
    tried = {key for key, *_ in [*RANGES, *WRONG_TYPES]}
    run = RunConfig()
    tables = ("model", "lora", "data", "train", "preference", "validate")
    assert tried == {f"{t}.{key}" for t in tables for key in asdict(getattr(run, t))}


def test_all_faults_are_named_at_once(write_run):
    path = write_run("[lora]\nrank = 0\nalpha = 'x'\nrnak = 1\n[trian]\n[data]\ntrain_on = 'x'\n")
    assert refusal(path, "train.epochs=0", "train.seed=1.5", "nonsense").splitlines() == [
        f"The run {path} is not valid:",
        "  nonsense: expected table.key=value, as in lora.rank=16",
        "  lora.alpha: got 'x', expected a number",
        "  unknown key lora.rnak; did you mean lora.rank?",
        "  unknown table [trian]; did you mean train?",
        "  train.seed: got 1.5, expected a whole number",
        "  lora.rank: got 0, expected at least 1",
        "  data.train_on: got 'x', expected one of answer, answers, last, all",
        "  train.epochs: got 0.0, expected above 0",
    ]


def test_run_made_in_python_has_the_same_ranges():
    with pytest.raises(ConfigError, match=r"lora\.rank: got 0, expected at least 1"):
        RunConfig(lora=LoraConfig(rank=0))


# overrides


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("lora.rank=16", "lora", "rank", 16),
        (" lora.rank = 16 ", "lora", "rank", 16),
        ("lora.rslora=true", "lora", "rslora", True),
        ("lora.targets=dense", "lora", "targets", ("dense",)),
        ('lora.targets=["dense", "h.0.mlp"]', "lora", "targets", ("dense", "h.0.mlp")),
        ("train.schedule=cosine", "train", "schedule", "cosine"),
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("data.path=my rows/a=b#c", "data", "path", "my rows/a=b#c"),
        ('data.path="my rows"', "data", "path", "my rows"),
        ("data.path=2024", "data", "path", "2024"),
        ("data.path=true", "data", "path", "true"),
    ],
)
def test_override_changes_its_key_and_no_other(override, table, key, value):
    a = load_run("A")
    changed = replace(getattr(a, table), **{key: value})
    assert load_run("A", [override]) == replace(a, **{table: changed})


def test_override_beats_the_file_and_a_later_one_an_earlier(write_run):
    path = write_run("[lora]\nrank = 3\nalpha = 5\n")
    run = load_run(path, ["lora.rank=4", "train.epochs=2", "lora.rank=6"])
    assert (run.lora.rank, run.lora.alpha, run.train.epochs) == (6, 5.0, 2)


def test_override_can_correct_a_fault_of_the_file(write_run):
    assert load_run(write_run("[lora]\nrank = 0\n"), ["lora.rank=4"]).lora.rank == 4


@pytest.mark.parametrize("override", ["rank=16", "lora.rank", "=16", "lora.=16", "lora=16", ""])
def test_override_without_table_and_key_is_refused(override):
    said = f"{override}: expected table.key=value, as in lora.rank=16"
    assert refusal("A", override) == f"The run A is not valid:\n  {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rnak=16", "unknown key lora.rnak; did you mean lora.rank?"),
        ("lorra.rank=16", "unknown table [lorra]; did you mean lora?"),
        ("lora.rank.x=16", "unknown key lora.rank.x; did you mean lora.rank?"),
        ("lora.rank=", "lora.rank: got '', expected a whole number"),
        ("lora.rank=16\nalpha=3", "lora.rank: got '16\\nalpha=3', expected a whole number"),
    ],
)
def test_override_of_an_unknown_key_or_a_wrong_value_is_refused(override, said):
    assert refusal("A", override) == f"The run A is not valid:\n  {said}"


# to TOML and back


ODD = [
    'quotes " and \' and """',
    "back\\slash\\n",
    "tab\tnewline\nreturn\r",
    "\x00\x1b\x7f",
    "é ß 漢 \N{GRINNING FACE}",
    "\u2028\u200b\ufeff",
    "\U000e0001tag",
    "= # [x]",
]


@pytest.mark.parametrize("letter", [*ORIGINAL, "mini", "alpaca", "dpo"])
def test_shipped_run_comes_back_from_its_toml(letter, write_run):
    run = load_run(letter)
    assert parse_run(run.name, to_toml(run)) == run
    assert load_run(write_run(to_toml(run), name=f"{run.name}.toml")) == run


@pytest.mark.parametrize("odd", ODD)
def test_run_with_odd_characters_comes_back_from_its_toml(odd):
    run = RunConfig(
        name=odd,
        model=ModelConfig(odd),
        data=DataConfig(path=odd),
        lora=LoraConfig(targets=(odd, "dense")),
    )
    assert parse_run(odd, to_toml(run)) == run


@pytest.mark.parametrize("number", [1e-5, 5e-5, 1e-300, 0.1 + 0.2, 3.0, 1e22, 123456789.125])
def test_number_comes_back_exactly(number):
    run = RunConfig(train=TrainConfig(learning_rate=number), lora=LoraConfig(rslora=True))
    assert parse_run("custom", to_toml(run)) == run


def test_toml_names_every_key_so_that_later_defaults_change_nothing():
    text = to_toml(RunConfig())
    assert text.startswith(
        '# Every key of the run, with its value\nname = "custom"\n\n[model]\nbase = '
    )
    for table in ("model", "lora", "data", "train", "validate"):
        body = text.split(f"[{table}]\n")[1].split("\n\n")[0]
        keys = [line.split(" = ")[0] for line in body.splitlines()]
        assert keys == list(asdict(getattr(RunConfig(), table)))


def test_name_is_a_key_of_the_run_or_else_the_file_s(write_run):
    assert load_run(write_run("[lora]\nrank = 3\n")).name == "mine"
    path = write_run('name = "weekend"\n[lora]\nrank = 3\n')
    assert load_run(path).name == "weekend"
    assert parse_run("folder", to_toml(load_run(path))).name == "weekend"


@pytest.mark.parametrize("name", ["''", "'a/b'", "'/'", "'..'", "'.'", "3", "[]"])
def test_name_that_is_no_file_s_is_refused(write_run, name):
    assert "\n  name: got " in refusal(write_run(f"name = {name}\n"))


def test_overriding_a_run_is_as_loading_it_with_overrides():
    overrides = ["lora.rank=3", "train.epochs=0.5"]
    assert override_run(load_run("B"), overrides) == load_run("B", overrides)
    with pytest.raises(ConfigError, match=r"The run run_B is not valid:\n  lora.rank: got 0"):
        override_run(load_run("B"), ["lora.rank=0"])


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(3, 0, 159), (0.5, 0, 27), (0.1, 0, 6), (1e-9, 0, 1), (3, 20, 20), (1, 100, 53), (2.0, 1, 1)],
)
def test_steps_are_those_of_the_epochs_or_fewer(epochs, max_steps, steps):
    assert TrainConfig(epochs=epochs, max_steps=max_steps).total_steps(53) == steps


def test_part_of_an_epoch_is_counted_exactly():
    assert TrainConfig(epochs=0.1).total_steps(30) == 3  # in floats 0.1 * 30 is more than 3


def test_key_outside_its_table_is_refused_with_the_table(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("rank = 3\n")
    with pytest.raises(ConfigError, match=r"rank: got 3, expected it in \[lora\]"):
        load_run(str(path))
