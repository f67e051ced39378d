"""fastsample.accelerate and restore on whole pipelines: the same images, and afterwards the very same pipeline."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch

import fastsample
from fastsample.integrations.acceleration import component, pipeline, projections
from fastsample.integrations.acceleration.projections import SharedLinears
from support.paths import ROOT
from support.small_pipelines import (
    FAMILIES,
    NEAR,
    Before,
    add_lora,
    ddim,
    image,
    network_of,
    quiet,
    stable_diffusion,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread_and_seed"),
    pytest.mark.filterwarnings("ignore:.*torchvision", "ignore:.*upcast_vae", "ignore:.*is_gradient_checkpointing"),
]

OWN, CONTEXT, ADDED = "to_q, to_k, to_v", "to_k, to_v", "to_q, to_k, to_v and add_q_proj, add_k_proj, add_v_proj"
# The projections that run as one, and the layers with LoRA.
DONE = {
    "sd15": ([OWN] * 2 + [CONTEXT] * 2, 16),
    "sdxl": ([OWN] * 4 + [CONTEXT] * 4, 32),
    "sd3": ([ADDED] * 2 + [OWN], 19),
    "flux": ([ADDED] * 2 + [OWN] * 2, 22),
}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_image_and_the_same_pipeline_again(family: str, lora: bool) -> None:
    pipe = FAMILIES[family]()
    plain = image(pipe)
    if lora:
        add_lora(network_of(pipe))
    before = Before(pipe)
    assert not lora or np.abs(before.image - plain).max() > 2 * NEAR, "the LoRA must matter"
    theirs = pipe.scheduler
    report = fastsample.accelerate(pipe)
    assert np.abs(image(pipe) - before.image).max() <= NEAR
    assert type(pipe.scheduler).__module__.startswith("fastsample.") and isinstance(pipe.scheduler, type(theirs))
    [network] = report.components
    projections, layers = DONE[family]
    assert report.swapped and sorted(network.fused.values()) == sorted(projections) and network.left == {}
    assert [len(paths) for paths in network.moved.values()] == [layers] * lora
    assert not any(hasattr(module, "lora_A") for module in network_of(pipe).modules())
    shared = {layer._frozen for layer in network_of(pipe).modules() if hasattr(layer, "_frozen")}
    shared = {frozen for frozen in shared if isinstance(frozen, SharedLinears)}
    assert len(shared) == sum(1 + (names == ADDED) for names in projections)
    assert all(frozen._claimed and not frozen._left_over and frozen._unclaimed is None for frozen in shared)
    fastsample.restore(pipe)
    before.check()


def test_a_prompt_with_a_lora_of_several_kinds_of_layers(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path)

    def made() -> Any:
        draws = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, height=8, width=8, output_type="np", generator=draws).images

    plain = made()
    add_lora(pipe.unet, targets=["conv1", "conv2", "proj_in", "to_q", "to_v", "to_out.0", "ff.net.2", "time_emb_proj"])
    before, state = made(), Before(pipe)
    report = fastsample.accelerate(pipe)
    after = made()
    assert np.abs(plain - before).max() > 2 * NEAR and np.abs(after - before).max() <= NEAR
    assert {"mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"} <= set(
        report.components[0].moved["style"]
    )
    fastsample.restore(pipe)
    state.check()
    assert np.array_equal(made(), before)


def test_the_report_prints_sentences() -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    pipe.set_adapters(["style"], [0.25])
    assert repr(fastsample.accelerate(pipe)).splitlines() == [
        "scheduler: DDIMScheduler of fastsample in the place of diffusers'",
        "unet: to_q, to_k, to_v as one product in 2 blocks",
        "unet: to_k, to_v as one product in 2 blocks",
        "unet: LoRA 'style' moved from PEFT, 16 layers, weight 0.25",
    ]


def test_twice_is_once() -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    before = Before(pipe)
    report = fastsample.accelerate(pipe)
    layers, scheduler = {name: id(module) for name, module in pipe.unet.named_modules()}, pipe.scheduler
    assert fastsample.accelerate(pipe) == report
    assert {name: id(module) for name, module in pipe.unet.named_modules()} == layers
    assert pipe.scheduler is scheduler
    fastsample.restore(pipe)
    before.check()
    fastsample.restore(pipe)
    before.check()


def test_restore_without_accelerate_changes_nothing() -> None:
    before = Before(stable_diffusion())
    fastsample.restore(before.pipeline)
    before.check()


def test_a_scheduler_set_after_accelerate_stays_and_is_swapped_by_another_call() -> None:
    pipe = stable_diffusion()
    fastsample.accelerate(pipe)
    chosen = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = chosen
    fastsample.restore(pipe)
    assert pipe.scheduler is chosen
    report = fastsample.accelerate(pipe)
    assert report.swapped and pipe.scheduler is not chosen
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    fastsample.restore(pipe)
    assert pipe.scheduler is chosen


def test_a_network_in_the_place_of_an_accelerated_one() -> None:
    pipe = stable_diffusion()
    first, second = pipe.unet, copy.deepcopy(pipe.unet)
    fastsample.accelerate(pipe)
    pipe.unet = second
    assert len(fastsample.accelerate(pipe).components[0].fused) == 4
    fastsample.restore(pipe)
    assert pipe.unet is second and not any(hasattr(module, "_frozen") for module in second.modules())
    pipe.unet = first
    fastsample.restore(pipe)
    assert not any(hasattr(module, "_frozen") for module in first.modules())


def test_pipelines_that_share_a_network() -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    before = Before(pipe)
    report = fastsample.accelerate(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert fastsample.accelerate(other) == report
    fastsample.restore(other)
    assert not any(hasattr(module, "_frozen") for module in pipe.unet.modules())
    fastsample.restore(pipe)
    before.check()


@pytest.mark.parametrize("pickled", [False, True], ids=["copied", "pickled"])
def test_a_copy_is_restored_by_itself(pickled: bool) -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    before = image(pipe)
    fastsample.accelerate(pipe)
    accelerated, twin = image(pipe), copy.deepcopy(pipe)
    if pickled:
        twin.unet = pickle.loads(pickle.dumps(pipe.unet))
    twin.set_adapters("style", 0.0)
    assert np.abs(image(twin) - before).max() > 2 * NEAR and np.array_equal(image(pipe), accelerated)
    twin.set_adapters("style", 1.0)
    fastsample.restore(twin)
    assert np.array_equal(image(twin), before) and not any(hasattr(m, "_frozen") for m in twin.unet.modules())
    assert np.array_equal(image(pipe), accelerated)
    fastsample.restore(pipe)
    assert np.array_equal(image(pipe), before)


def test_compiled_afterwards(fresh_compiler: None) -> None:
    """The processors' three calls are one op of the graph there too."""
    pipe = FAMILIES["flux"]()
    add_lora(pipe.transformer)
    before = Before(pipe)
    report = fastsample.accelerate(pipe)
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append(sum("lora_linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    pipe.transformer = torch.compile(pipe.transformer, backend=counting, fullgraph=True)
    assert np.abs(image(pipe) - before.image).max() <= NEAR
    kinds, paths = list(report.components[0].fused.values()), report.components[0].moved["style"]
    single = [path for path in paths if path.endswith(("to_out.0", "to_add_out"))]
    assert set(calls) == {len(kinds) + kinds.count(ADDED) + len(single)}
    assert fastsample.accelerate(pipe) == report
    fastsample.restore(pipe)
    pipe.transformer = pipe.transformer._orig_mod
    assert np.array_equal(image(pipe), before.image)
    assert not any(hasattr(module, "_frozen") for module in pipe.transformer.modules())


FAILING = {
    "packing": (projections.SharedLinears, "pack", 3),
    "adapters": (component, "slots_of", 5),
    "placing": (component, "put", 1),
    "methods": (component, "follow_scale", 1),
    "scheduler": (diffusers.StableDiffusionPipeline, "__setattr__", 1),
}


@pytest.mark.parametrize("where", FAILING)
def test_what_fails_half_way_leaves_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    before = Before(pipe)
    owner, name, count = FAILING[where]
    original, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        fails = calls == count
        result = original(*arguments, **options)
        if fails:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, failing)
        fastsample.accelerate(pipe)
    before.check()
    fastsample.accelerate(pipe)
    fastsample.restore(pipe)
    before.check()


def test_the_components_before_a_failing_one_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion()
    before = Before(pipe)

    def failing(*_: object) -> None:
        raise OSError("no scheduler today")

    monkeypatch.setattr(pipeline, "_swap", failing)
    with pytest.raises(OSError, match="no scheduler today"):
        fastsample.accelerate(pipe)
    before.check()


@pytest.mark.parametrize("function", [fastsample.accelerate, fastsample.restore], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", [None, "a pipeline", torch.nn.Linear(2, 2), ddim()], ids=lambda g: type(g).__name__)
def test_what_is_no_pipeline(function: Any, given: object) -> None:
    with pytest.raises(TypeError, match=f"pipeline must be a DiffusionPipeline.*got {type(given).__name__}"):
        function(given)


def test_nothing_is_imported_before_a_pipeline_is_there() -> None:
    code = (
        "import sys, fastsample\n"
        "for function in (fastsample.accelerate, fastsample.restore):\n"
        "    try: function(1)\n"
        "    except TypeError as error: print(error)\n"
        "print([name for name in ('diffusers', 'peft', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "pipeline must be a DiffusionPipeline of diffusers, got int"
    assert done.stdout.splitlines() == [message, message, "[]"], done.stderr


def test_pipelines_without_attention_or_text() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    )
    pipe = quiet(diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()))
    draws = torch.Generator()

    def made() -> Any:
        return pipe(num_inference_steps=2, generator=draws.manual_seed(0), output_type="np").images

    before = made()
    report = fastsample.accelerate(pipe)
    assert repr(report).splitlines()[1:] == ["unet: left: it has no attention projections"]
    assert np.abs(made() - before).max() <= NEAR
    fastsample.restore(pipe)
    assert np.array_equal(made(), before)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = stable_diffusion(tmp_path)
    before = Before(pipe)
    add_lora(pipe.unet)
    factors = peft.get_peft_model_state_dict(pipe.unet, adapter_name="style")
    pipe.save_lora_weights(tmp_path, factors, weight_name="style.safetensors")
    pipe.unload_lora_weights()
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "accelerate.md").read_text()
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)), {"pipe": pipe})
    # The page's numbers are those of the published UNet.
    printed = re.sub(r"\d+ (blocks|layers)", r"N \1", capsys.readouterr().out)
    assert f"```\n{printed}```" in re.sub(r"\d+ (blocks|layers)", r"N \1", page)
    pipe.unload_lora_weights()
    assert np.array_equal(image(pipe), before.image)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
