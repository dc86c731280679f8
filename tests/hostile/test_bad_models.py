"""Model folders that lie: refused with the file, what it says and what it should say.

Converting reads a folder as it lies on the Hub (SRC is a copy of one), generating reads a
converted one (a copy of BASE).
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
from networks import write_network
from refusals import Bad, check
from safetensors.numpy import load_file, save_file

Change = Callable[[Path], object]
WEIGHTS = "model.safetensors"
EMBEDDING = "transformer.word_embeddings.weight"
QKV = "transformer.h.0.self_attention.query_key_value.weight"


def source(name: str, change: Change, error: str, *says: str) -> Bad:
    return Bad(name, change, "convert IN --out out", error, says)


def base(name: str, change: Change, error: str, *says: str) -> Bad:
    return Bad(name, change, "generate 'What is a loss?' --model IN", error, says)


def write(file: str, content: bytes | str) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


def edit(file: str, *drop: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        value = json.loads(path.read_text())
        kept = {key: v for key, v in value.items() if key not in drop}
        path.write_text(json.dumps(kept | changes))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Change the tensors of a safetensors file, which are float32."""

    def apply(folder: Path) -> None:
        loaded = load_file(folder / WEIGHTS)
        change(loaded)
        save_file(loaded, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of a safetensors file and leave its numbers alone."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def first_bytes(count: int) -> Change:
    return lambda folder: os.truncate(folder / WEIGHTS, count)


def length(number: int) -> Change:
    def change(folder: Path) -> None:
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(number.to_bytes(8, "little"))

    return change


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def replaced_by_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def link_out(name: str, target: str | None = None) -> Change:
    """Put a link in a file's place, to a copy of it outside the folder, or to `target`."""

    def change(folder: Path) -> None:
        secret = folder.parent / "secret"
        (folder / name).replace(secret) if (folder / name).exists() else secret.write_text("{}")
        (folder / name).symlink_to(target or secret)

    return change


def shards(index: object, *files: str) -> Change:
    def change(folder: Path) -> None:
        for name in files:
            shutil.copyfile(folder / WEIGHTS, folder / name)
        (folder / WEIGHTS).unlink()
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return change


def shard(name: str) -> Change:
    return shards({"weight_map": {EMBEDDING: name}})


def change_tokenizer(*path: str, value: object) -> Change:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "tokenizer.json").read_text())
        place = whole
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "tokenizer.json").write_text(json.dumps(whole))

    return change


