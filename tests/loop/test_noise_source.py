"""noise=: torch generators and functions of the row in place of seeds, and when a loop asks for noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, ddim, ops
from support.whole_runs import SHAPE, model


def test_seeds_are_read_once() -> None:
    seeds = torch.tensor([5, 6])
    steps = DDIM(Schedule.linear(), steps=6, eta=1.0).iterate(model, SHAPE, seed=seeds)
    next(steps)
    seeds += 100
    *_, last = steps
    assert torch.equal(last.x, DDIM(Schedule.linear(), steps=6, eta=1.0)(model, SHAPE, seed=[5, 6]))


def test_generators_give_torchs_own_stream(backend: str) -> None:
    x = ops.randn(SHAPE, seed=0)
    common = dict(steps=5, eta=1.0, backend=backend)
    generator = torch.Generator().manual_seed(8)
    drawn = [torch.randn(SHAPE, generator=generator) for _ in range(5)]
    want = ddim(model, x, noise=lambda k: drawn[k], **common)
    assert torch.equal(ddim(model, x, noise=torch.Generator().manual_seed(8), **common), want)

    several = [torch.Generator().manual_seed(i) for i in range(2)]
    rows = [torch.cat([torch.randn((1, *SHAPE[1:]), generator=g) for g in several]) for _ in range(5)]
    want = ddim(model, x, noise=lambda k: rows[k], **common)
    assert torch.equal(ddim(model, x, noise=[torch.Generator().manual_seed(i) for i in range(2)], **common), want)


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        pytest.param([torch.Generator()], ValueError, "one per sample", id="too-few-generators"),
        pytest.param([1, 2], TypeError, "torch.Generator", id="not-generators"),
        pytest.param(3, TypeError, "torch.Generator", id="number"),
        pytest.param(lambda k: None, TypeError, "noise must be a tensor", id="returns-none"),
        pytest.param(lambda k: torch.zeros(2, 3), ValueError, "noise must have", id="wrong-shape"),
    ],
)
def test_bad_noise(backend: str, noise: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ddim(model, SHAPE, steps=3, eta=1.0, noise=noise, backend=backend)  # type: ignore[arg-type]


def test_noise_is_asked_for_only_where_it_is_added() -> None:
    rows = []

    def noise(k: int) -> Tensor:
        rows.append(k)
        return torch.zeros(SHAPE)

    ddim(model, SHAPE, steps=4, eta=1.0, noise=noise)
    assert rows == [0, 1, 2], "the last row goes to alpha bar 1 and adds none"
