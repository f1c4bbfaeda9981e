"""Pickles read without running anything in them.

A pickle is a program for a machine with a stack. `read_pickle` is that machine with its hands tied: it imports nothing
and calls nothing that a file names. Tensors, arrays' scalars and the containers of `KNOWN` it makes itself, by
functions of its own; of all else that a file would make it keeps a `Record`, which does nothing. A file that names what
has no business in one of networks, os.system say, is refused with that name, and so is a dotted one, by which a
function is reached through another module's attributes.

Large strings of bytes, the tensors' numbers, stay in the file until they are read into the tensor.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import CheckpointError

__all__ = ["Reader", "Record", "check_names", "read_pickle"]


class Record:
    """What a file would have made, and did not: an object of inert parts.

    Attributes:
        name: of the class or function, "module.name".
        args, kwargs: what it would have been called with; args is None for the class or function itself.
        state: what its `__setstate__` would have been given, or its attributes.
        members: appended or added.
        entries: set by key.
    """

    def __init__(self, name: str, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}
        self.state: Any = None
        self.members: list[Any] = []
        self.entries: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"Record({self.name})"


_ROOMS = ("torch", "torch_utils", "dnnlib", "training", "numpy", "collections", "builtins", "__builtin__", "copyreg")
"""The packages whose names may stand in a file of a network: as records, but for the names of `_MADE`."""

_PLAIN = {"object", "complex", "dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "_reconstructor"}
"""What may stand of the builtins and of copyreg."""

_LARGE = 1 << 12

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Section:
    """Bytes that stay in the file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        self.numbers: Tensor | None = None  # once they are read: a file that names them twice has them once

    def __len__(self) -> int:
        return self.length


class Reader:
    """A file for `pickletools.genops`, whose large strings of bytes are sections."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end = file, end
        self.opcode, self.length = b"", b""  # what was read last, where these are what it was

    def read(self, n: int) -> Any:
        start = self.file.tell()
        of_bytes = self.opcode in (b"B", b"\x8e") and len(self.length) in (4, 8)  # BINBYTES, BINBYTES8
        if of_bytes and n >= _LARGE and start + n <= self.end:
            self.file.seek(n, io.SEEK_CUR)
            return _Section(self.file, start, n)
        self.opcode, self.length = self.length, self.file.read(min(n, max(0, self.end - start)))
        return self.length

    def readline(self) -> bytes:
        return self.file.readline(1 << 16)

    def tell(self) -> int:
        return self.file.tell()


def read_pickle(path: Path) -> Any:
    """What is in a pickle: containers, numbers, strings, tensors on the CPU, and records of all else.

    Raises:
        CheckpointError: if it names what is no part of a network, saying what; or is damaged, or no pickle.
    """
    with path.open("rb") as file:
        try:
            return _run(file, path.stat().st_size)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}") from error.__cause__
        except Exception as error:  # whatever a damaged program does to the stack
            raise CheckpointError(f"{path} is no pickle, or damaged: {type(error).__name__}: {error}") from error


def check_names(path: Path) -> None:
    """Raises CheckpointError if a pickle of torch.save, alone or in its archive, names what is no part of a network,
    saying what. What else may be wrong with it is not said.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
        file = io.BytesIO(data)
        for _ in range(4):  # before torch 1.6: a number, a version, the machine, and what was saved
            _run(file, len(data), persistent=lambda _: None, made={})
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except Exception:  # whatever a damaged program does to the stack
        return


def _named(module: str, name: str) -> Record:
    """The record of a class or function.

    Raises:
        CheckpointError: if it is not one that a file of networks may name.
    """
    room, full = module.split(".")[0], f"{module}.{name}"
    if "." in name:
        raise CheckpointError(f"names {full!r}, an attribute of something in {module!r}: it is not read")
    plain = room in ("builtins", "__builtin__", "copyreg") and name not in _PLAIN
    if full not in _MADE and (room not in _ROOMS or plain):
        raise CheckpointError(f"holds {full}, which is no part of a network: it is not read, for a pickle can run code")
    return Record(full)


# ---- the machine ----

_MARK = object()
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_OF_MARKED: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": lambda items: frozenset(_keys(items)),
    "DICT": lambda items: dict(_pairs(items)),
}


