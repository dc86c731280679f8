"""Every option of every command does something, and a table says which test shows it."""

import gzip
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import mlx.core as mx
import pytest
from checkpoints import tiny_falcon, write_checkpoint
from hub_server import TOKEN, USER, HubServer
from networks import edit_config, write_network
from served import running

from interviewmate_mlx import __version__
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.cli import main
from interviewmate_mlx.cli.options import chosen_run, shown_text
from interviewmate_mlx.coach import generate
from interviewmate_mlx.coach.feedback import Feedback
from interviewmate_mlx.config import RunConfig, load_run, shipped_data
from interviewmate_mlx.data.prompts import encode, encode_messages, encode_question
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.results import doctor

SHOWN: dict[str, str] = {}  # an option -> the test that shows its effect


def shows(option: str) -> Callable[[Any], Any]:
    """Enter a test into the table."""

    def enter(test: Any) -> Any:
        assert option not in SHOWN, f"{option} is shown twice"
        SHOWN[option] = test.__name__
        return test

    return enter


def all_options(command: click.Command, path: str = "") -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{path} {max(parameter.opts, key=len)}".strip()
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from all_options(command.get_command(context, name), f"{path} {name}".strip())


@shows("--traceback")
@pytest.mark.parametrize("asked", ["option", "variable"])
def test_traceback_shows_the_whole_error(imate, monkeypatch, asked):
    plain = imate("data", "check", "nowhere", code=1).stderr
    assert "Traceback" not in plain
    monkeypatch.setenv("INTERVIEWMATE_TRACEBACK", "1" if asked == "variable" else "")
    whole = imate(*["--traceback"] * (asked == "option"), "data", "check", "nowhere", code=1).stderr
    assert whole.startswith("Traceback (most recent call last):\n")
    assert "records.py" in whole
    assert plain.splitlines()[0].removeprefix("DataError: ") in whole


