"""Which samplers the study of quality runs, with how many model calls and samples, the most telling ones first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

import fastsample
from fastsample import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Sampler,
    UniPC,
    distill,
)

Make = Callable[..., Sampler]

# x0 is clipped throughout: pixels end at -1 and 1, and a cosine schedule starts next to pure noise.
SAMPLERS: Mapping[str, Make] = {
    "DDIM": partial(DDIM, clip=1.0),
    "DPM-Solver++ 2M": partial(DPMSolver, order=2, clip=1.0),
    "DDPM, learned range": partial(DDPM, variance="learned_range", clip=1.0),
    "DDPM, fixed small": partial(DDPM, variance="fixed_small", clip=1.0),
    "DDPM, fixed large": partial(DDPM, variance="fixed_large", clip=1.0),
    "DPM-Solver++ 3M": partial(DPMSolver, order=3, clip=1.0),
    "Heun": partial(Heun, clip=1.0),
    "Euler": partial(Euler, clip=1.0),
    "Euler ancestral": partial(EulerAncestral, clip=1.0),
    "DPM-Solver++ 2M, Karras": partial(DPMSolver, order=2, timesteps="karras", clip=1.0),
    "DDIM, not clipped": DDIM,
    "UniPC-2": partial(UniPC, order=2, clip=1.0),
    "UniPC-3": partial(UniPC, order=3, clip=1.0),
    "DEIS-tAB3": partial(DEIS, order=3, clip=1.0),
    "DEIS-3, log rho": partial(DEIS, order=3, variant="log_rho", clip=1.0),
    "iPNDM-2": partial(IPNDM, order=2, clip=1.0),
    "iPNDM-4": partial(IPNDM, order=4, clip=1.0),
    "DPM-Solver++ 2M SDE": partial(DPMSolver, order=2, sde=True, clip=1.0),
    # What DDIMScheduler does by default, of whose own spacing benchmarks.few_calls has the time.
    "DDIM, as diffusers": partial(DDIM, timesteps="leading", clip=1.0, rederive_epsilon=False),
    "DDIM, GITS": partial(DDIM, clip=1.0),
    "DPM-Solver++ 2M, GITS": partial(DPMSolver, order=2, clip=1.0),
}
FOUND = "GITS"  # at the end of a name: the timesteps are those of fastsample.optimal_timesteps
AS_DIFFUSERS = "DDIM, as diffusers"
SPACED = [name for name in SAMPLERS if not name.endswith(FOUND) and name != AS_DIFFUSERS]
LEARNED = "DDPM, learned range"
SOLVER = "DPM-Solver++ 2M"
DDPMS = tuple(name for name in SAMPLERS if name.startswith("DDPM"))
FEW, MIDDLE, MANY = (10, 4, 6, 8, 5, 3), (50, 20, 100), (250, 1000)
SAMPLES, FEWER_SAMPLES, QUICK_SAMPLES, STUDENT_SAMPLES = 3000, 900, 300, 5000
GUIDANCE = 1.25
TOLD = (GUIDANCE, 2.0, 1.0, 4.0, 8.0)  # of students that are told; the first two in all their steps
BITS = ((50, 1000), (10, 1000), (25, 1000), (100, 1000), (1000, 100))  # model calls, digits
QUICK_BITS = ((10, 100), (50, 100))
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


@dataclass(frozen=True)
class Case:
    """One set of samples: `count` of them by this sampler, in so many model calls or, for Heun, one less.

    They are latents' where `latent` says so, by the bundled model of these in place of the study's.
    """

    sampler: str
    calls: int
    count: int
    guidance: float = 1.0
    latent: bool = False

    def make(self, model: fastsample.zoo.UNet) -> Sampler:
        """The sampler on the model's schedule."""
        make, schedule = SAMPLERS[self.sampler], model.schedule
        if self.latent:
            make = partial(make, clip=None)  # latents have no bounds
        if self.sampler.endswith(FOUND):
            make = partial(make, timesteps=found_timesteps(model, self.calls))
        steps = (self.calls + 1) // 2 if self.sampler == "Heun" else self.calls
        # Solvers visit one timestep less than there are.
        most = schedule.T if getattr(make, "func", make) in (DDIM, DDPM) else schedule.T - 1
        with warnings.catch_warnings():
            # Of timesteps that do not suit a schedule: how bad they are is what the study is about.
            warnings.simplefilter("ignore", UserWarning)
            return make(schedule, steps=min(steps, most), prediction=model.config.prediction)

    def image_calls(self, model: fastsample.zoo.UNet) -> int:
        """Images times model calls; guidance doubles the images."""
        return self.count * self.rows(model) * (1 if self.guidance == 1 else 2)

    def rows(self, model: fastsample.zoo.UNet) -> int:
        """Model calls of the run, which a schedule may not have as many of."""
        return self.calls if self.sampler.endswith(FOUND) else len(self.make(model).table)


