"""Runs that are interrupted end with the weights of one that is not; students of every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Schedule, distill
from fastsample.distill.run import _Run
from support.ahead import TESTS, Ahead, in_a_process
from support.distillation import (
    DATA,
    METHODS,
    OBSERVATIONS,
    RANGE,
    SHAPE,
    SMALL,
    Policy,
    run,
    text_to_image,
    unet,
    weights,
)
from support.interruption import stopped_at

RUNS: dict[str, dict[str, Any]] = {
    "trajectory": {},
    "progressive": {},
    "consistency": {},
    "consistency-average": {"target_decay": 0.9, "solver": "ddim", "loss": "huber"},
    "consistency-easy": {"curriculum": "easy"},
    "guided": {},
    "lcm": {},
    "lcm-told": {"target_decay": 0.9, "loss": "l2"} | RANGE,
    "lcm_lora": {},
    "lcm_lora-average": {"target_decay": 0.9},
}


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than all steps of such a run."""
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)


def interrupted(name: str, out: Path, at: int, **options: Any) -> None:
    """A run that stops with Ctrl-C at the beginning of this iteration."""
    with stopped_at(_Run, at):
        run(name, unet(), out, **options)


def same_students(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in (*names, "loss.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name", RUNS)
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    options = RUNS[name] | {"save_every": 2, "settings": replace(SMALL, ema_decay=0.5)}
    method = name.partition("-")[0]
    run(method, unet(), tmp_path / "straight", **options)
    total = SMALL.iterations * (3 if method in ("progressive", "guided") else 1)
    for at in (0, 1, 3, total // 2 + 1, total - 1):
        interrupted(method, tmp_path / "broken", at, **options)
    run(method, unet(), tmp_path / "broken", **options)
    same_students(tmp_path / "straight", tmp_path / "broken")


@Ahead
def killed() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    in_a_process("-m", "support.killed_distillations", folder.name, cwd=TESTS)
    return folder


@pytest.mark.ahead(killed)
@pytest.mark.parametrize("name", METHODS)
def test_killed_at_any_moment(name: str) -> None:
    """SIGKILL at five random moments: the weights of a run in one go."""
    folder = Path(killed.result().name, name)
    same_students(folder / "straight", folder / "killed")


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_a_batch_add_up(name: str, tmp_path: Path) -> None:
    for out, accumulate in (("whole", 1), ("parts", 2)):
        run(name, unet(), tmp_path / out, settings=replace(SMALL, accumulate=accumulate))
    whole, parts = (losses_of(tmp_path / out) for out in ("whole", "parts"))
    torch.testing.assert_close(parts[:1], whole[:1], rtol=1e-5, atol=0)
    # Adam's first steps are as long for a gradient that rounding makes as for any other.
    torch.testing.assert_close(parts, whole, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    teacher = unet()
    before = weights(teacher)
    student = run(name, teacher, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in weights(teacher).items())
    assert not teacher.training and not student.training
    name, kept = ("factors.1", torch.zeros(())) if name == "lcm_lora" else ("leave.weight", before["leave.weight"][:12])
    assert not torch.equal(weights(student)[f"network.{name}"], kept.expand_as(weights(student)[f"network.{name}"]))


@pytest.mark.parametrize("name", ["trajectory", "progressive", "consistency", "lcm"])
@pytest.mark.parametrize("kind", ["actions", "actions of two halves"])
def test_a_model_of_actions(name: str, kind: str, tmp_path: Path) -> None:
    """(16, 7), given observations; with a variance half it gets both halves, but for an LCM."""
    torch.manual_seed(0)
    model = Policy(16 if kind == "actions" else 32)
    student = of_tensors(name, model, (16, 7), tmp_path, OBSERVATIONS)
    # An LCM predicts what its teacher does.
    assert student.output == ("epsilon" if kind == "actions" or name == "lcm" else "both")
    sample = student.sample((2, 16, 7), seed=0, obs=OBSERVATIONS["obs"][:2])
    assert sample.shape == (2, 16, 7) and torch.isfinite(sample).all()
    file = tmp_path / ("student-1.safetensors" if name == "progressive" else "student.safetensors")
    with pytest.raises(ValueError, match="Policy: give such a module as network="):
        distill.load(file)
    again = distill.load(file, Policy(16 if kind == "actions" else 32))
    assert torch.equal(again.sample((2, 16, 7), seed=0, obs=OBSERVATIONS["obs"][:2]), sample)


@pytest.mark.parametrize("name", METHODS)
def test_a_text_to_image_model(name: str, tmp_path: Path) -> None:
    """diffusers' UNet2DConditionModel, with the embeddings of prompts as data; told its guidance as a projection."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = text_to_image(time_cond_proj_dim=8 if name == "guided" else None)
    prompts = {"encoder_hidden_states": torch.randn(6, 5, 12)}
    guidance: Any = {"consistency": 1.0, "guided": (1.0, 3.0)}.get(name, 3.0)
    student = of_tensors(
        name,
        model,
        (4, 8, 8),
        tmp_path,
        prompts,
        schedule=Schedule.scaled_linear(),
        uncond={"encoder_hidden_states": torch.zeros(1, 5, 12)},
        guidance=guidance,
    )
    told = {"guidance": 2.0} if name == "guided" else {}
    shape = (2, 4, 8, 8)
    sample = student.sample(shape, encoder_hidden_states=prompts["encoder_hidden_states"][:2], seed=1, **told)
    assert torch.isfinite(sample).all()


def of_tensors(
    name: str, model: Any, shape: tuple[int, ...], out: Path, cond: dict[str, Tensor], **others: Any
) -> distill.Student:
    """Fifty updates, after which the loss has fallen."""
    settings = distill.Settings(iterations=50, batch_size=8, warmup=5, lr=3e-2)
    common = {"settings": settings, "cond": cond, "progress": False} | others
    if name == "trajectory":
        common["settings"] = replace(settings, iterations=25)
        student = distill.trajectory(model, shape, out, steps=2, substeps=2, paths=16, **common)
    else:
        data = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
        sizes = {"progressive": {"start": 1, "steps": 1}, "guided": {"start": 1, "steps": 1}}
        student = getattr(distill, name)(model, data, out, **sizes.get(name, {"scales": 4}), **common)
    stages = losses_of(out).reshape(-1, 50)
    assert len(stages) == (2 if name == "guided" else 1)
    for losses in stages:
        assert losses[-10:].mean() < 0.9 * losses[:10].mean()
    return student


def losses_of(out: Path) -> Tensor:
    """Of every update so far."""
    history: Tensor = torch.load(out / "checkpoint.pt", weights_only=True)["history"]
    return history


def test_a_smaller_student(tmp_path: Path) -> None:
    """Half as wide, from random weights, of another kind of output."""
    half = unet(widths=(8, 8), prediction="x0", target=None, learned_variance=False)
    student = run("trajectory", unet(), tmp_path, student=half)
    assert student.output == "v"
    assert distill.load(tmp_path / "student.safetensors").network.config.widths == (8, 8)  # type: ignore[union-attr]


def test_only_what_requires_gradients_is_trained(tmp_path: Path) -> None:
    """As an adapter's weights do, beside the frozen ones of the model."""
    model = Policy()
    adapted = copy.deepcopy(model).requires_grad_(False)
    adapted.leave.requires_grad_(True)
    student = of_tensors("trajectory", model, (16, 7), tmp_path, OBSERVATIONS, student=adapted)
    changed = {key for key, value in weights(student.network).items() if not torch.equal(value, weights(model)[key])}
    assert changed == {"leave.weight", "leave.bias"}


@pytest.mark.parametrize("name", ["trajectory", "guided", "lcm_lora"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Weights stay float32, and are near those of float32."""
    student = run(name, unet(), tmp_path / "half", settings=replace(SMALL, precision="bfloat16", lr=1e-4))
    whole = run(name, unet(), tmp_path / "whole", settings=replace(SMALL, lr=1e-4))
    for key, value in weights(student).items():
        assert value.dtype == torch.float32
        # Adam's steps are as long as the learning rate, whatever the gradient: all of them against all of them.
        assert torch.allclose(value, weights(whole)[key], atol=2 * 1e-4 * 3 * SMALL.iterations), key


def test_a_teacher_in_half_precision(tmp_path: Path) -> None:
    student = of_tensors("trajectory", Policy().bfloat16(), (16, 7), tmp_path, OBSERVATIONS)
    assert {value.dtype for value in weights(student).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["trajectory", "progressive", "lcm_lora"])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(name: str, tmp_path: Path) -> None:
    from fastsample.distill import run as frame

    losses = frame._Run._losses

    def spoilt(run: _Run, stage: int, batch: Any) -> Iterator[Tensor]:
        for loss in losses(run, stage, batch):
            yield loss * (float("nan") if batch.iteration == 4 else 1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArithmeticError, match="not finite at step 4"):
        patch.setattr(_Run, "_losses", spoilt)
        run(name, unet(), tmp_path / "spoilt", save_every=1)
    assert len(losses_of(tmp_path / "spoilt")) == 4 * (2 if name == "trajectory" else 1)
    run(name, unet(), tmp_path / "spoilt", save_every=1)
    run(name, unet(), tmp_path / "straight", save_every=1)
    same_students(tmp_path / "straight", tmp_path / "spoilt")


def test_a_finished_run_leaves_no_paths(tmp_path: Path) -> None:
    run("trajectory", unet(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "checkpoint.pt",
        "loss.csv",
        "student.safetensors",
    ]


def test_half_precision_on_disk(tmp_path: Path) -> None:
    student = run("trajectory", unet(), tmp_path)
    distill.save(student, tmp_path / "half.safetensors", torch.float16)
    small, large = (tmp_path / f"{name}.safetensors" for name in ("half", "student"))
    assert small.stat().st_size < 0.7 * large.stat().st_size
    again = distill.load(small)
    labels = torch.arange(2)
    difference = again.sample((2, *SHAPE), seed=0, y=labels) - student.sample((2, *SHAPE), seed=0, y=labels)
    assert 0 < difference.abs().max() < 0.05
    assert again.facts == student.facts and len(DATA) == 10