def test_every_option_has_a_test_of_its_effect():
    options = list(all_options(main))
    assert len(options) == len(set(options))
    assert set(options) - set(SHOWN) == set(), "show the effect of these, with @shows"
    assert set(SHOWN) - set(options) == set(), "no such option any more"


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that differs from `tiny_base` in shape and tokenizer; 384 rows for 300 tokens."""
    folder = tmp_path_factory.mktemp("hub") / "other"
    model = tiny_falcon(heads=2, head_dim=16, layers=1, seed=1)
    checkpoint = write_checkpoint(folder, model, tokenizer_size=300)
    return convert(checkpoint, tmp_path_factory.mktemp("models") / "other").path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.isolate(monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def small(tiny_base: Path, questions: Path) -> list[object]:
    """Options of a run of three steps."""
    return ["--model", tiny_base, "--set", f"data.path={questions}", "--set", "train.epochs=1"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# imate-mlx


@shows("--version")
def test_version_is_printed(imate):
    assert imate("--version").stdout == f"imate-mlx {__version__}\n"


@shows("--verbose")
def test_verbose_adds_the_machine_to_the_version(imate):
    lines = imate("--version", "--verbose").stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["interviewmate-mlx"] == __version__
    assert facts["device"] in ("cpu", "metal", "cuda")
    assert facts["dtype"] == ("float32" if facts["device"] == "cpu" else "bfloat16")
    assert float(facts["matmul_gflops"]) > 0
    assert float(facts["planned_memory_gb"]) > 0
    assert {"python", "system", "mlx", "device_name", "blas"} <= set(facts)


# convert


@shows("convert --out")
def test_convert_writes_to_out(imate, tiny_checkpoint):
    imate("convert", tiny_checkpoint, "--out", "here/it/is")
    assert Path("here/it/is/model.safetensors").is_file()
    assert not Path("models").exists()
    imate("convert", tiny_checkpoint)
    assert Path("models", tiny_checkpoint.name, "model.safetensors").is_file()


@shows("convert --revision")
def test_convert_takes_the_revision_of_a_hub_id(imate, tiny_checkpoint, tmp_path, monkeypatch):
    tuned = write_checkpoint(tmp_path / "tuned", tiny_falcon(layers=1, seed=3))
    with HubServer({"owner/falcon": tiny_checkpoint, "owner/falcon@v2": tuned}) as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        for options, branch, layers in (([], "main", 2), (["--revision", "v2"], "v2", 1)):
            imate("convert", "owner/falcon", "--out", branch, *options)
            assert read_json(Path(branch, "config.json"))["num_hidden_layers"] == layers
            made_of = read_json(Path(branch, "conversion.json"))["revision"]
            assert made_of == hub.repos["owner/falcon"].sha(branch)


@shows("convert --dtype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_writes_weights_of_the_dtype(imate, tiny_checkpoint, dtype):
    imate("convert", tiny_checkpoint, "--out", "out", "--dtype", dtype)
    weights = mx.load("out/model.safetensors")
    assert {array.dtype for array in weights.values()} == {getattr(mx, dtype)}


@shows("convert --trim-vocab")
def test_convert_trims_the_vocabulary_to_the_tokenizers(imate, tmp_path):
    folder = write_checkpoint(tmp_path / "wide", tiny_falcon(layers=1), tokenizer_size=300)
    for out, options, rows in (("whole", [], 384), ("trimmed", ["--trim-vocab"], 300)):
        imate("convert", folder, "--out", out, *options)
        assert read_json(Path(out, "config.json"))["vocab_size"] == rows
        weights = mx.load(f"{out}/model.safetensors")
        assert weights["transformer.word_embeddings.weight"].shape == (rows, 64)


@shows("convert --quantize")
@shows("convert --group-size")
def test_convert_quantises_to_the_bits_in_groups(imate, tiny_checkpoint):
    for bits, group in (("4", 32), ("8", 64)):
        options = ["--group-size", "32"] if group == 32 else []
        said = imate("convert", tiny_checkpoint, "--out", bits, "--quantize", bits, *options)
        assert f", {bits} bits" in said.stdout
        expected = {"group_size": group, "bits": int(bits)}
        assert read_json(Path(bits, "config.json"))["quantization"] == expected
    assert (
        "--group-size is of --quantize"
        in imate("convert", tiny_checkpoint, "--group-size", "32", code=2).stderr
    )


@shows("convert --force")
def test_convert_replaces_an_earlier_conversion_with_force_alone(imate, tiny_checkpoint):
    words = ["convert", tiny_checkpoint, "--out", "out", "--dtype"]
    imate(*words, "float32")
    assert "dtype: got float32, expected float16" in imate(*words, "float16", code=1).stderr
    imate(*words, "float16", "--force")
    assert read_json(Path("out/conversion.json"))["dtype"] == "float16"


@shows("convert --json")
def test_convert_prints_json(imate, tiny_checkpoint):
    line = imate("convert", tiny_checkpoint, "--out", "out", "--json").stdout
    path = Path("out").resolve()
    num_parameters = sum(array.size for array in mx.load(str(path / "model.safetensors")).values())
    expected = {
        "path": str(path),
        "num_parameters": num_parameters,
        "dtype": "float32",
        "nbytes": 4 * num_parameters,
        "already_there": False,
    }
    assert json.loads(line) == expected
    again = imate("convert", tiny_checkpoint, "--out", "out", "--json").stdout
    assert json.loads(again) == expected | {"already_there": True}


# train


def adapter_config(folder: str) -> dict[str, Any]:
    return read_json(Path(folder, "adapter_config.json"))


@shows("train --run")
def test_train_takes_a_shipped_run_or_a_file(imate, small):
    imate("train", "--run", "c", *small)
    config = adapter_config("adapters/run_C")
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    Path("mine.toml").write_text("[lora]\nrank = 5\n", encoding="utf-8")
    imate("train", "--run", "mine.toml", *small)
    assert adapter_config("adapters/mine")["r"] == 5


@shows("train --set")
def test_train_takes_overrides(imate, small):
    imate("train", *small, "--set", "lora.rank=3", "--set", "lora.targets=dense")
    weights = mx.load("adapters/run_A/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"dense"}
    assert {min(array.shape) for array in weights.values()} == {3}


KEY_OPTIONS = {  # what users type often, and the key that it is
    "--data": ("data.path", "my rows/a=b"),
    "--epochs": ("train.epochs", "0.5"),
    "--lr": ("train.learning_rate", "1e-3"),
    "--max-steps": ("train.max_steps", "7"),
    "--seed": ("train.seed", "5"),
}


@pytest.mark.parametrize("command", ["train", "bench"])
@pytest.mark.parametrize("option", KEY_OPTIONS)
def test_short_option_is_its_set(command, option):
    key, value = KEY_OPTIONS[option]

    def run_of(*words: str) -> RunConfig:
        found = main.get_command(click.Context(main), command)
        return chosen_run(found.make_context(command, list(words)))

    run = run_of(option, value)
    assert run == run_of("--set", f"{key}={value}") == load_run("A", [f"{key}={value}"])
    assert run != load_run("A")
    with pytest.raises(click.UsageError, match=f"{option} is --set {key}: give one of them"):
        run_of(option, value, "--set", f"{key}={value}")


for _command in ("train", "bench"):
    for _option in KEY_OPTIONS:
        shows(f"{_command} {_option}")(test_short_option_is_its_set)


@shows("train --log")
def test_train_logs_to_the_boards_that_are_named(imate, small):
    imate("train", *small, "--log", "tensorboard")
    assert list(Path("adapters/run_A/boards/tensorboard").iterdir())
    assert load_run("adapters/run_A/run.toml").log.to == ("tensorboard",)


@shows("train --dry-run")
def test_dry_run_says_what_it_will_take_and_writes_nothing(imate, small):
    result = imate("train", *small, "--dry-run")
    assert result.stdout.splitlines()[:2] == [
        "12 rows to train on, 4 to validate on",
        "3 steps, 3 an epoch",
    ]
    assert re.search(r"\nabout \S+ kB of disk for checkpoints\n", result.stdout)
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"about \d+s of training and \d+s for 2 validations, at \d+ tokens/s "
        r"\(measured over 2 steps\)",
        last,
    )
    facts = json.loads(imate("train", *small, "--dry-run", "--json").stdout)
    assert (facts["total_steps"], facts["num_validations"]) == (3, 2)
    assert facts["training_s"] > 0
    assert list(Path().iterdir()) == []


@shows("train --model")
def test_train_takes_another_base(imate, small, other_base):
    imate("train", *small, "--model", other_base)
    assert adapter_config("adapters/run_A")["base_model_name_or_path"] == str(other_base)
    weights = mx.load("adapters/run_A/adapter_model.safetensors")
    assert sorted({array.shape for array in weights.values()}) == [(8, 32), (96, 8)]


@pytest.fixture
def untested_base(tmp_path: Path) -> Path:
    """A network that mlx-lm has, and that no test holds against transformers."""
    write_network(tmp_path / "xverse", "llama", num_hidden_layers=1)
    edit_config(tmp_path / "xverse", model_type="xverse", tie_word_embeddings=False)
    return tmp_path / "xverse"


@shows("train --untested-base")
def test_train_takes_an_untested_base_where_it_is_asked_to(imate, small, untested_base):
    words = ["train", *small, "--model", untested_base]
    said = imate(*words, code=1).stderr
    assert "no test holds xverse of mlx-lm against transformers" in said
    assert "--untested-base" in said
    assert not Path("adapters").exists()
    said = imate(*words, "--untested-base").stderr
    assert "no test holds xverse of mlx-lm against transformers" in said
    assert adapter_config("adapters/run_A")["target_modules"]


@shows("bench --untested-base")
def test_bench_takes_an_untested_base_where_it_is_asked_to(imate, small, untested_base):
    words = ["bench", *small, "--steps", "1", "--warmup", "0", "--model", untested_base]
    assert "no test holds xverse" in imate(*words, code=1).stderr
    assert json.loads(imate(*words, "--untested-base", "--json").stdout)["rows"] == 4


@shows("train --out")
def test_train_writes_to_out(imate, small):
    imate("train", *small, "--out", "else where/mine")
    assert adapter_config("else where/mine")["r"] == 8
    assert not Path("adapters").exists()


@shows("train --resume")
def test_train_goes_on_with_resume(imate, small, signal_after):
    small = [*small, "--set", "train.epochs=4"]
    imate("train", *small)
    with signal_after(5, signal.SIGINT):
        imate("train", *small, "--out", "halves", code=130)
    steps = read_json(Path("halves/summary.json"))["steps"]
    assert 5 <= steps < 12
    shutil.copytree("halves", "again")
    result = imate("train", *small, "--out", "halves", "--resume")
    assert "going on after step " in result.stderr
    assert "step 12/12" in result.stderr
    name = "adapter_model.safetensors"
    assert Path("halves", name).read_bytes() == Path("adapters/run_A", name).read_bytes()
    # The folder knows its run.
    imate("train", "--out", "again", "--resume")
    assert Path("again", name).read_bytes() == Path("adapters/run_A", name).read_bytes()
    longer = imate("train", "--out", "again", "--resume", "--epochs", 5)
    assert "changed on purpose: train.epochs 4.0 -> 5.0; the learning rate" in longer.stderr
    assert read_json(Path("again/summary.json"))["steps"] == 15


@shows("train --force")
def test_train_replaces_a_run_with_force_alone(imate, small):
    imate("train", *small)
    before = Path("adapters/run_A/adapter_model.safetensors").read_bytes()
    different = [*small, "--set", "train.seed=1"]
    assert (
        "Options for that: --resume, --force, --out." in imate("train", *different, code=1).stderr
    )
    assert Path("adapters/run_A/adapter_model.safetensors").read_bytes() == before
    imate("train", *different, "--force")
    assert Path("adapters/run_A/adapter_model.safetensors").read_bytes() != before
    metrics = Path("adapters/run_A/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 2, 3, 3]


@shows("train --json")
def test_train_prints_json(imate, small):
    printed = json.loads(imate("train", *small, "--json").stdout)
    assert printed == read_json(Path("adapters/run_A/summary.json")) | {"adapter": "adapters/run_A"}
    assert (printed["steps"], printed["train_rows"], printed["valid_rows"]) == (3, 12, 4)


# generate

ASK = ["generate", "What is a mean?", "--max-tokens", 24]


@shows("generate --model")
def test_generate_takes_the_base(imate, tiny_base, other_base):
    answers = {imate(*ASK, "--model", base).stdout for base in (tiny_base, other_base)}
    assert len(answers) == 2


@shows("generate --adapter")
def test_generate_takes_the_adapter_and_the_base_that_it_names(imate, tiny_base, tiny_adapter):
    words = imate(*ASK, "--adapter", tiny_adapter).stdout
    assert words == imate(*ASK, "--adapter", tiny_adapter, "--model", tiny_base).stdout
    assert words != imate(*ASK, "--model", tiny_base).stdout
    coach, tokenizer = generate.load_coach(None, tiny_adapter)
    sampling = generate.Sampling(max_tokens=24)
    assert words == generate.answer(coach, tokenizer, "What is a mean?", sampling) + "\n"


@shows("generate --max-tokens")
def test_generate_stops_after_max_tokens(imate, tiny_base):
    coach, tokenizer = generate.load_coach(tiny_base)
    ids = encode_question(tokenizer, "What is a mean?")
    num_prompt = len(ids)
    for _ in range(7):  # the likeliest token each time, without a cache
        ids.append(mx.argmax(coach(mx.array([ids]))[0, -1]).item())
    for count in (1, 7):
        said = imate("generate", "What is a mean?", "--model", tiny_base, "--max-tokens", count)
        expected = tokenizer.decode(ids[num_prompt : num_prompt + count])
        assert said.stdout.strip() == expected.strip()


def sample(imate: Any, adapter: Path, *options: object) -> str:
    # In float32: in bfloat16 two tokens may be equally likely.
    return imate(*ASK, "--adapter", adapter, "--dtype", "float32", *options).stdout


@shows("generate --temperature")
def test_generate_samples_with_a_temperature(imate, tiny_adapter):
    greedy = sample(imate, tiny_adapter)
    assert sample(imate, tiny_adapter, "--temperature", 0) == greedy
    for option in ("--seed", "--top-p", "--top-k", "--min-p"):
        imate(*ASK, "--adapter", tiny_adapter, option, 1, code=2)  # of no effect, so refused
    assert sample(imate, tiny_adapter, "--temperature", 1e-4) == greedy
    assert sample(imate, tiny_adapter, "--temperature", 3) != greedy


@shows("generate --top-p")
def test_generate_samples_from_the_likeliest(imate, tiny_adapter):
    greedy, hot = sample(imate, tiny_adapter), ["--temperature", 3, "--seed", 1]
    assert sample(imate, tiny_adapter, *hot, "--top-p", 1e-6) == greedy
    assert sample(imate, tiny_adapter, *hot, "--top-p", 0.9) != greedy


@shows("generate --top-k")
@shows("generate --min-p")
def test_generate_leaves_out_unlikely_tokens(imate, tiny_adapter):
    greedy, hot = sample(imate, tiny_adapter), ["--temperature", 3, "--seed", 1]
    for one, several in (["--top-k", 1], ["--top-k", 50]), (["--min-p", 0.99], ["--min-p", 1e-3]):
        assert sample(imate, tiny_adapter, *hot, *one) == greedy
        assert sample(imate, tiny_adapter, *hot, *several) != greedy


@shows("generate --repetition-penalty")
def test_generate_repeats_less_with_a_penalty(imate, tiny_base):
    words = [*ASK, "--model", tiny_base, "--dtype", "float32"]
    coach, tokenizer = generate.load_coach(tiny_base)
    ids = encode_question(tokenizer, "What is a mean?")
    num_prompt = len(ids)
    for _ in range(24):  # by hand: the last 64 tokens' logits, divided or multiplied
        logits = coach(mx.array([ids]))[0, -1].tolist()
        for token in set(ids[-64:]):
            logits[token] *= 3 if logits[token] < 0 else 1 / 3
        ids.append(max(range(len(logits)), key=logits.__getitem__))
    said = imate(*words, "--repetition-penalty", 3).stdout
    assert said.strip() == shown_text(tokenizer.decode(ids[num_prompt:])).strip()
    assert said != imate(*words).stdout


@shows("generate --stop")
def test_generate_ends_before_a_stop_text(imate, tiny_adapter):
    whole = sample(imate, tiny_adapter)
    stop = whole[4:7]
    assert (
        sample(imate, tiny_adapter, "--stop", "never", "--stop", stop).rstrip("\n")
        == (whole[: whole.index(stop)])
    )
    line = imate(*ASK, "--adapter", tiny_adapter, "--stop", stop, "--json").stdout
    assert json.loads(line)["answer"] == whole[: whole.index(stop)].strip()
    imate(*ASK, "--adapter", tiny_adapter, "--stop", "", code=2)


@shows("generate --system")
def test_generate_puts_a_system_text_first(imate, tiny_adapter):
    coach, tokenizer = generate.load_coach(None, tiny_adapter)
    prompt = encode_messages(
        tokenizer, [Message("system", "Be brief."), Message("user", "What is a mean?")]
    )
    sampling = generate.Sampling(max_tokens=24)
    expected = "".join(generate.stream_answer(coach, tokenizer, "", sampling, prompt))
    said = imate(*ASK, "--adapter", tiny_adapter, "--system", "Be brief.").stdout
    assert said.strip() == expected.strip()
    imate(*ASK, "--adapter", tiny_adapter, "--system", "x", "--raw", code=1)


@shows("generate --raw")
def test_generate_goes_on_from_the_text_as_it_stands(imate, tiny_adapter):
    coach, tokenizer = generate.load_coach(None, tiny_adapter)
    ids = encode(tokenizer, "What is a mean?")
    sampling = generate.Sampling(max_tokens=24)
    expected = "".join(generate.stream_answer(coach, tokenizer, "", sampling, ids))
    assert imate(*ASK, "--adapter", tiny_adapter, "--raw").stdout == expected + "\n"


@shows("generate --samples")
def test_generate_gives_several_samples(imate, tiny_adapter):
    words = [*ASK, "--adapter", tiny_adapter, "--temperature", 3]
    said = imate(*words, "--seed", 5, "--samples", 2).stdout
    one, other = (imate(*words, "--seed", seed).stdout for seed in (5, 6))
    assert said == f"--- 1 of 2\n{one}--- 2 of 2\n{other}"
    line = json.loads(imate(*words, "--seed", 5, "--samples", 2, "--json").stdout)
    assert list(map(shown_text, line["answers"])) == [one.strip(), other.strip()]
    imate(*ASK, "--adapter", tiny_adapter, "--samples", 2, code=2)  # all would be the same


@shows("generate --questions")
def test_generate_answers_a_file_of_questions(imate, tiny_adapter, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"id": "a", "question": "What is a mean?"}\n{"prompt": "What is a loss?"}\n')
    words = ["generate", "--adapter", tiny_adapter, "--max-tokens", 24]
    rows = list(map(json.loads, imate(*words, "--questions", file).stdout.splitlines()))
    assert [row["question"] for row in rows] == ["What is a mean?", "What is a loss?"]
    assert rows[0]["id"] == "a"
    for row in rows:
        said = imate(*words[:1], row["question"], *words[1:]).stdout.strip()
        assert row["answer"] == said
        assert said == imate(*words[:1], "-", *words[1:], stdin=row["question"]).stdout.strip()
    file.write_text('{"question": ""}\n{}\n')
    refused = imate(*words, "--questions", file, code=1).stderr
    assert "asked.jsonl: 2 faults" in refused
    assert "2 rows (lines 1, 2)" in refused
    imate(*words, code=2)


@shows("generate --json")
def test_generate_prints_json(imate, tiny_adapter):
    line = json.loads(imate(*ASK, "--adapter", tiny_adapter, "--json").stdout)
    assert line["question"] == "What is a mean?"
    assert line["answer"] + "\n" == imate(*ASK, "--adapter", tiny_adapter).stdout


@shows("generate --seed")
def test_generate_repeats_a_seed(imate, tiny_adapter):
    said = [sample(imate, tiny_adapter, "--temperature", 3, "--seed", s) for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@shows("generate --dtype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generate_computes_in_the_dtype(imate, tiny_base, monkeypatch, dtype):
    loaded = []
    original = generate.load_coach

    def load(*arguments: Any) -> Any:
        loaded.extend(original(*arguments))
        return tuple(loaded)

    monkeypatch.setattr(generate, "load_coach", load)
    imate(*ASK, "--model", tiny_base, "--dtype", dtype)
    assert loaded[0](mx.array([[1]])).dtype == getattr(mx, dtype)


# merge


def merged_config(folder: str) -> dict[str, Any]:
    return read_json(Path(folder, "config.json"))


@shows("merge --out")
@shows("merge --force")
def test_merge_writes_to_out_and_replaces_with_force_alone(imate, tiny_adapter):
    said = imate("merge", tiny_adapter, "--out", "merged").stdout
    assert said.startswith("merged: ")
    assert "merged exists" in imate("merge", tiny_adapter, "--out", "merged", code=1).stderr
    imate("merge", tiny_adapter, "--out", "merged", "--force")
    whole = mx.load("merged/model.safetensors")
    imate("merge", f"{tiny_adapter}=0.5", "--out", "half")
    name = "transformer.h.0.self_attention.dense.weight"
    assert float(mx.abs(whole[name] - mx.load("half/model.safetensors")[name]).max()) > 0
    assert "expected ADAPTER=WEIGHT" in imate("merge", "a=b", "--out", "x", code=2).stderr
    assert "Give --out FOLDER" in imate("merge", tiny_adapter, code=2).stderr


@shows("merge --model")
def test_merge_takes_the_base_from_another_place(imate, tiny_adapter, tiny_base, tmp_path):
    adapter = tmp_path / "moved"
    shutil.copytree(tiny_adapter, adapter)
    path = adapter / "adapter_config.json"
    config = read_json(path) | {"base_model_name_or_path": "/nowhere"}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "/nowhere" in imate("merge", adapter, "--out", "merged", code=1).stderr
    imate("merge", adapter, "--out", "merged", "--model", tiny_base)
    assert Path("merged/model.safetensors").is_file()


@shows("merge --dtype")
def test_merge_writes_weights_of_the_dtype(imate, tiny_adapter):
    imate("merge", tiny_adapter, "--out", "merged", "--dtype", "bfloat16")
    weights = mx.load("merged/model.safetensors")
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}


@shows("merge --quantize")
@shows("merge --group-size")
@shows("merge --data")
@shows("merge --json")
def test_merge_quantises_and_says_what_is_left(imate, tiny_adapter, questions):
    words = ["merge", tiny_adapter, "--quantize", "8"]
    assert "has no valid rows" in imate(*words, "--out", "x", code=1).stderr  # it had none
    words += ["--data", questions]
    said = imate(*words, "--out", "merged").stdout
    assert re.search(r"quantised to 8 bits, \d+% of the adapter's effect is left", said)
    assert merged_config("merged")["quantization"] == {"group_size": 64, "bits": 8}
    options = ["--group-size", "32", "--out", "other", "--json"]
    facts = json.loads(imate(*words, *options).stdout)
    assert 0.5 < facts["share_left"] < 1.5
    assert facts["nbytes"] < Path("other/model.safetensors").stat().st_size
    assert merged_config("other")["quantization"]["group_size"] == 32
    assert not Path("x").exists()
    for option in (["--group-size", "32"], ["--data", "interview"]):
        said = imate("merge", tiny_adapter, "--out", "x", *option, code=2).stderr
        assert f"{option[0]} is of --quantize" in said


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own
@shows("merge --push")
@shows("merge --private")
def test_merge_pushes_to_the_hub(imate, hub, tiny_adapter):
    said = imate("merge", tiny_adapter, "--push", f"{USER}/merged", "--private").stdout
    assert said == f"{hub.endpoint}/{USER}/merged\n"
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.uploaded[f"{USER}/merged"])
    assert hub.repos[f"{USER}/merged"].private
    said = imate("merge", tiny_adapter, "--out", "x", "--private", code=2).stderr
    assert "--private is of --push" in said


# export

HANDED_OUT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "run.toml",
    "summary.json",
}


@shows("export --out")
def test_export_copies_the_adapter_without_checkpoints(imate, tiny_adapter):
    assert imate("export", tiny_adapter, "--out", "copy").stdout == "copy\n"
    assert {path.name for path in Path("copy").iterdir()} == HANDED_OUT
    for name in HANDED_OUT - {"README.md"}:
        assert Path("copy", name).read_bytes() == (tiny_adapter / name).read_bytes()
    card = Path("copy/README.md").read_text(encoding="utf-8")
    assert "## Base\n\n" in card
    assert "of an unknown revision. Its licence is not known here" in card


@shows("export --model")
def test_export_names_the_base_otherwise(imate, tiny_adapter, tmp_path):
    out = tmp_path / "copy"
    said = imate("export", tiny_adapter, "--out", out, "--model", "someone/else").stderr
    assert "the copy names its base someone/else, not " in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/else"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own
@shows("export --push")
def test_export_pushes_to_the_hub(imate, hub, tiny_adapter):
    said = imate("export", tiny_adapter, "--push", f"{USER}/coach").stdout
    assert said == f"{hub.endpoint}/{USER}/coach\n"
    assert set(hub.uploaded[f"{USER}/coach"]) == HANDED_OUT
    assert not hub.repos[f"{USER}/coach"].private


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@shows("export --private")
def test_export_makes_a_private_repository(imate, hub, tiny_adapter):
    imate("export", tiny_adapter, "--push", f"{USER}/coach", "--private")
    assert hub.repos[f"{USER}/coach"].private


@shows("export --force")
def test_export_replaces_an_exported_adapter_with_force_alone(imate, tiny_adapter):
    imate("export", tiny_adapter, "--out", "copy")
    Path("copy/README.md").write_text("old", encoding="utf-8")
    assert "--force" in imate("export", tiny_adapter, "--out", "copy", code=1).stderr
    assert Path("copy/README.md").read_text(encoding="utf-8") == "old"
    imate("export", tiny_adapter, "--out", "copy", "--force")
    assert "## Base" in Path("copy/README.md").read_text(encoding="utf-8")


@shows("export --as")
def test_export_writes_the_format(imate, tiny_adapter):
    imate("export", tiny_adapter, "--out", "theirs", "--as", "mlx-lm")
    assert {path.name for path in Path("theirs").iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    imate("export", "theirs", "--out", "peft", "--as", "peft")
    expected = mx.load(str(tiny_adapter / "adapter_model.safetensors"))
    got = mx.load("peft/adapter_model.safetensors")
    assert got.keys() == expected.keys()
    assert all(bool((got[name] == expected[name]).all()) for name in expected)


def test_export_leaves_any_other_folder_alone_even_with_force(imate, tiny_adapter):
    Path("mine").mkdir()
    Path("mine/thesis").touch()
    said = imate("export", tiny_adapter, "--out", "mine", "--force", code=1).stderr
    assert "mine exists and is not an exported adapter" in said
    assert [path.name for path in Path("mine").iterdir()] == ["thesis"]


# bench


def bench(imate: Any, *options: object) -> dict[str, Any]:
    return json.loads(imate("bench", "--json", *options).stdout)


@shows("bench --run")
def test_bench_takes_a_run(imate, tiny_base, questions):
    text = f"[model]\nbase = '{tiny_base}'\n[data]\npath = '{questions}'\n"
    Path("mine.toml").write_text(text, encoding="utf-8")
    result = bench(imate, "--run", "mine.toml", "--steps", 1, "--warmup", 0)
    assert (result["run"], result["base"], result["rows"]) == ("mine", str(tiny_base), 4)


@shows("bench --set")
def test_bench_takes_overrides(imate, small):
    options = ["--steps", 2, "--warmup", 0, "--set", "train.grad_accumulation=1"]
    assert bench(imate, *small, *options)["rows"] == 2


@shows("bench --model")
def test_bench_takes_another_base(imate, small, other_base):
    assert bench(imate, *small, "--model", other_base, "--steps", 1)["base"] == str(other_base)


@shows("bench --steps")
def test_bench_times_so_many_steps(imate, small):
    for steps in (1, 3):
        result = bench(imate, *small, "--steps", steps, "--warmup", 0)
        assert (result["steps"], result["rows"]) == (steps, 4 * steps)


@shows("bench --warmup")
def test_bench_does_not_time_the_warmup(imate, small):
    imate("train", *small)
    metrics = Path("adapters/run_A/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [line["num_tokens"] for line in map(json.loads, metrics) if line["event"] == "step"]
    assert len(set(tokens)) == 3
    for warmup in range(3):
        result = bench(imate, *small, "--steps", 1, "--warmup", warmup)
        assert result["tokens"] == tokens[warmup]


@shows("bench --json")
def test_bench_prints_json_and_writes_nothing(imate, small):
    result = bench(imate, *small, "--steps", 2)
    assert result["samples_per_s"] == pytest.approx(result["rows"] / result["seconds"])
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"])
    assert list(Path().iterdir()) == []
    plain = imate("bench", *small, "--steps", 2).stdout
    assert f"2 steps ({result['rows']} rows, {result['tokens']} tokens) in " in plain


# data


@shows("data check --model")
def test_data_check_counts_the_model_s_tokens(imate, questions, tiny_base):
    assert json.loads(imate("data", "check", questions, "--json").stdout)["token_lengths"] is None
    line = imate("data", "check", questions, "--json", "--model", tiny_base).stdout
    shortest, median, longest = json.loads(line)["token_lengths"]
    assert 10 < shortest < median < longest < 512


@shows("data check --max-length")
def test_data_check_refuses_rows_that_do_not_fit(imate, questions, tiny_base):
    words = ["data", "check", questions, "--max-length", 16]
    imate(*words, code=2)
    refusal = imate(*words, "--model", tiny_base, code=1).stderr
    assert "train.jsonl: more than 16 tokens: 12 rows (lines 1, 2, 3, ...)" in refusal


@shows("data check --all")
def test_data_check_names_every_row(imate, questions, tiny_base):
    words = ["data", "check", questions, "--model", tiny_base, "--max-length", 16]
    refusal = imate(*words, "--all", code=1).stderr
    # One fault in several rows is one line, with all of their numbers.
    places = re.findall(r"train\.jsonl(?:: .* \(lines ([\d, ]+)\)| line (\d+): )", refusal)
    numbers = [int(n) for several, one in places for n in (several or one).split(", ")]
    assert sorted(numbers) == list(range(1, 13))
    imate(*words, "--all", "--json", code=2)


@shows("data check --json")
def test_data_check_prints_json(imate, questions):
    report = json.loads(imate("data", "check", questions, "--json").stdout)
    assert report["rows"] == {"train": 12, "valid": 4, "test": 3}
    shortest, _, longest = report["answer_words"]
    plain = imate("data", "check", questions).stdout
    assert re.search(r"rows\W+12\W+4\W+3\W", plain)
    assert f"words an answer: {shortest} to {longest}" in plain


@pytest.fixture
def rows_with_ids(questions: Path) -> list[dict[str, str]]:
    rows = (questions / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row) | {"id": f"q{number}"} for number, row in enumerate(rows)]


@pytest.fixture
def split(imate: Callable[..., Any], rows_with_ids: list[dict[str, str]]) -> Callable[..., Any]:
    """Split 12 rows; give the ids in each split."""
    text = "".join(json.dumps(row) + "\n" for row in rows_with_ids)
    Path("rows.jsonl").write_text(text, encoding="utf-8")

    def run(out: str, *options: object) -> dict[str, set[str]]:
        imate("data", "split", "rows.jsonl", "--out", out, *options)
        return {
            path.stem: {json.loads(line)["id"] for line in path.read_text().splitlines()}
            for path in Path(out).iterdir()
        }

    return run


@shows("data split --out")
def test_data_split_writes_to_out(split, rows_with_ids):
    dealt = split("here/mine")
    assert sorted(map(len, dealt.values())) == [1, 3, 8]
    assert set.union(*dealt.values()) == {row["id"] for row in rows_with_ids}


def test_data_split_says_what_it_added_updated_and_left(imate, split, rows_with_ids):
    split("mine")
    changed = [row | {"answer": "Another."} for row in rows_with_ids[:5]]
    new = {"id": "new", "question": "What is new?", "answer": "This."}
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*changed, new]))
    lines = imate("data", "split", "more.jsonl", "--out", "mine").stdout.splitlines()
    assert lines[-1] == "1 row added, 5 updated in their split, 7 left as they were"
    counts = [
        re.fullmatch(r"mine/(\w+).jsonl: (\d+) rows?, (\d) of them new", s) for s in lines[:3]
    ]
    assert [count[1] for count in counts] == ["train", "valid", "test"]
    assert (sum(int(count[2]) for count in counts), sum(int(c[3]) for c in counts)) == (13, 1)
    again = imate("data", "split", "more.jsonl", "--out", "mine").stdout.splitlines()
    assert again[-1] == "0 rows added, 0 updated in their split, 13 left as they were"


@shows("data split --seed")
def test_data_split_deals_by_the_seed(split):
    assert split("one", "--seed", 1) == split("again", "--seed", 1)
    assert split("other", "--seed", 2) != split("one", "--seed", 1)


@shows("data split --shares")
def test_data_split_deals_out_the_shares(split):
    dealt = split("halves", "--shares", 0.5, 0.25, 0.25)
    assert {name: len(ids) for name, ids in dealt.items()} == {"train": 6, "valid": 3, "test": 3}


@pytest.fixture
def preview(imate: Callable[..., Any], tiny_base: Path, questions: Path) -> Callable[..., str]:
    def run(*options: object) -> str:
        return imate("data", "preview", questions, "--model", tiny_base, *options).stdout

    return run


def counts(text: str) -> list[int]:
    """Tokens, those with loss, and those that were cut, as the last line has them."""
    return [int(number) for number in re.findall(r"\d+", text.splitlines()[-1])]


@shows("data preview --model")
def test_data_preview_takes_the_bases_tokenizer(preview, other_base):
    mine, other = preview(), preview("--model", other_base)
    plain = [re.sub(r"[][]", "", text).splitlines()[:-1] for text in (mine, other)]
    assert plain[0] == plain[1]
    assert counts(other)[0] > counts(mine)[0], "its tokenizer has fewer merges"


@shows("data preview --row")
def test_data_preview_shows_the_row(preview):
    assert preview().startswith("Question: What is a loss?\\n\nAnswer:[")
    assert preview("--row", 12).startswith("Question: What is a model?\\n\nAnswer:[")


@shows("data preview --split")
def test_data_preview_shows_the_split(preview):
    assert preview("--split", "valid").startswith("Question: What is a hard idea?")
    assert preview("--split", "test").startswith("Question: What is a softmax?")


@shows("data preview --max-length")
def test_data_preview_cuts_at_max_length(preview):
    whole, cut = counts(preview()), counts(preview("--max-length", 20))
    assert (cut[0], cut[2]) == (20, whole[0] - 20)
    assert whole[0] - whole[1] == cut[0] - cut[1], "the answer is what is cut"


TABLE = "Question;Response;Kind\nWhat is it?;A loss.;x\nAnd this?;A mean of many things.;y\n"


@shows("data convert --out")
def test_data_convert_writes_rows_of_our_own_form(imate):
    Path("rows.csv").write_text(TABLE)
    said = imate("data", "convert", "rows.csv", "--out", "rows.jsonl").stdout
    assert said == (
        "rows.jsonl: 2 rows, 2 of them got an id\n"
        "2 rows: question from 'Question', answer from 'Response'\n"
    )
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("What is it?", "A loss."),
        ("And this?", "A mean of many things."),
    ]
    assert len({row["id"] for row in rows}) == 2
    imate("data", "convert", "rows.jsonl", "--out", "again.jsonl")
    assert Path("again.jsonl").read_bytes() == Path("rows.jsonl").read_bytes()
    assert "ends in .jsonl" in imate("data", "convert", "rows.csv", "--out", "x.csv", code=1).stderr
    Path("rows.csv").write_text(TABLE + "What is it?;A loss.;z\nHalf\n")
    words = ["data", "convert", "rows.csv", "--out", "none.jsonl"]
    refusal = imate(*words, code=1).stderr
    assert "row 4: the same question and answer as rows.csv row 2, and no id" in refusal
    assert "row 5: got 1 cell, expected 3 cells, as in row 1" in refusal
    assert not Path("none.jsonl").exists()


def test_shipped_conversations_train_and_chat_out_of_the_box(imate, tiny_base):
    words = ["--data", "interview-dialogues", "--set", "train.warmup_ratio=0", "--max-steps", 1]
    imate("train", "--model", tiny_base, *words, "--out", "adapter")
    words = ["--model", tiny_base, "--adapter", "adapter", "--max-tokens", 4]
    said = imate("chat", *words, stdin="Ask me of indexes.\nA sorted copy.\n").stdout
    assert len(said.splitlines()) >= 2


def test_train_says_how_other_keys_were_understood(imate, tiny_base):
    Path("rows.csv").write_text(TABLE)
    words = ["--data", "rows.csv", "--set", "train.warmup_ratio=0", "--max-steps", "1"]
    said = imate("train", "--model", tiny_base, *words, "--out", "adapter").stderr
    assert "2 rows: question from 'Question', answer from 'Response'" in said
    plain = [{"question": "What is it?", "answer": "A loss."}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    words[1] = "rows.jsonl"
    assert "understood" not in imate("train", "--model", tiny_base, *words, "--out", "b").stderr


@shows("data convert --skip-faulty")
def test_data_convert_leaves_faulty_rows_out_if_asked(imate):
    Path("rows.csv").write_text(TABLE + "What is it?;A loss.;z\nHalf\nWhy?;;\n")
    words = ["data", "convert", "rows.csv", "--out", "rows.jsonl"]
    refusal = imate(*words, code=1).stderr
    assert "3 faults" in refusal
    assert "--skip-faulty" in refusal
    done = imate(*words, "--skip-faulty")
    assert done.stdout.startswith("rows.jsonl: 2 rows, 2 of them got an id\n")
    assert done.stderr.splitlines() == [
        "left out: rows.csv row 4: the same question and answer as rows.csv row 2, and no id",
        "left out: rows.csv row 5: got 1 cell, expected 3 cells, as in row 1: 'Question, Response, "
        "Kind'",
        "left out: rows.csv row 6: Response: got nothing, expected a string",
    ]
    assert len(Path("rows.jsonl").read_text().splitlines()) == 2
    twice = [{"id": "a", "question": f"Q{n}", "answer": "A"} for n in range(2)]
    Path("twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    words = ["data", "convert", "twice.jsonl", "--out", "once.jsonl", "--skip-faulty"]
    assert "id 'a' is taken by line 1" in imate(*words).stderr
    assert [json.loads(line) for line in Path("once.jsonl").read_text().splitlines()] == twice[:1]
    # What cannot be read to its end is not a row that is left out.
    Path("half.jsonl.gz").write_bytes(gzip.compress(Path("twice.jsonl").read_bytes() * 999)[:-9])
    words[2:5] = ["half.jsonl.gz", "--out", "half.jsonl"]
    assert "damaged gzip" in imate(*words, code=1).stderr
    assert not Path("half.jsonl").exists()


@shows("data convert --force")
def test_data_convert_replaces_a_file_only_if_asked(imate):
    Path("rows.csv").write_text(TABLE)
    Path("out.jsonl").write_text("mine\n")
    words = ["data", "convert", "rows.csv", "--out", "out.jsonl"]
    assert "--force" in imate(*words, code=1).stderr
    assert Path("out.jsonl").read_text() == "mine\n"
    imate(*words, "--force")
    assert "A loss." in Path("out.jsonl").read_text()


@shows("data convert --split")
def test_data_convert_takes_the_split(imate, questions):
    words = ["data", "convert", questions, "--out", "out.jsonl"]
    assert "--split" in imate(*words, code=1).stderr
    assert imate(*words, "--split", "valid").stdout.startswith("out.jsonl: 4 rows, 4 of them")


@pytest.fixture
def shown_rows(imate: Callable[..., Any], tiny_base: Path, questions: Path) -> Callable[..., Any]:
    def run(*options: object) -> Any:
        words = ["data", "show", questions, "--model", tiny_base, "--json", *options]
        return json.loads(imate(*words).stdout)["train"]

    return run


@shows("data show --json")
def test_data_show_prints_json_of_what_it_shows(imate, shown_rows, questions, tiny_base):
    report = shown_rows()
    assert (report["rows"], report["turns"]) == (12, {"1": 12})
    text = imate("data", "show", questions, "--model", tiny_base).stdout
    assert re.search(r"rows\s+│\s+12 │\s+4 │\s+3 │", text)
    share = f"{report['loss_share']:.0%}"
    assert re.search(rf"tokens with loss\s+│\s+{share} │", text)
    assert "train: 12 rows: question, answer" in text


@shows("data show --model")
def test_data_show_counts_the_bases_tokens(shown_rows, other_base):
    assert (
        shown_rows("--model", other_base)["tokens"]["longest"] > shown_rows()["tokens"]["longest"]
    )


@shows("data show --max-length")
def test_data_show_counts_rows_that_will_be_cut(shown_rows):
    assert (shown_rows()["num_cut"], shown_rows("--max-length", 16)["num_cut"]) == (0, 12)


@shows("data show --template")
def test_data_show_counts_tokens_of_the_template(shown_rows):
    assert shown_rows("--template", "alpaca")["loss_share"] < shown_rows()["loss_share"]


@shows("data show --train-on")
def test_data_show_counts_tokens_with_loss(shown_rows):
    assert shown_rows("--train-on", "all")["loss_share"] > shown_rows()["loss_share"]
    assert shown_rows("--train-on", "last") == shown_rows()


@shows("data preview --template")
def test_data_preview_puts_the_row_into_the_template(preview, tmp_path):
    assert preview("--template", "plain") == preview()
    assert preview("--template", "alpaca").startswith("Below is an instruction that describes")
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ '# ' + m.content if m.role == 'user' else m.content + "
        "eos_token }}{{ '\n' }}{% endfor %}"
    )
    assert preview("--template", path).startswith("# What is a loss?\\n\n[It]")


@shows("data check --template")
def test_data_check_counts_the_tokens_of_the_template(imate, questions, tiny_base):
    words = ["data", "check", questions, "--model", tiny_base]
    imate("data", "check", questions, "--template", "alpaca", code=2)
    plain, alpaca = (
        json.loads(imate(*words, "--json", "--template", name).stdout)["token_lengths"][0]
        for name in ("plain", "alpaca")
    )
    assert alpaca > plain + 20


@shows("data preview --train-on")
def test_data_preview_marks_what_is_trained_on(preview):
    answer, every = preview("--train-on", "answer"), preview("--train-on", "all")
    assert re.fullmatch(
        r"Question: What is a loss\?\\n\nAnswer:(\[[^][]+\])+", answer.split("\n\n")[0]
    )
    assert counts(answer)[1] == answer.count("[") - 1
    assert counts(every)[1] == counts(every)[0] - 1 == every.count("[") - 1
    assert all("[<|endoftext|>]\n" in text for text in (answer, every))


@pytest.fixture
def evaluated(imate: Callable[..., Any], questions: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate` on the test rows, or as asked; the last model's facts, and the whole."""

    def run(*options: object) -> dict[str, Any]:
        given = [] if "--data" in options else ["--data", questions]
        found = json.loads(imate("evaluate", *options, *given, "--json").stdout)
        return found["evaluations"][-1] | {"whole": found}

    return run


