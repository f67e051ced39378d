"""The denoising loop of an accelerated pipeline with a LoRA, beside the same pipeline without one.

A pipeline of the shape of Stable Diffusion 1.5, its UNet narrower, with random weights: prompt and picture are given,
so that what is timed is the loop, under guidance. A result file for each dtype.

  no LoRA             diffusers' pipeline
  PEFT rank 16        with a LoRA on all attention projections
  fastsample rank 16  that after fastsample.accelerate
  fastsample no LoRA  the pipeline without one after fastsample.accelerate

--shapes takes latents, such as 1x4x32x32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsample
from benchmarks.common import progress
from benchmarks.common.harness import Candidate, measure, ratio
from benchmarks.common.optional import optional
from benchmarks.common.options import Run, Shape, begin, label, parser, refuse
from benchmarks.common.report import OURS, Row, against, plot, rows_of, table, write_csv
from benchmarks.common.sentences import closing
from benchmarks.sections import unets
from benchmarks.sections.projections import dtypes_named, name_of, provider
from benchmarks.sections.unets import BARE, DTYPES, TOKENS

RANK, STEPS, QUICK_STEPS = 16, 3, 1
WITH_PEFT, WITH_OURS, OURS_BARE = provider("PEFT", RANK), provider(OURS, RANK), f"{OURS} no LoRA"
# 0.4 of the published width, so that a loop takes a second or two on two cores.
CONFIG: dict[str, Any] = {**unets.CONFIG, "block_out_channels": (128, 256, 512, 512), "sample_size": 32}
SHAPES: tuple[Shape, ...] = ((1, 4, 32, 32),)
QUICK_SHAPES: tuple[Shape, ...] = ((1, 4, 8, 8),)
MOST = 1.03  # of the time without LoRA


def main(argv: Sequence[str] | None = None) -> int:
    """Measures both dtypes and writes their results."""
    flags = parser("benchmarks.accelerate", __doc__, gpus=True)
    flags.add_argument("--steps", type=int, help=f"of each loop, default {STEPS}")
    flags.add_argument("--dtypes", type=_dtypes, default=DTYPES, help="comma separated, of float32, bfloat16")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    shapes = arguments.shapes or (QUICK_SHAPES if run.quick else SHAPES)
    steps = arguments.steps or (QUICK_STEPS if run.quick else STEPS)
    if any(len(shape) != 4 or shape[1] != CONFIG["in_channels"] for shape in shapes):
        refuse("--shapes: latents have four axes, of which the second is 4")
    if any(optional(package, "the pipeline") is None for package in ("diffusers", "peft")):
        return 0
    for dtype in arguments.dtypes:
        file = f"accelerate-{name_of(dtype)}"
        with progress.section(file, run.rounds, run.quick):
            rows = section(run, shapes, steps, dtype)
        write_csv(run.path(file, ".csv"), rows, run.device)
        plot(run.path(file, ".png"), rows, f"benchmarks.accelerate, {name_of(dtype)}", run.device)
        print(f"\n{closing(rows)}", flush=True)
    return 0


def section(run: Run, shapes: Sequence[Shape], steps: int, dtype: torch.dtype) -> list[Row]:
    """Times loops of so many steps from latents of every shape."""
    unet = unets.build(unets.QUICK_CONFIG if run.quick else CONFIG).to(run.device)
    inputs = {shape: _inputs(shape, unet.config.cross_attention_dim, run.device) for shape in shapes}
    exact = {shape: loop(_pipeline(unet), *inputs[shape], steps) for shape in shapes} if dtype != torch.float32 else {}
    pipelines = _pipelines(unet.to(dtype))
    rows: list[Row] = []
    for shape in shapes:
        latents, tokens = (value.to(dtype) for value in inputs[shape])
        calls = {name: partial(loop, pipe, latents, tokens, steps) for name, pipe in pipelines.items()}
        rounding = unets.distance(calls[BARE](), exact[shape]) if exact else unets.FLOAT32_ROUNDING
        check_agreement(calls, rounding)
        timings = measure([Candidate(name, call) for name, call in calls.items()], run.rounds, clock=run.loop_clock)
        case = f"latents {label(shape)}, {steps} steps"
        rows += rows_of(f"accelerate {name_of(dtype)}", case, timings, against(BARE, timings))
        print(table(rows[-len(timings) :]))
        low, middle, high = ratio(timings[WITH_OURS], timings[BARE])
        print(f"  with LoRA {middle:.3f} ({low:.3f} .. {high:.3f}) of the time without, aim {MOST}", flush=True)
    return rows


def loop(pipeline: Any, latents: Tensor, tokens: Tensor, steps: int) -> Tensor:
    """The latents after all steps."""
    made: Tensor = pipeline(
        prompt_embeds=tokens,
        negative_prompt_embeds=-tokens,
        latents=latents,
        num_inference_steps=steps,
        output_type="latent",
    ).images
    return made


def check_agreement(calls: Mapping[str, Callable[[], Tensor]], rounding: float) -> None:
    """Fails unless the accelerated loops agree with those they stand for, and a LoRA makes more than roundings.

    Two that compute the same have different roundings, so that they differ by about sqrt(2) times one's; allowed is
    twice as much.
    """
    latents = {name: call() for name, call in calls.items()}
    for ours, theirs in ((WITH_OURS, WITH_PEFT), (OURS_BARE, BARE)):
        if (apart := unets.distance(latents[ours], latents[theirs])) > 2 * rounding:
            raise AssertionError(f"{ours} and {theirs} differ by {apart:.2g}, roundings by {rounding:.2g}")
    if unets.distance(latents[WITH_OURS], latents[BARE]) < 1.5 * rounding:
        raise AssertionError(f"{WITH_OURS} computes what the pipeline without LoRA does")


def _pipelines(unet: nn.Module) -> dict[str, Any]:
    """Pipelines around the same parameters, by the names that they are reported under."""
    pipelines = {BARE: _pipeline(unet), OURS_BARE: _pipeline(unets.sharing(unet))}
    for name in (WITH_PEFT, WITH_OURS):
        adapted = unets.with_peft(unet, RANK)
        assert adapted is not None
        pipelines[name] = _pipeline(adapted)
    for name in (WITH_OURS, OURS_BARE):
        report = fastsample.accelerate(pipelines[name])
        if not report.swapped or report.components[0].left:
            raise AssertionError(f"accelerate left a part of the pipeline:\n{report}")
    return pipelines


def _pipeline(unet: nn.Module) -> Any:
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    absent = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipeline: Any = diffusers.StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _inputs(shape: Shape, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    latents, tokens = (torch.randn(size, generator=draws) for size in (shape, (shape[0], TOKENS, width)))
    return latents.to(device), tokens.to(device)


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    return dtypes_named(text, DTYPES)


if __name__ == "__main__":
    raise SystemExit(main())
