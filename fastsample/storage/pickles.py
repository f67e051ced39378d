"""Pickles of tensors, looked through before torch.load(weights_only=True) makes anything of them.

weights_only runs no code, but it makes tensors as large as a pickle says: a file of 2 KB can take all memory, by a
storage larger than the file, a tensor that is expanded over a small storage, or a compressed archive.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

from fastsample.storage.reading import open_regular

# A tensor takes about 200 bytes of a pickle, beside its values.
_LARGEST_PICKLE = 8 << 20
_INERT = {
    "collections": ("Counter",),
    "builtins": ("bytearray", "set", "complex"),
    "__builtin__": ("bytearray", "set", "complex"),
    "torch": ("Size", "device"),
    "_codecs": ("encode",),
}
# Opcodes that call classes; torch.save has no use for them.
_MAKERS = {*pickle.NEWOBJ, *pickle.NEWOBJ_EX, *pickle.OBJ, *pickle.INST, *pickle.BYTEARRAY8}
_MAKERS |= {*pickle.EXT1, *pickle.EXT2, *pickle.EXT4}
_TENSORS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


def load_pickle(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """What torch.save wrote, of tensors, numbers, texts and containers alone; it takes no more memory than the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, no such pickle, holds anything else, or tensors larger than itself.
    """
    with open_regular(path) as file:
        try:
            _look_through(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a broken pickle raises whatever its reader trips over
            # torch's own text goes on to advise weights_only=False.
            lines = [line.strip() for line in str(error).splitlines()] or [""]
            reasons = [line for line in lines if re.search(r"\b(GLOBAL|Unsupported)\b", line)]
            reason = reasons[0] if reasons else f"{type(error).__name__}: {lines[0]}"
            raise ValueError(
                f"{path} is refused: it is a pickle, and loading it as bare tensors (weights_only) failed: "
                f"{reason[:500]}"
            ) from error


@dataclass(frozen=True)
class _Storage:
    """A storage that a pickle asks for."""

    nbytes: int
    itemsize: int


class _Inert:
    """Stands for an object that is no tensor's."""

    def __init__(self, *arguments: object) -> None:
        pass


def _look_through(file: BinaryIO) -> None:
    """Raises ValueError if the pickle's tensors would be larger than what the file holds for them."""
    whole = os.fstat(file.fileno()).st_size
    if file.read(4) != b"PK\x03\x04":
        file.seek(0)
        _look_through_old(file, whole)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        sizes = {entry.filename.lower(): entry.file_size for entry in entries}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed, which torch.save does not do")
        if len(sizes) != len(entries) or sum(sizes.values()) > whole:
            raise ValueError("the archive's entries overlap")
    file.seek(0)
    # By torch's own reader: what it finds is what torch.load will find.
    reader = torch._C.PyTorchFileReader(file)
    [name] = [name for name in sizes if name.endswith("/data.pkl")]
    if sizes[name] > _LARGEST_PICKLE:
        raise ValueError(f"the pickle has {sizes[name]} bytes beside the tensors, at most {_LARGEST_PICKLE} are read")
    folder = name.removesuffix("data.pkl")

    def held(key: str) -> int:
        return sizes.get(f"{folder}data/{key}".lower(), 0)

    _Dry(io.BytesIO(reader.get_record("data.pkl")), held).load()


def _look_through_old(file: BinaryIO, whole: int) -> None:
    """The format before torch 1.6: pickles of a magic number, a version, the system and the objects, then storages."""
    storages: dict[str, _Storage] = {}
    start = io.BytesIO(file.read(_LARGEST_PICKLE))
    for _ in range(4):
        dry = _Dry(start, lambda key: whole)
        dry.load()
        storages = dry.storages
    if (total := sum(storage.nbytes for storage in storages.values())) > whole:
        raise ValueError(f"its storages have {total} bytes, the file {whole}")


class _Dry(pickle._Unpickler):
    """Reads a pickle without making what it asks for. In Python: the C reader's memo is as large as a pickle says."""

    stack: list[Any]

    def __init__(self, file: BinaryIO, held: Callable[[str], int]) -> None:
        super().__init__(file)
        self._held = held
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if name in _INERT.get(module, ()):
            return _bounded if name == "bytearray" else _inert
        if module == "torch._utils" and name in _TENSORS:
            return _tensor
        if module == "torch._utils" and name in _PARAMETERS:
            return _parameter
        named = getattr(torch, name, None) if module in ("torch", "torch.storage") else None
        if isinstance(named, torch.dtype) or (isinstance(named, type) and name.endswith("Storage")):
            return named
        raise ValueError(f"GLOBAL {module[:100]}.{name[:100]} is no part of a tensor")

    def _build(self) -> None:
        # State would be written into whatever is there, be it a class of torch's.
        self.stack.pop()

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function not in (OrderedDict, _inert, _bounded, _parameter, _tensor):
            raise ValueError(f"Unsupported call of a {type(function).__name__}")
        self.stack.append(function(*arguments))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: step for code, step in pickle._Unpickler.dispatch.items() if code not in _MAKERS},
        pickle.BUILD[0]: _build,
        pickle.REDUCE[0]: _reduce,
    }

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(key, str) or not _is_size(count):
            raise ValueError("a persistent id is no storage's")
        if key not in self.storages:
            # `dtype` warns, of a class that torch.save itself still names.
            itemsize = 1 if storage is torch.UntypedStorage else storage._dtype.itemsize
            if count * itemsize > self._held(key):
                raise ValueError(f"storage {key[:100]} has {count * itemsize} bytes, the file {self._held(key)} for it")
            self.storages[key] = _Storage(count * itemsize, itemsize)
        return self.storages[key]


def _inert(*arguments: object) -> _Inert:
    return _Inert(*arguments)


def _bounded(*arguments: object) -> _Inert:
    if any(isinstance(argument, int) for argument in arguments):
        raise ValueError("a bytearray is made of a number, not of bytes")
    return _Inert()


def _parameter(data: object, *_: object) -> object:
    return data


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, *rest: Any) -> _Inert:
    dtype = next((item for item in rest if isinstance(item, torch.dtype)), None)
    itemsize = storage.itemsize if dtype is None else dtype.itemsize
    if not all(map(_is_size, (offset, *size, *stride))) or len(size) != len(stride):
        raise ValueError("a tensor's offset, size and stride must be whole numbers from 0 on")
    count = 1
    for length in size:
        count *= length
    end = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if max(count, end) * itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {tuple(size)[:8]} is larger than its storage of {storage.nbytes} bytes")
    return _Inert()


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def state_dict_of(loaded: object, path: object) -> Mapping[Any, Any]:
    """The state dict in what was loaded, which may lie in a training framework's checkpoint."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded
