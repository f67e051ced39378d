"""What stands before a module's name in a file, or inside it, and in the module's own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from support.lora_files import Tree, flat
from support.lora_modules import Net, assert_same, file, merged

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

NAMES = "blocks.0.0 blocks.1.2 conv"


def renamed(state: dict[str, Tensor], stem: Callable[[str], str], halves: str = "A B") -> dict[str, Tensor]:
    ends = dict(zip((".lora_A.weight", ".lora_B.weight"), halves.split(), strict=True))
    return {
        f"{stem(key.removesuffix(end))}.lora_{half}.weight": value
        for key, value in state.items()
        for end, half in ends.items()
        if key.endswith(end)
    }


WRITERS: dict[str, tuple[Callable[[str], str], str]] = {
    **{
        prefix: (lambda name, prefix=prefix: prefix + name, "A B")
        for prefix in (
            *("_orig_mod.", "module.", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "pipe.dit."),
            *(
                "transformer.",
                "unet.",
                "lora_unet.",
                "module._orig_mod.",
                "_orig_mod.module.",
                "base_model.model.unet.",
            ),
            *("unet._orig_mod.", "module.base_model.model._orig_mod.", "_fsdp_wrapped_module.", "unet.module."),
        )
    },
    "_orig_mod inside": (lambda name: name.replace("blocks.", "blocks._orig_mod."), "A B"),
    "FSDP inside": (lambda name: name.replace("blocks.", "blocks._fsdp_wrapped_module."), "A B"),
    "checkpoints inside": (lambda name: name.replace("blocks.", "blocks._checkpoint_wrapped_module."), "A B"),
    "kohya": (lambda name: f"lora_unet_{flat(name)}", "down up"),
    "kohya of a compiled model": (lambda name: f"lora_unet_{flat('_orig_mod.' + name)}", "down up"),
    "kohya of compiled blocks": (
        lambda name: f"lora_unet_{flat(name.replace('blocks.', 'blocks._orig_mod.'))}",
        "down up",
    ),
    "OneTrainer": (lambda name: f"lora_transformer_{flat(name)}", "down up"),
    "LyCORIS": (lambda name: f"lycoris_{flat(name)}", "down up"),
    "without lora_": (lambda name: f"unet_{flat(name)}", "down up"),
    "bare": (flat, "down up"),
    "an adapter's name": (lambda name: f"unet.{name}", "A.default B.default"),
    "kohya with an adapter's name": (lambda name: f"diffusion_model.{name}", "down.default up.default"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_wraps_a_name_is_no_part_of_it(writer: str) -> None:
    net, good = Net().eval().requires_grad_(False), file(NAMES)
    x = torch.randn(2, 3, 4, 4)
    want = merged(net, (good, 1.0))(x)
    report = lora.attach(net, renamed(good, *WRITERS[writer]))
    assert set(report.matched) == set(NAMES.split()) and report.unmatched == report.elsewhere == ()
    assert_same(net(x), want)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda net: Tree(module=net), id="ddp"),
        pytest.param(lambda net: Tree(_orig_mod=net), id="compiled"),
        pytest.param(lambda net: Tree(module=Tree(_orig_mod=net)), id="both"),
        pytest.param(lambda net: Tree(_fsdp_wrapped_module=net), id="fsdp"),
        pytest.param(lambda net: Tree(unet=Tree(_orig_mod=net)), id="in-a-pipeline"),
    ],
)
@pytest.mark.parametrize("writer", ["unet.", "kohya"])
def test_what_wraps_the_model_is_no_part_of_its_names(wrap: Callable[[nn.Module], nn.Module], writer: str) -> None:
    net = wrap(Net().requires_grad_(False))
    report = lora.attach(net, renamed(file(NAMES), *WRITERS[writer]))
    assert len(report.matched) == 3
    again = lora.attach(Net().requires_grad_(False), lora.state_dict(net))
    assert set(again.matched) == set(NAMES.split())


def test_children_of_these_names_come_first() -> None:
    tree = Tree(module=nn.Linear(4, 6), te=Tree(q=nn.Linear(4, 6)), t5=nn.Linear(4, 6)).requires_grad_(False)
    factors = {"A": torch.ones(1, 4), "B": torch.ones(6, 1)}
    state = {
        f"{name}.lora_{half}.weight": value for name in ("module", "te.q", "t5") for half, value in factors.items()
    }
    assert set(lora.attach(tree, state).matched) == {"module", "te.q", "t5"}


ENCODERS = {
    **{
        prefix: f"{prefix}text_model.encoder.layers.0.q_proj"
        for prefix in (
            *("text_encoder.", "text_encoder_2.", "text_encoder_3.", "clip_l.", "clip_g.", "te.", "te1.", "te2."),
            *(
                "text_encoders.clip_l.transformer.",
                "text_encoders.qwen3_4b.transformer.",
                "cond_stage_model.transformer.",
            ),
            *("conditioner.embedders.0.transformer.", "base_model.model.text_encoder.", "lora_te1.", ""),
        )
    },
    "t5.": "t5.encoder.block.0.layer.0.SelfAttention.q",
    "t5xxl": "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    **{
        prefix: f"{prefix}text_model_encoder_layers_0_q_proj"
        for prefix in ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "te1_", "te2_", "lora_clip_l_", "lora_t5_")
    },
}


@pytest.mark.parametrize("prefix", ENCODERS)
@pytest.mark.parametrize("beside", ["unet.", "diffusion_model.", "kohya", "LyCORIS"])
def test_text_encoders_beside_a_unet_are_no_error(prefix: str, beside: str) -> None:
    halves = "down up" if prefix.endswith("_") else "A B"
    state: dict[str, Any] = renamed(file(NAMES), *WRITERS[beside])
    for half, shape in zip(halves.split(), ((2, 8), (8, 2)), strict=True):
        state[f"{ENCODERS[prefix]}.lora_{half}.weight"] = torch.ones(shape)
    if halves == "down up":
        state[f"{ENCODERS[prefix]}.alpha"] = torch.tensor(1.0)
    report = lora.attach(Net().requires_grad_(False), state)
    assert len(report.matched) == 3 and report.unmatched == ()
    assert report.elsewhere == (ENCODERS[prefix],) and report.reasons[ENCODERS[prefix]].startswith("belongs to ")


@pytest.mark.parametrize("name", ["clip_l.", "te1.", "text_encoders.clip_l.transformer.", "lora_te1_", "te1_", ""])
def test_the_same_file_at_the_text_encoder(name: str) -> None:
    encoder = Tree(text_model=Tree(encoder=Tree(layers=nn.ModuleList([Tree(q_proj=nn.Linear(8, 8))]))))
    state = renamed(file(NAMES), *WRITERS["unet."])
    for half, other in (("A", "down"), ("B", "up")):
        state[f"{ENCODERS[name]}.lora_{other if name.endswith('_') else half}.weight"] = torch.ones(
            (2, 8) if half == "A" else (8, 2)
        )
    report = lora.attach(encoder.requires_grad_(False), state)
    assert report.matched == ("text_model.encoder.layers.0.q_proj",)
    assert len(report.elsewhere) == 3 and report.unmatched == ()


def test_a_text_encoder_misses_layers_of_its_own_names() -> None:
    encoder = Tree(text_model=Tree(q_proj=nn.Linear(8, 8))).requires_grad_(False)
    pairs = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    state = {
        f"text_model.{one}.lora_{half}.weight": value for one in ("q_proj", "gone") for half, value in pairs.items()
    }
    with pytest.raises(ValueError, match=r"text_model\.gone: names no submodule"):
        lora.attach(encoder, state)
