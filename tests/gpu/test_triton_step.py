"""kernels/step.py: every mode has the bits of the CPU kernel at its scalar level; interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Table
from fastsample.ops.noise.reference import randn_reference
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.tables import COLUMNS, HISTORY
from support.devices import DEVICE
from support.formula import normal, same_values
from support.levels import needs_cpu
from support.step_modes import KINDS

pytest.importorskip("triton")
from fastsample.kernels import step
from fastsample.kernels.coefficients import ALWAYS, NEVER, SOMETIMES, constants_of
from support.triton_launch import Framed, small_launches

pytestmark = [
    needs_cpu,
    pytest.mark.parametrize("level", ["scalar"], indirect=True),
    pytest.mark.usefixtures("level"),
]

KEYS = torch.tensor([3, -1, 2**62, 17, 5, 40])
INF = float("inf")
FIRST = len(HISTORY)  # the first row of a kind


def table_of(*names: str) -> Table:
    """Rows of these kinds, with three before them so that any of them may have a history; e differs from row to row."""
    rows = [{}] * FIRST + [KINDS[name] for name in names]
    columns = {name: [row.get(name, default) for row in rows] for name, default in COLUMNS.items()}
    return Table(range(len(rows), 0, -1), **{**columns, "e": np.linspace(0.5, 1.5, len(rows))})


class Case(NamedTuple):
    """One launch: what it reads, and the outputs asked for."""

    table: Table
    row: int | Tensor
    x: Tensor
    m: Tensor
    guidance: Tensor | None = None
    rescale: float = 0.0
    z: Tensor | None = None
    histories: tuple[Tensor, ...] = ()
    inputs: torch.dtype | None = None


def case(
    *names: str,
    shape: tuple[int, ...] = (2, 3, 5, 7),
    row: int | Tensor = FIRST,
    dtype: torch.dtype = torch.float32,
    variance: bool = False,
    guided: bool = False,
    given: bool = False,
    inputs: torch.dtype | None = torch.float16,
    **more: Any,
) -> Case:
    channels = (2 if variance else 1) * shape[1]
    m = normal((shape[0] * (2 if guided else 1), channels, *shape[2:]), 1, dtype)
    weights = torch.linspace(1.0, 7.5, shape[0]) if guided else None
    histories = normal(shape, 2), normal(shape, 3), normal(shape, 5)
    z = normal(shape, 4) if given else None
    return Case(table_of(*names), row, normal(shape, 0), m, weights, z=z, histories=histories, inputs=inputs, **more)


def on_cpu(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x', the entry and the next input, written twice, of the CPU kernel."""
    out, entry = torch.empty_like(c.x), torch.empty_like(c.x)
    inputs = torch.empty((2 * len(c.x), *c.x.shape[1:]), dtype=c.inputs or torch.float32)
    rows = c.row if isinstance(c.row, Tensor) else None
    keys = None if c.z is not None else KEYS[: len(c.x)]
    operands = Operands(
        c.x, c.table, keys, guidance=c.guidance, rescale=c.rescale, history=c.histories, rows=rows, out=out,
        x0_out=entry, input_out=inputs,
    )  # fmt: skip
    plan = StepPlan(operands, "cpu")
    plan(c.m, 0 if rows is not None else int(c.row), c.z)
    return out, entry, inputs


