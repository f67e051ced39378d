"""What state_dict and save give has the same effect in every reader: PEFT, diffusers, and kohya's rule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastsample import lora
from support.lora_files import flat
from support.lora_modules import small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

TARGETS = ("to_q", "to_k", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut")
TOLERANCE = 1e-5


def given(unet: nn.Module, ranks: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """A file with an alpha of its own for each layer."""
    state = {}
    layers = [(name, layer) for name, layer in unet.named_modules() if name.endswith(TARGETS)]
    for i, (name, layer) in enumerate(layers):
        (out, into, *kernel), rank = layer.weight.shape, ranks[i % len(ranks)]
        state[f"{name}.lora_A.weight"] = torch.randn(rank, into, *kernel).to(dtype) / 4
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel)).to(dtype) / 4
        state[f"{name}.alpha"] = torch.tensor(7.0 if i % 2 else 1.5)
    return state


def run(unet: Any) -> Tensor:
    x, context = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 60).reshape(1, 5, 12)
    with torch.no_grad():
        return unet(x, torch.tensor([300]), context).sample


def of_diffusers(unet: Any, state: dict[str, Tensor], _: Path) -> Any:
    unet.load_lora_adapter(dict(state), prefix=None)
    return unet


def of_diffusers_file(unet: Any, state: dict[str, Tensor], path: Path) -> Any:
    save_file({f"unet.{key}": value.contiguous() for key, value in state.items()}, path / "x.safetensors")
    unet.load_lora_adapter(path, weight_name="x.safetensors", use_safetensors=True, prefix="unet")
    return unet


def of_pipelines(unet: Any, state: dict[str, Tensor], path: Path) -> Any:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    save_file({f"unet.{key}": value.contiguous() for key, value in state.items()}, path / "x.safetensors")
    found, alphas, metadata = Loader.lora_state_dict(path / "x.safetensors", return_lora_metadata=True)
    Loader.load_lora_into_unet(found, alphas, unet, metadata=metadata)
    return unet


def of_peft(unet: Any, state: dict[str, Tensor], _: Path) -> Any:
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    rank = len(next(iter(state.values())))
    pattern = {name: len(state[f"{name}.lora_A.weight"]) for name in names}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, rank_pattern=pattern, alpha_pattern=pattern, target_modules=names)
    adapted = peft.get_peft_model(unet, config)
    keys = {f"base_model.model.{key}": value for key, value in state.items()}
    assert not peft.set_peft_model_state_dict(adapted, keys).unexpected_keys
    return adapted


def of_kohya(unet: Any, state: dict[str, Tensor], _: Path) -> Any:
    """kohya's rule by hand: alpha is at the key .alpha, or r."""
    for key, down in state.items():
        name, _, half = key.partition(".lora_")
        if half != "A.weight":
            continue
        alpha, up = float(state.get(f"{name}.alpha", len(down))), state[f"{name}.lora_B.weight"]
        weight = unet.get_submodule(name).weight
        weight += (alpha / len(down) * up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)
    return unet


def of_attach(unet: Any, state: dict[str, Tensor], _: Path) -> Any:
    lora.attach(unet, {f"lora_unet_{flat(key.partition('.lora_')[0])}.{kohya_end(key)}": state[key] for key in state})
    return unet


def kohya_end(key: str) -> str:
    return "lora_down.weight" if key.endswith("A.weight") else "lora_up.weight"


READERS = [of_diffusers, of_diffusers_file, of_pipelines, of_peft, of_kohya, of_attach]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [pytest.param((3,), id="rank-3"), pytest.param((3, 5), id="ranks-3-and-5")])
@pytest.mark.parametrize("reader", READERS, ids=[reader.__name__ for reader in READERS])
@pytest.mark.filterwarnings("ignore:.*Already found a")
def test_every_reader(reader: Any, ranks: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    plain = small_unet().eval().requires_grad_(False)
    ours = copy.deepcopy(plain)
    lora.attach(ours, given(plain, ranks, dtype), scale=0.75)
    state = lora.state_dict(ours)
    assert {key.rpartition(".lora_")[2] for key in state} == {"A.weight", "B.weight"}
    want, without = run(ours), run(plain)
    got = run(reader(copy.deepcopy(plain), state, tmp_path))
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    assert (want - without).abs().max() > 1000 * TOLERANCE * want.abs().max()


@pytest.mark.parametrize(
    ("dtype", "factor", "kept"),
    [
        pytest.param(torch.float16, 1.0, torch.float16, id="1"),
        pytest.param(torch.float16, 0.25, torch.float16, id="exact"),
        pytest.param(torch.float16, 0.3, torch.float32, id="rounded"),
        pytest.param(torch.float16, 2.0**-22, torch.float32, id="underflow"),
        pytest.param(torch.float16, 2.0**20, torch.float32, id="overflow"),
        pytest.param(torch.bfloat16, 2.0**20, torch.bfloat16, id="wide"),
        pytest.param(torch.float8_e4m3fn, 0.3, torch.float32, id="float8"),
        pytest.param(torch.float64, 0.3, torch.float64, id="double"),
    ],
)
def test_b_is_scaled_without_a_rounding(dtype: torch.dtype, factor: float, kept: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 4)).requires_grad_(False)
    up = torch.tensor([[1.0], [1.125], [-0.875], [0.0]]).to(dtype)
    lora.attach(net, {"0.lora_A.weight": torch.ones(1, 3, dtype=dtype), "0.lora_B.weight": up}, scale=factor)
    got = lora.state_dict(net)["0.lora_B.weight"]
    assert got.dtype == kept
    assert torch.allclose(got.double(), up.double() * factor, rtol=2**-23, atol=0)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_saved_from_a_state_dict_with_alphas(form: str, tmp_path: Path) -> None:
    plain = small_unet().eval().requires_grad_(False)
    state = given(plain, (3,), torch.float16)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    lora.attach(ours, state)
    path = tmp_path / ("x.safetensors" if form == "diffusers" else "folder")
    lora.save(state, path, format=form)
    if form == "diffusers":
        theirs = of_diffusers(theirs, {key[5:]: value for key, value in load_file(path).items()}, tmp_path)
    else:
        theirs = peft.PeftModel.from_pretrained(theirs, path)
    want = run(ours)
    assert (run(theirs) - want).abs().max() <= TOLERANCE * want.abs().max()