@shows("evaluate --model")
def test_evaluate_takes_the_base_that_is_named(evaluated, tiny_base, tiny_adapter):
    shutil.copytree(tiny_adapter, "mine")  # it is written to
    alone = evaluated("--model", tiny_base, "--no-answers")
    both = evaluated("mine", "--model", tiny_base, "--no-answers")
    assert (alone["name"], both["name"]) == (str(tiny_base), "mine")
    assert alone["loss"] == both["whole"]["evaluations"][0]["loss"]


@shows("evaluate --data")
def test_evaluate_takes_the_data_that_is_named(evaluated, tiny_base, questions):
    found = evaluated("--model", tiny_base, "--no-answers", "--data", "interview", "--limit", 2)
    assert (found["whole"]["data"], found["whole"]["rows"]) == ("interview", 2)


@shows("evaluate --split")
def test_evaluate_takes_the_split(evaluated, tiny_base):
    words = ["--model", tiny_base, "--no-answers"]
    assert evaluated(*words)["whole"]["rows"] == 3
    assert evaluated(*words, "--split", "valid")["whole"]["rows"] == 4


@shows("evaluate --limit")
def test_evaluate_takes_the_first_rows(evaluated, tiny_base):
    assert evaluated("--model", tiny_base, "--no-answers", "--limit", 2)["loss"]["rows"] == 2


