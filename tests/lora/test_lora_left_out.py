"""Files that hold more than pairs that fit: refused whole by default, and with strict=False but for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsample import lora
from support.lora_files import Tree
from support.lora_modules import Net, Unchanged, assert_same, file, merged

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

GOOD = "blocks.0.0 conv"


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


def pair(name: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}


ONE = torch.ones(3)
# What stands beside good pairs; under which keys it is reported, and what the reason says.
BESIDE: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "textual-inversion": (
        {"bundle_emb.cat.string_to_param.*": ONE},
        ("bundle_emb.cat.string_to_param.*",),
        "bundle_emb",
    ),
    "bundle-of-a-clip": ({"bundle_emb.cat.clip_l": ONE}, ("bundle_emb.cat.clip_l",), "bundle_emb"),
    "bias-difference": ({"conv.diff_b": ONE}, ("conv.diff_b",), "whole-weight differences"),
    "weight-difference": ({"lora_unet_first.diff": ONE}, ("lora_unet_first.diff",), "whole-weight differences"),
    "own-bias": ({"conv.lora_B.bias": ONE}, ("conv.lora_B.bias",), "its own bias"),
    "norm": ({"first.w_norm": ONE, "first.b_norm": ONE}, ("first.w_norm", "first.b_norm"), "norm weights"),
    "conv1d": (pair("first", (2, 6, 3), (6, 2, 1)), ("first",), "do not fit"),
    "conv4d": (pair("first", (2, 6, 1, 1, 1, 1), (6, 2, 1, 1, 1, 1)), ("first",), "two axes each"),
    "convolution-on-a-linear": (pair("first", (2, 6, 3, 3), (6, 2, 1, 1)), ("first",), "do not fit"),
    "kernel": (pair("first", (2, 6, 3, 3), (6, 2, 3, 3)), ("first",), "without a kernel"),
    "wrong-width": (pair("first", (2, 7), (6, 2)), ("first",), "do not fit"),
    "wrong-rank": (pair("first", (2, 6), (6, 3)), ("first",), "they must be"),
    "alpha-alone": ({"first.alpha": torch.tensor(3.0)}, ("first",), "has no down factor"),
    "alpha-of-nothing": ({"lora_unet_gone.alpha": torch.tensor(3.0)}, ("lora_unet_gone",), "has no down factor"),
    "alpha-infinite": (
        {**pair("first", (2, 6), (6, 2)), "first.alpha": torch.tensor(torch.inf)},
        ("first",),
        "no finite number",
    ),
    "half": ({"first.lora_A.weight": torch.ones(2, 6)}, ("first",), "has no up factor"),
    "nan": (
        {"first.lora_A.weight": torch.full((2, 6), torch.nan), "first.lora_B.weight": torch.ones(6, 2)},
        ("first",),
        "NaN",
    ),
    "integers": (
        {"first.lora_A.weight": torch.ones(2, 6, dtype=torch.int8), "first.lora_B.weight": torch.ones(6, 2)},
        ("first",),
        "floating-point",
    ),
    "whole-module": ({"head.weight": ONE, "head.bias": ONE}, ("head.weight", "head.bias"), "no key of a LoRA's"),
    "modules-to-save": ({"a.modules_to_save.weight": ONE}, ("a.modules_to_save.weight",), "a whole module"),
    "nowhere": (pair("gone", (2, 6), (6, 2)), ("gone",), "names no submodule"),
    "no-layer": (pair("blocks.0.1", (2, 6), (6, 2)), ("blocks.0.1",), "a GELU, neither a linear nor"),
    "dora": (
        {**pair("first", (2, 6), (6, 2)), "first.dora_scale": ONE},
        ("first.dora_scale", "first"),
        "DoRA, which is not supported",
    ),
    "peft-dora": (
        {**pair("first", (2, 6), (6, 2)), "first.lora_magnitude_vector.weight": ONE},
        ("first.lora_magnitude_vector.weight", "first"),
        "DoRA",
    ),
    "lokr": ({"first.lokr_w1": ONE, "first.lokr_w2": ONE}, ("first.lokr_w1", "first.lokr_w2"), "LoKr"),
    "lokr-alpha": (
        {"first.lokr_w1": ONE, "first.alpha": torch.tensor(1.0)},
        ("first.lokr_w1", "first"),
        "LoKr",
    ),
    "twice": (
        {**pair("first", (2, 6), (6, 2)), **pair("unet.first", (2, 6), (6, 2))},
        ("first", "unet.first"),
        "all name first",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_fits_is_attached_and_the_rest_reported(net: Net, name: str) -> None:
    beside, keys, reason = BESIDE[name]
    good, unchanged = file(GOOD), Unchanged(net)
    state = {**good, **beside}
    with pytest.raises(ValueError, match=f"(?s)the state dict: {len(keys)} of its parts.*strict=False.*{reason}"):
        lora.attach(net, state)
    unchanged.check()
    report = lora.attach(net, state, strict=False)
    assert set(report.matched) == set(GOOD.split())
    assert sorted(report.unmatched) == sorted(keys) and report.elsewhere == ()
    assert all(report.reasons[key] for key in keys) and reason in report.reasons[keys[0]]
    x = unchanged.inputs[0]
    lora.detach(net)
    want = merged(net, (good, 1.0))(x)
    lora.attach(net, state, strict=False)
    assert_same(net(x), want)


def test_a_file_of_which_nothing_fits(net: Net) -> None:
    unchanged = Unchanged(net)
    report = lora.attach(net, {"x.lokr_w1": ONE, "y.weight": ONE}, strict=False)
    assert report.matched == () and set(report.unmatched) == {"x.lokr_w1", "y.weight"}
    unchanged.check()


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_cannot_have_adapters(net: Net) -> None:
    net.odd = Odd(6, 6)
    state = {**file(GOOD), **pair("odd", (2, 6), (6, 2))}
    with pytest.raises(TypeError, match=r"odd: .*plain Linear"):
        lora.attach(net, state)
    report = lora.attach(net, state, strict=False)
    assert set(report.matched) == set(GOOD.split()) and type(net.odd) is Odd
    assert report.unmatched == ("odd",) and "its forward is not Linear's own" in report.reasons["odd"]


def test_swap_takes_whole_files_alone(net: Net) -> None:
    lora.attach(net, file(GOOD))
    unchanged = Unchanged(net)
    with pytest.raises(ValueError, match="whole-weight"):
        lora.swap(net, {**file(GOOD), "conv.diff_b": ONE})
    unchanged.check()


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"text_encoder.text_model.head.weight": ONE}, id="whole-module"),
        pytest.param({"lora_te1_text_model_head.diff": ONE}, id="difference"),
        pytest.param({"text_encoders.clip_l.transformer.position.diff_b": ONE}, id="comfy"),
        pytest.param(pair("clip_g.layer", (2, 6), (6, 3)), id="pair"),
        pytest.param({"te2.layer.lokr_w1": ONE}, id="lokr"),
    ],
)
def test_what_is_wrong_with_another_component_is_no_error_here(net: Net, extra: dict[str, Any]) -> None:
    good = {f"unet.{key}": value for key, value in file(GOOD).items()}
    report = lora.attach(net, {**good, **extra})
    assert set(report.matched) == set(GOOD.split()) and not report.unmatched
    assert len(report.elsewhere) == 1 and report.reasons[report.elsewhere[0]].startswith("belongs to text_encoder")


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
def test_a_peft_folder_with_biases_and_a_whole_module(tmp_path: Path) -> None:
    model = Tree(q=nn.Linear(4, 6), head=nn.Linear(6, 2))
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q"], modules_to_save=["head"], lora_bias=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    plain = Tree(q=nn.Linear(4, 6), head=nn.Linear(6, 2)).requires_grad_(False)
    with pytest.raises(ValueError, match="bias"):
        lora.attach(plain, tmp_path)
    report = lora.attach(plain, tmp_path, strict=False)
    assert report.matched == ("q",) and list(report.scales) == ["adapter_config.json"]
    assert any("head" in key for key in report.unmatched) and any("bias" in key for key in report.unmatched)
    layer = theirs.base_model.model.q
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    state = lora.state_dict(plain)
    assert torch.equal(state["q.lora_B.weight"], 3 * up) and torch.equal(state["q.lora_A.weight"], down)


def test_a_configuration_that_gives_all_pairs_another_meaning_is_never_forgiven(tmp_path: Path) -> None:
    save_file(pair("first", (2, 6), (6, 2)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"fan_in_fan_out": true}')
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        lora.attach(Net(), tmp_path, strict=False)
