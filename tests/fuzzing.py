"""Broken files, made up by hypothesis: valid ones mutated, and garbage in a format's own words.

Readers of what strangers write are the targets. Each may read what it is given or
refuse it with an error of this package; any other exception is a fault. `scripts/fuzz.py`
runs them, in a process whose memory and whose time for each file are limited.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from chat_templates import SHAPES, chat_tokenizer
from hypothesis import strategies as st

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights, save_adapter
from interviewmate_mlx.config import load_run, parse_run, to_toml
from interviewmate_mlx.data.prompts import encode_messages
from interviewmate_mlx.data.records import Message, load_splits
from interviewmate_mlx.data.templates import choose_template
from interviewmate_mlx.errors import InterviewMateError
from interviewmate_mlx.formats.safetensors_file import read_safetensors_header, safetensors_header
from interviewmate_mlx.formats.torch_file import read_torch_file
from interviewmate_mlx.model.falcon import Model, ModelArgs


@dataclass(frozen=True)
class Target:
    """A reader, what to feed it, and the name of the file that it reads."""

    file: str
    contents: st.SearchStrategy[bytes]
    read: Callable[[Path], object]


def is_refused(target: Target, content: bytes, folder: Path) -> bool:
    """Whether the reader refuses a file; whatever it raises that is not ours is raised here."""
    path = folder / target.file
    path.write_bytes(content)
    message = None
    try:
        target.read(path)
    except InterviewMateError as error:
        message = str(error)
    assert message is None or 0 < len(message) < 20_000, "no message for a person"
    return message is not None


# mutations of a valid file

_NUMBERS = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]

_MUTATIONS = ["flip", "set", "number", "cut", "drop", "repeat", "insert", "splice"]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with a few bits, bytes, numbers or stretches changed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 64))
        match draw(st.sampled_from(_MUTATIONS)):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[place] = draw(st.sampled_from(b"\x00\xff{}[]\"'.:,0123456789()tRbcuQe\x80\n"))
            case "number":
                code = draw(st.sampled_from(["<B", "<H", "<I", "<Q"]))
                number = draw(st.sampled_from(_NUMBERS)) % (1 << 8 * struct.calcsize(code))
                data[place : place + struct.calcsize(code)] = struct.pack(code, number)
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + length]
            case "repeat":
                times = draw(st.sampled_from([1, 2, 1000]))
                data[place:place] = data[place : place + length] * times
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "splice":
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[place : place + length] = other[start : start + length]
    return bytes(data)


# JSON, and what it should not hold

_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 4, 8, 64, 2**31, 2**53, 2**63, 2**64, 10**400, 10**4000]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "\ud800", "\x1b[2J", "..", "/etc/passwd", "a" * 5000, "(a*)*$", "\0", "DIGITS"]
    ),
)
_ANY_JSON = st.recursive(
    _ODD,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


def _dump(value: Any) -> bytes:
    # A number of more digits than Python itself would write, or read.
    return json.dumps(value).encode().replace(b'"DIGITS"', b"9" * 5000)


@st.composite
def changed_json(draw: st.DrawFn, valid: list[dict[str, Any]], keys: list[str]) -> Any:
    """A valid object with some values replaced, added or removed, at any depth."""
    value = json.loads(json.dumps(draw(st.sampled_from(valid))))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while True:
            inner = [k for k, v in place.items() if isinstance(v, dict)]
            if not inner or draw(st.booleans()):
                break
            place = place[draw(st.sampled_from(inner))]
        key = draw(st.sampled_from([*place, *keys]) | st.text(max_size=8))
        if draw(st.booleans()):
            place[key] = draw(_ANY_JSON)
        else:
            place.pop(key, None)
    return value


# torch files


def torch_archive(data_pkl: bytes, **others: bytes) -> bytes:
    members = {"data.pkl": data_pkl, "version": b"3\n", "data/0": bytes(range(64))} | others
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"m/{name}"), content)
    return buffer.getvalue()


STORAGE = (
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"  # BINPERSID
)
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\x02\x85K\x01\x85"
    b"\x89ccollections\nOrderedDict\n)RtR"
)
STATE = b"\x80\x02}X\x01\0\0\0a" + TENSOR + b"s."
# Instructions with their arguments, to be strung together in any order.
_PARTS = [
    STORAGE,
    TENSOR,
    *(bytes([op]) for op in b"()]}tsuaeRbQ0125.\x85\x86\x87\x88\x89\x93\x94\x81\x92\x8f\x90odlpN"),
    b"\x80\x02",
    b"\x80\x04",
    b"K\x10",
    b"M\xff\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"G\x7f\xf0\0\0\0\0\0\0",
    b"q\x00",
    b"h\x00",
    b"r\xff\xff\xff\x7f",
    b"X\x01\0\0\0a",
    b"X\xff\xff\xff\x7f",
    b"\x8c\x01b",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    b"ios\nsystem\n",
    b"cbuiltins\neval\n",
    b"S'true'\n",
    b"I01\n",
    b"F1e999\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"P1\n",
    b"\x82\x01",
    b"\x84\xff\xff\xff\x7f",
]


def _torch_seeds() -> list[bytes]:
    other = OrderedDict(layers=[1.5, None, True, (1, 2, 3), {"a": "b"}])
    return [
        torch_archive(STATE),
        torch_archive(b"\x80\x02}(" + b"X\x01\0\0\0a" + TENSOR + b"X\x01\0\0\0b" + TENSOR + b"u."),
        torch_archive(STATE, byteorder=b"little"),
        torch_archive(pickle.dumps(other, 2)),
        torch_archive(pickle.dumps({}, 4)),
    ]


def _read_torch(path: Path) -> None:
    for entry in read_torch_file(path).values():
        assert sum(len(chunk) for chunk in entry.chunks()) == entry.nbytes < 1 << 20


def torch_target() -> Target:
    programs = st.lists(st.sampled_from(_PARTS) | st.binary(max_size=3), max_size=24)
    return Target(
        "pytorch_model.bin",
        st.one_of(
            st.sampled_from(_torch_seeds()),
            mutated(_torch_seeds()),
            mutated([STATE]).map(torch_archive),
            programs.map(lambda parts: torch_archive(b"\x80\x02" + b"".join(parts) + b".")),
        ),
        _read_torch,
    )


# safetensors files


def with_header(header: bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _safetensors_seeds() -> list[bytes]:
    tensors = [("a", "float32", (2, 4)), ("b.weight", "bfloat16", (16,)), ("c", "float32", ())]
    header = safetensors_header(tensors, {"format": "pt"})
    return [header + bytes(68), safetensors_header([], {}), header + b"\xff" * 68]


def _safetensors_contents(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    valid = []
    for seed in seeds:
        length = int.from_bytes(seed[:8], "little")
        valid.append(json.loads(seed[8 : 8 + length]))
    keys = ["__metadata__", "dtype", "shape", "data_offsets", "a", "b"]
    changed = changed_json(valid, keys).map(_dump)
    lengths = st.none() | st.sampled_from([n for n in _NUMBERS if n < 2**64])
    return st.one_of(
        st.sampled_from(seeds),
        mutated(seeds),
        st.builds(with_header, changed, lengths, st.binary(max_size=256)),
        st.builds(with_header, _ANY_JSON.map(_dump), lengths),
    )


def _read_safetensors(path: Path) -> None:
    for entry in read_safetensors_header(path).tensors.values():
        assert sum(len(chunk) for chunk in entry.chunks()) == entry.nbytes < 1 << 20


def safetensors_target() -> Target:
    return Target(
        "model.safetensors", _safetensors_contents(_safetensors_seeds()), _read_safetensors
    )


# adapters: a length, adapter_config.json, adapter_model.safetensors, in one piece


def adapter_target(folder: Path) -> Target:
    args = ModelArgs(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=32,
        ffn_hidden_size=64,
    )
    config = AdapterConfig("mini", 2, 4.0, targets=("query_key_value",))
    weights = {
        f"transformer.h.{i}.self_attention.query_key_value.lora_{m}.weight": mx.ones(shape)
        for i in range(2)
        for m, shape in (("A", (2, 16)), ("B", (48, 2)))
    }
    save_adapter(folder, weights, config)
    config_file, weights_file = (
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
    )
    valid_config, valid_weights = config_file.read_bytes(), weights_file.read_bytes()

    def joined(config: bytes, weights: bytes) -> bytes:
        return len(config).to_bytes(8, "little") + config + weights

    def read(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        config_file.write_bytes(content[8 : 8 + length])
        weights_file.write_bytes(content[8 + length :])
        model = Model(args)
        Adapter.open(folder).apply(model)
        for name, array in adapter_weights(model).items():
            assert np.isfinite(np.array(array)).all(), name

    patterns = st.sampled_from([".*value", "(a|a)*$", "(.*)*x", "((.+)+)+y", "[", "(?P<a", "\\"])
    changed = changed_json(
        [json.loads(valid_config)], ["r", "lora_alpha", "rank_pattern", "use_dora", "bias", "new"]
    )
    with_pattern = st.builds(
        lambda c, key, p: c | {key: p if key == "target_modules" else {p: 2}},
        changed,
        st.sampled_from(["target_modules", "rank_pattern", "alpha_pattern"]),
        patterns | st.text("a.*+?()[]|\\{}1,hqd", max_size=20),
    )
    configs = st.one_of(
        st.just(valid_config), mutated([valid_config]), (changed | with_pattern).map(_dump)
    )
    files = st.just(valid_weights) | _safetensors_contents([valid_weights])
    return Target("adapter", st.builds(joined, configs, files), read)


# runs

_TOML_SEEDS = [
    to_toml(load_run("A")).encode(),
    b'[lora]\nrank = 16\ntargets = ["dense"]\n[train]\nschedule = "cosine"\n',
    b'\xef\xbb\xbf[data]\r\npath = "x"\r\nmax_length = 64\r\n',
]
_TOML_KEYS = [
    "base",
    "dtype",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "rslora",
    "path",
    "epochs",
    "seed",
    "every",
    "x",
]
_TOML_VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=8).map(json.dumps),
    st.sampled_from(
        [
            "true",
            "nan",
            "inf",
            "1e400",
            "0x" + "f" * 5000,
            "1" * 5000,
            "[" * 3000,
            "{a=" * 500,
            "[[1], ['a']]",
            "2024-01-01",
            "25:61:00",
            '"""',
            "''",
            "{}",
            "[]",
        ]
    ),
)