@shows("evaluate --no-answers")
def test_evaluate_generates_nothing_if_asked(evaluated, tiny_base):
    assert evaluated("--model", tiny_base, "--no-answers")["answers"] is None
    assert evaluated("--model", tiny_base, "--max-tokens", 1)["answers"]["answers"] == 3


@shows("evaluate --max-tokens")
def test_evaluate_ends_answers(evaluated, tiny_base):
    short, long = (
        evaluated("--model", tiny_base, "--max-tokens", n)["answers"]["length"] for n in (2, 40)
    )
    assert short < long


@shows("evaluate --top-k")
@shows("evaluate --min-p")
@shows("evaluate --repetition-penalty")
@shows("evaluate --stop")
@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", 2, "--top-k", 2],
        ["--temperature", 2, "--min-p", 0.3],
        ["--repetition-penalty", 4],
        ["--stop", "a", "--stop", "e"],
    ],
)
def test_evaluate_samples_as_it_is_told(evaluated, tiny_base, options):
    """Another text each time, with other scores."""
    words = ["--model", tiny_base, "--max-tokens", 12, *options[:2]]
    plain = evaluated("--model", tiny_base, "--max-tokens", 12, *options[: len(options) - 2])
    changed = evaluated(*words, *options[2:])
    assert changed["answers"] != plain["answers"]


