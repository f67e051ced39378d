"""What ops.step refuses, before it writes anything."""

from __future__ import annotations

import math

import pytest
import torch

from fastsample import Table, ops

X, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)


TWICE = torch.zeros(4, 3, 4)


PLAIN, NOISY = Table([1, 0], a=1.0), Table([1, 0], a=1.0, s=1.0)


LEARNED, RECALLS = Table([1, 0], a=1.0, s=1.0, g1=1.0), Table([1, 0], c1=[0.0, 1.0])


RECALLS_THREE = Table([3, 2, 1, 0], c3=[0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"row": 2}, ValueError, "row 2", id="row-too-large"),
        pytest.param({"row": 0.0}, TypeError, "row must be an int or an int64 tensor", id="row-float"),
        pytest.param({"table": None}, TypeError, "fastsample.Table", id="no-table"),
        pytest.param({"x": [1.0]}, TypeError, "x must be a tensor", id="x-list"),
        pytest.param({"row": -3}, ValueError, "row -3", id="row-too-small"),
        pytest.param({"model_output": (M,)}, TypeError, "must be a tensor", id="output-is-tuple"),
        pytest.param({"model_output": torch.zeros(2, 9, 4)}, ValueError, "twice its axis 1", id="output-3C"),
        pytest.param({"model_output": torch.zeros(1, 3, 4)}, ValueError, "model_output", id="output-broadcasts"),
        pytest.param({"model_output": M.long()}, TypeError, "floating point", id="output-int"),
        pytest.param({"model_output": M.to("meta")}, ValueError, "lies on meta", id="output-device"),
        pytest.param({"x": X.long()}, TypeError, "float32", id="x-int"),
        pytest.param({"x": X.half()}, TypeError, "float32", id="x-half"),
        pytest.param({"x": torch.zeros(0, 3)}, ValueError, "no zero", id="x-empty"),
        pytest.param({"x": torch.tensor(1.0), "model_output": torch.tensor(1.0)}, ValueError, "axis", id="x-0d"),
        pytest.param({"table": NOISY, "noise": X, "seed": 1}, ValueError, "noise= or seed=, not both", id="two-noises"),
        pytest.param({"table": NOISY, "noise": torch.zeros(2, 3)}, ValueError, "noise", id="noise-shape"),
        pytest.param({"table": NOISY, "noise": X.double()}, TypeError, "noise", id="noise-dtype"),
        pytest.param({"table": NOISY, "seed": [1, 2, 3]}, ValueError, "seed must be .* one per sample", id="seeds"),
        pytest.param({"table": NOISY, "index": [1, 2, 3]}, ValueError, "index must be .* one per sample", id="places"),
        pytest.param({"seed": 1.5}, TypeError, "seed must be", id="seed-that-no-row-reads"),
        pytest.param({"index": -1}, ValueError, "index must", id="place-that-no-row-reads"),
        pytest.param({"out": torch.zeros(2, 3)}, ValueError, "out", id="out-shape"),
        pytest.param({"out": X.half()}, TypeError, "out", id="out-dtype"),
        pytest.param({"x0_out": X.double()}, TypeError, "x0_out", id="x0-dtype"),
        pytest.param({"x0_out": [1.0]}, TypeError, "x0_out must be a tensor", id="x0-list"),
        pytest.param({"x0_out": X.to("meta")}, ValueError, "x0_out lies on meta", id="x0-device"),
        pytest.param({"input_out": torch.zeros(6, 3, 4)}, ValueError, "or twice its batch", id="input-thrice"),
        pytest.param({"row": torch.tensor([0, 2])}, ValueError, r"\[0, 2\] are not all inside", id="rows-too-large"),
        pytest.param({"row": torch.tensor([0, -3])}, ValueError, r"\[0, -3\] are not all", id="rows-too-small"),
        pytest.param({"row": torch.tensor([0, 1, 0])}, ValueError, "one per sample", id="rows-too-many"),
        pytest.param({"row": torch.tensor([[0], [1]])}, ValueError, "one per sample", id="rows-2d"),
        pytest.param({"row": torch.tensor([0.0, 1.0])}, TypeError, "int64", id="rows-float"),
        pytest.param({"row": torch.tensor([0, 1]).int()}, TypeError, "int64", id="rows-int32"),
        pytest.param(
            {"row": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "row lies on", id="rows-device"
        ),
        pytest.param({"model_output": TWICE}, ValueError, "model_output must have x's shape", id="unasked-guidance"),
        pytest.param({"guidance": 2.0, "model_output": torch.zeros(6, 3, 4)}, ValueError, "4 samples", id="guided-3B"),
        pytest.param({"guidance": 2.0}, ValueError, "unconditional and the conditional half, 4 samples", id="guided-B"),
        pytest.param(
            {"guidance": 2.0, "model_output": torch.zeros(4, 3, 5)}, ValueError, "twice the batch", id="guided"
        ),
        pytest.param({"guidance": "much"}, TypeError, "guidance must be a number or one per sample", id="weight-text"),
        pytest.param({"guidance": [1.0, 2.0, 3.0]}, ValueError, "one per sample; got", id="weights-too-many"),
        pytest.param({"guidance": [[1.0], [2.0]]}, ValueError, "one per sample; got", id="weights-2d"),
        pytest.param({"guidance": math.nan}, ValueError, "guidance must be finite", id="weight-nan"),
        pytest.param({"guidance": [1.0, -math.inf]}, ValueError, "guidance must be finite", id="weight-infinite"),
        *[
            pytest.param(
                {"guidance": 2.0, "model_output": TWICE, "guidance_rescale": phi},
                ValueError,
                r"guidance_rescale must lie in \[0, 1\]",
                id=f"phi-{phi}",
            )
            for phi in (1.01, -0.01, math.nan)
        ],
        pytest.param({"guidance_rescale": 0.5}, ValueError, "guidance_rescale needs guidance=", id="phi-alone"),
        pytest.param({"table": LEARNED, "seed": 1}, ValueError, "must have 6 channels in axis 1", id="no-variance"),
        pytest.param(
            {"table": LEARNED, "seed": 1, "model_output": TWICE, "guidance": 2.0},
            ValueError,
            "must have 6 channels in axis 1",
            id="no-guided-variance",
        ),
        pytest.param(
            {"table": LEARNED, "seed": 1, "row": torch.tensor([0, 1])}, ValueError, "6 channels", id="rows-no-variance"
        ),
        pytest.param({"table": RECALLS, "row": 1}, ValueError, "row 1 needs the entries of 1", id="no-history"),
        pytest.param(
            {"table": RECALLS, "row": torch.tensor([0, 1])}, ValueError, "row 1 needs the entries", id="rows-no-history"
        ),
        pytest.param(
            {"table": RECALLS_THREE, "row": 3, "history": [X, X]},
            ValueError,
            "row 3 needs the entries of 3",
            id="no-h3",
        ),
        pytest.param({"history": [X[:1]]}, ValueError, r"history\[0\] must have x's shape", id="history-shape"),
        pytest.param(
            {"history": [X, X.double()]}, TypeError, r"history\[1\] must be torch.float32", id="history-dtype"
        ),
        pytest.param({"history": [None]}, TypeError, r"history\[0\] must be a tensor", id="history-none"),
        pytest.param(
            {"history": [X, X, X.double()]}, TypeError, r"history\[2\] must be torch.float32", id="third-history-dtype"
        ),
        pytest.param({"history": [X, X, X[:1]]}, ValueError, r"history\[2\] must have x's shape", id="h3-shape"),
        pytest.param(
            {"history": [X, X, X, X]},
            ValueError,
            "holds the entries of at most 3 earlier rows, got 4",
            id="history-too-long",
        ),
        *[
            pytest.param(
                {name: torch.zeros(2, 3, 1).expand(2, 3, 4)}, ValueError, f"{name} is expanded", id=f"{name}-expanded"
            )
            for name in ("out", "x0_out", "input_out")
        ],
        *[
            pytest.param(
                {name: torch.zeros(20).as_strided((2, 3, 4), (8, 2, 1))},
                ValueError,
                f"{name} overlaps itself",
                id=f"{name}-overlapping",
            )
            for name in ("out", "x0_out", "input_out")
        ],
        pytest.param({"input_out": X.long()}, TypeError, "input_out", id="input-dtype"),
        pytest.param({"backend": "cuda"}, ValueError, "cannot run", id="absent-backend"),
    ],
)
def test_bad_input_writes_nothing(backend: str, arguments: dict, error: type[Exception], message: str) -> None:
    outputs = {name: torch.full((2, 3, 4), 7.0) for name in ("out", "x0_out", "input_out")}
    call = {"x": X, "model_output": M, "table": PLAIN, "row": 0, "backend": backend, **outputs, **arguments}
    with pytest.raises(error, match=message):
        ops.step(**call)
    assert all((one == 7).all() for one in outputs.values())
