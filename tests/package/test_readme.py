"""What README and pages in docs promise: their Python runs, set-up lines are single."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0][:40])
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_examples_of_training_run() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Tensor] = {}
    exec(compile(code, "training.md", "exec"), found)
    assert found["network"].weight.grad.isfinite().all()  # type: ignore[attr-defined]


def test_examples_of_lora_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet_2d_condition = pytest.importorskip("diffusers").UNet2DConditionModel
    unet = unet_2d_condition(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=4,
    ).requires_grad_(False)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    for name, rank in (("style", 4), ("sketch", 16)):
        factors = {}
        for path, linear in unet.named_modules():
            if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                factors[f"unet.{path}.lora_A.weight"] = torch.randn(rank, linear.in_features)
                factors[f"unet.{path}.lora_B.weight"] = torch.randn(linear.out_features, rank)
        save_file(factors, f"{name}.safetensors")
    page = (ROOT / "docs" / "lora.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    exec(compile(code, "lora.md", "exec"), {"unet": unet})
    assert Path("copy.safetensors").is_file()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_two_setup_commands_that_read_the_lock() -> None:
    commands = blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1 and "-c constraints.txt" in command and "-m venv" in command
