"""What the methods aim at, against the formulas and against models whose few steps are known to be exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

import fastsample
from fastsample import DPMSolver, Schedule, distill
from fastsample.distill.consistency import ConsistencyMethod
from fastsample.distill.consistency_student import SIGMA_MIN, ConsistencyStudent
from fastsample.distill.data import Samples
from fastsample.distill.grid import nested_timesteps
from fastsample.distill.method import Batch
from fastsample.distill.pairs import CURRICULA, levels_between
from fastsample.distill.progressive import Progressive
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.distill.trajectory import Trajectory
from fastsample.train.processes import Processes
from support.distillation import DATA, LABELS, SHAPE, Delta, unet

COSINE = Schedule.cosine(1000)
POINT = torch.rand(3, 5, generator=Generator().manual_seed(3)) * 2 - 1
NO_FACTS = Facts("", (3, 5), {})
CPU = torch.device("cpu")
ALONE = Processes("cpu")


def batch(size: int = 16, iteration: int = 0) -> Batch:
    return Batch(Generator().manual_seed(7), size, (0, size), CPU, iteration)


def levels(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of COSINE in float64, (1, 0) at -1."""
    abar = torch.where(t < 0, 1.0, torch.tensor(COSINE.alphas_cumprod)[t.clamp(min=0)])
    return tuple(level.reshape(-1, *(1,) * (x.ndim - 1)) for level in (abar.sqrt(), (1 - abar).sqrt()))  # type: ignore


class Bent(torch.nn.Module):
    """A v model that no step solves exactly."""

    schedule, prediction = COSINE, "v"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(self.scale * x + t.to(x.dtype).reshape(-1, 1, 1) / 300)


