"""Tables as values, and DDIM's rows against diffusers' formulas written a second time, in float64."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastsample import DDIM, Schedule, Table, spaced_timesteps
from fastsample.samplers.ddim import ddim_table
from fastsample.tables import noise_levels

COLUMNS = ("p", "q", "a", "b", "d", "s", "limit")
DEFAULTS = {"p": 0, "q": 0, "a": 0, "b": 0, "d": 0, "s": 0, "limit": math.inf}
FULL: dict[str, Any] = {
    "p": [2.0, 1.0, 0.5],
    "q": -0.25,
    "a": [0.1, 0.2, 0.3],
    "b": 0.75,
    "d": [1.5, 0.0, -1.5],
    "s": [0.5, 0.25, 0.0],
    "limit": [math.inf, 2.0, 1.0],
}


@pytest.fixture
def table() -> Table:
    return Table([9, 5, 0], **FULL)


# Construction


def test_columns_left_out_take_their_defaults() -> None:
    table = Table([3, 1])
    for name, default in DEFAULTS.items():
        column = getattr(table, name)
        assert column.tolist() == [default, default] and column.dtype == np.float64, name
    assert table.stochastic == (False, False)


def test_numbers_are_broadcast_and_arrays_kept(table: Table) -> None:
    assert table.stochastic == (True, True, False)
    for name, given in FULL.items():
        assert getattr(table, name).tolist() == (given if isinstance(given, list) else [given] * 3), name


@pytest.mark.parametrize(
    ("t", "dtype", "kept"),
    [
        pytest.param([9, 0], np.int64, [9, 0], id="list"),
        pytest.param(np.array([9, 0], dtype=np.int32), np.int64, [9, 0], id="int32"),
        pytest.param([0.5, 0.25], np.float32, [0.5, 0.25], id="floats"),
        pytest.param(np.array([0.1]), np.float32, [np.float32(0.1)], id="float64"),
    ],
)
def test_times_are_int64_or_float32(t: Any, dtype: type, kept: list[float]) -> None:
    table = Table(t)
    assert table.t.dtype == dtype
    assert table.t.tolist() == kept


@pytest.mark.parametrize(
    ("t", "columns", "message"),
    [
        pytest.param([], {}, r"t must be a non-empty 1-D array, got shape \(0,\)", id="no-rows"),
        pytest.param(5, {}, r"non-empty 1-D array, got shape \(\)", id="scalar-t"),
        pytest.param([[1, 2]], {}, r"non-empty 1-D array, got shape \(1, 2\)", id="2-d-t"),
        pytest.param([1.0, math.nan], {}, "t .*nan", id="nan-t"),
        pytest.param([1.0, math.inf], {}, "t .*inf", id="infinite-t"),
        pytest.param([1, 0], {"c1": 1.0}, "no column c1; its columns are p, q, a, b, d, s, limit", id="unknown"),
        pytest.param([1, 0], {"z": 1, "A": 1}, "no column A, z;", id="two-unknown"),
        pytest.param([1, 0], {"a": [1.0, 2.0, 3.0]}, r"column a must have shape \(2,\), got \(3,\)", id="too-long"),
        pytest.param([1, 0], {"a": [[1.0, 2.0]]}, r"column a must have shape \(2,\), got \(1, 2\)", id="2-d"),
        pytest.param([7, 3], {"b": [1.0, math.nan]}, r"column b is nan in row 1 \(t = 3\)", id="nan"),
        pytest.param([7, 3], {"s": [-math.inf, 0]}, r"column s is -inf in row 0 \(t = 7\)", id="infinite"),
        pytest.param([1, 0], {"limit": [1.0, 0.0]}, "limit must be positive, got 0.0", id="zero-limit"),
        pytest.param([1, 0], {"limit": -1.0}, "limit must be positive, got -1.0", id="negative-limit"),
        pytest.param([1, 0], {"limit": [math.nan, 1.0]}, "limit must be positive, got nan", id="nan-limit"),
        pytest.param([1, 0], {"p": 1e39}, "overflows float32", id="overflow"),
        pytest.param([1, 0], {"p": 1e30, "b": 1e30}, "overflows float32", id="folded-x-overflows"),
        pytest.param([1, 0], {"q": -1e30, "b": 1e30}, "overflows float32", id="folded-m-overflows"),
        # Beyond float64 too: a clean error, no RuntimeWarning on the way.
        pytest.param([1, 0], {"p": 1e200, "b": 1e200}, "overflows float32", id="folded-overflows-float64"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_construction_refused(t: Any, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(t, **columns)


def test_the_largest_float32_is_no_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    assert Table([0], d=largest).packed[0, 4] == largest


# What a table is


def test_packed_layout_that_kernels_read(table: Table) -> None:
    p, q, a, b, d, s, limit = (np.broadcast_to(np.float64(FULL[name]), 3) for name in COLUMNS)
    expected = np.stack([p, q, a, b, d, s, limit, a + b * p, b * q + d], axis=1).astype(np.float32)
    np.testing.assert_array_equal(table.packed, expected)
    assert table.packed.dtype == np.float32
    assert table.packed.flags.c_contiguous
    assert table.packed.shape == (3, 9)
    assert table.packed_address == table.packed.ctypes.data


def test_folding_rounds_once() -> None:
    # a + b*p is 2^-30 in float64; folding rounded columns would give 0.
    table = Table([0], a=-1.0, b=1.0 + 2.0**-30, p=1.0, q=1.0, d=-1.0)
    assert table.packed[0, 3] == 1.0
    assert table.packed[0, 7] == 2.0**-30
    assert table.packed[0, 8] == 2.0**-30


def test_immutable(table: Table) -> None:
    for name in ("t", *COLUMNS, "packed"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(table, name)[0] = 1
        with pytest.raises(AttributeError, match=re.escape(f"cannot set {name!r}; use .replace({name}=...)")):
            setattr(table, name, 1)


def test_the_callers_arrays_are_copied_and_stay_writable() -> None:
    t, a = np.array([5, 3]), np.array([1.0, 2.0])
    table = Table(t, a=a)
    t[0] = a[0] = 7
    assert table == Table([5, 3], a=[1.0, 2.0])


def test_replace_leaves_the_original(table: Table) -> None:
    changed = table.replace(b=0.0, limit=math.inf, t=[8, 4, 2])
    assert changed == Table([8, 4, 2], **{**FULL, "b": 0.0, "limit": math.inf})
    assert changed.packed[0, 7] == np.float32(0.1), "folded again"
    assert table == Table([9, 5, 0], **FULL)
    assert table.replace() == table


def test_replace_checks_as_construction_does(table: Table) -> None:
    with pytest.raises(ValueError, match="column a is nan in row 0"):
        table.replace(a=math.nan)
    with pytest.raises(ValueError, match=r"column p must have shape \(2,\)"):
        table.replace(t=[1, 0])


def test_iteration_yields_rows_as_dicts_of_plain_numbers(table: Table) -> None:
    rows = list(table)
    assert len(rows) == 3
    assert list(rows[0]) == ["t", *COLUMNS]
    assert rows[1] == {"t": 5, "p": 1.0, "q": -0.25, "a": 0.2, "b": 0.75, "d": 0.0, "s": 0.25, "limit": 2.0}
    assert type(rows[1]["t"]) is int
    assert {type(rows[1][name]) for name in COLUMNS} == {float}
    assert type(next(iter(Table([0.5])))["t"]) is float


def test_repr_is_a_table_of_the_columns_in_use() -> None:
    sampler = DDIM(Schedule.linear(), steps=4, eta=1.0, clip=1.0)
    assert repr(sampler.table) == (
        "Table of 4 rows: x0 = p x + q m, clamped to limit; x' = a x + b x0 + d m + s z\n"
        "  k    t           p           q           a           b           s       limit\n"
        "  0  750      17.407     -17.379     0.19057     0.26797     0.94128           1\n"
        "  1  500      3.5853      -3.443     0.20045     0.66619     0.66447           1\n"
        "  2  250      1.3849    -0.95803  0.00015089     0.99984   0.0099995           1\n"
        "  3    0      1.0001   -0.010001           0           1           0           1"
    )
    assert repr(Table([0.5, 12.25], d=2.0)) == (
        "Table of 2 rows: x0 = p x + q m, clamped to limit; x' = a x + b x0 + d m + s z\n"
        "  k      t           d\n  0    0.5           2\n  1  12.25           2"
    )


COPIES: dict[str, Callable[[Table], Table]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda table: pickle.loads(pickle.dumps(table)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("t", [[9, 5, 0], [0.9, 0.5, 0.1]], ids=["int64", "float32"])
def test_copies_are_equal_and_stand_alone(duplicate: Callable[[Table], Table], t: list[float]) -> None:
    original = Table(t, **FULL)
    copied = duplicate(original)
    assert copied == original
    assert hash(copied) == hash(original)
    np.testing.assert_array_equal(copied.packed, original.packed)
    assert copied.packed_address == copied.packed.ctypes.data, "an address does not travel"
    assert copied.stochastic == original.stochastic
    with pytest.raises(ValueError, match="read-only"):
        copied.packed[0, 0] = 1.0


def test_equality_is_by_value(table: Table) -> None:
    assert table == Table([9, 5, 0], **FULL)
    assert table != Table([9, 5, 1], **FULL)
    for name in COLUMNS:
        assert table != table.replace(**{name: getattr(table, name) * 1.5 + 0.5}), name
    assert table != "table"
    assert table != Table([9])
    assert len({table, Table([9, 5, 0], **FULL), table.replace(a=0.0)}) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(Table([1], q=0.0), Table([1], q=-0.0), id="sign-of-zero"),
        pytest.param(Table([1.0], q=0.5), Table([1], q=0.5), id="float-and-integer-time"),
    ],
)
def test_equal_tables_hash_alike(one: Table, other: Table) -> None:
    assert one != other or hash(one) == hash(other)


# Noise levels


def test_noise_levels_follow_the_list_and_then_the_end() -> None:
    schedule, t = Schedule.linear(), np.array([900, 33, 2])
    for final in (1.0, float(schedule.alphas_cumprod[0]), float(schedule.alphas_cumprod[2])):
        alpha, sigma = noise_levels(schedule, t, final)
        alpha_bar = [*schedule.alphas_cumprod[t], final]
        np.testing.assert_allclose(alpha, [math.sqrt(value) for value in alpha_bar], rtol=1e-15)
        np.testing.assert_allclose(sigma, [math.sqrt(1 - value) for value in alpha_bar], rtol=1e-15)
    assert noise_levels(schedule, t)[0][-1] == 1.0


@pytest.mark.parametrize("final", [0.0, -0.5, 1.0 + 1e-9, math.nan, math.inf, 0.99])
def test_final_alpha_cumprod_out_of_range(final: float) -> None:
    schedule = Schedule.linear()
    with pytest.raises(ValueError, match=r"in \(0, 1\] and not below 0.9999, .* timestep 0; got"):
        noise_levels(schedule, np.array([500, 0]), final)
    with pytest.raises(ValueError, match="final_alpha_cumprod"):
        DDIM(schedule, steps=5, final_alpha_cumprod=final)


@pytest.mark.parametrize(
    ("timesteps", "steps"),
    [("trailing", 7), ("trailing", 30), ("linspace", 10), ("quad", 9), ("10,10,5", 25), ([990, 17, 3], 3)],
    ids=str,
)
def test_the_previous_alpha_bar_is_that_of_the_next_entry(timesteps: Any, steps: int) -> None:
    """Where T // N is not the distance of neighbours, t - T // N would miss (diffusers #9261, #11347)."""
    schedule = Schedule.linear()
    table = DDIM(schedule, timesteps=timesteps, steps=steps).table
    # eta = 0: x' = sqrt(abar') x0 + ..., so b is sqrt(abar').
    expected = np.sqrt([*schedule.alphas_cumprod[table.t[1:]], 1.0])
    np.testing.assert_allclose(table.b, expected, rtol=1e-15)
    strided = table.t - 1000 // steps
    assert (strided[:-1] != table.t[1:]).any(), "a list that could not tell the two apart"