@cache
def found_timesteps(model: fastsample.zoo.UNet, steps: int) -> tuple[int | float, ...]:
    """The timesteps that this model's own trajectories ask for, of 60 samples of all its classes."""
    config = model.config
    batch = (60, config.channels, *config.size)
    keywords = {"y": torch.arange(60) % config.num_classes} if config.num_classes else {}
    return fastsample.optimal_timesteps(
        model, batch, steps, clip=1.0, samples=60, seed=0, progress=False, model_kwargs=keywords
    )


@dataclass(frozen=True)
class RealCase:
    """So many real images against the others."""

    count: int

    def image_calls(self, model: fastsample.zoo.UNet) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class BitsCase:
    """Bits per dimension of held-out images on a process of so many steps."""

    variance: str
    calls: int
    count: int

    def image_calls(self, model: fastsample.zoo.UNet) -> int:
        """Images times model calls."""
        return self.count * min(self.calls, model.schedule.T)


@dataclass(frozen=True)
class StudentCase:
    """So many samples of a distilled model, in some of the steps that it was distilled for.

    One of a range of guidance is told the weight; for others it is None.
    """

    student: Path
    steps: int
    count: int
    guidance: float | None = None
    stochastic: bool = False

    def image_calls(self, model: fastsample.zoo.UNet) -> int:
        """Images times model calls, of a network as large as the teacher's."""
        return self.count * self.steps


AnyCase = Case | RealCase | BitsCase | StudentCase


def plan(model: fastsample.zoo.UNet, *, quick: bool, count: int | None = None) -> list[AnyCase]:
    """All cases of the study that this model can run, each once, in order.

    Args:
        quick: those of a run of minutes.
        count: samples and digits of every case, instead of the study's own numbers.
    """
    cases = [
        case for case in (_quick_cases() if quick else _cases()) if model.config.learned_variance or not _learned(case)
    ]
    if count is not None:
        cases = [replace(case, count=count) for case in cases]
    once: dict[object, AnyCase] = {}
    for case in cases:
        same = (type(case), replace(case, calls=case.rows(model))) if isinstance(case, Case) else case
        once.setdefault(same, case)
    return list(once.values())


def students_plan(students: Sequence[Path], *, quick: bool, count: int | None = None) -> list[AnyCase]:
    """Students in all their steps, beside their teachers in many steps and in as few; equal numbers of samples."""
    count = count or (QUICK_SAMPLES if quick else STUDENT_SAMPLES)
    guided = [Case("DDIM", calls, count, GUIDANCE) for calls in (MIDDLE[0], FEW[0], 4)]
    guided.append(Case(SOLVER, FEW[0], count, GUIDANCE))
    few = [Case(name, calls, count) for calls in (FEW[0], 4) for name in ("DDIM", SOLVER)]
    distilled = [case for path in students for case in _student_cases(path, count)]
    weights = {case.guidance for case in distilled if case.guidance is not None} - {GUIDANCE}
    guided += [Case("DDIM", MIDDLE[0], count, weight) for weight in sorted(weights - {1.0})]
    latents = _latent_teacher(count, weights) if any(is_latent(case.student) for case in distilled) else []
    real = RealCase(min(count, 2500))
    return [real, Case("DDIM", MIDDLE[0], count), *guided, *few, *latents, *distilled]