def on_triton(c: Case, *, keeps_entry: bool = True, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the kernel under test; with `in_place` x' lies over x and the entry over the oldest history."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE, copy=True)

    x, (h1, h2, h3) = moved(c.x), (*map(moved, c.histories), None, None, None)[:3]
    out, entry, inputs = Framed(c.x.shape), Framed(c.x.shape), None
    if in_place:
        assert x is not None and h3 is not None
        x = out.output.copy_(x)
        h3 = entry.output.copy_(h3)
    if c.inputs is not None:
        inputs = Framed((2 * len(c.x), *c.x.shape[1:]), c.inputs)
    kernel = step.Step(
        rows=torch.from_numpy(c.table.packed.copy()).to(DEVICE),
        row_of=moved(c.row) if isinstance(c.row, Tensor) else None,
        x=x,
        keys=None if c.z is not None else moved(KEYS[: len(c.x)]),
        guidance=moved(c.guidance),
        rescale=c.rescale,
        h1=h1,
        h2=h2,
        h3=h3,
        x0_out=entry.output,
        input_out=None if inputs is None else inputs.output,
        low=None,
        high=None,
        log_prob_sums=None,
        thresholds=c.table.thresholded,
    )
    stride = c.m.numel() // len(c.m)
    row = 0 if isinstance(c.row, Tensor) else c.row
    kernel(row, moved(c.m), stride, len(c.m) > len(c.x), moved(c.z), out.output, keeps_entry, inputs is not None)
    return out.written(), entry.written(), torch.empty(0) if inputs is None else inputs.written()


def check(c: Case, **options: Any) -> None:
    for name, found, expected in zip(("x'", "entry", "input"), on_triton(c, **options), on_cpu(c), strict=True):
        assert not expected.isnan().any()
        assert torch.equal(found, expected), f"{name}: {(found != expected).sum()} of {found.numel()} differ"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, where an input becomes infinite
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_row(name: str) -> None:
    learned = "g1" in KINDS[name]
    check(case(name, variance=learned, dtype=torch.float16 if learned else torch.float32))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("folded", (1, 1), id="folded, 1 element"),
        pytest.param("everything", (2, 3), id="everything, 3 elements"),
        pytest.param("everything", (1, 16, 7), id="everything, actions"),
        pytest.param("folded-noise", (1, 4100), id="folded-noise, 4100 elements"),
    ],
)
def test_sizes_and_dtypes(name: str, shape: tuple, dtype: torch.dtype) -> None:
    check(case(name, shape=shape, dtype=dtype, variance=name == "everything", inputs=dtype))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("folded", {}, id="folded"),
        pytest.param("everything", {"variance": True, "dtype": torch.float16}, id="everything"),
        pytest.param("thresholded", {}, id="thresholded"),
        pytest.param("clamped", {"variance": True}, id="unread variance half"),
    ],
)
def test_guidance_with_a_weight_per_sample(name: str, options: dict[str, Any]) -> None:
    check(case(name, guided=True, shape=(3, 2, 9), **options))


@pytest.mark.parametrize("name", ["folded", "clamped", "thresholded"])
def test_guidance_rescale(name: str) -> None:
    # The factor comes from sums in another order than the CPU's: an ulp of it, times what a step amplifies.
    c = case(name, guided=True, rescale=0.7, inputs=torch.float32)
    for found, expected in zip(on_triton(c), on_cpu(c), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["folded-noise", "everything"])
def test_given_noise(name: str) -> None:
    check(case(name, given=True, variance=name == "everything"))


