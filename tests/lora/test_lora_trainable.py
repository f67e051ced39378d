"""LoRAs that are trained, and their files as attach, PEFT and diffusers read them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from support.distillation import text_to_image, unet


class Net(nn.Module):
    """A linear and a convolution inside, with odd sizes, and layers at the ends that get no LoRA."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(3, 5, 1)
            self.inner = nn.ModuleDict({"conv": nn.Conv2d(5, 7, 3, stride=2, padding=1), "linear": nn.Linear(7, 11)})
            self.embed = nn.Sequential(nn.Linear(2, 7))
            self.grouped = nn.Sequential(nn.Conv2d(11, 11, 3, groups=11, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner["conv"](self.enter(x)) + self.embed[0].bias[:, None, None]
        h = self.inner["linear"](h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.grouped(h)
        return out


X = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module, *inputs: Any, fused: bool = True, **options: Any) -> lora.Trainable:
    """A LoRA after three steps that make the outputs smaller."""
    adapted = lora.Trainable(model, **{"rank": 3} | options)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05, fused=fused)
    for _ in range(3):
        given = adapted(*inputs)
        (given if isinstance(given, Tensor) else given.sample).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def test_it_begins_as_the_model_and_leaves_it_alone() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    adapted = lora.Trainable(net, rank=4)
    torch.testing.assert_close(adapted(X), net(X), rtol=1e-5, atol=1e-6)
    trained(net, X)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_which_layers_get_one() -> None:
    paths = {key.rpartition(".lora_")[0] for key in lora.Trainable(Net()).lora()}
    assert paths == {"inner.conv", "inner.linear"}
    only = {key.rpartition(".lora_")[0] for key in lora.Trainable(Net(), targets=["linear", "enter"]).lora()}
    assert only == {"inner.linear", "enter"}
    count = sum(p.numel() for p in lora.Trainable(Net(), rank=2).parameters() if p.requires_grad)
    assert count == 2 * (5 * 9 + 7) + 2 * (7 + 11)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_without_gradients_it_computes_with_the_factors_as_they_are(fused: bool) -> None:
    """Torch does not count the writes of a fused optimizer."""
    adapted = trained(Net(), X, fused=fused)
    with torch.no_grad():
        now = adapted(X)
    torch.testing.assert_close(now, adapted(X).detach(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(now, Net()(X), atol=1e-3)


def test_gradients_are_those_of_the_definition() -> None:
    """Of y = W x + B A x in float64, against autograd on the formula."""
    net = nn.Sequential(nn.Sequential(nn.Linear(7, 5))).double()
    adapted = lora.Trainable(net, rank=2, seed=3)
    down, up = adapted.factors[0], adapted.factors[1]
    with torch.no_grad():
        up.copy_(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    adapted(x).square().sum().backward()
    a, b = (factor.detach().double().requires_grad_() for factor in (down, up))
    (net(x).detach() + x @ a.T @ b.T).square().sum().backward()
    for factor, wanted in ((down, a), (up, b)):
        assert factor.grad is not None and wanted.grad is not None
        torch.testing.assert_close(factor.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


def test_copies_and_state_dicts_are_whole() -> None:
    adapted = trained(Net(), X)
    other = copy.deepcopy(adapted)
    fresh = lora.Trainable(Net(), rank=3)
    fresh.load_state_dict(adapted.state_dict())
    with torch.no_grad():
        wanted = adapted(X)
        assert torch.equal(other(X), wanted) and torch.equal(fresh(X), wanted)
        other.factors[0].add_(1.0)
        assert torch.equal(adapted(X), wanted) and not torch.equal(other(X), wanted)


def test_it_goes_on_from_a_lora() -> None:
    adapted = trained(Net(), X)
    again = lora.Trainable(Net(), lora=adapted.lora())
    assert again.rank == 3
    with torch.no_grad():
        assert torch.equal(again(X), adapted(X))


@pytest.mark.parametrize("form", ["diffusers", "peft"])
@pytest.mark.parametrize("alpha", [None, 6.0], ids=str)
def test_attach_reads_what_save_writes(form: str, alpha: float | None, tmp_path: Path) -> None:
    adapted = trained(Net(), X)
    state: dict[str, Tensor] = adapted.lora()
    if alpha is not None:
        state |= {f"{path}.alpha": torch.tensor(alpha) for path in ("inner.conv", "inner.linear")}
    path = tmp_path / ("lora.safetensors" if form == "diffusers" else "folder")
    lora.save(state, path, format=form)
    one, other = Net(), Net()
    lora.attach(one, path)
    lora.attach(other, state)
    with torch.no_grad():
        torch.testing.assert_close(one(X), other(X), rtol=1e-5, atol=1e-5)


def test_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = trained(Net(), X)
    lora.save(adapted.lora(), tmp_path / "peft", format="peft")
    model = peft.PeftModel.from_pretrained(Net(), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(model(X), adapted(X), rtol=1e-5, atol=1e-5)


def test_diffusers_reads_it(tmp_path: Path) -> None:
    """load_lora_weights, of a pipeline that has a UNet alone."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = text_to_image()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 12))
    adapted = trained(model, *inputs)
    lora.save(adapted.lora(), tmp_path / "pytorch_lora_weights.safetensors")
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionPipeline(
        unet=copy.deepcopy(model), scheduler=scheduler, requires_safety_checker=False, **nothing
    )
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*inputs).sample, adapted(*inputs).sample, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "no module": ({"model": lambda x: x}, "model must be a torch module"),
    "no rank": ({"rank": 0}, "rank must be at least 1"),
    "names of nothing": ({"targets": ["to_q"]}, "none is named 'to_q'"),
    "nothing inside": ({"model": nn.Linear(2, 2)}, "it has none"),
    "a lora of other keys": ({"lora": {"a": torch.ones(1)}}, "lora must hold X.lora_A.weight"),
    "a lora of other layers": (
        {"lora": {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}},
        "names no submodule",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        lora.Trainable(**{"model": Net(), "rank": 2} | dict(changes))


def test_adapters_that_are_there_already_are_refused() -> None:
    net = Net()
    lora.attach(net, lora.Trainable(Net(), rank=2).lora())
    with pytest.raises(ValueError, match="detach them first"):
        lora.Trainable(net)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({}, {}, "lora must hold"),
        ({"x.lora_A.weight": torch.ones(1, 2)}, {}, "without x.lora_B.weight"),
        ({"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1), "y": torch.ones(1)}, {}, "got y"),
        (
            {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)},
            {"format": "kohya"},
            "format must",
        ),
    ],
    ids=["nothing", "half of one", "a foreign key", "another format"],
)
def test_save_refuses(state: dict[str, Tensor], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lora.save(state, tmp_path / "lora.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_layers_of_two_ranks_are_no_file(form: str, tmp_path: Path) -> None:
    state = {f"{x}.lora_A.weight": torch.ones(r, 2) for r, x in ((1, "x"), (2, "y"))}
    state |= {f"{x}.lora_B.weight": torch.ones(2, r) for r, x in ((1, "x"), (2, "y"))}
    with pytest.raises(ValueError, match="layers of one rank, got ranks 1, 2"):
        lora.save(state, tmp_path / "lora", format=form)
    assert not list(tmp_path.iterdir())


def test_a_unet_of_the_zoo_keeps_what_samplers_ask_for() -> None:
    model = unet()
    adapted = lora.Trainable(model)
    assert adapted.prediction == model.prediction and adapted.schedule is model.schedule


def test_layers_that_nothing_calls_get_none() -> None:
    """MultiheadAttention reads the weights of its last linear without calling it."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8))
    paths = {key.rpartition(".lora_")[0] for key in lora.Trainable(net).lora()}
    assert paths == {"0.linear1", "0.linear2"}
    with pytest.raises(ValueError, match=r"targets: 0.self_attn.out_proj cannot have a LoRA"):
        lora.Trainable(net, targets=["out_proj"])


def test_a_folder_of_pefts_is_whole_or_as_it_was(tmp_path: Path) -> None:
    state = lora.Trainable(Net(), rank=2).lora()
    (tmp_path / "adapter_model.safetensors").mkdir()
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(ValueError, match="adapter_model"):
        lora.save(state, tmp_path, format="peft")
    assert (tmp_path / "adapter_config.json").read_text() == "mine"
