"""The command `fastsample demo`: a picture of samples, and what they cost beside a plain PyTorch loop."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fastsample.model import Model
from fastsample.ops import randn
from fastsample.ops.backend import backends
from fastsample.samplers import ddim
from fastsample.timesteps import spaced_timesteps
from fastsample.zoo import digits

STEPS = (10, 20, 50)
SHAPE = (10, 1, 28, 28)


def run(args: argparse.Namespace) -> int:
    """Writes the picture and prints the tables.

    Returns:
        0 on success; 2 where a package or the folder for the picture is missing, with a word on stderr.
    """
    try:
        import matplotlib
    except ImportError:
        print("fastsample demo draws with matplotlib: pip install 'fastsample[demo]'", file=sys.stderr)
        return 2
    if not args.out.absolute().parent.is_dir():
        print(f"fastsample demo: no such folder: {args.out.absolute().parent}", file=sys.stderr)
        return 2
    if args.rounds < 1:
        print(f"fastsample demo: --rounds must be at least 1, got {args.rounds}", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    model, labels = GuidedDigits(guidance=2.0), {"y": torch.arange(10)}
    rows = {steps: ddim(model, SHAPE, steps=steps, seed=args.seed, model_kwargs=labels) for steps in STEPS}
    _draw(rows, args.out)
    print(f"{args.out}: digits 0 to 9 with guidance 2, one row each for {', '.join(map(str, STEPS))} DDIM steps\n")
    cpu = backends()["cpu"]
    where = f"cpu kernels ({cpu['isa']})" if cpu["available"] else f"reference backend ({cpu['reason']})"
    print(
        f"{where}, {torch.get_num_threads()} threads, batch of {SHAPE[0]}; medians of {args.rounds} rounds, interleaved"
    )
    _print_times(model, labels, args.rounds)
    _print_seeds(model, args.seed)
    return 0


class GuidedDigits:
    """The bundled model with classifier-free guidance, e_none + w (e_label - e_none): a model like any other."""

    def __init__(self, guidance: float) -> None:
        self._model, self._guidance = digits(), guidance
        self.schedule = self._model.schedule

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        none = torch.full_like(y, self._model.config.num_classes)
        output = self._model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([none, y]))
        unconditional, conditional = output.chunk(2)
        return unconditional + self._guidance * (conditional - unconditional)


def plain_ddim(model: Model, x: Tensor, steps: int, y: Tensor) -> Tensor:
    """The loop as one writes it in plain PyTorch: what `ddim` is timed against."""
    alphas_cumprod = model.schedule.alphas_cumprod  # type: ignore[attr-defined]
    timesteps = spaced_timesteps(len(alphas_cumprod), "leading", steps).tolist()
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar = float(alphas_cumprod[t])
        alpha_bar_previous = 1.0 if previous is None else float(alphas_cumprod[previous])
        output = model(x, torch.full((len(x),), t), y=y)
        epsilon = output[:, : x.shape[1]]
        x0 = (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
        x = alpha_bar_previous**0.5 * x0 + (1 - alpha_bar_previous) ** 0.5 * epsilon
    return x


class _FreeModel:
    """Returns the same tensor every time, so that only the sampler's own work is timed."""

    def __init__(self, model: GuidedDigits) -> None:
        self.schedule = model.schedule
        self._output = torch.zeros(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._output


def _print_times(model: GuidedDigits, labels: dict[str, Tensor], rounds: int) -> None:
    """Time per image, and per step of the whole batch; last with a model that takes no time at all."""
    free = _FreeModel(model)
    print(f"{'':<22}{'fastsample':>14}{'plain PyTorch':>18}{'plain / fastsample':>22}")
    for steps in STEPS:
        ours, plain, ratio = _interleaved(model, steps, labels, rounds)
        print(f"{f'{steps} steps, per image':<22}{_ms(ours, SHAPE[0])}{_ms(plain, SHAPE[0]):>18}{ratio:>21.2f}x")
        print(f"{'per step of the batch':>22}{_ms(ours, steps)}{_ms(plain, steps):>18}")
    ours, plain, ratio = _interleaved(free, STEPS[-1], labels, rounds)
    print(f"{'same, model free':>22}{_ms(ours, STEPS[-1])}{_ms(plain, STEPS[-1]):>18}{ratio:>21.2f}x\n")


def _ms(seconds: float, count: int) -> str:
    return f"{1e3 * seconds / count:11.3f} ms"


@torch.no_grad()
def _interleaved(model: Model, steps: int, labels: dict[str, Tensor], rounds: int) -> tuple[float, float, float]:
    """Median seconds of `ddim` and of `plain_ddim`, and the median of their ratios round by round."""
    x = randn(SHAPE, seed=0)
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        ddim(model, x, steps=steps, model_kwargs=labels)
        middle = time.perf_counter()
        plain_ddim(model, x, steps, **labels)
        times.append((middle - start, time.perf_counter() - middle))
    counted = times[1:]  # the first round warms up
    ratio = statistics.median(b / a for a, b in counted)
    return statistics.median(a for a, _ in counted), statistics.median(b for _, b in counted), ratio


def _print_seeds(model: GuidedDigits, seed: int) -> None:
    one, sixteen = (1, *SHAPE[1:]), (16, *SHAPE[1:])
    same = torch.equal(randn(one, seed=seed), randn(sixteen, seed=seed)[:1])
    eights = torch.full((16,), 8)
    alone = ddim(model, one, steps=20, eta=1.0, seed=seed, model_kwargs={"y": eights[:1]})
    among = ddim(model, sixteen, steps=20, eta=1.0, seed=seed, model_kwargs={"y": eights})[:1]
    print(
        f"seed {seed} in a batch of 1 and of 16: noise bits {'identical' if same else 'DIFFERENT'}; samples (eta 1, 20 "
        f"steps) differ by at most {(alone - among).abs().max():.1e}, which is the model's own rounding"
    )


def _draw(rows: dict[int, Tensor], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), SHAPE[0], figsize=(SHAPE[0], 1.1 * len(rows) + 0.3))
    for line, (steps, images) in zip(axes, rows.items(), strict=True):
        for digit, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image[0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if steps == STEPS[0]:
                axis.set_title(str(digit))
        line[0].set_ylabel(f"{steps} steps")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
