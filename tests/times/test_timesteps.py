"""Timestep selection against the published sets, the peers' rules written a second time, and every refusal."""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import DDIM, Schedule, spaced_timesteps
from support.paths import GOLDEN

NAMES = ["leading", "trailing", "linspace", "quad", "respaced", "lcm"]
DDIM_OF_1000 = [
    *range(2, 37), 38, 39, 40, 42, 44, 46, 48, 50, 53, 56, 59, 63, 67, 72, 77, 84, 91, 100, 112, 125, 143, 167, 200,
    250, 334, 500, 1000,
]  # fmt: skip
SECTIONS_10_10_5 = [
    0, 37, 74, 111, 148, 185, 222, 259, 296, 333,
    334, 371, 408, 445, 482, 518, 555, 592, 629, 666,
    667, 750, 833, 916, 999,
]  # fmt: skip
SECTION_25 = [
    0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500,
    541, 583, 624, 666, 708, 749, 791, 832, 874, 916, 957, 999,
]  # fmt: skip


def ascending(T: int, spec: Any, **options: Any) -> list[int]:
    chosen = spaced_timesteps(T, spec, **options)
    assert chosen.dtype == np.int64
    assert all(later < earlier for earlier, later in pairwise(chosen.tolist())), "must strictly descend"
    return chosen[::-1].tolist()


# Golden sets


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("ddim25", list(range(0, 1000, 40))),
        ("10,10,5", SECTIONS_10_10_5),
        ("25", SECTION_25),
        ("1", [0]),
        ("2", [0, 999]),
        ("1,1", [0, 500]),
        ("1000", list(range(1000))),
    ],
    ids=["ddim25", "10,10,5", "25", "1", "2", "1,1", "1000"],
)
def test_published_sets_of_1000(spec: str, expected: list[int]) -> None:
    assert ascending(1000, spec) == expected


def test_published_ends_of_250_of_1000() -> None:
    chosen = ascending(1000, "250")
    assert len(chosen) == 250
    assert chosen[:3] == [0, 4, 8]
    assert chosen[-4:] == [987, 991, 995, 999]


def test_published_stable_diffusion_timesteps() -> None:
    assert spaced_timesteps(1000, "leading", 5, steps_offset=1).tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize(
    ("name", "T", "spec"),
    [
        ("iddpm_linear1000_ddim50", 1000, "ddim50"),
        ("iddpm_linear300_10-15-20", 300, "10,15,20"),
        ("iddpm_cosine4000_100", 4000, "100"),
    ],
)
def test_golden_timesteps(name: str, T: int, spec: str) -> None:
    assert ascending(T, spec) == np.load(GOLDEN / f"{name}.npz")["timesteps"].tolist()


# "ddimN"


def test_every_reachable_ddim_count_of_1000() -> None:
    assert len(DDIM_OF_1000) == 62
    reachable = []
    for count in range(1, 1001):
        try:
            chosen = ascending(1000, f"ddim{count}")
        except ValueError:
            continue
        reachable.append(count)
        smallest = next(stride for stride in range(1, 1000) if len(range(0, 1000, stride)) == count)
        assert chosen == list(range(0, 1000, smallest))
    assert reachable == DDIM_OF_1000


@pytest.mark.parametrize(
    ("T", "count", "nearest"),
    [
        (1000, 64, ["ddim63", "ddim67"]),
        (1000, 1, ["ddim2"]),
        (1000, 300, ["ddim250", "ddim334"]),
        (1000, 501, ["ddim500", "ddim1000"]),
        (1000, 1001, ["ddim1000"]),
        (1000, 0, ["ddim2"]),
        (10, 7, ["ddim5", "ddim10"]),
    ],
)
def test_unreachable_ddim_count_names_the_nearest(T: int, count: int, nearest: list[str]) -> None:
    with pytest.raises(ValueError, match=f"exactly {count} of {T} ") as caught:
        spaced_timesteps(T, f"ddim{count}")
    assert str(caught.value).split(": ")[1].split(", ") == nearest