def pickled(data_pkl: bytes, **members: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        archive = fuzzing.torch_archive(data_pkl, **members)
        (folder / "pytorch_model.bin").write_bytes(archive)

    return change


def torch_file(write_file: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write_file(folder / "pytorch_model.bin")

    return change


def legacy_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({"os": name}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def zip_bomb(path: Path) -> None:
    """A pickle and a storage of 128 MB of zeros each, in a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("m/data.pkl", "m/data/0"):
            with archive.open(name, "w", force_zip64=True) as member:
                for _ in range(32):
                    member.write(bytes(1 << 22))


def large_directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100):
            info = zipfile.ZipInfo(f"m/{number}")
            info.comment = bytes(60_000)
            archive.writestr(info, b"")


def overlapping(path: Path) -> None:
    """The directory says that the storage begins in the middle of the pickle."""
    data = bytearray(fuzzing.torch_archive(fuzzing.STATE))
    entry = data.rindex(b"m/data/0") - 46
    data[entry + 42 : entry + 46] = (20).to_bytes(4, "little")
    path.write_bytes(data)


SYSTEM = b"cos\nsystem\n"
TOUCH = b"X\x09\0\0\0touch ran"
A_KEY = b"X\x01\0\0\0a"
CODE = {
    "GLOBAL": b"\x80\x02" + SYSTEM + TOUCH + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R.",
    "STACK_GLOBAL with a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x01x\x85R.",
    "INST": b"(S'touch ran'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch ran'\no.",
    "REDUCE in a value": b"\x80\x02}" + A_KEY + SYSTEM + TOUCH + b"\x85Rs.",
    "REDUCE in a key": b"\x80\x02}" + SYSTEM + TOUCH + b"\x85RK\x01s.",
    "REDUCE in what is dropped": b"\x80\x02" + SYSTEM + TOUCH + b"\x85R0}.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + TOUCH + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93(" + TOUCH + b"t}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\0.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0.",
    "PERSID": b"Pos.system\n.",
    "BINPERSID of a call": b"\x80\x02" + SYSTEM + TOUCH + b"\x85RQ.",
    "BINPERSID of a list": b"\x80\x02]Q.",
    "BUILD of a class": b"\x80\x02ctorch\nFloatStorage\n}X\x08\0\0\0__dict__}sb.",
    "BUILD of a call": b"\x80\x02" + SYSTEM + TOUCH + b"\x85R}b.",
    "BUILTINS eval": b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.",
    "Python 2's eval": b"\x80\x02c__builtin__\neval\nX\x01\0\0\x001\x85R.",
    "getattr chain": b"\x80\x02cbuiltins\ngetattr\n(cos\nsystem\n" + TOUCH + b"tR.",
    "torch's own loader": b"\x80\x02ctorch\nload\nX\x01\0\0\0x\x85R.",
    "torch's own gadget": b"\x80\x02ctorch.hub\nload\nX\x01\0\0\0x\x85R.",
    "numpy's loader": b"\x80\x02cnumpy\nload\nX\x01\0\0\0x\x85R.",
    "a storage that is called": b"\x80\x02ctorch\nFloatStorage\nK\x09\x85R.",
    "a rebuild with a hook": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + SYSTEM
    + b"K\0)))}tR.",
    "a buffer outside": b"\x80\x05\x97.",
    "a byte string": b"\x80\x03C\x02os.",
    "a set": b"\x80\x04\x8f.",
    "a frame that lies": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a text that lies": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "protocol 255": b"\x80\xff}.",
}

TORCH = [
    *(
        source(
            f"pickle: {name}",
            pickled(program),
            "WeightsError",
            "IN/pytorch_model.bin cannot be read as a torch file: ",
            "Nothing in it was run",
        )
        for name, program in CODE.items()
    ),
    source(
        "torch's legacy tar format",
        torch_file(legacy_tar),
        "WeightsError",
        "pytorch_model.bin is not in the zip format of torch 1.6 and newer",
    ),
    source(
        "a bare pickle",
        torch_file(lambda path: path.write_bytes(CODE["GLOBAL"])),
        "WeightsError",
        "pytorch_model.bin is not in the zip format",
    ),
    source(
        "zip bomb", torch_file(zip_bomb), "WeightsError", "data.pkl", "expected at most 1048576"
    ),
    source(
        "zip of a large directory",
        torch_file(large_directory),
        "WeightsError",
        "its directory has 6004990",
        "expected at most 4194304",
    ),
    source("zip whose members overlap", torch_file(overlapping), "WeightsError", "is not where"),
    source(
        "pickle of 2 MB of lists",
        pickled(b"\x80\x02" + b"]" * (2 << 20)),
        "WeightsError",
        "2097154 bytes, expected at most 1048576",
    ),
    source(
        "text of 50,000 letters without quotes",
        pickled(b"\x80\x02S" + b"x" * 50_000 + b"\n."),
        "WeightsError",
        "its pickle is damaged: no string quotes around b'xxx",
        f"{'x' * 40}\n",  # and no more than a line of it
    ),
    source(
        "axes without end",
        pickled(fuzzing.STATE.replace(b"K\x02\x85K\x01\x85", b"(" + b"K\x01" * 99 + b"tq\1h\1")),
        "WeightsError",
        "calls torch._utils._rebuild_tensor_v2 in a way that torch.save never does",
    ),
    source(
        "storage in a parent folder",
        pickled(fuzzing.STATE.replace(b"X\x01\0\0\x000", b"X\x04\0\0\0../0")),
        "WeightsError",
        "a: storage '../0' is not in the archive",
    ),
    source(
        "training checkpoint",
        pickled(b"\x80\x02}(X\x05\0\0\0epochK\x03X\x05\0\0\0model}u."),
        "WeightsError",
        "it is not a flat state dict",
        "epoch: int",
    ),
    source("list of tensors", pickled(b"\x80\x02]."), "WeightsError", "got a list, expected a st"),
    source(
        "big-endian",
        pickled(fuzzing.STATE, byteorder=b"big"),
        "WeightsError",
        "its numbers are not little-endian",
    ),
    source("too few tensors", pickled(fuzzing.STATE), "WeightsError", "expected at most 1, the"),
]

FOLDERS = [
    source("no config", remove("config.json"), "ModelError", "IN holds no config.json"),
    source("config is a folder", replaced_by_folder("config.json"), "ModelError", "no config.json"),
    source(
        "half a config", write("config.json", '{"alibi'), "ModelError", "config.json is not JSON"
    ),
    source(
        "config is a list", write("config.json", "[]"), "ModelError", "got a JSON list, expected"
    ),
    source(
        "config in UTF-16", write("config.json", "{}".encode("utf-16")), "ModelError", "not JSON"
    ),
    source("deep config", write("config.json", "[" * 99_999), "ModelError", "nested too deeply"),
    source(
        "config of 5000 digits",
        write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
        "ModelError",
        "config.json is not JSON: Exceeds the limit (4300 digits)",
    ),
    source(
        "another model",
        edit("config.json", model_type="llama"),
        "ModelError",
        "model_file: got 'falcon.py', expected none",
    ),
    source(
        "names that contradict",
        edit("config.json", n_layer=3),
        "ModelError",
        "n_layer is 3, num_hidden_layers is 2",
    ),
    *(
        source(f"{key} of {value!r}", edit("config.json", **{key: value}), "ModelError", said)
        for key, value, said in [
            ("hidden_size", "64", "hidden_size: got '64', expected a positive integer"),
            ("hidden_size", 0, "hidden_size: got 0, expected a positive integer"),
            ("hidden_size", 2**40, "hidden_size: got 1099511627776, expected at most 16777216"),
            ("num_attention_heads", 7, "hidden_size: got 64, expected a multiple of 7 heads"),
            ("num_attention_heads", -4, "num_attention_heads: got -4, expected a positive"),
            ("num_hidden_layers", None, "num_hidden_layers: got None, expected a positive"),
            ("num_hidden_layers", 10**9, "num_hidden_layers: got 1000000000, expected at most"),
            ("vocab_size", True, "vocab_size: got True, expected a positive integer"),
            ("ffn_hidden_size", "x", "ffn_hidden_size: got 'x', expected a whole number"),
            ("bias", "yes", "bias: got 'yes', expected true or false"),
            ("tie_word_embeddings", [], "tie_word_embeddings: got [], expected true or false"),
            ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon: got nan, expected from 0"),
            ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon: got '1e-5', expected from 0"),
            ("alibi", "true", "alibi: got 'true', expected True"),
        ]
    ),
    source(
        "a million layers",
        edit("config.json", num_hidden_layers=10**6),
        "WeightsError",
        "num_hidden_layers: got 1000000, expected at most 27",
    ),
    # tensors
    source(
        "missing tensor",
        tensors(lambda t: t.pop(QKV)),
        "WeightsError",
        f"{QKV}: missing",
    ),
    source(
        "surplus tensor",
        tensors(lambda t: t.update(evil=np.zeros(3, np.float32))),
        "WeightsError",
        "evil: unknown",
    ),
    source(
        "shape",
        tensors(lambda t: t.update({QKV: t[QKV].T.copy()})),
        "WeightsError",
        f"{QKV}: got (64, 192), expected (192, 64)",
    ),
    source(
        "dtype",
        tensors(lambda t: t.update({QKV: t[QKV].astype(np.int32)})),
        "WeightsError",
        f"{QKV}: got int32, expected one of float32, bfloat16, float16",
    ),
    source(
        "dtypes that differ",
        tensors(lambda t: t.update({QKV: t[QKV].astype(np.float16)})),
        "WeightsError",
        f"{QKV}: got float16, expected float32 like the embedding",
    ),
    source(
        "head that differs",
        tensors(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        "WeightsError",
        "lm_head.weight: differs from the embedding",
    ),
    source(
        "name that steers the terminal",
        tensors(lambda t: t.update({"\x1b[2J": np.zeros(1, np.float32)})),
        "WeightsError",
        "'\\x1b[2J': a name that cannot be printed",
    ),
    source("no weights", remove(WEIGHTS), "WeightsError", "holds no weights: expected model.saf"),
    source("weights are a folder", replaced_by_folder(WEIGHTS), "WeightsError", "holds no weights"),
    source(
        "pointer of Git LFS",
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "WeightsError",
        "is only a Git LFS pointer",
    ),
    # a header that lies
    source("empty file", first_bytes(0), "WeightsError", "claims 0 bytes in a file of 0"),
    source("half a length", first_bytes(5), "WeightsError", "bytes in a file of 5"),
    source("half a header", first_bytes(100), "WeightsError", "bytes in a file of 100"),
    source("half the numbers", first_bytes(50_000), "WeightsError", "got 50000 bytes, expected"),
    source("header of 2**63", length(2**63), "WeightsError", "claims 9223372036854775808 bytes"),
    source("header of nothing", length(0), "WeightsError", "bad header: Expecting value"),
    source("header too short", length(10), "WeightsError", "bad header: "),
    source(
        "header of 5 MB",
        write(WEIGHTS, fuzzing.with_header(b"[" + b"[]," * (6 << 18) + b"[]]")),
        "WeightsError",
        "expected at most 4194304",
    ),
    source(
        "header is a list",
        write(WEIGHTS, fuzzing.with_header(b"[]", data=b"")),
        "WeightsError",
        "bad header: it is not a JSON object",
    ),
    source(
        "deep header",
        write(WEIGHTS, fuzzing.with_header(b"[" * 99_999)),
        "WeightsError",
        "bad header: maximum recursion",
    ),
    source(
        "a name twice",
        write(WEIGHTS, fuzzing.with_header(b'{"a": 1, "a": 2}')),
        "WeightsError",
        "got the key 'a' more than once",
    ),
    source(
        "no offsets",
        header(lambda h: h[QKV].pop("data_offsets")),
        "WeightsError",
        f"{QKV}: expected dtype, shape and data_offsets",
    ),
    source(
        "unknown dtype",
        header(lambda h: h[QKV].update(dtype="F8_E5M2")),
        "WeightsError",
        f"{QKV}: got dtype 'F8_E5M2', expected one of F64",
    ),
    source(
        "shape below 0",
        header(lambda h: h[QKV].update(shape=[-192, -64])),
        "WeightsError",
        f"{QKV}: got shape [-192, -64]",
    ),
    source(
        "shape of 10**30",
        header(lambda h: h[QKV].update(shape=[10**30, 0])),
        "WeightsError",
        "expected sizes and [begin, end]",
    ),
    source(
        "shape of a thousand axes",
        header(lambda h: h[QKV].update(shape=[1] * 1000)),
        "WeightsError",
        f"{QKV}: got shape [1, 1, ",
    ),
    source(
        "shape and bytes that differ",
        header(lambda h: h[QKV].update(shape=[192, 65])),
        "WeightsError",
        f"{QKV}: got 49152 bytes, expected 49920 for [192, 65]",
    ),
    source(
        "offsets beyond the file",
        header(lambda h: h[QKV].update(data_offsets=[1 << 40, (1 << 40) + 49152])),
        "WeightsError",
        "model.safetensors is not a valid safetensors file: got",
    ),
    source(
        "tensors that overlap",
        header(lambda h: h.update(copy=h[QKV])),
        "WeightsError",
        "its tensors overlap or leave gaps",
    ),
    source(
        "bytes after the end",
        lambda folder: write(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"PK\x03\x04")(folder),
        "WeightsError",
        "bytes, expected",
    ),
    # shards
    source("index of no JSON", shards("{"), "ModelError", "index.json is not JSON"),
    source("index without a map", shards({}), "WeightsError", "index.json has no weight_map"),
    source("index of numbers", shards({"weight_map": {"a": 1}}), "WeightsError", "no weight_map"),
    source("shard above", shard("../secret.safetensors"), "WeightsError", "'../secret.safetens"),
    source(
        "shard at a path", shard("/etc/passwd"), "WeightsError", "'/etc/passwd': expected a fil"
    ),
    source(
        "shard above in disguise",
        shard("model-../x-of-1.safetensors"),
        "WeightsError",
        "'model-../x-of-1.safetensors': expected a file name like model-*-of-*.safetensors",
    ),
    source("shard with a backslash", shard("model-..\\x-of-1.safetensors"), "WeightsError", "expe"),
    source(
        "shard that is missing",
        shard("model-1-of-1.safetensors"),
        "WeightsError",
        "model-1-of-1.safetensors: in the index, but not in the folder",
    ),
    source(
        "shard that the index does not name",
        shards(
            {"weight_map": {EMBEDDING: "model-1-of-2.safetensors"}},
            "model-1-of-2.safetensors",
            "model-2-of-2.safetensors",
        ),
        "WeightsError",
        "model-2-of-2.safetensors: in the folder, but not in the index",
    ),
    source(
        "index that names too little",
        shards({"weight_map": {EMBEDDING: "model-1-of-1.safetensors"}}, "model-1-of-1.safetensors"),
        "WeightsError",
        f"{QKV}: in model-1-of-1.safetensors, but the index says no file",
    ),
    # links
    source(
        "weights elsewhere", link_out(WEIGHTS), "ModelError", f"{WEIGHTS}: links to", "expected"
    ),
    source("merges elsewhere", link_out("merges.txt"), "ModelError", "merges.txt: links to"),
    source(
        "config of the system", link_out("config.json", "/etc/passwd"), "ModelError", "/etc/pas"
    ),
    source(
        "link above",
        link_out("tokenizer.json", "../secret"),
        "ModelError",
        "tokenizer.json: links to",
        "replace the links by copies of them",
    ),
    source(
        "link to itself", link_out("config.json", "config.json"), "ModelError", "no config.json"
    ),
    # tokenizers
    source(
        "no tokenizer",
        remove("tokenizer.json", "vocab.json", "merges.txt"),
        "ModelError",
        "holds no tokenizer, so its true end token is unknown",
    ),
    source(
        "half a tokenizer", write("tokenizer.json", "{"), "ModelError", "tokenizer.json is not JS"
    ),
    source(
        "tokenizer of nothing", write("tokenizer.json", "{}"), "ModelError", "KeyError('model')"
    ),
    source(
        "ids that are none",
        change_tokenizer("model", "vocab", value={"a": "b"}),
        "ModelError",
        "the id of 'a' is 'b'",
    ),
    source(
        "id beyond the embedding",
        change_tokenizer("model", "vocab", "a", value=2**31),
        "ModelError",
        "its tokenizer has 2147483649 tokens, its embedding only 384 rows",
    ),
    source(
        "a token of two ids",
        change_tokenizer("model", "vocab", "<|endoftext|>", value=2**31),
        "ModelError",
        "the id of '<|endoftext|>' is 2147483648 and 383",
    ),
    source(
        "end token that is none",
        edit("tokenizer_config.json", eos_token="<never>"),
        "ModelError",
        "eos_token: '<never>'",
    ),
]

BASES = [
    base("no safetensors", remove(WEIGHTS), "ModelError", "IN holds no model*.safetensors"),
    base("half a config", write("config.json", "{"), "ModelError", "config.json is not JSON"),
    base(
        "a billion layers",
        edit("config.json", num_hidden_layers=10**7),
        "WeightsError",
        "num_hidden_layers: got 10000000, expected at most 27",
    ),
    base("bias of a text", edit("config.json", bias="x"), "ModelError", "bias: got 'x', expected"),
    base("missing tensor", tensors(lambda t: t.pop(QKV)), "WeightsError", QKV, "Convert it again"),
    base(
        "surplus tensor",
        tensors(lambda t: t.update(evil=np.zeros(3, np.float32))),
        "WeightsError",
        "evil",
    ),
    base(
        "shape",
        tensors(lambda t: t.update({QKV: t[QKV].T.copy()})),
        "WeightsError",
        "(192, 64)",
        "(64, 192)",
        QKV,
    ),
    base("half the numbers", first_bytes(50_000), "WeightsError", "got 50000 bytes, expected"),
    base("header of 2**63", length(2**63), "WeightsError", "9223372036854775808 bytes"),
    base(
        "offsets beyond the file",
        header(lambda h: h[QKV].update(data_offsets=[1 << 40, (1 << 40) + 49152])),
        "WeightsError",
        "is not a valid safetensors file",
    ),
    base("weights elsewhere", link_out(WEIGHTS), "ModelError", f"{WEIGHTS}: links to"),
    base("weights are a folder", replaced_by_folder(WEIGHTS), "WeightsError", "Is a directory"),
    base(
        "quantisation of nothing",
        edit("config.json", quantization={"group_size": 0, "bits": "x"}),
        "ModelError",
        "IN/config.json: quantization: got {'group_size': 0, 'bits': 'x'}, expected",
    ),
    base(
        "quantisation that the weights know nothing of",
        edit("config.json", quantization={"group_size": 64, "bits": 4}),
        "ModelError",
        "IN/config.json: quantization: got 4 bits, expected none: the weights are not quantised",
    ),
    base("no tokenizer", remove("tokenizer.json", "vocab.json"), "ModelError", "no tokenizer"),
    base(
        "half a tokenizer", write("tokenizer.json", "{"), "ModelError", "tokenizer.json is not JS"
    ),
    base(
        "merges of nothing",
        change_tokenizer("model", "merges", value=[["zz", "qq"]]),
        "ModelError",
        "Cannot load the tokenizer in ",
        "Convert the model again",
    ),
    base(
        "normalizer that panics",
        change_tokenizer(
            "normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        "ModelError",
        "normalizer: got Precompiled, expected another kind",
    ),
    base(
        "id beyond the embedding",
        change_tokenizer("model", "vocab", "a", value=9999),
        "ModelError",
        "its tokenizer has 10000 tokens, its embedding only 384 rows",
    ),
]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
# A folder of another network, whose config mlx-lm reads, and does not check.
LLAMAS = [
    base("half a config", write("config.json", "{"), "ModelError", "config.json is not JSON"),
    base("config of a list", write("config.json", "[1]"), "ModelError", "config.json"),
    base(
        "a billion layers",
        edit("config.json", num_hidden_layers=10**7),
        "WeightsError",
        "num_hidden_layers: got 10000000, expected at most",
    ),
    base(
        "a width of 2**60",
        edit("config.json", hidden_size=2**60),
        "ModelError",
        "hidden_size: got 1152921504606846976, expected a whole number",
    ),
    base("heads of a text", edit("config.json", num_attention_heads="x"), "ModelError", "x"),
    base("no heads", edit("config.json", num_attention_heads=0), "ModelError"),
    base("negative groups", edit("config.json", num_key_value_heads=-2), "ModelError", "-2"),
    base("a norm of a text", edit("config.json", rms_norm_eps="x"), "ModelError", "x"),
    base(
        "rotary settings of a list",
        edit("config.json", rope_parameters=[1, 2]),
        "ModelError",
    ),
    base(
        "rotary factor of nothing",
        edit("config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "ModelError",
    ),
    base(
        "code of its own",
        edit("config.json", model_file="evil.py"),
        "ModelError",
        "model_file: got 'evil.py', expected none",
    ),
    base(
        "a network elsewhere",
        edit("config.json", model_type="..utils"),
        "ModelError",
        "model_type: got '..utils'",
    ),
    base(
        "a file that is no network",
        edit("config.json", model_type="rope_utils"),
        "ModelError",
        "model_type: got 'rope_utils', which mlx-lm has not",
    ),
    base(
        "a network that ends the process",
        edit("config.json", model_type="olmo"),
        "ModelError",
        "model_type: got 'olmo', expected",
    ),
    base("missing tensor", tensors(lambda t: t.pop(Q_PROJ)), "WeightsError", "q_proj"),
    base(
        "surplus tensor",
        tensors(lambda t: t.update(evil=np.zeros(3, np.float32))),
        "WeightsError",
        "evil",
    ),
    base(
        "shape",
        tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][:8].copy()})),
        "WeightsError",
        "q_proj",
    ),
    base("half the numbers", first_bytes(50_000), "WeightsError", "got 50000 bytes, expected"),
    base("weights elsewhere", link_out(WEIGHTS), "ModelError", f"{WEIGHTS}: links to"),
    base(
        "another tool's quantisation",
        edit("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "ModelError",
        "quantised by 'awq'",
    ),
    base(
        "id beyond the embedding",
        change_tokenizer("model", "vocab", "a", value=9999),
        "ModelError",
        "its tokenizer has 10000 tokens, its embedding only 400 rows",
    ),
]


@pytest.fixture(scope="module")
def hub_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a Hub has it: without what a conversion adds, weights in safetensors."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("conversion.json", "*.py"))
    return folder


def on_copy(bad: Bad, folder: Path) -> Bad:
    def make(path: Path) -> None:
        shutil.copytree(folder, path, dirs_exist_ok=True)
        bad.make(path)

    return Bad(bad.name, make, bad.words, bad.error, bad.says)


@pytest.mark.parametrize("bad", FOLDERS + TORCH, ids=str)
def test_bad_folder_is_not_converted(bad, tmp_path, hub_folder):
    check(on_copy(bad, hub_folder), tmp_path)


@pytest.mark.parametrize("bad", BASES, ids=str)
def test_bad_base_is_not_loaded(bad, tmp_path, tiny_base):
    check(on_copy(bad, tiny_base), tmp_path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of mlx-lm. Read only."""
    folder = tmp_path_factory.mktemp("networks") / "llama"
    write_network(folder, "llama", num_hidden_layers=2)
    return folder


@pytest.mark.parametrize("bad", LLAMAS, ids=str)
def test_bad_network_is_not_loaded(bad, tmp_path, llama):
    check(on_copy(bad, llama), tmp_path)


def test_the_copies_are_good_before_they_are_changed(imate, hub_folder, tiny_base):
    imate("convert", hub_folder, "--out", "out")
    imate("generate", "What is a loss?", "--model", tiny_base, "--max-tokens", "1")


@pytest.mark.parametrize(
    "settings", [{"model_max_length": "x"}, {"chat_template_type": "../../os"}], ids=str
)
def test_settings_that_would_mislead_a_library_reach_none(imate, tmp_path, tiny_base, settings):
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    words = ["generate", "What is a loss?", "--max-tokens", "3", "--model"]
    expected = imate(*words, folder).stdout
    edit("tokenizer_config.json", **settings)(folder)
    assert imate(*words, folder).stdout == expected


def test_links_of_a_hub_cache_are_followed(imate, tmp_path, hub_folder):
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in hub_folder.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    imate("convert", snapshot, "--out", "out")


@pytest.mark.parametrize("name", ["GLOBAL", "STACK_GLOBAL", "INST", "REDUCE in a value"])
def test_the_pickles_would_run_in_python(tmp_path, name):
    code = f"import pickle; pickle.loads({CODE[name]!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, stderr=subprocess.PIPE)
    assert (tmp_path / "ran").exists()