# DDIM against diffusers' formulas


def diffusers_ddim(
    x: float, m: float, z: float, a: float, a_prev: float, prediction: str, clip: float | None, reuse: bool, eta: float
) -> float:
    """DDIMScheduler.step on one number; reuse is use_clipped_model_output."""
    b = 1 - a
    if prediction == "epsilon":
        x0, epsilon = (x - math.sqrt(b) * m) / math.sqrt(a), m
    elif prediction == "v":
        x0, epsilon = math.sqrt(a) * x - math.sqrt(b) * m, math.sqrt(a) * m + math.sqrt(b) * x
    else:
        x0, epsilon = m, (x - math.sqrt(a) * m) / math.sqrt(b)
    if clip is not None:
        x0 = min(max(x0, -clip), clip)
    sigma = eta * math.sqrt((1 - a_prev) / b * (1 - a / a_prev))
    if reuse:
        epsilon = (x - math.sqrt(a) * x0) / math.sqrt(b)
    return math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * epsilon + sigma * z


def apply_row(row: dict[str, float], x: float, m: float, z: float) -> float:
    x0 = min(max(row["p"] * x + row["q"] * m, -row["limit"]), row["limit"])
    return row["a"] * x + row["b"] * x0 + row["d"] * m + row["s"] * z


PROCESSES: dict[str, tuple[Schedule, str, int, int, float]] = {
    "linear-leading-10": (Schedule.linear(), "leading", 10, 0, 1.0),
    "linear-trailing-7": (Schedule.linear(), "trailing", 7, 0, 1.0),
    "linear-every-step": (Schedule.linear(100), "leading", 100, 0, 1.0),
    "cosine-linspace-20": (Schedule.cosine(), "linspace", 20, 0, 1.0),
    "stable-diffusion": (Schedule.scaled_linear(), "leading", 50, 1, float(Schedule.scaled_linear().alphas_cumprod[0])),
    "zero-terminal-snr": (Schedule.scaled_linear().rescale_zero_terminal_snr(), "trailing", 6, 0, 1.0),
}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("clip", "rederive"),
    [(None, False), (None, True), (1.0, False), (1.0, True), (0.5, True)],
    ids=["no-clip", "no-clip-rederive", "clip", "clip-rederive", "clip-0.5-rederive"],
)
@pytest.mark.parametrize(
    ("process", "prediction"),
    # Epsilon cannot work at alpha bar 0: asserted on its own.
    [(p, m) for p in PROCESSES for m in ("epsilon", "v", "x0") if (p, m) != ("zero-terminal-snr", "epsilon")],
)
def test_ddim_rows_follow_diffusers(
    process: str, prediction: str, clip: float | None, rederive: bool, eta: float
) -> None:
    schedule, spacing, steps, offset, final = PROCESSES[process]
    t = spaced_timesteps(schedule.T, spacing, steps, steps_offset=offset)
    alpha_bar = [*schedule.alphas_cumprod[t].tolist(), final]
    table = ddim_table(
        t, *noise_levels(schedule, t, final), eta=eta, prediction=prediction, clip=clip, rederive_epsilon=rederive
    )
    generator = np.random.default_rng(0)
    for row, a, a_prev in zip(table, alpha_bar, alpha_bar[1:], strict=False):
        for x, m, z in generator.standard_normal((4, 3)).tolist():
            reuse = rederive and clip is not None
            expected = diffusers_ddim(x, m, z, a, a_prev, prediction, clip, reuse, eta)
            # x0 is as large as 1 / alpha and epsilon as 1 / sigma; each passes a dozen roundings of 1.1e-16, and the
            # differences 1 - a / a' and 1 - a' - s^2 lose up to 4 digits next to the data.
            scale = 1 / math.sqrt(max(a, 1e-12)) if prediction == "epsilon" else 1 / math.sqrt(1 - a)
            assert apply_row(row, x, m, z) == pytest.approx(expected, rel=0, abs=1e-12 * (1 + scale)), row
    assert table.stochastic == tuple(eta > 0 and 0 < later < 1 for later in alpha_bar[1:])


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_rows_that_let_x0_be_corrected_say_the_same_while_it_is_not(prediction: str, clip: float | None) -> None:
    schedule, t = Schedule.linear(), np.array([900, 500, 100, 0])
    levels = noise_levels(schedule, t)
    plain = ddim_table(t, *levels, eta=0.3, prediction=prediction, clip=clip)
    corrected = ddim_table(t, *levels, eta=0.3, prediction=prediction, clip=clip, corrects_x0=True)
    assert (corrected.d == 0).all(), "epsilon comes from x0 alone"
    for one, other in zip(plain, corrected, strict=True):
        for x, m, z in np.random.default_rng(1).standard_normal((4, 3)).tolist():
            # 1 / alpha is 66 at t = 900.
            assert apply_row(one, x, m, z) == pytest.approx(apply_row(other, x, m, z), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("t", "previous", "variance"), [(420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)]
)
def test_published_variances(t: int, previous: int, variance: float) -> None:
    table = DDIM(Schedule.linear(), timesteps=[t, previous], eta=1.0).table
    # Published with five digits.
    assert table.s[0] ** 2 == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine], ids=lambda f: f.__name__)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1e6])
