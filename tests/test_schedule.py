"""Schedules against formulas written a second time, golden betas, and what a schedule refuses."""

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsample import Schedule
from support.paths import GOLDEN

# A handful of float64 roundings.
EXACT = 1e-15

SCHEDULES = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": Schedule.cosine,
    "betas": lambda: Schedule.from_betas([0.1, 0.5, 0.25]),
    "alphas_cumprod": lambda: Schedule.from_alphas_cumprod([1.0, 0.5, 0.0]),
    "one_timestep": lambda: Schedule.linear(1),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]()


def ramp(start: float, end: float, T: int) -> list[float]:
    return [start + (end - start) * i / max(T - 1, 1) for i in range(T)]


def cosine_betas(T: int, s: float = 0.008, max_beta: float = 0.999) -> list[float]:
    def alpha_bar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)]


@pytest.mark.parametrize(
    ("made", "betas"),
    [
        pytest.param(Schedule.linear(), ramp(1e-4, 0.02, 1000), id="linear"),
        pytest.param(Schedule.linear(7, 0.01, 0.3), ramp(0.01, 0.3, 7), id="linear-ends"),
        pytest.param(Schedule.linear(1), [1e-4], id="linear-one-timestep"),
        pytest.param(
            Schedule.scaled_linear(),
            [root**2 for root in ramp(math.sqrt(0.00085), math.sqrt(0.012), 1000)],
            id="scaled_linear",
        ),
        pytest.param(Schedule.scaled_linear(3, 0.04, 0.25), [0.2**2, 0.35**2, 0.5**2], id="scaled_linear-ends-by-hand"),
        pytest.param(Schedule.cosine(), cosine_betas(1000), id="cosine"),
        pytest.param(Schedule.cosine(50, s=0.1, max_beta=0.5), cosine_betas(50, 0.1, 0.5), id="cosine-arguments"),
        pytest.param(Schedule.cosine(1), [0.999], id="cosine-one-timestep"),
        pytest.param(Schedule.from_betas((0.5, 0.25, 1.0)), [0.5, 0.25, 1.0], id="from_betas-ending-in-1"),
        pytest.param(Schedule.from_alphas_cumprod([0.75, 0.25]), [0.25, 1 - 0.25 / 0.75], id="from_alphas_cumprod"),
    ],
)
def test_betas_and_alpha_bars_follow_the_formulas(made: Schedule, betas: list[float]) -> None:
    assert len(betas) == made.T
    np.testing.assert_allclose(made.betas, betas, rtol=0, atol=EXACT)
    alpha_bars, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        alpha_bars.append(product)
    # Every factor carries the rounding of its beta, so the relative error grows with T and with 1 / (1 - beta).
    np.testing.assert_allclose(made.alphas_cumprod, alpha_bars, rtol=1e-11, atol=0)


