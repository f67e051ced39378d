"""Sets of samples: the same however they are cut, and what a sampler of one's own gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsample
from fastsample.cli import COMMANDS
from fastsample.commands.console import Parser
from fastsample.generation import Recipe, generate, merge, named_model
from fastsample.generation.slices import Slices
from support.generated import SMALL, TEXT, Telling, merged, unet
from support.paths import ROOT


@pytest.mark.parametrize("batch", [1, 7, 23, 256])
@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
def test_a_sample_does_not_depend_on_the_batch(batch: int, guidance: float | None, tmp_path: Path) -> None:
    """Of a model whose output tells batches of other sizes and places in them apart."""
    options: dict[str, Any] = {"shape": (1, 2, 3), "guidance": guidance, "null_class": 0}
    wanted, _ = merged(tmp_path / "a", Telling(), **options)
    found, labels = merged(tmp_path / "b", Telling(), batch=batch, **options)
    assert np.array_equal(found, wanted)
    assert labels.tolist() == [i % 3 for i in range(23)]
    other, _ = merged(tmp_path / "c", Telling(), model_batch=4, **options)
    assert not np.array_equal(other, wanted)


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_every_call_has_one_size_and_every_sample_its_place(first: int, count: int) -> None:
    calls = []

    def model(x: torch.Tensor, other: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(other) == 4 and shared.shape == (7,)
        calls.append(x.clone())
        return 10 * x + other

    x = torch.arange(2.0 * count) + 100  # guidance puts two halves into a batch
    found = Slices(first, count, 4)(model, x, x + 1, shared=torch.zeros(7))
    assert torch.equal(found, 11 * x + 1)
    for call in calls:
        for place, value in enumerate(call.tolist()):
            if place == (first + (int(value) - 100) % count) % 4:
                break
        else:
            pytest.fail(f"no sample of {call} is at its place")


def test_a_set_is_what_the_sampler_draws(tmp_path: Path) -> None:
    model, labels = unet(), torch.arange(23) % 3
    found, classes = merged(tmp_path / "set", model_batch=23)
    options: dict[str, Any] = {"steps": 2, "clip": 1.0, "seed": 7, "model_kwargs": {"y": labels}}
    wanted = fastsample.to_uint8(fastsample.ddim(model, (23, 3, 8, 6), **options))
    assert np.array_equal(found, wanted.numpy()) and np.array_equal(classes, labels.numpy())


@pytest.mark.parametrize(
    ("choices", "function", "options"),
    [
        ({"sampler": "dpm_solver", "arguments": {"order": 2}}, fastsample.dpm_solver, {"order": 2, "clip": 1.0}),
        ({"arguments": {"eta": 1.0, "clip": None}}, fastsample.ddim, {"eta": 1.0}),
        ({"sampler": "ddpm", "steps": 3}, fastsample.ddpm, {"steps": 3, "clip": 1.0}),
    ],
    ids=["another sampler", "arguments", "a sampler with noise"],
)
def test_samplers_and_their_arguments(choices: Any, function: Any, options: Any, tmp_path: Path) -> None:
    found, _ = merged(tmp_path / "set", model_batch=23, **choices)
    kwargs = {"y": torch.arange(23) % 3}
    wanted = function(unet(), (23, 3, 8, 6), seed=7, model_kwargs=kwargs, **{"steps": 2, **options})
    assert np.array_equal(found, fastsample.to_uint8(wanted).numpy())


def test_guidance_and_classes(tmp_path: Path) -> None:
    found, labels = merged(tmp_path / "set", model_batch=23, guidance=2.0, classes=[2, 0])
    y = torch.tensor([2, 0] * 12)[:23]
    options: dict[str, Any] = {"guidance": 2.0, "cond": {"y": y}, "uncond": {"y": torch.full((23,), 3)}, "seed": 7}
    wanted = fastsample.ddim(unet(), (23, 3, 8, 6), steps=2, clip=1.0, **options)
    # One call for both halves there, two here: convolutions may round differently.
    assert np.abs(found.astype(int) - fastsample.to_uint8(wanted).numpy()).max() <= 1
    assert np.array_equal(labels, y.numpy())


@pytest.mark.parametrize("name", ["trajectory-4", "consistency", "lcm", "guided-4-latent", "lcm-lora"])
def test_students_draw_as_they_do(name: str, tmp_path: Path) -> None:
    student = fastsample.zoo.digits(name)
    told = {"guidance": 1.5} if isinstance(student.facts.guidance, tuple) else {}
    generate(f"zoo:{name}", tmp_path / "set", num=6, batch=6, model_batch=6, seed=3, progress=False, **told)
    merge(tmp_path / "set", tmp_path / "set.npz")
    wanted = student.sample((6, 1, 28, 28), seed=3, y=torch.arange(6), **told)
    with np.load(tmp_path / "set.npz") as found:
        assert np.abs(found["arr_0"].astype(int) - fastsample.to_uint8(wanted).numpy()).max() <= 1


def test_latents_are_decoded(tmp_path: Path) -> None:
    generate("zoo:latent-digits", tmp_path / "set", num=5, batch=2, model_batch=5, steps=3, progress=False)
    merge(tmp_path / "set", tmp_path / "set.npz")
    model, autoencoder = fastsample.zoo.latent_digits()
    options: dict[str, Any] = {"steps": 3, "seed": 0, "model_kwargs": {"y": torch.arange(5)}}
    wanted = fastsample.ddim(model, (5, 4, 7, 7), decode=autoencoder.decode, **options)
    with np.load(tmp_path / "set.npz") as found:
        assert np.abs(found["arr_0"].astype(int) - fastsample.to_uint8(wanted).numpy()).max() <= 1


def test_models_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    sizes = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 4}
    model = diffusers.UNet2DModel(**sizes, **blocks)
    model.save_pretrained(tmp_path / "model" / "unet")
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "model" / "scheduler")
    found, labels = merged(tmp_path / "set", f"diffusers:{tmp_path / 'model'}", num=5, model_batch=5)
    schedule = fastsample.Schedule.cosine()
    kwargs = {"class_labels": torch.arange(5) % 4}
    wanted = fastsample.ddim(
        model.eval(), (5, 3, 8, 8), schedule=schedule, steps=2, clip=1.0, seed=7, model_kwargs=kwargs
    )
    assert np.abs(found.astype(int) - fastsample.to_uint8(wanted).numpy()).max() <= 1
    assert labels.tolist() == [0, 1, 2, 3, 0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no samples": ({"num": 0}, "num must"),
    "half a sample": ({"num": 2.5}, "num must"),
    "an empty batch": ({"batch": 0}, "batch must"),
    "an empty call": ({"model_batch": 0}, "model_batch must"),
    "no threads": ({"threads": 0}, "threads must"),
    "a seed below 0": ({"seed": -1}, "seed must"),
    "no steps": ({"steps": 0}, "steps must"),
    "more steps than timesteps": ({"steps": 101}, "steps"),
    "an unknown sampler": ({"sampler": "plms"}, "sampler must be one of ddim"),
    "a student's sampler": ({"sampler": "distilled"}, "distilled for a student"),
    "an unknown argument": ({"arguments": {"etta": 1}}, "arguments of ddim are"),
    "an argument that cannot be": ({"arguments": {"eta": -1}}, "eta"),
    "an argument that JSON has not": ({"arguments": {"eta": torch.ones(1)}}, "arguments must be"),
    "an unknown format": ({"format": "gif"}, "format must be"),
    "a class that there is not": ({"classes": [3]}, "classes must be from 0 to 2"),
    "a negative class": ({"classes": [-1]}, "classes must"),
    "no classes": ({"classes": []}, "classes must not be empty"),
    "guidance that is not finite": ({"guidance": float("nan")}, "guidance must be"),
    "no image": ({"shape": (3, 8)}, "shape must be"),
    "an unknown engine": ({"engine": "mpi"}, "engine must be"),
    "workers without Ray": ({"workers": 2}, "workers are Ray's"),
    "a device that there is not": ({"device": "nonsense"}, "device"),
    "more chunks than can be": ({"num": 10**7, "batch": 1}, "batch must be larger"),
    "a class beyond int64": ({"classes": [2**63]}, "classes must"),
    "a null class that there is not": ({"guidance": 2.0, "null_class": 50}, "null_class must be from 0 to 3"),
    "a schedule beside the model's": ({"schedule": "linear"}, "schedule is the model's own"),
    "an unknown schedule": ({"schedule": "steep"}, "schedule must be one of linear"),
    "an unknown choice": ({"stepps": 3}, "generate takes no stepps"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_before_anything_is_written(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generate(TEXT, tmp_path / "set", progress=False, **{**SMALL, **options})
    assert not (tmp_path / "set").exists()


def test_what_a_model_does_not_say_must_be_given(tmp_path: Path) -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    with pytest.raises(ValueError, match="shape must be given"):
        generate(model, tmp_path / "set", num=3, progress=False)
    with pytest.raises(ValueError, match="schedule must be given, one of linear"):
        generate(model, tmp_path / "set", num=3, shape=(1, 2, 2), progress=False)
    with pytest.raises(ValueError, match="guidance needs a model with classes"):
        generate(model, tmp_path / "set", num=3, shape=(1, 2, 2), guidance=2.0, progress=False)
    with pytest.raises(ValueError, match="guidance needs null_class"):
        generate(model, tmp_path / "set", num=3, shape=(1, 2, 2), guidance=2.0, classes=[1], progress=False)
    with pytest.raises(ValueError, match="format 'png' is for images of 1, 3 or 4 channels"):
        generate(model, tmp_path / "set", num=3, shape=(2, 2, 2), format="png", progress=False)
    with pytest.raises(ValueError, match="distilled for"):
        generate("zoo:trajectory-4", tmp_path / "set", num=3, shape=(1, 32, 32), progress=False)
    assert not (tmp_path / "set").exists()
    generate(model, tmp_path / "set", num=3, shape=(2, 2, 2), schedule="cosine", progress=False)
    assert merge(tmp_path / "set", tmp_path / "set.npz") == 3
    with np.load(tmp_path / "set.npz") as found:
        assert found.files == ["arr_0"] and found["arr_0"].shape == (3, 2, 2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model must be a text or callable"),
        (lambda x, t: x[:, :, :1], "the model must return"),
        (lambda x, t: x[None], "the model must return"),
        (lambda x, t: {}["x"], "the model cannot be called: KeyError"),
        (lambda x: x, "the model cannot be called: TypeError"),
        ("python:support.generated:failing", r"model: failing\(\) raised RuntimeError: no weights"),
    ],
    ids=["none", "another shape", "another rank", "one that raises", "another signature", "a function that raises"],
)
def test_models_that_cannot_be_used_are_refused_before_anything_is_written(
    model: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generate(model, tmp_path / "set", num=3, shape=(1, 2, 2), schedule="cosine", progress=False)
    assert not (tmp_path / "set").exists()


def test_samples_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where((y == 2).reshape(-1, 1, 1, 1), torch.nan, x)

    options: dict[str, Any] = {"shape": (1, 2, 2), "schedule": "cosine", "classes": [0, 1, 2], "model_batch": 4}
    with pytest.raises(ValueError, match="sample 2 is not finite"):
        generate(model, tmp_path / "set", num=5, progress=False, **options)


@pytest.mark.parametrize(
    "change", ["prediction", "schedule"], ids=["what the model predicts", "the schedule it was trained with"]
)
def test_what_else_decides_the_set_is_compared(change: str, tmp_path: Path) -> None:
    model = Telling()
    generate(model, tmp_path / "set", num=5, shape=(1, 2, 2), progress=False)
    setattr(model, change, {"prediction": "x0", "schedule": fastsample.Schedule.linear(100)}[change])
    with pytest.raises(ValueError, match="was begun with table"):
        generate(model, tmp_path / "set", num=5, shape=(1, 2, 2), progress=False)


def test_defaults_are_what_they_stand_for(tmp_path: Path) -> None:
    generate(TEXT, tmp_path / "set", num=5, model_batch=5, progress=False)
    generate(TEXT, tmp_path / "set", num=5, model_batch=5, steps=50, sampler="ddim", shape=(3, 8, 6), progress=False)


def test_a_student_of_ones_own(tmp_path: Path) -> None:
    file = fastsample.zoo.STUDENTS["progressive-1"]
    found, _ = merged(tmp_path / "a", f"zoo:{file}", steps=None, num=3)
    wanted, _ = merged(tmp_path / "b", "zoo:progressive-1", steps=None, num=3)
    assert np.array_equal(found, wanted)


def test_an_autoencoder_of_ones_own(tmp_path: Path) -> None:
    model, autoencoder = fastsample.zoo.latent_digits()
    generate(model, tmp_path / "a", num=3, steps=2, autoencoder=autoencoder, progress=False)
    wanted, _ = merged(tmp_path / "b", "zoo:latent-digits", num=3, seed=0, batch=256, model_batch=64)
    merge(tmp_path / "a", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["arr_0"], wanted)


def test_a_model_is_in_training_mode_again(tmp_path: Path) -> None:
    model = unet().train()
    merged(tmp_path / "set", model, num=2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("there", ["vae", "flow"])
def test_pipelines_that_are_not_understood(there: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks).save_pretrained(
        tmp_path / "unet"
    )
    if there == "vae":
        (tmp_path / "vae").mkdir()
    else:
        diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="latents" if there == "vae" else "of which no schedule is known"):
        named_model(f"diffusers:{tmp_path}")


def test_threads_are_as_before_afterwards(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merged(tmp_path / "set", threads=before + 1, num=1, model_batch=1)
    assert torch.get_num_threads() == before


def test_chunks_of_a_recipe() -> None:
    recipe = Recipe("a", num=10, batch=4)
    assert [list(recipe.places(k)) for k in range(recipe.chunks)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert Recipe(**recipe.as_json()) == recipe


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "scale.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    exec(compile("\n".join(code), "scale.md", "exec"), {})
    assert capsys.readouterr().out == "True 40\n"


COMMAND = re.compile(r"^fastsample (?:generate|merge|evaluate)[^#\n]*", flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMAND.findall((ROOT / "docs" / "scale.md").read_text()))
def test_commands_of_the_page_are_understood(command: str) -> None:
    """Their options, not what they would do."""
    parser = Parser()
    commands = parser.add_subparsers(required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name))
    parser.parse_args(shlex.split(command)[1:])
