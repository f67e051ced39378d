"""The folder that users copy into ComfyUI, loaded as ComfyUI loads it, over a stub of what it uses of ComfyUI."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample.integrations import k_diffusion
from support.k_diffusion_loops import denoiser, karras
from support.paths import ROOT

FOLDER = ROOT / "examples" / "comfyui"
OPTIONS: dict[str, Any] = {"eta": 0.7, "s_noise": 0.9, "solver_type": "heun"}
TAKEN = {
    "euler": {},
    "euler_ancestral": {"eta": 0.7, "s_noise": 0.9, "seed": 5},
    "heun": {},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {**OPTIONS, "seed": 5},
    "lcm": {"seed": 5},
    "ddim": {"eta": 0.7, "s_noise": 0.9, "seed": 5},
    "ipndm": {},
}


class KSAMPLER:
    """What comfy.samplers.KSAMPLER does with a function, without masks: initial noise, keywords, previews."""

    def __init__(self, sampler_function: Any, extra_options: Any = None, inpaint_options: Any = None) -> None:
        self.function, self.options = sampler_function, extra_options or {}

    def sample(self, model: Any, sigmas: Tensor, extra_args: dict[str, Any], preview: Any, noise: Tensor) -> Tensor:
        def callback(info: dict[str, Any]) -> None:
            preview(info["i"], info["denoised"], info["x"], len(sigmas) - 1)

        x = noise * sigmas[0]
        given: dict[str, Any] = {"extra_args": extra_args, "callback": callback, "disable": True}
        return self.function(model, x, sigmas, **given, **self.options)


class CONST:
    pass


class Wrapped:
    """A model as KSamplerX0Inpaint holds it: called with the seed among its keywords."""

    def __init__(self, sampling: object = None) -> None:
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))

    def __call__(self, x: Tensor, sigma: Tensor, *, model_options: dict[str, Any], seed: int) -> Tensor:
        return denoiser(x, sigma)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    comfy, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER, comfy.samplers = KSAMPLER, samplers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    spec = importlib.util.spec_from_file_location("custom_nodes_fastsample", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    found: dict[str, type] = module.NODE_CLASS_MAPPINGS
    return found


def sampler_of(nodes: dict[str, type], name: str) -> KSAMPLER:
    (node,) = nodes.values()
    assert node.RETURN_TYPES == ("SAMPLER",) and isinstance(node.CATEGORY, str)  # type: ignore[attr-defined]
    (sampler,) = getattr(node(), node.FUNCTION)(sampler=name, **OPTIONS)  # type: ignore[attr-defined]
    assert isinstance(sampler, KSAMPLER)
    return sampler


def run(sampler: KSAMPLER, model: Wrapped, previews: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(the sample, its noise, its sigmas), in inference mode as in ComfyUI."""
    sigmas, noise = karras(5), torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(5))
    extra_args: dict[str, Any] = {"model_options": {}, "seed": 5}
    with torch.inference_mode():
        shown = sampler.sample(model, sigmas, extra_args, lambda i, x0, x, total: previews.append(i), noise)
    return shown, noise, sigmas


def test_the_node_offers_every_function(nodes: dict[str, type]) -> None:
    (node,) = nodes.values()
    inputs = node.INPUT_TYPES()["required"]  # type: ignore[attr-defined]
    assert [f"sample_{name}" for name in sorted(inputs["sampler"][0])] == k_diffusion.__all__
    assert set(inputs) == {"sampler", *OPTIONS} and set(TAKEN) == set(inputs["sampler"][0])


@pytest.mark.parametrize("name", TAKEN)
def test_a_sampler_runs(nodes: dict[str, type], name: str) -> None:
    previews: list[int] = []
    got, noise, sigmas = run(sampler_of(nodes, name), Wrapped(), previews)
    want = getattr(k_diffusion, f"sample_{name}")(denoiser, noise * sigmas[0], sigmas, disable=True, **TAKEN[name])
    assert torch.equal(got, want) and previews == list(range(5))


@pytest.mark.parametrize("name", TAKEN)
def test_flows_are_not_given_the_noise_of_diffusions(nodes: dict[str, type], name: str) -> None:
    sampler = sampler_of(nodes, name)
    if "seed" not in TAKEN[name]:
        run(sampler, Wrapped(CONST()), [])
        return
    with pytest.raises(ValueError, match="the model is a flow"):
        run(sampler, Wrapped(CONST()), [])
    if "eta" in TAKEN[name]:
        sampler.options["eta"] = 0.0
        run(sampler, Wrapped(CONST()), [])
