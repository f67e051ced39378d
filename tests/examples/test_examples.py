"""The examples run as they are, and what each of them says holds."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample.evaluate import digits_classifier
from support.paths import ROOT

EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
HELPERS = {"tiny"}
MOST_LINES = 40

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs an example as `python examples/NAME.py` does, in an empty folder, and gives its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with torch.random.fork_rng(devices=[]):
        yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    for helper in HELPERS:
        sys.modules.pop(helper, None)


def written() -> set[str]:
    return {path.name for path in Path().iterdir()}


def right(images: Tensor, classes: Tensor) -> int:
    """How many images the classifier takes for what they should be."""
    return int((digits_classifier().look(images).classes == classes).sum())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES and ast.get_docstring(ast.parse(text))


def test_the_page_lists_all_examples() -> None:
    linked = re.findall(r"\]\(([\w/.]+)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(linked) == sorted([*(path.name for path in FILES), "comfyui/README.md"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_has_a_test(path: Path) -> None:
    own_file = Path(__file__).with_name(f"test_{path.stem}.py")
    assert path.stem in HELPERS or f"test_{path.stem}" in globals() or own_file.is_file()


def test_text_to_image(run: Run) -> None:
    shown = run("text_to_image")
    with_diffusers = (
        (EXAMPLES / "text_to_image.py").read_text().replace("fastsample.integrations.diffusers", "diffusers")
    )
    theirs: dict[str, Any] = {}
    exec(compile(with_diffusers, "text_to_image.py", "exec"), theirs)
    assert type(shown["pipe"].scheduler) is not type(theirs["pipe"].scheduler) is diffusers.DDIMScheduler
    assert farthest(shown["images"], theirs["images"]) <= 1
    assert written() == {"fox.png"}


def test_lcm_lora(run: Run) -> None:
    shown = run("lcm_lora")
    assert written() == {"pytorch_lora_weights.safetensors", "fox_in_4_steps.png"}
    pipe = shown["tiny"].stable_diffusion()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    without = four_steps(pipe)
    pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
    assert farthest(shown["images"], four_steps(pipe)) <= 1 < farthest(shown["images"], without)


def four_steps(pipe: Any) -> Any:
    draws = torch.Generator().manual_seed(0)
    return pipe("a fox in the snow", num_inference_steps=4, guidance_scale=1.0, generator=draws).images


def farthest(images: Any, others: Any) -> int:
    """The largest difference of two bytes; 1 is what the last bits of a float may come to."""
    return max(
        int(np.abs(np.int16(image) - np.int16(other)).max()) for image, other in zip(images, others, strict=True)
    )


def test_inpainting(run: Run) -> None:
    shown = run("inpainting")
    known, filled = shown["known"], shown["filled"]
    assert torch.equal(filled[:, :, :14], known[:, :, :14])
    assert (filled[:, :, 14:] != known[:, :, 14:]).flatten(1).any(1).all()
    assert right(filled, torch.arange(10)) >= 8
    assert written() == {"inpainting.png"}


def test_inversion_and_edit(run: Run) -> None:
    shown = run("inversion_and_edit")
    x0, again, edited = (shown[name] for name in ("x0", "again", "edited"))
    assert (again - x0).norm() < 0.06 * x0.norm()
    assert right(x0, torch.tensor(3)) >= 7 and right(edited, torch.tensor(8)) >= 6
    distances = torch.cdist(edited.flatten(1), x0.flatten(1))
    assert (distances.argmin(1) == torch.arange(8)).sum() >= 6, "they are of the same hand"
    assert written() == {"inversion_and_edit.png"}


def test_seeds_and_guidance(run: Run) -> None:
    shown = run("seeds_and_guidance")
    digits, classes = shown["digits"], shown["classes"]
    for i, (seed, scale) in enumerate(zip(shown["seeds"], shown["scales"], strict=True)):
        alone = fastsample.ddim(
            shown["model"],
            (1, 1, 28, 28),
            steps=20,
            clip=1.0,
            seed=seed,
            guidance=scale,
            cond={"y": classes[i : i + 1]},
            uncond={"y": torch.tensor([10])},
        )
        # What the model makes of another batch differs in its last bits.
        torch.testing.assert_close(digits[i : i + 1], alone, rtol=0, atol=1e-3)
    assert right(digits, classes) == 4
    assert (digits[1] - digits[2]).abs().max() > 0.1, "one seed and two scales"
    assert written() == {"seeds_and_guidance.png"}


def test_styles_in_one_batch(run: Run) -> None:
    shown = run("styles_in_one_batch")
    digits = shown["digits"]
    fastsample.lora.detach(shown["model"])
    bare = fastsample.ddim(
        shown["model"],
        (10, 1, 28, 28),
        steps=10,
        clip=1.0,
        seed=list(range(10)),
        model_kwargs={"y": torch.arange(10)},
    )
    torch.testing.assert_close(digits[:10], bare, rtol=0, atol=1e-3)
    plain, left, right_ones = slant(digits).view(3, 10).mean(1).tolist()
    assert left < plain - 0.2 < plain + 0.05 < right_ones
    assert right(digits, torch.arange(10).repeat(3)) >= 25
    assert written() == {"styles_in_one_batch.png"}


def slant(images: Tensor) -> Tensor:
    """How many columns the strokes of each image move to the right in a row upwards: -m_xy / m_yy of its ink."""
    ink = (images[:, 0].clamp(-1, 1) + 1) / 2
    ink = ink / ink.sum((1, 2), keepdim=True)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    dy, dx = (axis - (ink * axis).sum((1, 2)).view(-1, 1, 1) for axis in (y, x))
    return -(ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2))


def test_image_to_image(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run("image_to_image")
    moved = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert 0 < moved[0] < moved[1] < moved[2]
    assert all(right(row, torch.arange(10)) >= 8 for row in shown["rows"])
    assert written() == {"image_to_image.png"}


@pytest.mark.skipif(not hasattr(diffusers, "WanPipeline"), reason="this diffusers has no Wan")
def test_video(run: Run) -> None:
    shown = run("video")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(None, None, shown["vae"], scheduler, shown["transformer"])
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": shown["words"], "negative_prompt_embeds": shown["no_words"]}
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 5.0}
    latents = fastsample.ops.randn((1, 16, 3, 4, 4), seed=0)
    theirs = pipe(**given, **size, latents=latents, output_type="pt").frames
    ours = (shown["video"].transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert written() == {"video.png"}


def test_audio(run: Run) -> None:
    shown = run("audio")
    with wave.open("sound.wav") as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 1024)
        frames = np.frombuffer(file.readframes(1024), np.int16).reshape(1024, 2)
    wanted = 32767 * shown["sound"][0].T.numpy()
    assert np.abs(frames - wanted).max() <= 1 and wanted.std() > 1000
    assert written() == {"sound.wav"}


def test_the_audio_model_is_asked_at_the_levels_of_its_own_time(run: Run) -> None:
    """At time u the state of a constant 1 without noise is cos(pi u / 2)."""
    shown = run("audio")
    schedule = shown["schedule"]
    asked = []
    shown["unet"].register_forward_pre_hook(lambda _, args: asked.append(args))
    for t in (0, 500, 998):
        shown["model"](torch.zeros(1, 2, 1024), torch.tensor(t))
    times = torch.stack([time for _, time in asked]).double()
    torch.testing.assert_close(
        (torch.pi / 2 * times).cos(),
        torch.from_numpy(schedule.alphas_cumprod[[0, 500, 998]]).sqrt(),
        rtol=1e-6,
        atol=1e-6,
    )