def ddim_step(model: Any, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The v model's DDIM step in float64."""
    (alpha, sigma), (after, noise) = levels(t, x), levels(r, x)
    v = model.double()(x.double(), t)
    return after * (alpha * x - sigma * v) + noise * (sigma * x + alpha * v)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_halving_asks_nothing_of_a_student_that_is_exact(prediction: str, count: int) -> None:
    schedule = Schedule.scaled_linear()
    model = Delta(POINT, prediction, schedule)
    method = Progressive(Teacher(model, (3, 5)), Samples(POINT[None], {}), prediction, count, 0)
    student = Student(model, prediction, schedule, NO_FACTS)
    method.begin(0, student, Path(), ALONE, False)
    [loss] = method.losses(student, 0, batch())
    assert float(loss.detach()) < 1e-6


@pytest.mark.parametrize("count", [1, 3])
def test_the_target_of_halving(count: int) -> None:
    """By the formula, from two steps of the teacher, in float64."""
    model = Bent()
    method = Progressive(Teacher(model, (3, 5)), Samples(POINT[None], {}), "v", count, 0)
    method.begin(0, Student(model, "v", COSINE, NO_FACTS), Path(), ALONE, False)
    seen: list[tuple[Tensor, Tensor]] = []

    def student(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    [loss] = method.losses(student, 0, batch())
    [(xt, t)] = seen
    fine = torch.tensor([*nested_timesteps(999, 2 * count), -1])
    row = (fine[None] == t[:, None]).long().argmax(1)
    middle, r = fine[row + 1], fine[row + 2]
    xr = ddim_step(model, ddim_step(model, xt.double(), t, middle), middle, r)
    (alpha, sigma), (after, noise) = levels(t, xt), levels(r, xt)
    target = (xr - noise / sigma * xt) / (after - noise / sigma * alpha)
    weight = (alpha / sigma).square().clamp(min=1)
    wanted = (weight * (alpha * xt - target).square()).mean()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert set(t.tolist()) == set(nested_timesteps(999, count))


def test_a_trajectory_leads_where_the_solver_does(tmp_path: Path) -> None:
    """The targets are states of DPM-Solver++ 3M; the losses are those of a student on its own path."""
    model, steps, substeps = Bent(), 3, 4
    method = Trajectory(Teacher(model, (3, 5)), "v", [steps], substeps, 6, 5)
    method.begin(0, Student(model, "v", COSINE, NO_FACTS), tmp_path, ALONE, False)
    losses = [float(loss.detach()) for loss in method.losses(lambda x, t: 0.3 * x, 0, batch(8))]
    places = torch.randint(6, (8,), generator=after_one_number())
    x = method._noise(places)
    solver = DPMSolver(COSINE, timesteps=nested_timesteps(999, steps * substeps), order=3, prediction="v")
    states = [step.x.clone() for step in solver.iterate(model, x)][substeps - 1 :: substeps]
    times = torch.tensor([*nested_timesteps(999, steps), -1])
    mine = x.double()
    for k, (loss, state) in enumerate(zip(losses, states, strict=True)):
        (alpha, sigma), (after, noise) = levels(times[k : k + 1], x), levels(times[k + 1 : k + 2], x)
        v = 0.3 * mine
        mine = after * (alpha * mine - sigma * v) + noise * (sigma * mine + alpha * v)
        assert loss == pytest.approx(float((mine - state).abs().mean()), rel=1e-4)
    assert torch.equal(states[-1], solver(model, x))


def test_paths_are_not_what_samplers_draw() -> None:
    """A student is judged by noise that it has not seen, under the seed of its training too."""
    method = Trajectory(Teacher(Bent(), (3, 5)), "v", [1], 1, 4, 0)
    drawn = fastsample.ops.randn((4, 3, 5), seed=0)
    assert not np.isin(method._noise(torch.arange(4)).numpy(), drawn.numpy()).any()


def after_one_number() -> Generator:
    """The generator of a batch from which the number of steps was drawn."""
    generator = Generator().manual_seed(7)
    torch.randint(1, (), generator=generator)
    return generator


def consistent(model: Any, schedule: Schedule, **options: Any) -> tuple[ConsistencyMethod, ConsistencyStudent]:
    options = {
        "iterations": 8,
        "curriculum": "fixed",
        "solver": "heun",
        "scales": 10,
        "loss": "norm",
        "target_decay": 0.0,
    } | options
    student = ConsistencyStudent(model, model.prediction, schedule, NO_FACTS)
    return ConsistencyMethod(Teacher(model, (3, 5)), Samples(POINT[None], {}), student, **options), student


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(
    "options", [{}, {"solver": "ddim"}, {"curriculum": "adaptive"}, {"curriculum": "easy"}, {"loss": "huber"}], ids=str
)
def test_an_exact_model_is_consistent(prediction: str, options: dict[str, Any]) -> None:
    schedule = Schedule.scaled_linear()
    method, student = consistent(Delta(POINT, prediction, schedule), schedule, **options)
    t = torch.tensor([-1, 0, 500, 999])
    alpha, sigma = student.levels(t, POINT[None])
    x = alpha * POINT + sigma * torch.randn(4, 3, 5, generator=Generator().manual_seed(0))
    clean = student.clean(student(x, student.time_of(t.clamp(min=0))), x, t)
    assert torch.equal(clean[0], x[0])
    # The boundary lies at sigma_min, not at 0: so much of the noise is left.
    assert (clean[1:] - POINT).abs().max() < 4 * SIGMA_MIN
    for iteration in (0, 3, 7):
        t, r, _ = method.pairs.draw(batch(iteration=iteration))
        [loss] = method.losses(student, 0, batch(iteration=iteration))
        noise = SIGMA_MIN * torch.randn(16, 15, generator=Generator().manual_seed(0)).norm(dim=1).max()
        assert float(loss.detach()) < 2 * float((method.pairs.weight(t, r) * noise).max())


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_a_step_of_the_teacher_is_the_solvers(solver: str) -> None:
    """Each row of the grid by itself, against a whole run of fastsample's own sampler."""
    model = Bent()
    method, _ = consistent(model, COSINE, solver=solver)
    grid = levels_between(fastsample.times.levels.sigma_over_alpha(COSINE)[:991], 10, 10)
    sampler = (fastsample.Heun if solver == "heun" else fastsample.DDIM)(COSINE, timesteps=grid, prediction="v")
    x = torch.randn(1, 3, 5, generator=Generator().manual_seed(0))
    rows = 2 if solver == "heun" else 1
    states = [x, *(s.x.clone() for s in sampler.iterate(model, x) if s.index % rows == rows - 1 or s.index == 18)]
    for k in range(10):
        found = method._stepped(states[k], torch.tensor([k]), torch.tensor([0]))
        assert torch.allclose(found, states[k + 1], atol=1e-6), k


def test_the_average_follows_the_student() -> None:
    method, student = consistent(Bent(), COSINE, target_decay=0.75)
    method.begin(0, student, Path(), ALONE, False)
    before = float(method.target.average.network.scale)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        student.network.scale.add_(1.0)  # type: ignore[operator,union-attr]
    method.moved(student)
    assert float(method.target.average.network.scale) == pytest.approx(before + 0.25)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("scales", [2, 10, 40, 150])
@pytest.mark.parametrize(
    "schedule", [COSINE, Schedule.linear(), Schedule.scaled_linear()], ids=["cosine", "linear", "sd"]
)
def test_levels_descend_from_the_last_to_the_first(schedule: Schedule, scales: int) -> None:
    sigmas = fastsample.times.levels.sigma_over_alpha(schedule)
    chosen = levels_between(sigmas, scales, scales)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (schedule.T - 1, 0, scales)
    assert list(chosen) == sorted(chosen, reverse=True)


@pytest.mark.parametrize("name", CURRICULA)
def test_pairs_are_in_order(name: str) -> None:
    sigmas = fastsample.times.levels.sigma_over_alpha(COSINE)[:991]
    pairs = CURRICULA[name](sigmas, 40, 8)
    gaps = []
    for iteration in range(8):
        t, r, _ = pairs.draw(batch(256, iteration))
        assert (r < t).all() and (r >= -1).all() and (t <= 990).all() and (t >= 0).all()
        weight = pairs.weight(t, r)
        assert torch.isfinite(weight).all() and (weight > 0).all()
        gaps.append(float((t - r).double().mean()))
    assert name == "fixed" or gaps[-1] < gaps[0] / 4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_guided_teacher(guidance: float) -> None:
    """A step per sample at rows of its own equals the sampler's step with guidance."""
    model = unet()
    uncond = {"y": torch.tensor([3])}
    teacher = Teacher(model, SHAPE, cond={"y": LABELS}, uncond=uncond, guidance=guidance)
    table = fastsample.DDIM(model.schedule, steps=4, prediction="v").table
    row, index = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4, 5, 8])
    x = torch.randn(4, *SHAPE, generator=Generator().manual_seed(0))
    stepped = teacher.step(x, table, row, index)
    for i in range(4):
        options: dict[str, Any] = {} if guidance == 1 else {"guidance": guidance, "uncond": uncond}
        sampler = fastsample.Sampler(table)
        one = sampler.iterate(
            teacher.model, x[i : i + 1], cond={"y": LABELS[index[i : i + 1]]}, start_step=i, **options
        )
        assert torch.allclose(stepped[i], next(one).x[0], atol=1e-5)