@shows("evaluate --temperature")
@shows("evaluate --top-p")
@shows("evaluate --seed")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([], ["--temperature", 2]),
        (["--temperature", 2], ["--temperature", 2, "--top-p", 0.05]),
        (["--temperature", 2, "--seed", 1], ["--temperature", 2, "--seed", 2]),
    ],
)
def test_evaluate_draws_as_asked(imate, tiny_base, questions, one, other):
    texts = []
    for options in (one, one, other):
        words = ["evaluate", "--model", tiny_base, "--data", questions, "--max-tokens", 16]
        imate(*words, *options, "--out", "found")
        texts.append(Path("found/answers.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


@shows("evaluate --tasks")
@shows("evaluate --tasks-from")
def test_evaluate_runs_tasks(evaluated, tiny_base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is a loss?", "choices": [" It tells.", " No."]}\n')
    task = {"task": "mine", "output_type": "multiple_choice", "test_split": "test"}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    (tmp_path / "mine.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": "acc"}]}))
    words = ["--model", tiny_base, "--no-answers", "--tasks", "mine", "--tasks-from", tmp_path]
    assert evaluated(*words)["tasks"]["mine"]["acc"] in (0, 1)


@shows("evaluate --out")
def test_evaluate_writes_a_base_s_numbers_to_out(imate, tiny_base, questions):
    words = ["evaluate", "--model", tiny_base, "--data", questions, "--no-answers"]
    imate(*words, "--out", "here/base")
    assert json.loads(Path("here/base/evaluation.json").read_text())["base"]["loss"]["rows"] == 3


