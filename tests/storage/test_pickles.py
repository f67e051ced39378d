"""Pickles that ask for more than they hold: refused before anything is made of them."""

from __future__ import annotations

import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsample.storage.pickles import load_pickle

REFUSED = r"a\.pt is refused: it is a pickle.*"


class _Calls:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _of_tensors(zipped: bool) -> dict[str, Any]:
    # The older format has no storages for newer dtypes.
    newer = {"eight": torch.ones(3).to(torch.float8_e4m3fn), "int": torch.ones(3, dtype=torch.uint16)}
    return {
        **(newer if zipped else {}),
        "a": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(12.0).reshape(3, 4)[:, 1:].T,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(x=1),
        "others": [Counter("ab"), {1, 2}, torch.Size((1, 2)), torch.float16, b"bytes", 1 + 2j],
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_what_torch_saves_is_read(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Linear(2, 3)
    want = {
        **_of_tensors(zipped),
        "module": module.state_dict(),
        "optimizer": torch.optim.SGD(module.parameters()).state_dict(),
    }
    torch.save(want, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = load_pickle(tmp_path / "a.pt")
    assert list(found) == list(want)
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert torch.equal(found[name].double(), value.double())
    assert found["others"] == want["others"]
    assert torch.equal(found["module"]["weight"], module.weight)


def _rewritten(path: Path, **changes: Callable[[bytes], bytes]) -> None:
    """The archive with other contents in the entries of these names, or as deflated ones."""
    with zipfile.ZipFile(path) as archive:
        entries = [(one.filename, archive.read(one)) for one in archive.infolist()]
    deflated = changes.pop("compress", None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            change = changes.get(name.rpartition("/")[2].partition(".")[0], bytes)
            archive.writestr(name, change(content))


def _long(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


LARGE = 1_500_000_000


def _with(old: bytes, new: bytes) -> Callable[[Path], None]:
    """77 zeros in whose pickle one part is another."""

    def changed(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    def change(path: Path) -> None:
        torch.save({"a": torch.zeros(77)}, path)
        _rewritten(path, data=changed)

    return change


def _call(*call: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({"a": _Calls(*call)}, path)


def _overlapping(path: Path) -> None:
    torch.save({"a": torch.zeros(77)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        one = archive.getinfo("a/data/0")
        other = zipfile.ZipInfo("a/data/1")
        for name in ("header_offset", "file_size", "compress_size", "CRC"):
            setattr(other, name, getattr(one, name))
        archive.filelist += [other] * 40
        archive._didModify = True


def _compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, path)
    _rewritten(path, compress=bytes)


def _deep(path: Path) -> None:
    torch.save({}, path)
    _rewritten(path, data=lambda _: b"\x80\x02" + b"(" * 100_000 + b".")


def _old_storage(path: Path) -> None:
    torch.save({"a": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x4d", _long(LARGE)))


BOMBS: dict[str, Callable[[Path], None]] = {
    "tensor-and-storage": _with(b"K\x4d", _long(LARGE)),
    "tensor": _with(b"K\x4d\x85", _long(LARGE) + b"\x85"),
    "expanded": _with(b"K\x4d\x85q\x08K\x01\x85", _long(LARGE) + b"\x85q\x08K\x00\x85"),
    "negative": _with(b"K\x4d\x85", _long(-1) + b"\x85"),
    "offset": _with(b"QK\x00", b"QK\x01"),
    "bytearray": _call(bytearray, LARGE),
    "storage-call": _call(torch.FloatStorage, LARGE),
    "empty-tensor": _call(torch.empty, LARGE),
    "meta": _call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (LARGE,), (1,), False),
    "memo": lambda path: path.write_bytes(b"\x80\x02Nr" + struct.pack("<I", 2**31) + b"."),
    "compressed": _compressed,
    "overlapping": _overlapping,
    "deep": _deep,
    "storage-before-1.6": _old_storage,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_take_memory(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    BOMBS[bomb](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=REFUSED):
        load_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KB"


def test_state_written_into_a_class_changes_nothing(tmp_path: Path) -> None:
    """BUILD would set attributes of torch's own classes."""
    state = pickle.dumps((None, {"poison": 1}), 2)[2:-1]
    torch.save({}, tmp_path / "a.pt")
    _rewritten(tmp_path / "a.pt", data=lambda _: b"\x80\x02ctorch\nFloatStorage\n" + state + b"b.")
    with pytest.raises(ValueError, match=REFUSED):
        load_pickle(tmp_path / "a.pt")
    assert not hasattr(torch.FloatStorage, "poison")


def test_a_fifo_does_not_wait(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom fastsample.lora.files.formats import read\nos.mkfifo(sys.argv[1])\n"
        "try:\n    read(sys.argv[1])\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")], timeout=60, capture_output=True, text=True
    )
    assert "a.safetensors is a FIFO" in done.stdout
