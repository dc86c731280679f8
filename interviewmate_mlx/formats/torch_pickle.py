"""Reads the pickle of a state dict without running it.

A pickle is a program, and its calls make it dangerous. Here it is read, not run:
Python's unpickler is not used, nothing is imported and nothing is called. Only the
few instructions that torch.save writes are allowed. They build plain data. A call
of one of torch's two rebuild functions becomes a description of a tensor. Anything
else is an error.

The format: Python's Lib/pickletools.py, torch/serialization.py (`persistent_id`)
and torch/_utils.py (`_rebuild_tensor_v2`, `_rebuild_parameter`).
"""

import pickletools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from interviewmate_mlx.errors import list_faults
from interviewmate_mlx.formats.safetensors_file import are_sizes, is_tensor_name

_DTYPE_OF_STORAGE = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_MAX_PROTOCOL = 5
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"

T = TypeVar("T")


class _Name(NamedTuple):
    """The name of a class or function in the pickle. It is never looked up."""

    text: str


class Storage(NamedTuple):
    """`length` numbers of `dtype` in the archive's member `data/KEY`."""

    dtype: str
    key: str
    length: int


class StoredTensor(NamedTuple):
    """A view of a storage, not checked against it. Offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(data: bytes) -> dict[str, StoredTensor]:
    """The tensors that `data.pkl` describes, by name.

    Raises:
        ValueError: the pickle is damaged, or holds anything but a flat dict of tensors.
    """
    try:
        found = _interpret(data)
    except (IndexError, KeyError) as error:  # an empty stack, or an unknown memo number
        raise ValueError("its pickle is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"got a {_kind(found)}, expected a state dict")
    if odd := [ascii(name[:80]) for name in found if not is_tensor_name(name)]:
        raise ValueError("names of tensors that cannot be printed:\n" + list_faults(odd))
    others = {name: value for name, value in found.items() if not isinstance(value, StoredTensor)}
    if others:
        faults = [f"{name[:80]}: {_kind(value)}" for name, value in others.items()]
        raise ValueError(
            "it is not a flat state dict (a training checkpoint?); these are not tensors:\n"
            + list_faults(faults)
        )
    return found


def _instructions(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(data)
    except ValueError as error:  # its message quotes the file, at any length
        raise ValueError(f"its pickle is damaged: {str(error)[:80]}") from error


def _interpret(data: bytes) -> object:
    """What a pickle describes: the stack machine of Python's `pickletools`, without its calls."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        return [stack.pop() for _ in range(count)][::-1]

    def since_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    argument: Any
    for instruction, argument, _ in _instructions(data):
        match instruction.name:
            case "PROTO" | "FRAME":
                if instruction.name == "PROTO" and argument > _MAX_PROTOCOL:
                    raise ValueError(
                        f"its pickle has protocol {argument}, expected at most {_MAX_PROTOCOL}"
                    )
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(instruction.name))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"TUPLE": (), "LIST": [], "DICT": {}}[instruction.name[6:]])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(instruction.name[-1]))))
            case "APPEND" | "APPENDS":
                items = since_mark() if instruction.name == "APPENDS" else pop(1)
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if instruction.name == "SETITEMS" else pop(2)
                pairs = zip(items[0::2], items[1::2], strict=True)
                _expect(stack[-1], dict).update((_expect(key, str), value) for key, value in pairs)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known_name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                module, name = pop(2)
                stack.append(_known_name(f"{_expect(module, str)}.{_expect(name, str)}"))
            case "REDUCE":
                name, arguments = pop(2)
                stack.append(_describe(_expect(name, _Name), _expect(arguments, tuple)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "BUILD":  # the state of an ordered dict: module versions, not needed here
                stack.pop()
                _expect(stack[-1], dict)
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(
                    f"its pickle has a {other} instruction; torch.save never writes one"
                )
    raise ValueError("its pickle does not end")


def _known_name(text: str) -> _Name:
    if text in (_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT) or text in _DTYPE_OF_STORAGE:
        return _Name(text)
    raise ValueError(f"its pickle names {text[:80]!r}, which is not a tensor of a known dtype")


def _describe(name: _Name, arguments: tuple[Any, ...]) -> StoredTensor | dict[str, Any]:
    """What a call of a known name would return."""
    if name.text == _ORDERED_DICT and not arguments:
        return {}
    if name.text == _REBUILD_PARAMETER and len(arguments) == 3:
        return _expect(arguments[0], StoredTensor)
    if name.text == _REBUILD_TENSOR and len(arguments) in (6, 7):
        storage, offset, shape, strides = arguments[:4]
        sizes_are_sane = all(
            isinstance(sizes, tuple) and are_sizes(sizes) for sizes in ((offset,), shape, strides)
        )
        if isinstance(storage, Storage) and sizes_are_sane and len(shape) == len(strides):
            return StoredTensor(storage, offset, shape, strides)
    raise ValueError(f"its pickle calls {name.text} in a way that torch.save never does")


def _storage(identity: object) -> Storage:
    """A storage from its description: ("storage", class, key, device, count of numbers)."""
    match identity:
        case ("storage", _Name(text), str(key), str(), int(length)) if text in _DTYPE_OF_STORAGE:
            return Storage(_DTYPE_OF_STORAGE[text], key, length)
    raise ValueError("its pickle describes a storage in a way that torch.save never does")


def _expect(value: object, kind: type[T]) -> T:
    """`value`, if it is of that type; a ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(
            f"its pickle has {_kind(value)} where torch.save has {kind.__name__.lstrip('_')}"
        )
    return value


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, StoredTensor) else type(value).__name__