def test_ddim_on_a_schedule_of_one() -> None:
    assert ascending(1, "ddim1") == [0]


# Sections


def sections_of_improved_diffusion(T: int, counts: list[int]) -> list[int]:
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (1 if i < T % len(counts) else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        at = 0.0
        for _ in range(count):
            chosen.add(start + round(at))
            at += stride
        start += size
    return sorted(chosen)


@pytest.mark.parametrize(
    ("T", "counts"),
    [(1000, [n]) for n in (3, 7, 50, 333, 999)]
    + [(300, [10, 15, 20]), (100, [1, 2, 33]), (7, [2, 1, 2]), (4000, [17, 0, 5]), (5, [1, 1, 1, 1, 1]), (3, [1] * 2)],
    ids=str,
)
def test_sections_follow_improved_diffusion(T: int, counts: list[int]) -> None:
    assert ascending(T, ",".join(map(str, counts))) == sections_of_improved_diffusion(T, counts)


# The spacings of diffusers and of ermongroup/ddim


def diffusers_spacing(T: int, name: str, N: int) -> list[int]:
    if name == "leading":
        return [i * (T // N) for i in range(N)]
    if name == "trailing":
        return sorted(int(value) - 1 for value in np.round(np.arange(T, 0, -(T / N))))
    return [int(value) for value in np.linspace(0, T - 1, N).round()]


def ermongroup_quad(T: int, N: int) -> list[int]:
    return [int(value) for value in list(np.linspace(0, np.sqrt(T * 0.8), N) ** 2)]


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [1000, 100, 7, 1])
def test_every_count_of_the_diffusers_spacings(name: str, T: int) -> None:
    """All N are valid: where diffusers' arange yields one element too many for trailing, ours still gives N."""
    for N in range(1, T + 1):
        expected = diffusers_spacing(T, name, N)
        if len(expected) == N + 1:
            assert name == "trailing"
            expected = expected[1:]
        assert ascending(T, name, steps=N) == expected, f"N = {N}"


@pytest.mark.parametrize("T", [1000, 100, 7, 1])
def test_every_count_of_the_quadratic_spacing(T: int) -> None:
    valid = 0
    for N in range(1, T + 1):
        expected = ermongroup_quad(T, N)
        if len(set(expected)) == N:
            assert ascending(T, "quad", steps=N) == expected, f"N = {N}"
            valid += 1
        else:
            with pytest.raises(ValueError, match="occurs twice"):
                spaced_timesteps(T, "quad", N)
    # Neighbours keep apart while the first gap, 0.8 T / (N - 1)^2, is at least 1.
    assert valid == min(math.isqrt(int(0.8 * T)) + 1, T)


@pytest.mark.parametrize(
    ("name", "N", "expected"),
    [
        ("leading", 4, [750, 500, 250, 0]),
        ("leading", 3, [666, 333, 0]),
        ("leading", 1, [0]),
        ("trailing", 4, [999, 749, 499, 249]),
        # 1000, 857.14, 714.29, 571.43, 428.57, 285.71, 142.86
        ("trailing", 7, [999, 856, 713, 570, 428, 285, 142]),
        ("trailing", 1, [999]),
        ("linspace", 4, [999, 666, 333, 0]),
        # 499.5 rounds to the even 500.
        ("linspace", 3, [999, 500, 0]),
        ("linspace", 1, [0]),
        ("quad", 5, [800, 450, 200, 50, 0]),
        ("quad", 1, [0]),
        ("respaced", 3, [999, 500, 0]),
        ("lcm", 1, [999]),
        ("lcm", 2, [999, 499]),
        ("lcm", 4, [999, 759, 499, 259]),
        ("lcm", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_spacings_by_hand(name: str, N: int, expected: list[int]) -> None:
    assert spaced_timesteps(1000, name, N).tolist() == expected


def test_halves_round_to_even() -> None:
    # 2.5 in the middle becomes 2, and 2 - 1 for trailing.
    assert spaced_timesteps(6, "linspace", 3).tolist() == [5, 2, 0]
    assert spaced_timesteps(5, "trailing", 2).tolist() == [4, 1]


@pytest.mark.parametrize(
    "spec", ["trailing", "linspace", "quad", "respaced", "lcm", "ddim50", "10,10", [3, 1]], ids=str
)
def test_the_offset_moves_leading_only(spec: Any) -> None:
    np.testing.assert_array_equal(spaced_timesteps(1000, spec, 10, steps_offset=1), spaced_timesteps(1000, spec, 10))


@pytest.mark.parametrize("spec", ["ddim50", "10,10", [3, 1]], ids=str)
def test_steps_matter_only_to_spacing_names(spec: Any) -> None:
    np.testing.assert_array_equal(spaced_timesteps(1000, spec, 7), spaced_timesteps(1000, spec))


# Explicit timesteps


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([5, 900, 0], id="list"),
        pytest.param((900, 5, 0), id="tuple"),
        pytest.param({0, 5, 900}, id="set"),
        pytest.param(np.array([0, 5, 900]), id="numpy-int64"),
        pytest.param(np.array([900, 0, 5], dtype=np.uint16), id="numpy-uint16"),
        pytest.param(torch.tensor([900, 5, 0]), id="torch-int64"),
        pytest.param(torch.tensor([5, 900, 0], dtype=torch.int32), id="torch-int32"),
        pytest.param([np.int64(5), torch.tensor(900), 0], id="mixed-integers"),
    ],
)
def test_explicit_timesteps_in_any_order_and_type(given: Iterable[int]) -> None:
    assert ascending(1000, given) == [0, 5, 900]


def test_explicit_range_and_generator() -> None:
    assert ascending(1000, range(0, 1000, 100)) == list(range(0, 1000, 100))
    assert ascending(1000, (t * t for t in range(4))) == [0, 1, 4, 9]


def test_the_result_is_the_callers_own() -> None:
    given = np.array([900, 5, 0])
    spaced_timesteps(1000, given)[0] = 1
    assert given.tolist() == [900, 5, 0]
    spaced_timesteps(1000, "leading", 4)[0] = 1
    assert spaced_timesteps(1000, "leading", 4).tolist() == [750, 500, 250, 0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param([5, 3, 5], ValueError, "timestep 5 occurs twice", id="duplicate"),
        pytest.param([0, 1000], ValueError, r"timestep 1000 lies outside \[0, 1000\)", id="too-large"),
        pytest.param([-1, 3], ValueError, r"timestep -1 lies outside \[0, 1000\)", id="negative"),
        pytest.param([], ValueError, "empty", id="empty-list"),
        pytest.param(torch.tensor([], dtype=torch.int64), ValueError, "empty", id="empty-tensor"),
        pytest.param([[1, 2], [3, 4]], ValueError, r"one-dimensional, got shape \(2, 2\)", id="2-d"),
        pytest.param(np.int64(5), ValueError, "one-dimensional", id="numpy-scalar"),
        pytest.param([1.0, 2.0], TypeError, "integers, got float64", id="floats"),
        pytest.param(np.array([1, 2], dtype=np.float32), TypeError, "integers, got float32", id="numpy-floats"),
        pytest.param(torch.tensor([1.0]), TypeError, "integers, got float32", id="torch-floats"),
        pytest.param([True, False], TypeError, r"integers, got \[True, False\]", id="booleans"),
        pytest.param(["1", "2"], TypeError, "integers", id="strings"),
        pytest.param([2**70], TypeError, "integers", id="beyond-int64"),
        pytest.param(5, TypeError, "must be a spacing", id="integer"),
    ],
)
def test_explicit_timesteps_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spaced_timesteps(1000, given)


def diffusers_lcm(T: int, M: int, N: int) -> list[int]:
    """LCMScheduler.set_timesteps."""
    origin = [i * (T // M) - 1 for i in range(1, M + 1)][::-1]
    return [origin[math.floor(index)] for index in np.linspace(0, M, num=N, endpoint=False)]


@pytest.mark.parametrize(("T", "M"), [(1000, 50), (1000, 7), (100, 100), (1000, 999), (1, 1)])
def test_every_count_of_the_distilled_timesteps(T: int, M: int) -> None:
    for N in range(1, min(M, 60) + 1):
        assert spaced_timesteps(T, "lcm", N, original_steps=M).tolist() == diffusers_lcm(T, M, N), f"N = {N}"


@pytest.mark.parametrize("N", [1, 2, 25, 250, 1000])
def test_respaced_is_one_section(N: int) -> None:
    assert ascending(1000, "respaced", steps=N) == ascending(1000, str(N))


# What else is refused


@pytest.mark.parametrize(
    ("steps", "original_steps", "error", "message"),
    [
        (51, 50, ValueError, "steps must not exceed original_steps=50, got 51"),
        (4, 0, ValueError, r"original_steps must lie in \[1, 1000\].*got 0"),
        (4, 1001, ValueError, r"original_steps must lie in \[1, 1000\].*got 1001"),
        (4, 50.0, TypeError, "original_steps must be an int, got 50.0"),
    ],
)
def test_distilled_timesteps_refused(steps: int, original_steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spaced_timesteps(1000, "lcm", steps, original_steps=original_steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_outside_the_schedule(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps must lie in \[1, 1000\].*got {steps}"):
        spaced_timesteps(1000, name, steps)


@pytest.mark.parametrize("name", NAMES)
def test_spacing_names_need_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*needs steps="):
        spaced_timesteps(1000, name)


@pytest.mark.parametrize("name", NAMES)
def test_fractional_steps_are_a_type_error(name: str) -> None:
    with pytest.raises(TypeError):
        spaced_timesteps(1000, name, 5.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["", "uniform", "Leading", "ddim", "ddim-5", "ddim5.0", "10,", ",10", "10, 5", "-5"])
def test_unknown_spacings_list_the_known_ones(spec: str) -> None:
    with pytest.raises(ValueError, match="leading, trailing, linspace, quad, respaced, lcm, 'ddimN'") as caught:
        spaced_timesteps(1000, spec, 10)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("T", "spec", "message"),
    [
        (1000, "1001", "section 0 of 1000 timesteps holds 1000: cannot visit 1001"),
        (10, "5,6", "section 1 of 10 timesteps holds 5: cannot visit 6"),
        (2, "1,1,1", "section 2 of 2 timesteps holds 0: cannot visit 1"),
        (1000, "0", "empty"),
        (1000, "0,0", "empty"),
    ],
)
def test_sections_refused(T: int, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(T, spec)


@pytest.mark.parametrize(
    ("N", "offset", "message"),
    [(1000, 1, "timestep 1000 lies outside"), (10, 100, "timestep 1000 lies outside"), (10, -1, "timestep -1 lies")],
)
def test_offsets_that_leave_the_schedule(N: int, offset: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, "leading", N, steps_offset=offset)


@pytest.mark.parametrize("T", [0, -1])
def test_a_schedule_has_at_least_one_timestep(T: int) -> None:
    with pytest.raises(ValueError, match=f"T must be at least 1, got {T}"):
        spaced_timesteps(T, [0])


def test_samplers_pass_the_choice_on() -> None:
    assert DDIM(Schedule.linear(), timesteps="ddim25").table.t.tolist() == list(range(960, -1, -40))
    assert DDIM(Schedule.linear(), timesteps=[7, 3], steps=50).table.t.tolist() == [7, 3]
    with pytest.raises(ValueError, match="ddim63, ddim67"):
        DDIM(Schedule.linear(), timesteps="ddim64")