def _read_run(path: Path) -> None:
    run = load_run(str(path))
    assert parse_run(run.name, to_toml(run)) == run


def config_target() -> Target:
    tables = st.sampled_from(["model", "lora", "data", "train", "validate", "lora.rank", "x", '"'])
    line = st.one_of(
        st.builds("[{}]".format, tables),
        st.builds("{} = {}".format, st.sampled_from(_TOML_KEYS), _TOML_VALUES),
        st.builds("{}.{} = {}".format, tables, st.sampled_from(_TOML_KEYS), _TOML_VALUES),
    )
    text = st.lists(line, max_size=8).map("\n".join)
    return Target(
        "run.toml",
        st.sampled_from(_TOML_SEEDS)
        | mutated(_TOML_SEEDS)
        | text.map(lambda t: t.encode("utf-8", "surrogatepass")),
        _read_run,
    )


# rows

_ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "Q?", "answer": "A.", "category": "c", "difficulty": "beginner"},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"prompt": "P", "completion": "C"},
    {"instruction": "I", "input": "", "output": "O"},
    {"text": "T"},
]
_ROW_KEYS = ["id", "question", "messages", "role", "content", "text", "catgory", "follow_up"]


def data_target(suffix: str = ".jsonl") -> Target:
    lines = [json.dumps(row).encode() for row in _ROWS]
    seeds = [b"\n".join(lines), b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n", lines[1]]
    if suffix == ".json":
        seeds = [b"[" + b",".join(lines) + b"]"]
    rows = st.lists(changed_json(_ROWS, _ROW_KEYS) | _ANY_JSON, max_size=4)
    odd = st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b"NaN", b"\xff", b"\0"])
    text = (
        rows.map(lambda rs: b"\n".join(map(_dump, rs))) if suffix == ".jsonl" else rows.map(_dump)
    )
    return Target(
        f"train{suffix}",
        st.one_of(
            st.sampled_from(seeds), mutated(seeds), text, st.lists(odd, max_size=3).map(b"\n".join)
        ),
        load_splits,
    )


