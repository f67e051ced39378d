"""LoRA files that are refused, and tensors that are taken as they are."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from support.lora_files import DOWN, PEFT, UP, Net, assert_equal, peft_model, read

# Tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_state_dicts_tensors_are_taken_as_they_are(dtype: torch.dtype) -> None:
    down, up = nn.Parameter(DOWN.to(dtype)), nn.Parameter(UP.to(dtype))
    (entry,) = read({"a.lora_A.weight": down, "a.lora_B.weight": up})
    assert entry.down is down and entry.up is up


def test_a_file_written_over_later_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(PEFT))
    (entry,) = read(path)
    path.write_bytes(save({key: value * 0 for key, value in PEFT.items()}))
    assert torch.equal(entry.down, DOWN) and torch.equal(entry.up, UP)


CONV_DOWN, CONV_UP = torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        pytest.param(DOWN * math.nan, UP, r"a\.lora_A\.weight holds NaN", id="nan"),
        pytest.param(DOWN, UP / 0, r"a\.lora_B\.weight holds NaN or infinity", id="inf"),
        pytest.param(DOWN, UP.int(), r"a\.lora_B\.weight must hold floating-point.*int32", id="int"),
        pytest.param(DOWN.to(torch.complex64), UP, r"lora_A.*complex64", id="complex"),
        pytest.param(DOWN, UP.to("meta"), r"lora_B.*meta", id="meta"),
        pytest.param(DOWN, UP.to_sparse(), r"lora_B.*sparse", id="sparse"),
        pytest.param(DOWN[:1], UP, r"lora_A.* has shape \(1, 3\), .*lora_B.* \(5, 2\)", id="ranks"),
        pytest.param(DOWN[:0], UP[:, :0], "an axis is empty", id="rank-0"),
        pytest.param(DOWN.T, UP.T, r"\(3, 2\).*\(2, 5\)", id="transposed"),
        pytest.param(DOWN, UP[0], "two axes each", id="vector"),
        pytest.param(DOWN[(..., *[None] * 4)], UP[(..., *[None] * 4)], "two axes each", id="conv4d"),
        pytest.param(CONV_DOWN, UP, "two axes each", id="conv-and-linear"),
        pytest.param(CONV_DOWN, CONV_DOWN.transpose(0, 1), "without a kernel", id="kernel-in-up"),
    ],
)
def test_factors_that_are_refused(down: Tensor, up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"the state dict: .*{message}"):
        read({"a.lora_A.weight": down, "a.lora_B.weight": up})


def test_convolutions_are_taken() -> None:
    (entry,) = read({"a.lora_A.weight": CONV_DOWN, "a.lora_B.weight": CONV_UP, "a.alpha": torch.tensor(1.0)})
    assert entry.down is CONV_DOWN and entry.up is CONV_UP and entry.factor == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"b.lora_A.weight": DOWN}, r"b\.lora_A\.weight has no up factor", id="down-alone"),
        pytest.param({"b.lora_B.weight": UP}, r"b\.lora_B\.weight has no down factor", id="up-alone"),
        pytest.param({"b.alpha": torch.tensor(1.0)}, r"b\.alpha has no", id="alpha-alone"),
        pytest.param({"base_model.model.a.lora_down.weight": DOWN}, "are the same factor of one module", id="twice"),
        pytest.param({"base_model.model.a.alpha": DOWN}, r"a\.alpha must be one number", id="alpha-matrix"),
        pytest.param({"base_model.model.a.alpha": torch.tensor(math.inf)}, r"a\.alpha is inf", id="alpha-inf"),
        pytest.param({"conv.weight": DOWN, "x": UP}, r"conv\.weight, x: no key of a LoRA's", id="other-keys"),
    ],
)
def test_state_dicts_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the state dict.*{message}"):
        read({**PEFT, **change})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(3, "source must be a path, a state dict or a PEFT model, got int", id="number"),
        pytest.param(b"x", "got bytes", id="bytes"),
        pytest.param(None, "got NoneType", id="none"),
        pytest.param([("a", DOWN)], "got list", id="list"),
        pytest.param({1: DOWN}, "keys must be strings, got 1", id="key"),
        pytest.param({**PEFT, "base_model.model.a.lora_B.weight": [1.0]}, "must be a tensor, got list", id="value"),
        pytest.param({**PEFT, "base_model.model.a.alpha": "1"}, "must be a number, got str", id="alpha"),
    ],
)
def test_types_that_are_refused(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        pytest.param(["lora_unet_a.dora_scale"], "DoRA", id="dora"),
        pytest.param(["base_model.model.a.lora_magnitude_vector"], "DoRA", id="peft-dora"),
        pytest.param(["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b"], "LoHa", id="loha"),
        pytest.param(["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2_a"], "LoKr", id="lokr"),
        pytest.param(["lora_unet_a.lora_mid.weight"], "Tucker", id="tucker"),
        pytest.param(["a.lora_embedding_A", "a.lora_embedding_B"], "embedding", id="embedding"),
        pytest.param(["a.lora_B.bias"], "bias", id="bias"),
        pytest.param(["a.lora_E", "a.ranknum"], "AdaLoRA", id="adalora"),
        pytest.param(["lora_unet_a.oft_blocks"], "OFT", id="oft"),
        pytest.param(["base_model.model.a.ia3_l"], "IA3", id="ia3"),
        pytest.param(["diffusion_model.norm.diff", "diffusion_model.a.diff_b"], "whole-weight differences", id="diff"),
        pytest.param(["lora_unet_norm.w_norm", "lora_unet_norm.b_norm"], "norm weights", id="norm"),
        pytest.param(["lora_controlnet"], "Control-LoRA", id="control-lora"),
    ],
)
def test_other_kinds_are_refused_by_name(keys: list[str], kind: str) -> None:
    state = {**PEFT, **dict.fromkeys(keys, torch.ones(1))}
    with pytest.raises(ValueError, match=f"the state dict: .*{', '.join(keys)}: .*{kind}.* not supported$"):
        read(state)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT of its own biases
def test_real_peft_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kinds = {
        "DoRA": peft.LoraConfig(target_modules=["q"], use_dora=True),
        "LoHa": peft.LoHaConfig(target_modules=["q"]),
        "LoKr": peft.LoKrConfig(target_modules=["q"]),
        "OFT": peft.OFTConfig(target_modules=["q"], r=1, oft_block_size=0),
        "IA3": peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=["q"], total_step=9),
        "bias": peft.LoraConfig(target_modules=["q"], lora_bias=True),
    }
    for kind, config in kinds.items():
        model = peft.get_peft_model(Net(), config)
        with pytest.raises(ValueError, match=kind):
            read(peft.get_peft_model_state_dict(model))
        model.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"(?i){kind}"):
            read(tmp_path / kind)


# Configurations


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        pytest.param({"use_dora": True}, "DoRA", id="dora"),
        pytest.param({"lora_bias": True}, "bias", id="bias"),
        pytest.param({"fan_in_fan_out": True}, "fan_in_fan_out", id="transposed"),
        pytest.param({"peft_type": "ADALORA"}, "ADALORA", id="adalora"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4", id="pissa"),
        pytest.param({"layer_replication": [[0, 1]]}, "layer replication", id="replication"),
        pytest.param({"rank_pattern": {"block.q": 5}}, r"block\.q has rank 4.* says 5", id="other-rank"),
        pytest.param({"r": 8}, "has rank 4, its configuration says 8", id="rank"),
        pytest.param({"alpha_pattern": {"q(": 5}}, r"alpha_pattern holds 'q\('", id="pattern"),
        pytest.param({"lora_alpha": "6"}, "lora_alpha of .* must be a finite number, got '6'", id="alpha"),
    ],
)
def test_peft_configurations_that_are_refused(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    peft_model(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{kind}"):
        read(tmp_path)


@pytest.mark.parametrize("text", [pytest.param("{", id="half"), pytest.param("[1]", id="list")])
def test_a_broken_configuration(text: str, tmp_path: Path) -> None:
    peft_model(r=4).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read(tmp_path)


# Files


WHOLE = save(PEFT)


def test_truncated_safetensors_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole safetensors file")):
            read(path)
    path.write_bytes(WHOLE)
    assert_equal(read(path), {"a": (DOWN, UP, 1.0)})


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({}))
    with pytest.raises(ValueError, match=re.escape(f"{path} is empty")):
        read(path)


class _Runs:
    """A pickle of it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_of_bare_tensors_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(PEFT, path)
    assert_equal(read(path), {"a": (DOWN, UP, 1.0)})
    torch.save({"state_dict": PEFT, "epoch": 3}, path)
    assert_equal(read(path), {"a": (DOWN, UP, 1.0)})


def test_other_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "x.bin", tmp_path / "ran"
    torch.save({**PEFT, "a": _Runs(marker)}, path)
    with pytest.raises(ValueError, match=r"x\.bin is refused: it is a pickle.*system") as caught:
        read(path)
    assert not marker.exists()
    assert "False" not in str(caught.value), "torch's advice to switch the check off is not passed on"
    for content in (b"", b"junk", path.read_bytes()[:99]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.bin is refused"):
            read(path)
    torch.save([DOWN], path)
    with pytest.raises(ValueError, match=r"x\.bin holds a list, not a state dict"):
        read(path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no LoRA file at"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"no LoRA file in {tmp_path}")):
        read(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt.*\.safetensors"):
        read(tmp_path / "notes.txt")
    save_file(PEFT, tmp_path / "one.safetensors")
    assert len(read(tmp_path)) == 1
    save_file(PEFT, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"2 safetensors files: one\.safetensors, two\.safetensors"):
        read(tmp_path)
    named = {"b.lora_A.weight": DOWN, "b.lora_B.weight": UP}
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors")
    assert [entry.key for entry in read(str(tmp_path))] == ["b"]
