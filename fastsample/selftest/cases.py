"""What `fastsample selftest` checks: every op in every mode, and whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastsample.selftest.case import DTYPES, LATENTS, ODD, TAIL, TINY, Case
from fastsample.selftest.op_cases import (
    likelihood_case,
    log_prob_case,
    lora_case,
    noise_case,
    posterior_case,
)
from fastsample.selftest.sampler_cases import sampler_case
from fastsample.selftest.step_cases import MODES


def cases(quick: bool = False) -> Iterator[Case]:
    """All checks, or those of small shapes."""
    shapes = (TINY, ODD, *(() if quick else (TAIL, LATENTS)))
    yield from (noise_case(shape) for shape in shapes)
    yield noise_case(ODD, "last step, a seed below 0", seed=-2, index=2**63, row=2**32 - 1)
    yield noise_case(ODD, "strided out", strided=True)
    for mode in MODES:
        for dtype in DTYPES:
            for shape in shapes if dtype == torch.float32 else shapes[1:3]:
                yield mode.case(dtype, shape)
    for dtype in DTYPES:
        yield from (log_prob_case(dtype, shape) for shape in shapes[1:3])
    for dtype in DTYPES:
        yield from (posterior_case(dtype, shape) for shape in shapes[1:3])
    for dtype in DTYPES:
        yield from (likelihood_case(dtype, shape, row) for shape in shapes[1:3] for row in (5, 9))
    for dtype in DTYPES:
        yield from (lora_case(dtype, *sizes) for sizes in ((3, 5, 24), *(() if quick else ((2, 77, 80),))))
    for shape in (ODD, *(() if quick else (LATENTS,))):
        for captured, guided in ((False, False), (True, False), (True, True)):
            yield sampler_case(shape, captured, guided)