_TABLES = [
    b"question,answer\nQ?,A.\n",
    b'\xef\xbb\xbfQuestion;Response;id\r\n"Q; ""x""\n?";A.;1\r\nR?;B.;2\r\n',
    b'id\tmessages\na\t"[{""from"": ""human"", ""value"": ""Q""}, '
    b'{""from"": ""gpt"", ""value"": ""A""}]"',
    b"text\nT\n",
]  # fmt: skip
_CELLS = [
    b",",
    b";",
    b"\t",
    b'"',
    b'""',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"question",
    b"answer",
    b"=1",
]


def table_target() -> Target:
    cells = st.lists(st.sampled_from(_CELLS), max_size=40).map(b"".join)
    contents = st.one_of(st.sampled_from(_TABLES), mutated(_TABLES), cells)
    return Target("train.csv", contents, load_splits)


_JINJA = [
    *("{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "for m in messages", "endfor", "if loop.last"),
    *("endif", "else", "set x = ", "m.content", "m['role']", "| trim", "| tojson", "~", "+", "*"),
    *("eos_token", "add_generation_prompt", "messages[1:]", "namespace(x=1)", "'<|im_end|>'"),
    *("loop.index0", ".split('a')", ".__class__", "range(99999)", "(", ")", "[", "]", "x", "99"),
    *("macro f(n)", "endmacro", "f(1)", "generation", "endgeneration", "break", "x.y.z", "\n"),
]


def template_target() -> Target:
    tokenizer = chat_tokenizer("chatml")
    asked = [Message("user", "Q"), Message("assistant", "A"), Message("user", "R")]
    seeds = [template.encode() for template, *_ in SHAPES.values()]
    words = st.lists(st.sampled_from(_JINJA), max_size=30).map(lambda w: "".join(w).encode())

    def read(path: Path) -> object:
        return encode_messages(tokenizer, asked, choose_template(str(path), tokenizer))

    return Target("a.jinja", st.one_of(st.sampled_from(seeds), mutated(seeds), words), read)


def make_target(name: str, folder: Path) -> Target:
    """A target by its name in `TARGETS`; `folder` is where it may write."""
    if name == "adapter":
        return adapter_target(folder)
    return {
        "torch": torch_target,
        "safetensors": safetensors_target,
        "config": config_target,
        "data": data_target,
        "json-data": lambda: data_target(".json"),
        "table": table_target,
        "template": template_target,
    }[name]()


TARGETS = ("torch", "safetensors", "adapter", "config", "data", "json-data", "table", "template")
