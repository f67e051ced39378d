"""Odd configurations, keys and numbers of LoRA files: a ValueError that names the file and what is odd in it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.lora_files import DOWN, PEFT, UP, read


def peft_folder(folder: Path, text: str) -> Path:
    save_file(PEFT, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_a_configuration_is_read(tmp_path: Path) -> None:
    config = {
        "r": 2.0,
        "lora_alpha": 8,
        "use_rslora": None,
        "rank_pattern": None,
        "alpha_pattern": {"(b|c)": 1, "a": 6},
    }
    [entry] = read(peft_folder(tmp_path, json.dumps(config)))
    assert entry.factor == 3.0


ODD: dict[str, Any] = {
    "text": {"lora_alpha": "8"},
    "list": {"lora_alpha": [8]},
    "true": {"lora_alpha": True},
    "huge": {"lora_alpha": 10**400},
    "infinite": {"lora_alpha": float("inf")},
    "nan": {"lora_alpha": float("nan")},
    "rank-text": {"r": "2"},
    "rank-0": {"r": 0},
    "rank-negative": {"r": -2},
    "rank-half": {"r": 2.5},
    "rank-huge": {"r": 10**400},
    "rank-object": {"r": {}},
    "patterns-list": {"rank_pattern": ["a"]},
    "patterns-text": {"alpha_pattern": "a"},
    "patterns-number": {"alpha_pattern": 3},
    "pattern-text": {"alpha_pattern": {"a": "6"}},
    "pattern-null": {"alpha_pattern": {"a": None}},
    "pattern-of-0": {"rank_pattern": {"b": 0}},
    "rslora": {"use_rslora": "false"},
    "type": {"peft_type": ["LORA"]},
    "type-number": {"peft_type": 7},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_named(name: str, tmp_path: Path) -> None:
    [key] = ODD[name]
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors.*{key}"):
        read(peft_folder(tmp_path, json.dumps(ODD[name])))


@pytest.mark.parametrize("name", ODD)
def test_odd_values_in_the_header_are_named(name: str, tmp_path: Path) -> None:
    [key] = ODD[name]
    config = {f"unet.{key}": ODD[name][key]}
    state = {f"unet.{name}": value for name, value in (("a.lora_A.weight", DOWN), ("a.lora_B.weight", UP))}
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{key}"):
        read(tmp_path / "x.safetensors")


TEXTS = {
    "deep": "[" * 100_000,
    "deep-object": '{"r":' * 60 + "2" + "}" * 60,
    "long-number": '{"r": ' + "1" * 5000 + "}",
    "large": json.dumps({"x": "a" * (5 << 20)}),
    "not-utf8": "\udcff",
    "nothing": "",
    "null": "null",
}


@pytest.mark.parametrize("name", TEXTS)
def test_odd_json_is_refused(name: str, tmp_path: Path) -> None:
    peft_folder(tmp_path, "")
    (tmp_path / "adapter_config.json").write_bytes(TEXTS[name].encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_a_configuration_that_is_no_file(kind: str, tmp_path: Path) -> None:
    """Not read over: alpha would be another."""
    path = peft_folder(tmp_path, "") / "adapter_config.json"
    path.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "loop": lambda one: one.symlink_to(one)}[kind](path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read(tmp_path)


def test_a_folder_whose_sole_file_is_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a FIFO"):
        read(tmp_path)


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def one(name: str, dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HEADERS = {
    "length-huge": header(b"{}", 1 << 63),
    "length-over-the-file": header(b"{}", 1 << 20),
    "deep": header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "overlapping": header(json.dumps({**one("a", "F32", [2], 0, 8), **one("b", "F32", [2], 4, 12)}).encode())
    + b"0" * 12,
    "shape-huge": header(json.dumps(one("a", "F32", [1 << 62, 1 << 62], 0, 8)).encode()) + b"0" * 8,
    "shape-negative": header(json.dumps(one("a", "F32", [-2], 0, 8)).encode()) + b"0" * 8,
    "offset-huge": header(json.dumps(one("a", "F32", [2], 1 << 60, (1 << 60) + 8)).encode()) + b"0" * 8,
    "dtype": header(json.dumps(one("a", "F6_E2M3", [4], 0, 3)).encode()) + b"000",
    "list": header(b"[]"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_odd_safetensors_headers(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"a.alpha": 10**400}, "a.alpha", id="alpha-huge"),
        pytest.param({"a.alpha": True}, "a.alpha must be a number", id="alpha-true"),
        pytest.param({"a.alpha": torch.tensor(True)}, "a.alpha must be a number", id="alpha-tensor-true"),
        pytest.param({"a.alpha": torch.tensor(float("nan"))}, "a.alpha is nan", id="alpha-nan"),
        pytest.param({"a.alpha": "8"}, "a.alpha must be a number", id="alpha-text"),
        pytest.param({"x" * 2000: DOWN}, "2000 letters", id="key-long"),
        pytest.param({3: DOWN}, "keys must be strings, got 3", id="key-number"),
        pytest.param({(1,) * 9: DOWN}, "keys must be strings", id="key-tuple"),
        pytest.param({"a.lora_A.weight": "text"}, "a.lora_A.weight must be a tensor", id="value-text"),
    ],
)
def test_odd_entries_of_a_file(change: dict[Any, Any], message: str, tmp_path: Path) -> None:
    state = {"a.lora_A.weight": DOWN, "a.lora_B.weight": UP, **change}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt.*{message}"):
        read(tmp_path / "x.pt")
    with pytest.raises((TypeError, ValueError), match=f"the state dict.*{message}"):
        read(state)


def test_factors_that_repeat_one_value_are_not_spread_out() -> None:
    """As large as no memory, where they do not fit each other."""
    state = {"a.lora_A.weight": torch.ones(1, 1).expand(1 << 20, 1 << 30), "a.lora_B.weight": UP}
    with pytest.raises(ValueError, match="they must be"):
        read(state)
    fitting = {"a.lora_A.weight": torch.ones(1, 1).expand(2, 3), "a.lora_B.weight": UP}
    assert read(fitting)[0].down.shape == (2, 3)
    fitting["a.lora_A.weight"] = torch.tensor([[1.0], [float("nan")]]).expand(2, 3)
    with pytest.raises(ValueError, match="NaN"):
        read(fitting)