def test_published_alpha_bars_at_both_ends() -> None:
    """1 / sqrt(abar_999) is 157 for linear, 14.6 for scaled linear and 20291 for cosine."""
    for made, amplification in ((Schedule.linear(), 157), (Schedule.scaled_linear(), 14.6), (Schedule.cosine(), 20291)):
        # The quoted numbers have three to five digits.
        assert 1 / math.sqrt(made.alphas_cumprod[-1]) == pytest.approx(amplification, rel=4e-3)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        # improved-diffusion scales the ends of its linear betas by 1000 / T.
        ("iddpm_linear1000_ddim50", Schedule.linear(1000)),
        ("iddpm_linear300_10-15-20", Schedule.linear(300, 1e-4 * 1000 / 300, 0.02 * 1000 / 300)),
        ("iddpm_cosine4000_100", Schedule.cosine(4000)),
    ],
    ids=["linear1000", "linear300", "cosine4000"],
)
def test_golden_betas_and_respaced_processes(name: str, made: Schedule) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    visited = golden["timesteps"]
    np.testing.assert_allclose(made.betas, golden["betas"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(made.alphas_cumprod[visited], golden["alphas_cumprod"], rtol=0, atol=1e-12)
    respaced = Schedule.from_alphas_cumprod(made.alphas_cumprod[visited])
    np.testing.assert_allclose(respaced.betas, golden["spaced_betas"], rtol=0, atol=1e-12)
    again = Schedule.from_betas(golden["spaced_betas"])
    np.testing.assert_allclose(again.alphas_cumprod, golden["alphas_cumprod"], rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=200))
def test_betas_survive_the_way_through_alpha_bars(betas: list[float]) -> None:
    made = Schedule.from_betas(betas)
    assert made.betas.tolist() == betas
    # 1 - beta, the product, the quotient and 1 - quotient each round once: 4 halves of an ulp of 1.
    again = Schedule.from_alphas_cumprod(made.alphas_cumprod)
    np.testing.assert_allclose(again.betas, betas, rtol=0, atol=4 * 2.0**-53)
    assert again == made


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "betas", "alphas_cumprod"])
def test_rescale_to_zero_terminal_snr(name: str) -> None:
    made = SCHEDULES[name]()
    root = [math.sqrt(value) for value in made.alphas_cumprod]
    first, last = root[0], root[-1]
    expected = [((value - last) * first / (first - last)) ** 2 for value in root]
    rescaled = made.rescale_zero_terminal_snr()
    np.testing.assert_allclose(rescaled.alphas_cumprod, expected, rtol=0, atol=EXACT)
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(made.alphas_cumprod[0], abs=EXACT)
    assert rescaled.betas[-1] == 1.0
    assert made == SCHEDULES[name](), "the original must not change"
    again = rescaled.rescale_zero_terminal_snr()
    np.testing.assert_allclose(again.alphas_cumprod, rescaled.alphas_cumprod, rtol=0, atol=EXACT)


def test_one_timestep_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="one timestep"):
        Schedule.linear(1).rescale_zero_terminal_snr()


# What a schedule is


def test_arrays_are_float64_and_strictly_decreasing(schedule: Schedule) -> None:
    assert schedule.alphas_cumprod.shape == schedule.betas.shape == (schedule.T,)
    assert schedule.alphas_cumprod.dtype == schedule.betas.dtype == np.float64
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert isinstance(schedule.T, int)


