"""What guidance refuses, before the model is called where that can be known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, Shared, ddim, ops
from support.guided import COND, SHAPE, UNCOND, X
from support.whole_runs import never

C, U = COND["c"], UNCOND["c"]

BEYOND_FLOAT32: dict[str, Any] = {
    "large": 1e39,
    "infinite": math.inf,
    "huge-int": 10**400,
    "large-int": 10**39,
    "one-of-three": [1.0, 2.0, 1e39],
    "huge-ints": [1, 2, 10**400],
    "tensor": torch.tensor(1e39, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"uncond": None}, ValueError, "guidance needs uncond=", id="no-uncond"),
        pytest.param({"uncond": {}}, ValueError, "only one of them has c", id="keyword-missing"),
        pytest.param({"cond": {**COND, "z": 1, "y": 2}}, ValueError, "only one of them has y, z", id="keywords-extra"),
        pytest.param(
            {"cond": {"c": {"k": C}}, "uncond": {"c": {"l": U}}}, ValueError, r"has c\.k, c\.l", id="nested-keywords"
        ),
        pytest.param({"cond": {"c": C[:, 0]}}, ValueError, "c must have one shape in cond and uncond", id="shapes"),
        pytest.param({"cond": {"c": C[:2]}, "uncond": {"c": U[:2]}}, ValueError, r"c is a tensor.*Shared", id="batch"),
        pytest.param({"cond": {"c": C[:2]}}, ValueError, r"c is a tensor.*: 3 in", id="one-wrong-batch"),
        pytest.param({"cond": {"c": torch.tensor(1.0)}}, ValueError, r"c is a tensor.*\(\) and", id="0-d-and-batch"),
        pytest.param(
            {"cond": {"c": torch.tensor(1.0)}, "uncond": {"c": torch.tensor(2.0)}},
            ValueError,
            "c differs between",
            id="0-d",
        ),
        pytest.param(
            {"model_kwargs": {"k": torch.arange(7.0)}}, ValueError, r"k is a tensor.*Shared", id="of-no-sample"
        ),
        pytest.param({"model_kwargs": {"k": torch.ones(1, 3)}}, ValueError, r"k is a tensor.*Shared", id="batch-of-1"),
        pytest.param(
            {"cond": {"c": Shared(C)}, "uncond": {"c": Shared(U)}}, ValueError, "c differs between", id="two-shared"
        ),
        pytest.param({"cond": {"c": Shared(C)}}, ValueError, "c differs between", id="shared-in-one"),
        pytest.param({"cond": {"c": 2.0}, "uncond": {"c": 3.0}}, ValueError, "c differs between", id="numbers"),
        pytest.param({"cond": {"c": 2}, "uncond": {"c": 2.0}}, ValueError, "c differs between", id="types"),
        pytest.param({"cond": {"c": C}, "uncond": {"c": None}}, ValueError, "c differs between", id="none"),
        pytest.param(
            {"cond": {"c": {"k": "a"}}, "uncond": {"c": {"k": "b"}}}, ValueError, r"c\.k differs", id="nested"
        ),
        pytest.param({"cond": {"c": (C, 1)}, "uncond": {"c": (U, 2)}}, ValueError, r"c\[1\] differs", id="in-a-tuple"),
        pytest.param(
            {"cond": {"c": (C,)}, "uncond": {"c": (U, U)}}, ValueError, "c differs", id="tuples-of-two-lengths"
        ),
        pytest.param(
            {"cond": {"c": [C]}, "uncond": {"c": [U, U]}}, ValueError, "c is a list.*tuple", id="list-lengths"
        ),
        pytest.param({"model_kwargs": {"k": [1, 2]}}, ValueError, "k is a list.*: 3 in cond", id="list-of-2"),
        pytest.param({"cond": {"c": np.ones(2)}, "uncond": {"c": np.zeros(2)}}, ValueError, "c differs", id="arrays"),
        pytest.param({"cond": {"c": {"k": C}}}, ValueError, "c differs between", id="mapping-and-tensor"),
        pytest.param({"cond": [C]}, TypeError, "cond must be a mapping", id="cond-list"),
        pytest.param({"uncond": "none"}, TypeError, "uncond must be a mapping", id="uncond-text"),
        pytest.param({"model_kwargs": 1}, TypeError, "model_kwargs must be a mapping", id="kwargs-number"),
        pytest.param({"guidance": math.nan}, ValueError, "guidance must be finite", id="weight-nan"),
        *(
            pytest.param({"guidance": weight}, ValueError, "guidance must be finite", id=f"weight-{name}")
            for name, weight in BEYOND_FLOAT32.items()
        ),
        pytest.param({"guidance": [1.0, 2.0]}, ValueError, "guidance must be one number or 3", id="weights-too-few"),
        pytest.param({"guidance": torch.ones(3, 1)}, ValueError, "guidance must be one number or 3", id="weights-2d"),
        pytest.param({"guidance_rescale": 1.5}, ValueError, "guidance_rescale must lie in", id="phi"),
        pytest.param({"guidance_rescale": math.nan}, ValueError, "guidance_rescale must lie in", id="phi-nan"),
        pytest.param({"guidance_rescale": "1"}, TypeError, "guidance_rescale must be a number", id="phi-text"),
        pytest.param({"guidance": "much"}, TypeError, "guidance must be a number or one per sample", id="weight-text"),
        pytest.param({"guidance": None}, ValueError, "uncond without guidance=", id="weight-missing"),
        pytest.param(
            {"guidance": None, "uncond": None, "guidance_interval": (1, 5), "guidance_rescale": 0.5},
            ValueError,
            "guidance_interval and guidance_rescale without guidance=",
            id="options-without-a-weight",
        ),
        pytest.param({"guidance_interval": (1, 2, 3)}, TypeError, r"must be \(t_lo, t_hi\)", id="interval-of-three"),
        pytest.param({"guidance_interval": "12"}, TypeError, r"guidance_interval must be \(t_lo", id="interval-text"),
        pytest.param({"guidance_interval": b"12"}, TypeError, r"guidance_interval must be \(t_lo", id="interval-bytes"),
        pytest.param({"guidance_interval": {1, 2}}, TypeError, r"guidance_interval must be \(t_lo", id="interval-set"),
        pytest.param({"guidance_interval": ("1", "2")}, TypeError, r"must be \(t_lo, t_hi\)", id="interval-of-texts"),
        pytest.param({"guidance_interval": 500}, TypeError, r"must be \(t_lo, t_hi\)", id="interval-number"),
        pytest.param({"guidance_interval": (400.5, 499)}, ValueError, "holds none of the times", id="interval-empty"),
        pytest.param({"guidance_interval": (5, 4)}, ValueError, "t_lo <= t_hi", id="interval-backwards"),
        pytest.param({"guidance_interval": (math.nan, 4)}, ValueError, "t_lo <= t_hi", id="interval-nan"),
    ],
)
def test_refused_before_the_model_is_called(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"guidance": 2.0, "cond": COND, "uncond": UNCOND, **options}
    with pytest.raises(error, match=message):
        ddim(never, X, steps=3, **given)
    with pytest.raises(error, match=message):
        DDIM(Schedule.linear(), steps=3).iterate(never, X, **given)


@pytest.mark.parametrize("rows", [2, 5, 7], ids=lambda rows: f"{rows}B")
def test_an_output_of_another_batch_is_refused(backend: str, rows: int) -> None:
    with pytest.raises(ValueError, match="with twice the batch under guidance"):
        ddim(lambda x, t: torch.zeros(rows, *SHAPE[1:]), X, steps=2, guidance=2.0, uncond={}, backend=backend)


def test_weights_beyond_float32_serve_double_precision() -> None:
    def unguided(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    assert ddim(unguided, X.double(), steps=2, guidance=1e39, uncond={}).isfinite().all()


@pytest.mark.parametrize("name", BEYOND_FLOAT32)
def test_the_step_refuses_these_weights_too(name: str, backend: str) -> None:
    table = DDIM(Schedule.linear(), steps=3).table
    with pytest.raises(ValueError, match="guidance must be finite"):
        ops.step(X, torch.cat([X, X]), table, 0, guidance=BEYOND_FLOAT32[name], backend=backend)
