"""Files that torch.save wrote, compared with what torch reads; and files that it never writes."""

import io
import operator
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2
from torch.serialization import skip_data

from interviewmate_mlx.errors import WeightsError
from interviewmate_mlx.formats.torch_file import read_torch_file

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def read_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    entries = read_torch_file(path)
    return {
        name: (e.dtype, e.shape, b"".join(map(bytes, e.chunks()))) for name, e in entries.items()
    }


def torch_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The naive reference: torch loads everything."""
    return state_bytes(torch.load(path, weights_only=True))


def state_bytes(state: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), to_bytes(t))
        for name, t in state.items()
    }


def to_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_known_dtype_has_the_bytes_that_torch_reads(path: Path, dtype: torch.dtype) -> None:
    torch.save({"a": torch.arange(12).reshape(3, 4).to(dtype), "b": torch.ones(()).to(dtype)}, path)
    assert read_bytes(path) == torch_bytes(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(path: Path, protocol: int) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    assert state._metadata  # torch writes it as the state of an ordered dict
    torch.save(state, path, pickle_protocol=protocol)
    assert read_bytes(path) == state_bytes(state)
    assert list(read_torch_file(path)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_views_of_any_stride_have_the_numbers_that_torch_reads(path: Path) -> None:
    numbers = torch.arange(120.0).reshape(4, 5, 6)
    state = {
        "transposed": numbers.permute(2, 0, 1),
        "sliced": numbers[1:, ::2, 3:],
        "offset": numbers[2],
        "expanded": torch.tensor(7.0).expand(3, 4),
        "column": numbers.reshape(-1, 1)[::3],
        "half": torch.randn(7, 3).bfloat16().T,
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    torch.save(state, path)
    assert read_bytes(path) == torch_bytes(path)


def test_a_large_transposed_tensor_is_gathered_in_pieces(path: Path) -> None:
    torch.save({"a": torch.arange(1 << 22, dtype=torch.int32).reshape(2048, 2048).T}, path)
    pieces = [bytes(piece) for piece in read_torch_file(path)["a"].chunks()]
    assert len(pieces) > 1
    assert b"".join(pieces) == torch_bytes(path)["a"][2]


def test_tied_weights_share_their_bytes(path: Path) -> None:
    weight = torch.randn(4, 3)
    torch.save({"embedding": weight, "head": weight}, path)
    entries = read_torch_file(path)
    assert entries["embedding"] == entries["head"]


def test_first_rows_are_the_first_rows(path: Path) -> None:
    weight = torch.randn(5, 3)
    torch.save({"a": weight, "t": weight.T}, path)
    entries = read_torch_file(path)
    assert b"".join(map(bytes, entries["a"].first_rows(2).chunks())) == to_bytes(weight[:2])
    assert b"".join(map(bytes, entries["t"].first_rows(2).chunks())) == to_bytes(weight.T[:2])


def test_padding_in_a_local_header_moves_the_data(path: Path) -> None:
    extra = b"FB" + (10).to_bytes(2, "little") + b"Z" * 10
    write_archive(path, pickled({"a": view()}), extra=extra)
    assert read_bytes(path)["a"][2] == NUMBERS[:8]
    assert extra in path.read_bytes()[: read_torch_file(path)["a"].offset]


def test_a_file_longer_than_32_bits_can_count_is_read_at_the_right_place(path: Path) -> None:
    with skip_data():  # torch leaves a hole of 5 GB in the file
        torch.save({"a": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.ones(3)}, path)
    entries = read_torch_file(path)
    assert entries["a"].nbytes == 5 << 30
    with path.open("r+b") as file:
        file.seek(entries["b"].offset)
        file.write(np.arange(3, dtype="<f4").tobytes())
    assert torch.load(path, mmap=True)["b"].tolist() == [0.0, 1.0, 2.0]


# --- what torch.save never writes ---------------------------------------------

NUMBERS = bytes(range(64))


class Id:
    """Pickles as a reference to a storage, of any shape."""

    def __init__(self, *value: object) -> None:
        self.value = value


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call

    def __call__(self) -> None:
        """Makes it callable: pickle then accepts a `Call` as the function of another one."""


class Pickler(pickle._Pickler):  # the pickler in pure Python can be made to write anything
    def persistent_id(self, value: object) -> object:
        return value.value if isinstance(value, Id) else None


def pickled(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def view(
    storage: str = "FloatStorage",
    length: object = 16,
    offset: object = 0,
    shape: object = (2,),
    strides: object = (1,),
) -> Call:
    identity = Id("storage", getattr(torch, storage), "0", "cpu", length)
    return Call(_rebuild_tensor_v2, identity, offset, shape, strides, False, OrderedDict())


def write_archive(
    path: Path,
    data_pkl: bytes,
    storage: bytes = NUMBERS,
    compression: int = zipfile.ZIP_STORED,
    extra: bytes = b"",
    **others: bytes,
) -> None:
    members = {"data.pkl": data_pkl, "version": b"3\n", "data/0": storage} | others
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"m/{name}")
            info.compress_type, info.extra = compression, extra
            archive.writestr(info, content)


def refusal(path: Path) -> str:
    """The message, without the path, because the path contains the test's name."""
    with pytest.raises(WeightsError) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "")


