"""attach and what follows it with files and arguments that cannot work: the module stays as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora.layers import frozen_linears
from support.lora_modules import KEEP, Net, State, Unchanged, file

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


def corrupt(**changes: Any) -> State:
    return {**file(), **{f"{key.replace('__', '.')}.weight": value for key, value in changes.items()}}


def odd() -> State:
    return {f"odd.lora_{half}.weight": torch.ones(6, 6) for half in "AB"}


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nan": (lambda _: corrupt(first__lora_A=torch.full((2, 6), torch.nan)), ValueError, "first"),
    "shape": (lambda _: corrupt(first__lora_A=torch.ones(2, 7)), ValueError, "first: .*do not fit"),
    "rank": (lambda _: corrupt(first__lora_A=torch.ones(3, 6)), ValueError, "first"),
    "half": (lambda _: {"first.lora_A.weight": torch.ones(2, 6)}, ValueError, "first"),
    "unmatched": (lambda _: corrupt(gone__lora_A=torch.ones(1, 1), gone__lora_B=torch.ones(1, 1)), ValueError, "gone"),
    "dora": (lambda _: {**file(), "first.dora_scale": torch.ones(6, 1)}, ValueError, "DoRA.*first"),
    "loha": (lambda _: {"lora_unet_first.hada_w1_a": torch.ones(6, 2)}, ValueError, "LoHa"),
    "lokr": (lambda _: {"lora_unet_first.lokr_w1": torch.ones(6, 2)}, ValueError, "LoKr"),
    "empty": (lambda _: {}, ValueError, "empty"),
    "none": (lambda _: None, TypeError, "source"),
    "missing": (lambda path: path / "gone.safetensors", FileNotFoundError, "gone"),
    "truncated": (lambda path: truncated(path / "cut.safetensors"), ValueError, "cut.safetensors"),
    "pickle": (lambda path: pickled(path / "evil.bin"), ValueError, "evil.bin"),
    "not-linear": (lambda _: {**file(), **odd()}, TypeError, "odd: .*plain Linear .*Odd"),
}


def truncated(path: Path) -> Path:
    safetensors.torch.save_file(file(), path)
    path.write_bytes(path.read_bytes()[:-8])
    return path


def pickled(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"first.lora_A.weight": Net()}, protocol=2))
    return path


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "attached"])
def test_a_bad_source_leaves_the_module_alone(net: Net, name: str, attached: bool, tmp_path: Path) -> None:
    net.odd = Odd(6, 6)
    if attached:
        lora.attach(net, file("first conv"), "before")
    unchanged = Unchanged(net)
    make, error, message = BAD[name]
    source = make(tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        lora.attach(net, source, keep_weight=False)
    unchanged.check()
    with pytest.raises((error, ValueError)):
        lora.swap(net, source, "before")
    unchanged.check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(name="before"), ValueError, "'before' is attached"),
        (dict(name=""), TypeError, "name must be"),
        (dict(scale=float("nan")), ValueError, "scale must be finite"),
        (dict(scale="1"), TypeError, "scale must be a number"),
        (dict(capacity=1), ValueError, "capacity is 1, the rank is 2 in conv"),
        (dict(capacity=0), ValueError, "capacity must be"),
        (dict(keep_weight=False), ValueError, r"other modules share: blocks\.0\.0$"),
    ],
    ids=["name-taken", "name", "scale-nan", "scale-str", "rank", "capacity", "tied"],
)
def test_bad_arguments_leave_the_module_alone(net: Net, options: Any, error: Any, message: str) -> None:
    net.blocks[1][0].weight = net.blocks[0][0].weight
    lora.attach(net, file("first"), "before")
    unchanged = Unchanged(net)
    with pytest.raises(error, match=message):
        lora.attach(net, file(), **options)
    unchanged.check()


@KEEP
@pytest.mark.parametrize("step", ["pack_linear", "mark", "pack_adapters"])
@pytest.mark.parametrize("passed", [0, 1, 2])
def test_a_failure_half_way_leaves_the_module_alone(
    net: Net, keep_weight: bool, step: str, passed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.attach(net, file("first"), "before", keep_weight=keep_weight)
    unchanged = Unchanged(net)
    original, calls = getattr(frozen_linears, step), iter([*[False] * passed, True])

    def failing(*args: Any) -> Any:
        if next(calls, False):
            raise MemoryError
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(frozen_linears, step, failing)
        lora.attach(net, file(), keep_weight=keep_weight)
    unchanged.check(storage=keep_weight)
    assert not net.blocks[0][0].weight.isnan().any()


def test_merged_layers_take_no_more(net: Net) -> None:
    lora.attach(net, file())
    lora.attach(net, file("conv"), "other")
    net.first.merge()
    unchanged = Unchanged(net)
    for refused in (
        lambda: lora.attach(net, file("conv"), "more"),
        lambda: lora.swap(net, file("conv")),
        lambda: lora.set_adapters(net, {}),
        lambda: lora.detach(net, "other"),
    ):
        with pytest.raises(RuntimeError, match="unmerge"):
            refused()
    unchanged.check()


def test_names_are_checked(net: Net) -> None:
    for call in (lambda: lora.detach(net, "x"), lambda: lora.swap(net, file(), "x"), lambda: lora.state_dict(net, "x")):
        with pytest.raises(ValueError, match="'x', there is none"):
            call()
    with pytest.raises(ValueError, match="name must say which adapter: none"):
        lora.state_dict(net)
    lora.attach(net, file(), "a")
    lora.attach(net, file("first"), "b")
    unchanged = Unchanged(net)
    with pytest.raises(ValueError, match="which adapter: 'a', 'b'"):
        lora.state_dict(net)
    with pytest.raises(ValueError, match="'x', there is 'a', 'b'"):
        lora.set_adapters(net, {"a": 1.0, "x": 1.0})
    with pytest.raises(TypeError, match="'b' must be a number"):
        lora.set_adapters(net, {"a": 0.0, "b": None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="torch module, got int"):
        lora.set_adapters(3, {})  # type: ignore[arg-type]
    unchanged.check()


def test_swap_takes_no_other_layers(net: Net) -> None:
    lora.attach(net, file("conv"), "a")
    lora.attach(net, file("first"), "b")
    unchanged = Unchanged(net)
    with pytest.raises(ValueError, match="1 layers have no adapter 'a' to swap: first"):
        lora.swap(net, file("conv first"), "a")
    with pytest.raises(ValueError, match="rank 3, capacity is 2"):
        lora.swap(net, file("first", rank=3), "b")
    unchanged.check()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1], TypeError, "got list"),
        (torch.tensor([0.0]), TypeError, "float32 of shape"),
        (torch.tensor(0), TypeError, r"shape \(\)"),
        (torch.tensor([0, 2]), ValueError, r"0 \(one\), 1 \(two\); got \[0, 2\]"),
        (torch.tensor([-2]), ValueError, r"got \[-2\]"),
    ],
    ids=["list", "float", "0d", "above", "below"],
)
def test_set_adapter_index_refuses(net: Net, index: Any, error: Any, message: str) -> None:
    lora.attach(net, file(), "one")
    lora.attach(net, file("first"), "two")
    unchanged = Unchanged(net)
    with pytest.raises(error, match=message):
        lora.set_adapter_index(net, index)
    unchanged.check()
