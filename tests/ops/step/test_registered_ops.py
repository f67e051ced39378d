"""The schemas of the registered ops: programs that were exported hold them, and later releases have to load those."""

from __future__ import annotations

import pytest
import torch

import fastsample.ops.step.compiled  # noqa: F401 - registers them

ROW = "Tensor x, Tensor model_output, Tensor table, SymInt row"
REST = "Tensor? noise, Tensor? keys, Tensor? guidance, float guidance_rescale, Tensor[] history, str? backend"
WRITTEN = "Tensor(a11!) out, Tensor(a12!)? x0_out, Tensor(a13!)? input_out, Tensor(a14!)? log_prob_out=None"


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("step", f"({ROW}, Tensor? rows, {REST}) -> Tensor"),
        ("step_and_x0", f"({ROW}, {REST}) -> (Tensor, Tensor)"),
        ("step_out", f"({ROW}, Tensor? rows, {REST}, {WRITTEN}) -> ()"),
    ],
)
def test_schemas_stay(name: str, schema: str) -> None:
    found = getattr(torch.ops.fastsample, name).default._schema
    assert str(found) == f"fastsample::{name}{schema}"
