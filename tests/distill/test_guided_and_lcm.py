"""Guided distillation and LCM: what they aim at, against the formulas, and how their students are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import fastsample
from fastsample import Schedule, distill, lora
from fastsample.distill.data import Samples
from fastsample.distill.guided import Guided
from fastsample.distill.lcm import LCMMethod
from fastsample.distill.lcm_student import LCMStudent
from fastsample.distill.method import Batch
from fastsample.distill.stochastic import Stochastic
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.train.processes import Processes
from support.distillation import DATA, LABELS, RANGE, SHAPE, Delta, run, unet

COSINE = Schedule.cosine(1000)
POINT = torch.rand(3, 5, generator=Generator().manual_seed(3)) * 2 - 1
NO_FACTS = Facts("", (3, 5), {})
ALONE = Processes("cpu")


def batch(size: int = 16, seed: int = 7) -> Batch:
    return Batch(Generator().manual_seed(seed), size, (0, size), torch.device("cpu"), 0)


class Steered(torch.nn.Module):
    """A v model with a condition, in float32 or float64, that guidance makes another."""

    schedule, prediction = COSINE, "v"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.eval()

    def forward(self, x: Tensor, t: Tensor, c: Tensor, guidance: Tensor | float = 0.0) -> Tensor:
        told = guidance if isinstance(guidance, float) else guidance.reshape(-1, 1, 1)
        shift = c.to(x).reshape(-1, 1, 1) + 0.1 * told
        return torch.sin(self.scale.to(x) * x + t.to(x.dtype).reshape(-1, 1, 1) / 300 + shift)


SAMPLES = torch.rand(6, 3, 5, generator=Generator().manual_seed(4)) * 2 - 1
WORDS = torch.linspace(-1, 1, 6)
EMPTY = {"c": torch.zeros(1)}


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of COSINE in float64, (1, 0) at -1."""
    abar = torch.where(t < 0, 1.0, torch.tensor(COSINE.alphas_cumprod)[t.clamp(min=0)])
    return abar.sqrt().reshape(-1, 1, 1), (1 - abar).sqrt().reshape(-1, 1, 1)