def _pairs(items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(_keys(items[::2]), items[1::2], strict=True)


def _keys(items: Iterable[Any]) -> list[Any]:
    """They, to be hashed: none is a tuple of tuples, of which a few bytes can make one whose hash takes any time."""
    found = list(items)
    if any(isinstance(part, tuple | frozenset) for key in found if isinstance(key, tuple | frozenset) for part in key):
        raise ValueError("a key is a tuple of tuples")
    return found


def _run(
    file: BinaryIO, end: int, persistent: Callable[[Any], Any] | None = None, made: Mapping[str, Any] | None = None
) -> Any:
    """One pickle, from where the file stands. What calls make is by `made`, or records."""
    made = _MADE if made is None else made
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        at = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    arg: Any
    for opcode, arg, _ in pickletools.genops(Reader(file, end)):  # type: ignore[arg-type]
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            return stack.pop()
        if op in _PUSHED:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in _OF_MARKED:
            stack.append(_OF_MARKED[op](marked()))
        elif op == "MARK":
            stack.append(_MARK)
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            marked()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if op == "APPEND" else marked()
            _add(stack[-1], items)
        elif op in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if op == "SETITEM" else marked()
            target = stack[-1]
            (target.entries if isinstance(target, Record) else target).update(_pairs(items))
        elif op == "GLOBAL":
            stack.append(_named(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, what = stack.pop(), stack.pop()
            stack.append(_made(made, what, args))
        elif op == "NEWOBJ_EX":
            kwargs, args, what = stack.pop(), stack.pop(), stack.pop()
            stack.append(_made(made, what, args, kwargs))
        elif op == "INST":
            stack.append(_made(made, _named(*arg.split(" ", 1)), tuple(marked())))
        elif op == "OBJ":
            what, *rest = marked()
            stack.append(_made(made, what, tuple(rest)))
        elif op == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, Record):
                target.state = state
            elif isinstance(target, np.dtype) and ">" in state:
                raise ValueError("a numpy number of another order of bytes")
        elif op in ("PERSID", "BINPERSID") and persistent is not None:
            stack.append(persistent(arg if op == "PERSID" else stack.pop()))
        else:
            raise CheckpointError(f"has the opcode {op}, which refers to what is outside the file: it is not read")
    raise ValueError("it does not stop")


def _add(target: Any, items: list[Any]) -> None:
    if isinstance(target, Record):
        target.members.extend(items)
    elif isinstance(target, set):
        target.update(_keys(items))
    else:
        target.extend(items)


def _made(made: Mapping[str, Any], what: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """What a call would have returned: a tensor or container where it is one of `made`, else a record."""
    if not isinstance(what, Record) or what.args is not None or not isinstance(args, tuple):
        raise CheckpointError(f"calls {what!r}, the result of another call: it is not read")
    make = None if kwargs else made.get(what.name)
    return Record(what.name, args, kwargs) if make is None else make(*args)


# ---- tensors ----


def _storage(data: _Section | bytes) -> Tensor:
    """The numbers of one storage, as torch.save wrote it before torch 1.6: five pickles, a count, and the numbers."""
    if isinstance(data, _Section):
        if data.numbers is not None:
            return data.numbers
        file, start, length = data.file, data.start, data.length
        resume = file.tell()
        file.seek(start)
    else:
        file, start, length, resume = io.BytesIO(data), 0, len(data), 0
    end = start + length
    described: list[Any] = []
    magic, _, system = _run(file, end), _run(file, end), _run(file, end)
    if magic != 0x1950A86A20F9469CFC6C or not system["little_endian"] or sys.byteorder != "little":
        raise ValueError("a storage is not one of torch.save, or of another order of bytes")
    _run(file, end, persistent=described.append)
    _run(file, end)
    ((kind, record, _, _, count, view),) = described
    count = int.from_bytes(file.read(8), "little")
    dtype = _STORAGES[record.name.split(".")[-1]]
    if kind != "storage" or view is not None or file.tell() + count * dtype.itemsize > end:
        raise ValueError("a storage is cut short, or a part of another")
    numbers = torch.empty(count, dtype=dtype)
    if count:
        file.readinto(numbers.view(torch.uint8).numpy())  # type: ignore[attr-defined]
    if isinstance(data, _Section):
        file.seek(resume)
        data.numbers = numbers
    return numbers


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    if min((offset, *size, *stride)) < 0 or math.prod(size) > len(storage):
        raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset} in {len(storage)} numbers")
    return torch.as_strided(storage, size, stride, offset)


_SCALARS = {f"{kind}{n}" for kind in "fiu" for n in (1, 2, 4, 8)} | {"b1"}


def _dtype(name: str, *_: Any) -> np.dtype[Any]:
    if name not in _SCALARS:
        raise ValueError(f"a numpy number of type {name!r}")
    return np.dtype(name)


def _scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    """A numpy number as Python's."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=dtype, count=1)[0].item()


def _encoded(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise ValueError(f"text of encoding {encoding!r}")
    return text.encode(encoding)


_MADE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": lambda items=(): OrderedDict(_pairs([part for pair in items for part in pair])),
    "_codecs.encode": _encoded,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "builtins.set": lambda items=(): set(_keys(items)),
    "__builtin__.set": lambda items=(): set(_keys(items)),
    "builtins.frozenset": lambda items=(): frozenset(_keys(items)),
    "builtins.bytearray": lambda data=b"": bytearray(data),
}