def test_a_last_level_that_repeats_is_the_identity(make: Callable[[], Schedule], eta: float) -> None:
    """final_alpha_cumprod = alphas_cumprod[0] after t = 0: rounding must not make the variance negative."""
    schedule = make()
    t = np.array([0])
    table = ddim_table(t, *noise_levels(schedule, t, float(schedule.alphas_cumprod[0])), eta=eta)
    assert table.s[0] == 0.0
    assert apply_row(next(iter(table)), 0.7, -1.3, 9.0) == pytest.approx(0.7, abs=1e-15)


# eta


ETAS = [
    pytest.param(schedule, spacing, steps, id=f"{name}-{spacing}-{steps}")
    for name, schedule in (("linear", Schedule.linear()), ("cosine", Schedule.cosine()))
    for spacing, steps in (("leading", 10), ("trailing", 3), ("trailing", 7), ("trailing", 50), ("linspace", 20))
]


@pytest.mark.parametrize(("schedule", "spacing", "steps"), ETAS)
def test_the_largest_eta_in_the_message_works_and_more_does_not(schedule: Schedule, spacing: str, steps: int) -> None:
    def make(eta: float) -> Table:
        return DDIM(schedule, timesteps=spacing, steps=steps, eta=eta).table

    with pytest.raises(ValueError, match="the largest valid eta here is") as caught:
        make(1000.0)
    assert "eta=1000.0" in str(caught.value)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    assert largest >= 1.0, "ancestral sampling is always possible"
    table = make(largest)
    # There the last noisy row is all noise: nothing of epsilon is left.
    assert np.isfinite(table.packed[:, :6]).all()
    _, sigma = noise_levels(schedule, spaced_timesteps(schedule.T, spacing, steps))
    assert (table.s <= sigma[1:] * (1 + 1e-12)).all()
    assert (table.s / np.where(sigma[1:] > 0, sigma[1:], 1)).max() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="needs more noise"):
        make(1.001 * largest)