def guided_x0(model: Steered, x: Tensor, t: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and epsilon of u + w (c - u) in float64."""
    alpha, sigma = levels(t)
    unconditional = model(x, t, torch.zeros_like(c))
    v = unconditional + w.reshape(-1, 1, 1) * (model(x, t, c) - unconditional)
    return alpha * x - sigma * v, sigma * x + alpha * v


def drawn(seed: int = 7) -> Generator:
    return Generator().manual_seed(seed)


def test_the_first_stage_aims_at_the_guided_teacher() -> None:
    """By the formula in float64, for a student that is told the weight."""
    model, student = Steered(), Steered()
    teacher = Teacher(model, (3, 5), cond={"c": WORDS}, uncond=EMPTY, guidance=4.0)
    method = Guided(teacher, Samples(SAMPLES, {}), "v", 4, 2, (1.0, 4.0))
    assert method.stages == 4 and [method.file(stage) for stage in (0, 1, 3)] == [
        "student-guided.safetensors",
        "student-4.safetensors",
        "student-1.safetensors",
    ]
    [loss] = method.losses(student, 0, batch())
    generator = drawn()
    examples, row = (torch.randint(end, (16,), generator=generator) for end in (6, 1000))
    z = torch.randn(16, 3, 5, generator=generator).double()
    w = 4 ** torch.rand(16, generator=generator).double()
    t, x0, c = 999 - row, SAMPLES[examples].double(), WORDS[examples].double()
    alpha, sigma = levels(t)
    x = alpha * x0 + sigma * z
    target, _ = guided_x0(model, x, t, c, w)
    own = alpha * x - sigma * student(x, t, c, w)
    weight = torch.maximum(torch.ones(()), (alpha / sigma) ** 2)
    assert float(loss.detach()) == pytest.approx(
        float((weight * ((own - target) / w.reshape(-1, 1, 1)).square()).mean().detach()), rel=2e-3
    )


def test_later_stages_halve_the_student_that_is_told_the_same() -> None:
    model, student = Steered(), Steered()
    teacher = Teacher(model, (3, 5), cond={"c": WORDS}, uncond=EMPTY, guidance=4.0)
    method = Guided(teacher, Samples(SAMPLES, {}), "v", 2, 1, (1.0, 4.0))
    before = Student(Steered(), "v", COSINE, NO_FACTS)
    method.begin(1, before, Path(), ALONE, False)
    [loss] = method.losses(student, 1, batch())
    generator = drawn()
    examples, row = (torch.randint(end, (16,), generator=generator) for end in (6, 2))
    z = torch.randn(16, 3, 5, generator=generator).double()
    w = 4 ** torch.rand(16, generator=generator).double()
    grid = torch.tensor([999, 749, 499, 249, -1])
    t, middle, r = (grid[2 * row + k] for k in range(3))
    x0, c = SAMPLES[examples].double(), WORDS[examples].double()
    alpha, sigma = levels(t)
    x = alpha * x0 + sigma * z
    state, at = x, t
    for after in (middle, r):
        a, s = levels(at)
        v = before.network(state, at, c, w)
        a_after, s_after = levels(after)
        state, at = a_after * (a * state - s * v) + s_after * (s * state + a * v), after
    a_r, s_r = levels(r)
    target = (state - s_r / sigma * x) / (a_r - s_r / sigma * alpha)
    own = alpha * x - sigma * student(x, t, c, w)
    weight = torch.maximum(torch.ones(()), (alpha / sigma) ** 2)
    assert float(loss.detach()) == pytest.approx(
        float((weight * ((own - target) / w.reshape(-1, 1, 1)).square()).mean().detach()), rel=2e-3
    )


@pytest.mark.parametrize("loss_name", ["huber", "l2"])
def test_lcm_aims_at_itself_one_guided_step_on(loss_name: str) -> None:
    """By the formula in float64, with the scalings of fastsample.lcm; clean data after the last timestep."""
    model, network = Steered(), Steered()
    teacher = Teacher(model, (3, 5), cond={"c": WORDS}, uncond=EMPTY, guidance=4.0)
    student = LCMStudent(network, "v", COSINE, NO_FACTS)
    method = LCMMethod("lcm", teacher, Samples(SAMPLES, {}), student, 4, loss_name, 0.0, (1.0, 4.0))
    [loss] = method.losses(student, 0, batch())
    generator = drawn()
    examples, row = (torch.randint(end, (16,), generator=generator) for end in (6, 4))
    z = torch.randn(16, 3, 5, generator=generator).double()
    w = 4 ** torch.rand(16, generator=generator).double()
    grid = torch.tensor([999, 749, 499, 249, -1])
    t, r, x0, c = grid[row], grid[row + 1], SAMPLES[examples].double(), WORDS[examples].double()
    alpha, sigma = levels(t)
    x = alpha * x0 + sigma * z
    clean, epsilon = guided_x0(model, x, t, c, w)
    a_r, s_r = levels(r)
    later = a_r * clean + s_r * epsilon

    def jump(state: Tensor, at: Tensor) -> Tensor:
        a, s = levels(at)
        scaled = (10.0 * at.clamp(min=0)).double().reshape(-1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        found = c_skip * state + c_out * (a * state - s * network(state, at.clamp(min=0), c, w))
        return torch.where(at.reshape(-1, 1, 1) < 0, state, found)

    squares = (jump(x, t) - jump(later, r)).square()
    wanted = squares if loss_name == "l2" else (squares + 0.001**2).sqrt() - 0.001
    assert float(loss.detach()) == pytest.approx(float(wanted.mean().detach()), rel=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_lcm_asks_nothing_of_an_exact_model(prediction: str) -> None:
    schedule = Schedule.scaled_linear()
    model = Delta(POINT, prediction, schedule)
    student = LCMStudent(model, prediction, schedule, NO_FACTS)
    method = LCMMethod("lcm", Teacher(model, (3, 5)), Samples(POINT[None], {}), student, 10, "l2", 0.0, None)
    [loss] = method.losses(student, 0, batch())
    assert float(loss.detach()) < 1e-8
    assert method.timesteps[4] == (999, 799, 499, 299) and sorted(method.timesteps) == [1, 2, 4, 8]


def test_the_grid_of_stable_diffusion_is_diffusers() -> None:
    """50 scales of 1000 timesteps are LCMScheduler's, and so are the few that are sampled."""
    schedule = Schedule.scaled_linear()
    model = Delta(POINT, "epsilon", schedule)
    student = LCMStudent(model, "epsilon", schedule, NO_FACTS)
    method = LCMMethod("lcm", Teacher(model, (3, 5)), Samples(POINT[None], {}), student, 50, "l2", 0.0, None)
    assert method.times.tolist() == [*range(999, 0, -20), -1]
    for steps in (8, 4, 2, 1):
        wanted = fastsample.LCM(schedule, steps=steps).table.t.tolist()
        assert list(method.timesteps[steps]) == wanted


def test_a_students_own_sampler_and_fastsample_lcm_agree(tmp_path: Path) -> None:
    student = run("lcm", unet(), tmp_path)
    y = torch.arange(4) % 3
    for steps in student.steps():
        own = student.sample((4, *SHAPE), steps, seed=3, y=y)
        options: dict[str, Any] = {"timesteps": student.timesteps(steps), "seed": 3, "model_kwargs": {"y": y}}
        assert torch.equal(own, fastsample.lcm(student, (4, *SHAPE), **options))


def test_an_lcm_lora_makes_the_teacher_the_student(tmp_path: Path) -> None:
    """Attached to the teacher, which returns epsilon and a variance, it gives the student's samples."""
    student, model = run("lcm_lora", unet(), tmp_path, clip=1.0), unet()
    lora.attach(model, tmp_path / "student.safetensors", name="lcm")
    y, times = torch.arange(4) % 3, student.timesteps(4)
    own = student.sample((4, *SHAPE), 4, seed=3, y=y)
    other = fastsample.lcm(model, (4, *SHAPE), timesteps=times, clip=1.0, seed=3, model_kwargs={"y": y})
    # The first step is from next to pure noise, where epsilon is known to seven digits, and x0 to three.
    torch.testing.assert_close(other, own, rtol=1e-2, atol=1e-2)
    again = distill.load(tmp_path / "student.safetensors", unet())
    assert torch.equal(again.sample((4, *SHAPE), 4, seed=3, y=y), own)
    with pytest.raises(ValueError, match="holds a LoRA for a UNet: give such a module as network="):
        distill.load(tmp_path / "student.safetensors")
    distill.save(again, tmp_path / "half.safetensors", torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "student.safetensors").stat().st_size


def test_a_guided_student_is_told_its_weight(tmp_path: Path) -> None:
    student = run("guided", unet(), tmp_path)
    y = torch.arange(3)
    one, other = (student.sample((3, *SHAPE), seed=0, y=y, guidance=weight) for weight in (1.0, 3.0))
    assert not torch.equal(one, other)
    each = student.sample((3, *SHAPE), seed=0, y=y, guidance=torch.tensor([1.0, 3.0, 1.0]))
    torch.testing.assert_close(each[1], other[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="guidance must be given, a weight from 1 to 3"):
        student.sample((3, *SHAPE), y=y)
    with pytest.raises(ValueError, match=r"guidance must lie in \[1, 3\]"):
        student.sample((3, *SHAPE), y=y, guidance=3.5)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["student-1.safetensors", "student-2.safetensors", "student-guided.safetensors"]
    assert distill.load(tmp_path / files[-1]).steps() == (4,)
    assert RANGE["guidance"] == distill.load(tmp_path / files[0]).facts.guidance


def test_two_steps_forward_and_one_back() -> None:
    """Against the formula in float64, with the noise that the sampler draws."""
    times = (999, 749, 499, 249)
    model = Steered()
    sampler = Stochastic(COSINE, timesteps=times, prediction="v")
    x = torch.randn(2, 3, 5, generator=drawn(1))
    c = torch.tensor([0.3, -0.2])
    states = [x, *(step.x.detach().clone() for step in sampler.iterate(model, x, seed=5, model_kwargs={"c": c}))]
    grid = torch.tensor([*times, -1, -1])
    for k in range(4):
        (a, s), (a1, _), (a2, s2) = (levels(grid[k + j].expand(2)) for j in range(3))
        state = states[k].double()
        with torch.no_grad():
            v = model(state, grid[k].expand(2), c)
        further = a2 * (a * state - s * v) + s2 * (s * state + a * v)
        kept = a1 / a2
        rest = states[k + 1].double() - kept * further
        if k == 3:
            assert rest.abs().max() < 1e-5
            continue
        noise = rest / (1 - kept**2).sqrt()
        assert 0.3 < float(noise.std()) < 2 and float(rest.abs().max()) > 1e-2
    assert float(sampler.table.alpha[-1]) == 1
    variance = torch.tensor(sampler.table.s).double() ** 2
    for k in range(3):
        a1, s1 = levels(grid[k + 1].expand(1))
        a2, s2 = levels(grid[k + 2].expand(1))
        assert float(variance[k] + (a1 / a2 * s2) ** 2) == pytest.approx(float(s1**2), rel=1e-6)


def test_a_student_is_sampled_both_ways(tmp_path: Path) -> None:
    student = run("progressive", unet(), tmp_path, steps=2)
    y = torch.arange(3)
    one, other = (student.sample((3, *SHAPE), seed=0, y=y, stochastic=way) for way in (False, True))
    assert one.shape == other.shape and not torch.equal(one, other) and torch.isfinite(other).all()
    assert len(DATA) == len(LABELS)
