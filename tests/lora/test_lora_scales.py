"""Every place where an alpha is stated, and what the report says of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsample import lora
from support.lora_files import DOWN, UP, Net, read
from support.lora_modules import small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

PAIR = {"0.lora_A.weight": DOWN, "0.lora_B.weight": UP}  # of rank 2


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5)).requires_grad_(False)


def factor_of(report: lora.Report, module: nn.Module) -> float:
    """How many times B A the module got, whose B A's are DOWN's and UP's."""
    [path] = report.matched
    state = lora.state_dict(module)
    got = state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
    return float((got / (UP @ DOWN)).nanmean())


def config(**fields: Any) -> str:
    return json.dumps({"peft_type": "LORA", **fields})


HEADERS = {
    "alpha": ({"alpha": "8"}, 4.0, "alpha of the header"),
    "lora_alpha": ({"lora_alpha": "8"}, 4.0, "lora_alpha of the header"),
    "lora_alpha-float": ({"lora_alpha": "8.0", "format": "pt"}, 4.0, "lora_alpha of the header"),
    "network_alpha": ({"network_alpha": "1"}, 0.5, "network_alpha of the header"),
    "kohya": ({"ss_network_alpha": "8.0", "ss_network_dim": "2"}, 4.0, "ss_network_alpha of the header"),
    "kohya-none": ({"ss_network_alpha": "None"}, 1.0, "no alpha stated"),
    "kohya-dynamic": ({"ss_network_alpha": "Dynamic"}, 1.0, "no alpha stated"),
    "with-rank": ({"transformer.lora_alpha": "8", "transformer.r": "2"}, 4.0, "transformer.lora_alpha of the header"),
    "of-a-unet": ({"unet.lora_alpha": "8", "text_encoder.lora_alpha": "1"}, 4.0, "unet.lora_alpha of the header"),
    "rslora": ({"lora_alpha": "8", "use_rslora": "true"}, 8 / math.sqrt(2), "lora_alpha of the header"),
    "alpha-pattern": ({"lora_alpha": "1", "alpha_pattern": '{"0": 8}'}, 4.0, "lora_alpha of the header"),
    "twice-alike": ({"alpha": "8", "lora_alpha": "8.0"}, 4.0, "alpha of the header"),
    "null": ({"alpha": "None"}, 1.0, "no alpha stated"),
    "other-words": ({"alphabet": "8", "step": "8", "epoch": "3"}, 1.0, "no alpha stated"),
    "text-encoders-alone": ({"text_encoder.lora_alpha": "8"}, 1.0, "no alpha stated"),
    "peft": ({"lora_adapter_metadata": config(r=2, lora_alpha=8)}, 4.0, "lora_adapter_metadata of the header"),
    "peft-of-a-transformer": (
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})},
        4.0,
        "lora_adapter_metadata of the header",
    ),
    "lora_config": ({"lora_config": config(lora_alpha=8)}, 4.0, "lora_config of the header"),
    "peft-first": (
        {"lora_adapter_metadata": config(lora_alpha=8), "alpha": "1"},
        4.0,
        "lora_adapter_metadata of the header",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    header, factor, origin = HEADERS[name]
    save_file(PAIR, tmp_path / "style.safetensors", metadata=header)
    module = net()
    report = lora.attach(module, tmp_path / "style.safetensors")
    assert factor_of(report, module) == pytest.approx(factor, rel=1e-6)
    assert report.scales == {origin: ("0",)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param({"alpha": "much"}, r"alpha of the header must be a finite number, got 'much'", id="word"),
        pytest.param({"lora_alpha": "nan"}, "lora_alpha of the header", id="nan"),
        pytest.param({"lora_alpha": "1e999"}, "lora_alpha of the header", id="inf"),
        pytest.param({"alpha": "true"}, "lora_alpha of its configuration must be a finite number", id="truth"),
        pytest.param({"alpha": "8", "lora_alpha": "4"}, "alpha and lora_alpha, which differ", id="two"),
        pytest.param(
            {"lora_alpha": "8", "r": "4"},
            r"0 has rank 2, its configuration says 4 \(lora_alpha of the header\)",
            id="rank",
        ),
    ],
)
def test_headers_that_are_refused(header: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "style.safetensors", metadata=header)
    with pytest.raises(ValueError, match=rf"style\.safetensors.*{message}"):
        lora.attach(net(), tmp_path / "style.safetensors")


def test_a_header_is_not_asked_where_the_layers_say_it(tmp_path: Path) -> None:
    header = {"alpha": "much", "rank": "high", "ss_network_alpha": "8"}
    save_file({**PAIR, "0.alpha": torch.tensor(6.0)}, tmp_path / "x.safetensors", metadata=header)
    assert [entry.factor for entry in read(tmp_path / "x.safetensors")] == [3.0]


@pytest.mark.parametrize("name", ["style.safetensors", "pytorch_lora_weights.safetensors", "x.bin", "adapter_model.pt"])
def test_a_configuration_beside_a_file_of_any_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(PAIR, path)
    else:
        torch.save(PAIR, path)
    (tmp_path / "adapter_config.json").write_text(config(r=2, lora_alpha=8))
    module = net()
    report = lora.attach(module, path)
    assert factor_of(report, module) == 4.0 and report.scales == {"adapter_config.json": ("0",)}