# Predictions that cannot work, and those that can


@pytest.fixture
def zero_terminal() -> Schedule:
    return Schedule.scaled_linear().rescale_zero_terminal_snr()


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
def test_epsilon_at_alpha_bar_zero_is_refused(zero_terminal: Schedule, clip: float | None) -> None:
    with pytest.raises(ValueError, match=r"epsilon.*alpha bar is 0.*v or x0"):
        DDIM(zero_terminal, timesteps="trailing", steps=5, clip=clip)
    assert len(DDIM(zero_terminal, timesteps="leading", steps=5, clip=clip).table) == 5, "800 is not the last timestep"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_other_predictions_work_at_alpha_bar_zero(
    zero_terminal: Schedule, prediction: str, clip: float | None, eta: float
) -> None:
    table = DDIM(zero_terminal, timesteps="trailing", steps=5, prediction=prediction, clip=clip, eta=eta).table
    alpha, sigma = noise_levels(zero_terminal, spaced_timesteps(1000, "trailing", 5))
    assert alpha[0] == 0.0
    x, m, z = 0.7, 0.4, -1.1
    # Pure noise: epsilon is x, and v is -x0. diffusers gets 0 / 0 here.
    x0 = -m if prediction == "v" else m
    s = eta * sigma[1]
    expected = alpha[1] * x0 + math.sqrt(sigma[1] ** 2 - s**2) * x + s * z
    assert apply_row(next(iter(table)), x, m, z) == pytest.approx(expected, abs=1e-15)