def test_a_network_of_v_teaches_what_the_model_does() -> None:
    """The plain network returns v, of which the model makes its epsilon."""
    model = unet()
    teacher = Teacher(model, SHAPE)
    x, t = torch.randn(5, *SHAPE), torch.tensor([0, 20, 50, 80, 99])
    alpha, sigma = Student(model, "v", model.schedule, NO_FACTS).levels(t, x)
    with torch.no_grad():
        assert torch.allclose(sigma * x + alpha * teacher.model(x, t), model(x, t)[:, :3], atol=1e-6)
    assert teacher.prediction == "v" and teacher.start("v") == 99


def test_both_halves_are_v() -> None:
    """v = alpha epsilon - sigma x0: exact for the epsilon and x0 of one sample, and of 0 at the start."""
    epsilon, x0 = torch.randn(2, 4, 3, 9, 6, generator=Generator().manual_seed(0))
    t = torch.tensor([0, 300, 800, 999])
    network = torch.nn.Module()
    network.forward = lambda x, t: torch.cat((epsilon, x0), dim=1)  # type: ignore[method-assign]
    student = Student(network, "both", COSINE, NO_FACTS)
    alpha, sigma = student.levels(t, x0)
    assert torch.equal(student(epsilon, t), alpha * epsilon - sigma * x0)
    assert student.prediction == "v"


def test_what_a_copy_of_two_halves_begins_as(tmp_path: Path) -> None:
    """Its epsilon is the teacher's and its x0 is nothing."""
    from fastsample.distill.network import network_for

    model = unet(target="epsilon")
    teacher = Teacher(model, SHAPE, prediction="epsilon")
    network, output = network_for(teacher, None, None)
    x, t = torch.randn(2, *SHAPE), torch.tensor([3, 90])
    with torch.no_grad():
        given, own = network(x, t), model(x, t)
    assert output == "both"
    assert torch.equal(given[:, :3], own[:, :3]) and not given[:, 3:].any() and own[:, 3:].any()


def test_a_students_own_sampler_and_the_function_agree() -> None:
    model = unet()
    method = ConsistencyMethod(
        Teacher(model, SHAPE, cond={"y": LABELS}, clip=1.0),
        Samples(DATA, {}),
        ConsistencyStudent(Teacher(model, SHAPE).model, "v", model.schedule, Facts("", SHAPE, {})),  # type: ignore
        iterations=1,
        curriculum="fixed",
        solver="ddim",
        scales=8,
        loss="norm",
        target_decay=0.0,
    )
    student = method.student.eval()
    student.facts = method.facts(0)
    labels = torch.arange(4) % 3
    for steps in student.steps():
        own = student.sample((4, *SHAPE), steps, seed=3, y=labels)
        sigmas = student.sigmas[list(student.timesteps(steps))]
        other = fastsample.consistency(
            student, (4, *SHAPE), sigmas=sigmas, sigma_data=1.0, seed=3, model_kwargs={"y": labels}
        )
        assert torch.equal(own, other)


def test_the_package_names_them() -> None:
    assert set(distill.__all__) >= {"trajectory", "progressive", "consistency"}