def test_drawn_noise_is_that_of_stream_1_and_the_row() -> None:
    c = case("nothing", "folded-noise", row=4, shape=(2, 4, 9), inputs=None)
    z = randn_reference(c.x.shape, KEYS[:2], step=4, stream=1)
    torch.testing.assert_close(on_triton(c)[0], on_triton(c._replace(z=z))[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_rows_of_samples(guided: bool) -> None:
    names = ("everything", "folded", "three-epsilons-clamped", "clamped-noise", "x-only")
    row = torch.tensor([7, 3, -4, 5, 4, 6])
    c = case(*names, row=row, shape=(6, 3, 7), variance=True, guided=guided, dtype=torch.float16)
    expected = on_cpu(c._replace(row=row % 8))
    for found, wanted in zip(on_triton(c), expected, strict=True):
        assert torch.equal(found, wanted)


def test_rows_outside_the_table_are_nan_and_leave_the_others_alone() -> None:
    c = case("folded-noise", "clamped-epsilon-entry", row=torch.tensor([5, 3, -6, 4]), shape=(4, 3, 7))
    c = c._replace(inputs=torch.float32)
    inside = on_cpu(c._replace(row=torch.tensor([0, 3, 0, 4])))
    for found, wanted in zip(on_triton(c), inside, strict=True):
        found, wanted = found.unflatten(0, (-1, 4)), wanted.unflatten(0, (-1, 4))
        assert found[:, [0, 2]].isnan().all()
        assert torch.equal(found[:, [1, 3]], wanted[:, [1, 3]])


def test_rows_that_miss_an_operand_are_nan() -> None:
    names = ("one-history", "learned", "clamped", "third-history-alone")
    c = case(*names, row=torch.tensor([3, 4, 5, 6]), shape=(4, 8), inputs=None)
    for histories, missed in (((), [True, True, False, True]), (c.histories[:2], [False, True, False, True])):
        found = on_triton(c._replace(histories=histories))[0]
        assert found.isnan().all(dim=1).tolist() == missed
        assert found[[not one for one in missed]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "poisoned"),
    [
        ("x-only", "m h1 h2 h3 z"),
        ("m-only", "x h1 h2 h3 z"),
        ("clamped-x0-of-x", "m h1 h2 h3 z"),
        ("clamped-x0-of-m", "h1 h2 h3 z"),
        ("one-history", "h2 h3 z"),
        ("two-histories", "h3 z"),
        ("third-history-alone", "h1 h2 z"),
        ("folded-noise", "v h1 h2 h3"),
        ("nothing", "x m v h1 h2 h3 z"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["one row", "rows of samples"])
def test_an_operand_whose_coefficient_is_0_may_be_nan(name: str, poisoned: str, mixed: bool) -> None:
    # The second sample has a row that reads everything, so that the launch must be able to.
    row = torch.tensor([3, 4]) if mixed else 3
    clean = case(name, "everything", row=row, shape=(2, 2, 9), variance=True, given=True)
    m, (h1, h2, h3) = clean.m.clone(), (one.clone() for one in clean.histories)
    x, z = clean.x.clone(), clean.z.clone()
    everything = {"x": x, "m": m[:, :2], "v": m[:, 2:], "h1": h1, "h2": h2, "h3": h3, "z": z}
    for operand in poisoned.split():
        everything[operand][0] = float("nan")
    found = on_triton(clean._replace(x=x, m=m, histories=(h1, h2, h3), z=z), keeps_entry=False)
    expected = on_cpu(clean)
    assert torch.equal(found[0][0], expected[0][0]) and torch.equal(found[2][0], expected[2][0])
    if mixed:
        assert torch.equal(found[0][1], expected[0][1])


@pytest.mark.parametrize(
    ("name", "poisoned"),
    [
        ("clamped-entry-of-x", "m"),
        ("clamped-entry-of-x0", ""),
        ("clamped-x0-of-m", "x"),
        ("m-only", "x m"),
        ("epsilon-entry", "x"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["one row", "rows of samples"])
def test_what_an_entry_does_not_hold_may_be_nan(name: str, poisoned: str, mixed: bool) -> None:
    # As above; the second sample's entry holds both x and x0.
    clean = case(name, "thresholded-epsilon-entry", row=torch.tensor([3, 4]) if mixed else 3, shape=(2, 2, 9))
    operands = {"x": clean.x.clone(), "m": clean.m.clone()}
    for operand in poisoned.split():
        operands[operand][0] = float("nan")
    found, expected = on_triton(clean._replace(**operands))[1], on_cpu(clean)[1]
    assert torch.equal(found[0], expected[0])
    if mixed:
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["everything", "three-histories", "three-epsilons-clamped"])
def test_in_place(name: str) -> None:
    check(case(name, variance=True), in_place=True)


def test_nan_and_infinity_go_where_the_cpu_lets_them() -> None:
    c = case("clamped-noise", shape=(2, 40), inputs=None)
    c.x[0, :3] = torch.tensor([float("nan"), INF, -INF])
    c.m[1, 5:8] = torch.tensor([float("nan"), INF, -INF])
    for found, expected in zip(on_triton(c)[:2], on_cpu(c)[:2], strict=True):
        assert same_values(found, expected)
        assert expected.isnan().any()


def test_what_is_not_asked_for_is_not_written() -> None:
    out, entry, inputs = on_triton(case("clamped", inputs=None), keeps_entry=False)
    assert out.isfinite().all() and entry.isnan().all() and inputs.numel() == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("folded-noise", (3, 300), id="3 samples of 3 tiles"),
        pytest.param("folded", (3, 1, 107), id="samples as one"),
        pytest.param("everything", (5, 129), id="odd size"),
    ],
)
def test_several_tiles_and_programs(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple) -> None:
    small_launches(monkeypatch, step)
    # In place: an element that two programs took would be stepped twice.
    check(case(name, shape=shape, variance=name == "everything"), in_place=True)


def test_constants_tell_what_all_rows_do() -> None:
    def found(*names: str, **options: bool) -> dict[str, int]:
        rows = table_of(*names).packed[FIRST:]
        return constants_of(rows, **{"keeps_x0": False, "noise": True, "rescaled": False, **options})

    never, always, sometimes = NEVER.value, ALWAYS.value, SOMETIMES.value
    folded = found("folded")
    assert {name for name, use in folded.items() if use} == {"A", "D"}
    assert found("folded", keeps_x0=True)["P"] == always
    assert found("folded-noise")["S"] == always and found("folded-noise", noise=False)["S"] == never
    assert found("folded-noise", "clamped")["S"] == sometimes
    assert found("clamped", rescaled=True)["Q"] == sometimes
    assert found("m-only", "clamped")["LIMITED"] == sometimes
    assert found("three-histories")["C3"] == always and found("two-histories")["C3"] == never


def test_constants_tell_whose_entries_are_not_x0() -> None:
    def found(*names: str, keeps_x0: bool = True) -> int:
        return constants_of(table_of(*names).packed[FIRST:], keeps_x0=keeps_x0, noise=True, rescaled=False)["ENTRY"]

    assert found("clamped-epsilon-entry") == found("clamped-entry-of-x0") == ALWAYS.value
    assert found("clamped") == found("epsilon-entry") == NEVER.value, "x0 itself, and folded"
    assert found("clamped-epsilon-entry", "epsilon-entry") == SOMETIMES.value
    assert found("clamped-epsilon-entry", keeps_x0=False) == NEVER.value, "nobody reads it"