def test_clean_data_do_not_tell_the_noise() -> None:
    """alphas_cumprod[0] = 1 makes sigma 0 at t = 0, where diffusers divides by 0."""
    schedule = Schedule.from_alphas_cumprod([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="alpha bar is 1: leave that timestep out"):
        DDIM(schedule, timesteps=[2, 1, 0], prediction="x0")
    with pytest.raises(ValueError, match="alpha bar is 1: leave that timestep out"):
        DDIM(schedule, timesteps=[2, 1, 0], prediction="v", clip=1.0)
    assert apply_row(list(DDIM(schedule, timesteps=[2, 1, 0], eta=1.0).table)[-1], 0.7, -1.3, 9.0) == 0.7
    assert len(DDIM(schedule, timesteps=[2, 1], prediction="x0").table) == 2


BAD_OPTIONS = [
    *[("eta", value, f"eta.*{value}") for value in (-1e-9, -1.0, math.nan, math.inf, -math.inf)],
    *[("clip", value, "clip must be positive or None") for value in (0.0, -1.0, math.nan)],
    *[
        ("prediction", value, f"one of epsilon, v, x0, got {value!r}")
        for value in ("eps", "v_prediction", "sample", "")
    ],
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("option", "value", "message"), BAD_OPTIONS, ids=[f"{o}={v!r}" for o, v, _ in BAD_OPTIONS])
def test_ddim_refuses(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDIM(Schedule.linear(), steps=5, **{option: value})