@shows("evaluate --dtype")
def test_evaluate_computes_in_the_dtype(evaluated, tiny_base):
    wide, narrow = (
        evaluated("--model", tiny_base, "--no-answers", "--dtype", dtype)["loss"]["loss"]
        for dtype in ("float32", "bfloat16")
    )
    # Two layers: a loss of some nats is off by some hundred roundings of 2**-9 at the most.
    assert 0 < abs(wide - narrow) < 0.2


@shows("evaluate --json")
def test_evaluate_prints_json(imate, tiny_base, questions):
    words = ["evaluate", "--model", tiny_base, "--data", questions, "--no-answers"]
    found = json.loads(imate(*words, "--json").stdout)
    plain = imate(*words).stdout
    assert f"{found['evaluations'][0]['loss']['loss']:.4f}" in plain
    assert "3 test rows" in plain


@pytest.fixture
def swept(imate: Callable[..., Any], small: list[object]) -> Callable[..., dict[str, Any]]:
    """`sweep` of run A on the small base and rows, one epoch; what it found."""

    def run(*options: object, runs: tuple[str, ...] = ("A",)) -> dict[str, Any]:
        found = json.loads(imate("sweep", *runs, *small, *options, "--json").stdout)
        shutil.rmtree(found["out"])
        return found

    return run


@shows("sweep --untested-base")
def test_sweep_takes_an_untested_base_where_it_is_asked_to(imate, small, untested_base):
    words = ["sweep", "A", "B", "--model", untested_base, *small[2:]]
    assert "no test holds xverse" in imate(*words, code=1).stderr
    imate(*words, "--untested-base", "--out", "sweeps/asked")


@shows("sweep --model")
@shows("sweep --data")
@shows("sweep --epochs")
@shows("sweep --max-steps")
@shows("sweep --lr")
@shows("sweep --seed")
@shows("sweep --set")
def test_sweep_overrides_keys_of_all_runs(imate, tiny_base, questions):
    words = ["--model", tiny_base, "--data", questions, "--epochs", 2, "--max-steps", 2]
    words += ["--lr", 1e-3, "--seed", 7, "--set", "lora.rank=3"]
    imate("sweep", "A", "B", *words)
    for name in ("run_A", "run_B"):
        run = load_run(f"sweeps/run_A_run_B/{name}/run.toml")
        assert (run.model.base, run.data.path) == (str(tiny_base), str(questions))
        assert (run.train.epochs, run.train.max_steps) == (2, 2)
        assert (run.train.learning_rate, run.train.seed, run.lora.rank) == (1e-3, 7, 3)


@shows("sweep --seeds")
def test_sweep_trains_so_many_seeds(swept):
    names = [trial["trial"] for trial in swept("--seeds", 2)["trials"]]
    assert names == ["run_A-seed42", "run_A-seed43"]


@shows("sweep --out")
def test_sweep_writes_to_out(swept):
    assert swept("--out", "here/mine")["out"] == "here/mine"