COPIES: dict[str, Callable[[Schedule], Schedule]] = {
    "itself": lambda schedule: schedule,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda schedule: pickle.loads(pickle.dumps(schedule)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_immutable_also_when_copied(schedule: Schedule, duplicate: Callable[[Schedule], Schedule]) -> None:
    _ = schedule.betas
    copied = duplicate(schedule)
    for array in (copied.alphas_cumprod, copied.betas):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5
    for name in ("alphas_cumprod", "betas", "T", "anything"):
        with pytest.raises(AttributeError, match=f"immutable.*{name}"):
            setattr(copied, name, 1)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_equal(schedule: Schedule, duplicate: Callable[[Schedule], Schedule]) -> None:
    copied = duplicate(schedule)
    assert copied == schedule
    assert hash(copied) == hash(schedule)
    np.testing.assert_array_equal(copied.betas, schedule.betas)


def test_the_callers_array_is_copied_and_stays_writable() -> None:
    betas, alphas_cumprod = np.array([0.1, 0.2]), np.array([0.9, 0.5])
    made = Schedule.from_betas(betas), Schedule.from_alphas_cumprod(alphas_cumprod)
    betas[0] = alphas_cumprod[0] = 0.7
    assert made[0].betas.tolist() == [0.1, 0.2]
    assert made[1].alphas_cumprod.tolist() == [0.9, 0.5]


def test_equality_is_by_alpha_bars() -> None:
    assert Schedule.linear(10) == Schedule.from_alphas_cumprod(Schedule.linear(10).alphas_cumprod)
    assert Schedule.linear(10) != Schedule.linear(11)
    assert Schedule.linear(10) != Schedule.linear(10, beta_end=0.03)
    assert Schedule.linear(10) != "Schedule.linear(10)"
    assert len({Schedule.linear(10), Schedule.linear(10), Schedule.cosine(10)}) == 2


def test_equal_schedules_hash_alike_whatever_the_sign_of_zero() -> None:
    positive, negative = Schedule.from_alphas_cumprod([0.5, 0.0]), Schedule.from_alphas_cumprod([0.5, -0.0])
    assert positive == negative
    assert hash(positive) == hash(negative)


def test_repr_tells_the_length_and_the_range() -> None:
    assert repr(Schedule.linear(1000)) == "Schedule(T=1000, alphas_cumprod=0.9999 .. 4.03583e-05)"


# What a schedule refuses


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        pytest.param([0.1, math.nan], "NaN.*index 1", id="nan"),
        pytest.param([0.1, 0.0], r"\(0, 1\], got 0.0 at index 1", id="zero"),
        pytest.param([-0.1, 0.2], r"\(0, 1\], got -0.1 at index 0", id="negative"),
        pytest.param([0.1, 1.5], r"\(0, 1\], got 1.5 at index 1", id="above-1"),
        pytest.param([0.1, math.inf], r"\(0, 1\], got inf at index 1", id="infinite"),
        pytest.param([0.1, 1.0, 0.1], "strictly decrease.*index 2", id="1-before-the-last"),
        pytest.param([0.1, 1e-20], "strictly decrease.*index 1", id="beta-lost-in-rounding"),
        pytest.param([0.9999] * 100, "strictly decrease", id="underflow"),
        pytest.param([], "non-empty", id="empty"),
        pytest.param([[0.1, 0.2], [0.3, 0.4]], r"1-D.*\(2, 2\)", id="2-d"),
        pytest.param(0.1, r"1-D.*\(\)", id="scalar"),
    ],
)
def test_from_betas_refuses(betas: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Schedule.from_alphas_cumprod, Schedule], ids=["from_alphas_cumprod", "Schedule"])
@pytest.mark.parametrize(
    ("alphas_cumprod", "message"),
    [
        pytest.param([math.nan, 0.5], "NaN.*index 0", id="nan"),
        pytest.param([1.5, 0.5], r"\[0, 1\], got 1.5 at index 0", id="above-1"),
        pytest.param([0.5, -0.1], r"\[0, 1\], got -0.1 at index 1", id="negative"),
        pytest.param([0.9, math.inf], r"\[0, 1\], got inf at index 1", id="infinite"),
        pytest.param([0.9, 0.5, 0.5], "strictly decrease, got 0.5 then 0.5 at index 2", id="flat"),
        pytest.param([0.5, 0.9], "strictly decrease, got 0.5 then 0.9 at index 1", id="ascending"),
        pytest.param([], r"non-empty.*\(0,\)", id="empty"),
        pytest.param([[0.9, 0.5]], r"1-D.*\(1, 2\)", id="2-d"),
        pytest.param(0.9, r"1-D.*\(\)", id="scalar"),
    ],
)
def test_alpha_bars_refused(make: Callable[[object], Schedule], alphas_cumprod: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(alphas_cumprod)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [0, -1])
def test_constructors_refuse_fewer_than_one_timestep(make: Callable[[int], Schedule], T: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {T}"):
        make(T)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine], ids=lambda f: f.__name__)
def test_constructors_refuse_a_fractional_T(make: Callable[[float], Schedule]) -> None:
    with pytest.raises(TypeError):
        make(10.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Schedule.linear(10, beta_end=2.0), "betas must lie", id="linear-above-1"),
        pytest.param(lambda: Schedule.linear(10, beta_start=math.nan), "NaN", id="linear-nan"),
        pytest.param(lambda: Schedule.scaled_linear(10, beta_end=math.nan), "nan", id="scaled_linear-nan"),
        pytest.param(lambda: Schedule.cosine(10, s=math.nan), "nan", id="cosine-nan"),
        # 1000 / T scaling: published ends exceed 1 below 20 timesteps.
        pytest.param(lambda: Schedule.linear(10, 0.01, 0.02 * 1000 / 10), "betas must lie", id="linear-scaled-too-far"),
    ],
)
def test_constructors_refuse_what_makes_no_schedule(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