def _student_cases(path: Path, count: int) -> Iterator[StudentCase]:
    student = load_student(path)
    if not isinstance(student.facts.guidance, tuple):
        yield from (StudentCase(path, steps, count) for steps in student.steps())
        return
    for steps in student.steps():
        weights = TOLD if steps == 4 else TOLD[:2]
        yield from (StudentCase(path, steps, count, weight) for weight in weights)
    if student.facts.sampler == "ddim" and student.steps()[0] > 1:
        yield StudentCase(path, student.steps()[0], count, GUIDANCE, stochastic=True)


def _latent_teacher(count: int, weights: set[float]) -> list[AnyCase]:
    every = sorted({1.0, GUIDANCE, *weights})
    many: list[AnyCase] = [Case("DDIM", MIDDLE[0], count, weight, latent=True) for weight in every]
    return many + [Case(name, 4, count, latent=True) for name in ("DDIM", SOLVER)]


@cache
def load_student(path: Path) -> distill.Student:
    """The student of a file, once a process; of a LoRA with the bundled model."""
    names = {file: name for name, file in fastsample.zoo.STUDENTS.items()}
    student: distill.Student = fastsample.zoo.digits(names[path]) if path in names else distill.load(path)
    return student


def is_latent(path: Path) -> bool:
    """Whether the student of a file is one of latents."""
    return load_student(path).autoencoder is not None


def _learned(case: AnyCase) -> bool:
    return (isinstance(case, Case) and case.sampler == LEARNED) or (
        isinstance(case, BitsCase) and case.variance == "learned_range"
    )


def _cases() -> Iterator[AnyCase]:
    yield RealCase(FEWER_SAMPLES)
    yield RealCase(2500)
    long = ("DDIM", SOLVER, *DDPMS)
    yield from (Case(name, FEW[0], SAMPLES) for name in SPACED)
    yield from (Case(name, MIDDLE[0], SAMPLES) for name in long)
    yield from (Case(name, FEW[1], SAMPLES) for name in SPACED)
    yield from (BitsCase(variance, *BITS[0]) for variance in VARIANCES)
    guided = (("DDIM", FEW[0]), (SOLVER, FEW[0]), ("UniPC-2", FEW[0]), ("UniPC-2", 5), (SOLVER, 5), ("DDIM", MIDDLE[0]))
    yield from (Case(name, calls, SAMPLES, GUIDANCE) for name, calls in guided)
    yield from (Case(AS_DIFFUSERS, MIDDLE[0], SAMPLES, weight) for weight in (1.0, GUIDANCE))
    yield from (Case(name, calls, SAMPLES) for calls in MIDDLE[1:] for name in long)
    yield from (BitsCase(variance, *bits) for bits in BITS[1:-1] for variance in VARIANCES)
    yield from (Case(name, calls, SAMPLES) for calls in FEW[2:] for name in SPACED)
    yield from (Case(name, calls, SAMPLES) for calls in (4, 5, 6) for name in SAMPLERS if name.endswith(FOUND))
    # The judge of many calls is the unbiased kernel distance, for which 900 samples will do.
    yield from (Case(name, calls, FEWER_SAMPLES) for calls in MANY for name in ("DDIM", *DDPMS[:2]))
    yield from (BitsCase(variance, *BITS[-1]) for variance in VARIANCES)
    # What few samples are worth: the same case as above, judged by as many as the rows of 250 and 1,000 calls have.
    yield from (Case(name, MIDDLE[0], FEWER_SAMPLES) for name in ("DDIM", *DDPMS[:2]))


def _quick_cases() -> Iterator[AnyCase]:
    yield RealCase(QUICK_SAMPLES)
    yield from (Case(name, calls, QUICK_SAMPLES) for calls in (10, 4) for name in SPACED)
    yield from (Case(name, 50, QUICK_SAMPLES) for name in ("DDIM", SOLVER, *DDPMS))
    yield Case("DDIM", 10, QUICK_SAMPLES, GUIDANCE)
    yield from (BitsCase(variance, *bits) for bits in QUICK_BITS for variance in VARIANCES)