def test_a_configuration_beside_counts_after_what_the_file_says_itself(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    (tmp_path / "adapter_config.json").write_text(config(r=7, lora_alpha=8))
    save_file(PAIR, path, metadata={"alpha": "1"})
    assert [entry.factor for entry in read(path)] == [0.5]
    save_file({**PAIR, "0.alpha": torch.tensor(6.0)}, path)
    assert [entry.factor for entry in read(path)] == [3.0]
    save_file(PAIR, path)
    with pytest.raises(ValueError, match=r"0 has rank 2, its configuration says 7 \(adapter_config\.json\)"):
        read(path)
    assert [entry.factor for entry in read(path, alpha=4)] == [2.0]


@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "0.alpha", "0.lora_alpha"])
def test_alphas_among_the_tensors(key: str) -> None:
    module = net()
    report = lora.attach(module, {**PAIR, key: torch.tensor(8.0)})
    assert factor_of(report, module) == 4.0
    assert list(report.scales) == ["alpha keys beside the factors" if key.startswith("0.") else f"the key {key}"]


def test_no_alpha_is_said() -> None:
    module = net()
    report = lora.attach(module, PAIR)
    assert factor_of(report, module) == 1.0 and report.scales == {"no alpha stated": ("0",)}


@pytest.mark.parametrize("stated", [{}, {"0.alpha": torch.tensor(6.0)}], ids=["silent", "stated"])
@pytest.mark.parametrize("alpha", [8, 0.5, -2.0])
def test_the_argument_alpha(alpha: float, stated: dict[str, Any]) -> None:
    module = net()
    report = lora.attach(module, {**PAIR, **stated}, alpha=alpha)
    assert factor_of(report, module) == alpha / 2 and list(report.scales) == ["the argument alpha"]
    lora.swap(module, {**PAIR, **stated}, alpha=2 * alpha)
    assert factor_of(report, module) == alpha


def test_the_argument_alpha_of_rank_stabilised_loras(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "x.safetensors", {"lora_adapter_metadata": config(lora_alpha=1, use_rslora=True)})
    assert [entry.factor for entry in read(tmp_path / "x.safetensors", alpha=8)] == [8 / math.sqrt(2)]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "8", True, torch.ones(2)], ids=repr)
def test_an_alpha_that_is_refused(alpha: Any) -> None:
    module = net()
    with pytest.raises((ValueError, TypeError), match="alpha must be"):
        lora.attach(module, PAIR, alpha=alpha)
    assert type(module[0]) is nn.Linear


def test_each_component_has_its_own_statement(tmp_path: Path) -> None:
    state = {
        f"{one}.0.lora_{half}.weight": value.clone()
        for one in ("unet", "text_encoder")
        for half, value in (("A", DOWN), ("B", UP))
    }
    save_file(state, tmp_path / "x.safetensors", {"unet.lora_alpha": "8", "text_encoder.lora_alpha": "1"})
    assert {entry.component: entry.factor for entry in read(tmp_path / "x.safetensors")} == {
        "unet": 4.0,
        "text_encoder": 0.5,
    }


# PEFT's models themselves


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lora_alpha": 8}, id="alpha"),
        pytest.param({"lora_alpha": 8, "use_rslora": True}, id="rslora"),
        pytest.param({"rank_pattern": {"q": 3}, "alpha_pattern": {"block.q": 7, "k": 2}}, id="patterns"),
    ],
)
def test_a_live_peft_model(options: dict[str, Any]) -> None:
    plain = Net().requires_grad_(False)
    targets = ["q", "k", "conv", "point"]
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    )
    report = lora.attach(plain, theirs)
    assert report.scales == {"the layers of the PeftModel": tuple(report.matched)}
    assert set(report.matched) == {"q", "k", "block.q", "block.conv", "block.point"}
    for name in report.matched:
        layer = theirs.base_model.model.get_submodule(name)
        got = products_of(lora.state_dict(plain), name)
        want = layer.get_delta_weight("default").flatten(1)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def products_of(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return state[f"{name}.lora_B.weight"].flatten(1) @ state[f"{name}.lora_A.weight"].flatten(1)


def test_a_live_model_of_diffusers_with_two_adapters() -> None:
    plain = small_unet().requires_grad_(False)
    theirs = copy.deepcopy(plain)
    for name, alpha in (("one", 8), ("two", 3)):
        theirs.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "conv1"], init_lora_weights=False), name
        )
    with pytest.raises(
        ValueError, match=r"source must have one active adapter: of 'one', 'two' .* 'one', 'two' active"
    ):
        theirs.set_adapters(["one", "two"])
        lora.attach(plain, theirs)
    theirs.set_adapters("one")
    report = lora.attach(plain, theirs)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 5, 12)
    with torch.no_grad():
        got, want = (model.eval()(x, t, context).sample for model in (plain, theirs))
    assert len(report.matched) > 4 and (got - want).abs().max() <= 1e-5 * want.abs().max()
    theirs.set_adapters("one", 0.5)
    lora.swap(plain, theirs)
    with torch.no_grad():
        got, want = (model(x, t, context).sample for model in (plain, theirs))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), "the layers' scale is what the model runs with"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"use_dora": True}, "DoRA", id="dora"),
        pytest.param({"lora_bias": True}, "bias", id="bias"),
        pytest.param({"modules_to_save": ["conv"]}, "block.conv.weight", id="whole-module"),
        pytest.param({"bias": "all"}, "bias", id="biases"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
def test_live_models_of_other_kinds(options: dict[str, Any], message: str) -> None:
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q"], **options))
    with pytest.raises(ValueError, match=f"the PeftModel.*{message}"):
        lora.attach(Net(), theirs)


def test_a_model_without_adapters_is_no_source() -> None:
    with pytest.raises(TypeError, match="a Linear without PEFT's adapters"):
        lora.attach(net(), nn.Linear(3, 5))  # type: ignore[arg-type]