@shows("sweep --prune")
def test_sweep_stops_what_is_clearly_worse(imate, small, tiny_base, questions):
    rows = f'[model]\nbase = "{tiny_base}"\n[data]\npath = "{questions}"\n'
    for name, rate in (("good", 1e-2), ("slow", 1e-7)):
        Path(f"{name}.toml").write_text(f"{rows}[train]\nlearning_rate = {rate}\n")
    for options, status in (([], "finished"), (["--prune"], "stopped")):
        words = ["sweep", "good.toml", "slow.toml", "--out", f"out{len(options)}", "--json"]
        found = json.loads(imate(*words, *options).stdout)
        assert [trial["status"] for trial in found["trials"]] == ["finished", status]


@shows("sweep --json")
def test_sweep_prints_json(imate, small):
    found = json.loads(imate("sweep", "A", *small, "--json").stdout)
    assert found["best"] == "run_A"
    assert (
        f"{found['trials'][0]['summary']['final_loss']:.3f}" in imate("sweep", "A", *small).stdout
    )


@shows("report --out")
@shows("report --json")
def test_report_writes_to_out_and_prints_json(imate, tiny_adapter):
    assert imate("report", tiny_adapter, "--out", "here").stdout == "here/report.html\n"
    assert Path("here/report.html").is_file()
    facts = json.loads(imate("report", tiny_adapter, "--json").stdout)
    assert facts == json.loads(Path("report/report.json").read_text(encoding="utf-8"))
    assert facts["runs"][0]["name"] == "run_A"


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` without what takes its time."""
    chosen = {name: doctor.CHECKS[name] for name in ("GELU", "AdamW")}
    monkeypatch.setattr(doctor, "CHECKS", chosen)
    monkeypatch.setattr(doctor, "SPEEDS", {})


@shows("doctor --dtype")
def test_doctor_checks_in_the_dtypes_that_are_named(imate, few_checks):
    said = imate("doctor", "--dtype", "float16", "--dtype", "bfloat16").stdout
    assert re.search(r"^error of allowed +float16 +bfloat16$", said, re.MULTILINE)
    assert re.search(r"^GELU +ok .* ok .*$", said, re.MULTILINE)


@shows("doctor --json")
def test_doctor_prints_json(imate, few_checks):
    found = json.loads(imate("doctor", "--dtype", "float16", "--json").stdout)
    assert found["passed"]
    checks = [(check["name"], check["dtype"]) for check in found["checks"]]
    assert checks == [("GELU", "float16"), ("AdamW", "")]


CHAT = ["chat", "--max-tokens", 12, "--dtype", "float32"]
SAY = "What is a mean?\n"


@shows("chat --adapter")
@shows("chat --model")
def test_chat_lets_each_adapter_and_the_base_answer(imate, tiny_base, tiny_adapter, random_adapter):
    ask = ["generate", "What is a mean?", "--max-tokens", 12, "--dtype", "float32"]
    alone = {
        "tiny": imate(*ask, "--model", tiny_base).stdout,
        "learned": imate(*ask, "--adapter", tiny_adapter).stdout,
        "other": imate(*ask, "--adapter", random_adapter).stdout,
    }
    expected = {name: " ".join(text.split("\n")).rstrip() for name, text in alone.items()}
    named = ["--adapter", tiny_adapter, "--adapter", f"other={random_adapter}"]
    for words in ([*CHAT, *named], [*CHAT, *named, "--model", tiny_base]):
        lines = imate(*words, stdin=f"/compare {SAY}").stdout.splitlines()
        assert [line.rstrip() for line in lines] == [
            f"[{name}] {text}".rstrip() for name, text in expected.items()
        ]
    said = imate(*CHAT, *named, stdin=SAY + "/adapter other\n/undo\n" + SAY).stdout.splitlines()
    assert [line.rstrip() for line in said] == [expected["learned"], expected["other"]]
    assert imate(*CHAT, "--model", tiny_base, stdin=SAY).stdout.rstrip() == expected["tiny"]
    imate("chat", code=2)
    imate(*CHAT, "--adapter", tiny_adapter, "--adapter", tiny_adapter, code=2)


@shows("chat --system")
def test_chat_has_a_system_text(imate, tiny_adapter):
    words = [*CHAT, "--adapter", tiny_adapter]
    given = imate(*words, "--system", "Be brief.", stdin=SAY)
    typed = imate(*words, stdin="/system Be brief.\n" + SAY)
    assert given.stdout == typed.stdout != imate(*words, stdin=SAY).stdout
    assert "system: Be brief." in typed.stderr


@shows("chat --max-tokens")
@shows("chat --temperature")
@shows("chat --top-p")
@shows("chat --top-k")
@shows("chat --min-p")
@shows("chat --seed")
@shows("chat --repetition-penalty")
@shows("chat --stop")
@pytest.mark.parametrize(
    "options",
    [
        ["--max-tokens", 5],
        ["--temperature", 3, "--seed", 4],
        ["--temperature", 3, "--top-p", 0.5],
        ["--temperature", 3, "--top-k", 3],
        ["--temperature", 3, "--min-p", 0.2],
        ["--repetition-penalty", 4],
        ["--stop", "e"],
    ],
)
def test_chat_samples_as_generate_does(imate, tiny_adapter, options):
    words = ["--adapter", tiny_adapter, "--dtype", "float32", "--max-tokens", 24, *options]
    alone = imate("generate", "What is a mean?", *words).stdout
    assert imate("chat", *words, stdin=SAY).stdout.rstrip() == " ".join(alone.split("\n")).rstrip()


@shows("chat --dtype")
def test_chat_computes_in_the_dtype(imate, tiny_base, monkeypatch):
    loaded = []
    original = Base.load

    def load(base: Base, dtype: mx.Dtype) -> Any:
        loaded.append(dtype)
        return original(base, dtype)

    monkeypatch.setattr(Base, "load", load)
    imate("chat", "--model", tiny_base, "--dtype", "bfloat16", "--max-tokens", 1, stdin=SAY)
    assert loaded == [mx.bfloat16]


def test_chat_by_its_commands(imate, tiny_base, tmp_path):
    words = [*CHAT, "--model", tiny_base]
    said = imate(*words, stdin=f"/help\n{SAY}/retry\n/save c.jsonl\n/undo\n/quit\nnever\n")
    assert "/compare TEXT" in said.stderr
    first, again = said.stdout.splitlines()
    assert first == again
    row = json.loads((tmp_path / "c.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert "forgotten: What is a mean?" in said.stderr
    for wrong, message in (
        ("/nope", "expected one of: /help"),
        ("/undo", "Nothing was said yet"),
        ("/adapter none", "No adapter 'none' here"),
        ("/save x.jsonl", "Nothing was said yet"),
        ("/retry now", "/retry takes nothing after it"),
        ("/compare", "/compare needs a message"),
    ):
        assert message in imate(*words, stdin=wrong + "\n", code=1).stderr


ANSWER = "The sum is 0, 2 or 4\n\nnothing more\n\ngood\n"


@pytest.fixture
def deck(tmp_path):
    rows = [
        {"question": f"What is {n}?", "answer": f"The sum is {n}.", "follow_up": "And then?"}
        | {"category": "even" if n % 2 == 0 else "odd"}
        | {"difficulty": "beginner" if n < 4 else "advanced"}
        for n in range(6)
    ]
    path = tmp_path / "deck.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@shows("interview --data")
@shows("interview --category")
@shows("interview --difficulty")
@shows("interview --count")
def test_interview_asks_what_is_wanted(imate, deck):
    said = imate("interview", stdin="/skip\n" * 20).stdout
    assert "Question 10 of 10" in said
    words = ["interview", "--data", deck]
    assert "Question 1 of 2" in imate(*words, "--count", 2, stdin="/quit\n").stdout
    only = imate(*words, "--category", "odd", "--difficulty", "advanced", stdin="/quit\n").stdout
    assert "What is 5?" in only
    assert "Question 1 of 1" in only
    assert "expected one of: even, odd" in imate(*words, "--category", "x", code=1).stderr


@shows("interview --adapter")
@shows("interview --model")
def test_interview_has_a_coach(imate, deck, tiny_base, tiny_adapter):
    words = ["interview", "--data", deck, "--count", 1, "--adapter", tiny_adapter]
    for own in (words, [*words, "--model", tiny_base]):
        said = imate(*own, stdin=ANSWER).stdout
        question = re.search(r"What is \d\?", said)[0]
        coach, tokenizer = generate.load_coach(tiny_base, tiny_adapter)
        expected = generate.answer(coach, tokenizer, question)
        shown = said.partition("which can be wrong")[2]
        assert " ".join(expected.split()) in " ".join(shown.split())
    assert "The coach" not in imate("interview", "--data", deck, stdin=ANSWER).stdout
    imate("interview", "--model", tiny_base, code=2)


@shows("interview --progress")
@shows("interview --export")
@shows("interview --json")
def test_interview_shows_what_was_practised(imate, deck):
    assert "Nothing was practised yet" in imate("interview", "--progress").stdout
    said = imate("interview", "--data", deck, "--category", "even", stdin=ANSWER).stdout
    assert "Your answer has 1 of 1 points" in said
    assert "overlap, not judgement" in said
    assert "And then?" in said
    assert "This question returns in" in said
    assert "1 answered and graded" in said
    table = imate("interview", "--progress").stdout
    assert re.search(r"even +1 +1 +100% +100% +0", table)
    facts = json.loads(imate("interview", "--progress", "--json").stdout)
    assert facts["categories"][0]["asked"] == 1
    assert list(facts["days"].values()) == [1]
    (line,) = imate("interview", "--export").stdout.splitlines()
    assert json.loads(line)["follow_up"] == "nothing more"
    for wrong in (["--json"], ["--progress", "--export"], ["--progress", "--count", 3]):
        imate("interview", *wrong, code=2)


def test_interview_takes_a_line_with_a_slash_and_stops_at_the_follow_up(imate, deck):
    words = ["interview", "--data", deck, "--category", "even"]
    typed = "first\n/usr/bin/env\nthird\n\n/skip\ngood\nthe sum\n\n/quit\n"
    assert "1 answered and graded" in imate(*words, stdin=typed).stdout
    (line,) = map(json.loads, imate("interview", "--export").stdout.splitlines())
    assert (line["answer"], line["follow_up"]) == ("first\n/usr/bin/env\nthird", "")


@pytest.fixture
def kept(tmp_path):
    """Feedback on three answers, one of them to a question of the shipped test rows."""
    held = json.loads((shipped_data("interview") / "test.jsonl").read_text().splitlines()[0])
    path = tmp_path / "feedback.sqlite"
    with Feedback.open(path) as feedback:
        for number, question in enumerate(["What is A?", "What is A?", held["question"]]):
            asked = [Message("user", question)]
            feedback.keep(f"{number}", asked, f"Answer {number}.", "coach", "hash", "statistics")
        feedback.rate("0", "up")
        feedback.rate("1", "down")
        feedback.rate("2", "down", "Quite another answer.")
    return path


@shows("feedback show --keep")
@shows("feedback show --json")
@shows("feedback show --conversations")
def test_feedback_show(imate, kept):
    kept.rename(kept.with_name("other.sqlite"))
    assert "No file feedback.sqlite" in imate("feedback", "show", code=1).stderr
    words = ["feedback", "show", "--keep", "other.sqlite"]
    assert re.search(r"coach +statistics +3 +3 +33% +1", imate(*words).stdout)
    assert "What is A?" not in imate(*words).stdout
    assert "What is A?" in imate(*words, "--conversations").stdout
    facts = json.loads(imate(*words, "--json", "--conversations").stdout)
    assert facts["groups"][0]["rated"] == 3
    assert len(facts["conversations"]) == 3


@shows("feedback export --keep")
@shows("feedback export --as")
@shows("feedback export --out")
@shows("feedback export --force")
@shows("feedback export --data")
@shows("feedback export --leave-out")
def test_feedback_export(imate, kept, questions):
    kept = kept.rename(kept.with_name("other.sqlite"))
    words = ["feedback", "export", "--keep", kept, "--out", "rows.jsonl", "--as"]
    refused = imate(*words, "pairs", code=1).stderr
    assert "1 of 2 rows are in the valid or test rows" in refused
    assert "--leave-out" in refused
    assert not Path("rows.jsonl").exists()
    assert "left out: " in imate(*words, "pairs", "--leave-out").stderr
    pair = {"prompt": "What is A?", "chosen": "Answer 0.", "rejected": "Answer 1."}
    assert json.loads(Path("rows.jsonl").read_text()) == pair | {"category": "statistics"}
    assert "--force" in imate(*words, "sft", "--leave-out", code=1).stderr
    imate(*words, "sft", "--force", "--data", questions)  # where the question is not held out
    rows = list(map(json.loads, Path("rows.jsonl").read_text().splitlines()))
    assert [row["answer"] for row in rows] == ["Answer 0.", "Quite another answer."]
    imate("data", "check", "rows.jsonl")


@shows("feedback forget --keep")
@shows("feedback forget --all")
def test_feedback_forget(imate, kept):
    words = ["feedback", "forget", "--keep", kept]
    with Feedback.open(kept) as feedback:
        first = feedback.conversations()[0][0]
    assert "forgotten: 1 answer" in imate(*words, first[:10]).stdout
    assert "forgotten: 2 answers" in imate(*words, "--all").stdout
    imate(*words, code=2)
    imate(*words, "--all", first, code=2)


ASKED = {"messages": [{"role": "user", "content": "What is a mean?"}], "max_tokens": 4}


@shows("serve --adapter")
@shows("serve --model")
@shows("serve --port")
@shows("serve --api-key")
@shows("serve --cors")
@shows("serve --keep")
@shows("serve --data")
@shows("serve --dtype")
def test_serve_as_it_is_told(tmp_path, tiny_base, tiny_adapter, deck):
    key = {"Authorization": "Bearer k"}
    words = ["--model", tiny_base, "--adapter", f"mine={tiny_adapter}", "--api-key", "k"]
    words += ["--cors", "http://localhost:3000", "--keep", "kept.sqlite", "--data", deck]
    with running(tmp_path, *words) as served:  # with --port 0 and --dtype float32
        assert served.port > 0
        assert served.get("/v1/models").status_code == 401
        assert [m["id"] for m in served.get("/v1/models", **key).json()["data"]] == ["tiny", "mine"]
        there = {"Origin": "http://localhost:3000"}
        headers = served.get("/health", **there).headers
        assert headers["access-control-allow-origin"] == "http://localhost:3000"
        assert served.get("/interview/questions", **key).json()["categories"] == ["even", "odd"]
        found = served.post("/v1/chat/completions", ASKED | {"temperature": 0}, **key).json()
        coach, tokenizer = generate.load_coach(tiny_base, tiny_adapter, "float32")
        expected = generate.answer(coach, tokenizer, "What is a mean?", generate.Sampling(4))
        assert found["choices"][0]["message"]["content"].strip() == expected
    with Feedback.open(tmp_path / "kept.sqlite") as feedback:
        assert feedback.conversations()[0][3] == "What is a mean?"


@shows("serve --queue")
@shows("serve --timeout")
def test_serve_has_limits(tmp_path, tiny_base):
    with running(tmp_path, "--model", tiny_base, "--queue", 0, "--timeout", 0.001) as served:
        many = served.post("/v1/chat/completions", ASKED | {"n": 16, "max_tokens": 500})
        assert many.status_code == 504
    with running(tmp_path, "--model", tiny_base, "--queue", 0) as served:
        body = ASKED | {"n": 16, "max_tokens": 1900, "stream": True, "temperature": 2}
        url = f"{served.url}/v1/chat/completions"
        with (
            httpx2.stream("POST", url, json=body) as one,
            httpx2.stream("POST", url, json=body) as other,
        ):
            lines = one.iter_lines(), other.iter_lines()
            assert all(next(each) for each in lines)
            assert served.post("/v1/chat/completions", body).status_code == 429


@shows("serve --host")
def test_serve_asks_for_a_key_where_others_can_reach_it(imate, tiny_base):
    refused = imate("serve", "--model", tiny_base, "--host", "0.0.0.0", code=1).stderr
    assert "others can reach it, so an API key is needed" in refused
    assert "--api-key" in refused
    words = ["serve", "--model", tiny_base, "--host", "192.0.2.1", "--api-key", "k"]
    assert "Cannot listen on 192.0.2.1:8080" in imate(*words, code=1).stderr
    imate("serve", code=2)
    imate("serve", "--model", tiny_base, "--api-key", " k", code=2)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "at least two hosts"),
        ('{"backend": "jaccl", "hosts": []}', "mlx.launch --hostfile"),
        ('[{"ssh": "a", "ips": []}, {"ssh": "b", "ips": ["127.0.0.1"]}]', "host 0: got"),
        (
            '[{"ssh": "a", "ips": ["203.0.113.9"]}, {"ssh": "b", "ips": ["127.0.0.1"]}]',
            "is not this machine",
        ),
    ],
)
@shows("train --hosts")
def test_lists_of_hosts_are_refused(imate, hosts, expected):
    Path("hosts.json").write_text(hosts, encoding="utf-8")
    assert expected in imate("train", "--hosts", "hosts.json", code=1).stderr


@shows("bench --hosts")
@shows("evaluate --hosts")
@pytest.mark.parametrize("command", ["bench", "evaluate"])
def test_others_need_their_list_of_hosts(imate, command):
    assert "Cannot read nowhere.json" in imate(command, "--hosts", "nowhere.json", code=1).stderr