def test_torch_reads_the_archives_of_these_tests(path: Path) -> None:
    write_archive(path, pickled({"a": view(offset=3, shape=(2, 3), strides=(3, 1))}))
    assert read_bytes(path)["a"] == ("float32", (2, 3), NUMBERS[12:36])
    assert read_bytes(path) == torch_bytes(path)


def evil_values(sentinel: Path) -> dict[str, Any]:
    command = f"touch {sentinel}"
    system = Call(os.system, command)
    a = view()
    return {
        "os.system": {"a": system},
        "eval": {"a": Call(eval, f"__import__('pathlib').Path({str(sentinel)!r}).touch()")},
        "exec": {"a": Call(exec, f"__import__('pathlib').Path({str(sentinel)!r}).touch()")},
        "open": {"a": Call(open, str(sentinel), "w")},
        "getattr": {"a": Call(Call(operator.attrgetter, "system"), command)},  # type: ignore[arg-type]
        "subprocess": {"a": Call(subprocess.call, ["touch", str(sentinel)])},
        "torch.load": {"a": Call(torch.load, str(sentinel))},
        "top level": system,
        "as a hook": {"a": Call(_rebuild_tensor_v2, *a.call[1][:5], system)},
        "as a key": {"a": a, "b": {system: a}},
        "in a parameter": {"a": Call(_rebuild_parameter, system, False, OrderedDict())},
        "as a storage": {"a": Call(_rebuild_tensor_v2, system, 0, (2,), (1,), False, {})},
        "in a storage": {"a": Call(_rebuild_tensor_v2, Id("storage", system, "0", "cpu", 16))},
        "in a list": [system],
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", evil_values(Path()))
def test_a_pickle_that_calls_anything_is_refused_and_runs_nothing(
    path: Path, name: str, protocol: int
) -> None:
    sentinel = path.parent / "ran"
    write_archive(path, pickled(evil_values(sentinel)[name], protocol))
    refusal(path)
    assert not sentinel.exists()


def test_the_evil_pickles_run_code_in_python(tmp_path: Path) -> None:
    for name in ("os.system", "eval", "top level", "subprocess"):
        sentinel = tmp_path / name.replace(" ", "-")
        pickle.loads(pickled(evil_values(sentinel)[name]))
        assert sentinel.exists()


def test_the_refusal_names_what_the_pickle_names(path: Path) -> None:
    write_archive(path, pickled({"a": Call(os.system, "true")}))
    assert f"{os.system.__module__}.system" in refusal(path)
    write_archive(path, pickled({"a": Call(eval, "1")}, 4))
    assert "builtins.eval" in refusal(path)


@pytest.mark.parametrize(
    "program",
    {
        "INST": b"(S'true'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'true'\no.",
        "NEWOBJ": b"\x80\x02ctorch\nFloatStorage\n)\x81.",
        "EXT1": b"\x80\x02\x82\x01.",
        "state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        "state of a storage class": b"\x80\x02ctorch\nFloatStorage\n}X\x01\0\0\0aK\x01sb.",
        "call of a storage class": b"\x80\x02ctorch\nFloatStorage\nK\x09\x85R.",
        "dict of arguments": b"\x80\x02ccollections\nOrderedDict\n](X\x01\0\0\0aK\x01ea\x85R.",
        "unknown memo": b"\x80\x02h\x07.",
        "empty stack": b"\x80\x02R.",
        "mark that is not there": b"\x80\x02t.",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "text": b"<!DOCTYPE html>",
        "key that is not a string": b"\x80\x02}K\x01K\x02s.",
        "odd number of items": b"\x80\x02}(X\x01\0\0\0au.",
        "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "nested protocol 0": b"(dp0\nS'a'\np1\nI1\ns.",
        "persistent text": b"Pstorage\n.",
    }.items(),
    ids=lambda item: item[0],
)
def test_an_unexpected_instruction_is_refused(path: Path, program: tuple[str, bytes]) -> None:
    write_archive(path, program[1])
    refusal(path)


def test_a_large_memo_number_costs_no_memory(path: Path) -> None:
    write_archive(path, b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_torch_file(path) == {}


@pytest.mark.parametrize(
    "identity",
    [
        (),
        ("storage",),
        ("storage", "FloatStorage", "0", "cpu", 16),
        ("tensor", torch.FloatStorage, "0", "cpu", 16),
        ("storage", torch.FloatStorage, 0, "cpu", 16),
        ("storage", torch.FloatStorage, "0", "cpu", "16"),
        ("storage", torch.FloatStorage, "0", "cpu", -1),
        ("storage", torch.FloatStorage, "0", "cpu", 16, None),
        ("storage", OrderedDict, "0", "cpu", 16),
        ("storage", torch.FloatStorage, "../0", "cpu", 16),
        ("storage", torch.FloatStorage, "9", "cpu", 16),
    ],
    ids=str,
)
def test_a_storage_with_an_unexpected_description_is_refused(path: Path, identity: Any) -> None:
    rebuilt = Call(_rebuild_tensor_v2, Id(*identity), 0, (2,), (1,), False, OrderedDict())
    write_archive(path, pickled({"a": rebuilt}))
    assert "storage" in refusal(path)


@pytest.mark.parametrize("length", [15, 17, 1 << 40, 2**63])
def test_a_storage_longer_or_shorter_than_its_bytes_is_refused(path: Path, length: int) -> None:
    write_archive(path, pickled({"a": view(length=length)}))
    assert "storage" in refusal(path)


def test_a_storage_longer_than_the_file_is_refused(path: Path) -> None:
    write_archive(path, pickled({"a": view(length=1 << 20)}))
    data = bytearray(path.read_bytes())
    size = (4 << 20).to_bytes(4, "little")
    entry = data.rindex(b"m/data/0") - 46  # in the archive's directory
    data[entry + 20 : entry + 28] = size + size
    path.write_bytes(data)
    assert "are left in the file" in refusal(path)


@pytest.mark.parametrize(
    "numbers",
    [
        {"offset": 15, "shape": (2,), "strides": (1,)},
        {"shape": (17,), "strides": (1,)},
        {"shape": (4, 4), "strides": (5, 1)},
        {"shape": (2,), "strides": (16,)},
        {"shape": (2**40, 2**40), "strides": (2**20, 1)},
        {"offset": -1},
        {"offset": "0"},
        {"offset": 2**64},
        {"shape": (-2,)},
        {"shape": [2]},
        {"shape": (2.0,)},
        {"shape": (2, 2)},
        {"strides": (-1,)},
        {"strides": None},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(
    path: Path, numbers: dict[str, Any]
) -> None:
    write_archive(path, pickled({"a": view(), "b": view(**numbers)}))
    refusal(path)


def test_all_faulty_tensors_are_listed(path: Path) -> None:
    faulty = {"b": view(length=3), "c": view(offset=99)}
    write_archive(path, pickled({"a": view(), **faulty}))
    message = refusal(path)
    assert "  b: " in message
    assert "  c: " in message
    assert "  a: " not in message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"model": {"a": 1}, "epoch": 3}, "epoch: int"),
        ([1, 2], "got a list"),
        (view(), "got a tensor"),
        ({"a\x1b[2J": view()}, "cannot be printed"),
        ({"a": view("DoubleStorage", 8)}, "torch.DoubleStorage"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_anything_but_a_flat_state_dict_is_refused(path: Path, value: object, says: str) -> None:
    write_archive(path, pickled(value))
    assert says in refusal(path)


def test_a_compressed_archive_is_refused(path: Path) -> None:
    bomb = pickled({"a": view(length=1 << 22)})
    write_archive(path, bomb, bytes(4 << 22), zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_a_pickle_beyond_the_limit_is_refused(path: Path) -> None:
    write_archive(path, bytes(17 << 20))
    assert "expected at most" in refusal(path)


def test_big_endian_numbers_are_refused(path: Path) -> None:
    write_archive(path, pickled({"a": view()}), byteorder=b"big")
    assert "little-endian" in refusal(path)
    write_archive(path, pickled({"a": view()}), byteorder=b"little")
    assert read_bytes(path)["a"][2] == NUMBERS[:8]


def test_an_archive_with_two_members_of_one_name_is_refused(path: Path) -> None:
    write_archive(path, pickled({"a": view()}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data.pkl", pickled({"b": view()}))
    assert "the same name" in refusal(path)


def test_an_archive_without_a_pickle_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/readme", b"")
    assert "data.pkl" in refusal(path)


def test_the_older_format_is_refused_with_working_code_to_save_it_again(path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    message = refusal(path)
    line = next(line for line in message.splitlines() if "torch.save" in line)
    code = line[line.index("torch.save") :].split(". Otherwise")[0]
    exec(code.replace(path.name, str(path)), {"torch": torch})
    assert read_bytes(path) == state_bytes(state)


def test_a_file_truncated_anywhere_is_refused(path: Path) -> None:
    torch.save({"a": torch.randn(50), "b": torch.randn(3, 4)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_damaged_file_is_either_read_or_refused(path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), random.integers(1, 4)):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            for entry in read_torch_file(path).values():
                assert sum(len(chunk) for chunk in entry.chunks()) == entry.nbytes < 100
            outcomes["read"] += 1
        except WeightsError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
