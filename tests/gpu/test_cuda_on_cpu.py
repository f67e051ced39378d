"""What running CUDA on the CPU finds (cuda_on_cpu/), and the kernels under the address sanitizer."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.ahead import ENVIRONMENT, Ahead
from support.cuda_on_cpu import build
from support.cuda_on_cpu.build import ORDERS, CudaOnCpu
from support.paths import TESTS

pytest_plugins = ["support.cuda_on_cpu.fixtures"]

COUNTED = [float(i) for i in range(128)]
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_lanes(on_cpu: CudaOnCpu, order: str) -> None:
    with on_cpu.order(order):
        why, got = on_cpu.trial("reversed", COUNTED, 128, (2,), (64,))
        assert not why and got == [*COUNTED[63::-1], *COUNTED[:63:-1]]
        why, got = on_cpu.trial("block_sum", COUNTED, 2, (2,), (64,))
        assert not why and got == [sum(COUNTED[:64]), sum(COUNTED[64:])]
        # The first lane's value, that of the next one among eight, which of the first eight are positive.
        why, got = on_cpu.trial("lanes", COUNTED[1:33], 32)
        assert not why and got == [1 + 100 * COUNTED[k + (k % 8 < 7) + 1] + 2550000 for k in range(32)]


def test_a_missing_barrier_shows(on_cpu: CudaOnCpu) -> None:
    """Threads run to their end one after the other, so which reads come too early depends on the order."""
    wrong = {}
    for order in ORDERS:
        with on_cpu.order(order):
            why, got = on_cpu.trial("reversed without barrier", COUNTED[:64], 64, (1,), (64,))
        assert not why
        wrong[order] = sum(a != b for a, b in zip(got, COUNTED[63::-1], strict=True))
    assert wrong["ascending"] == wrong["descending"] == 32 and wrong["mixed"] > 0


def test_shared_memory_starts_as_nan_in_every_block(on_cpu: CudaOnCpu) -> None:
    _, got = on_cpu.trial("uninitialised", COUNTED, 32, (3,), (32,))
    assert all(math.isnan(v) for v in got)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("returns_early", [1.0, -1.0] * 16, "16 wait at .*, 16 of 32 have returned"),
        ("two_barriers", COUNTED[:32], "16 wait at .*, 16 wait at .*, 0 of 32 have returned"),
        ("half_a_warp", COUNTED[:32], "16 wait at .*, 16 of 32 have returned"),
        ("absent_lane", COUNTED[:32], "reads from a lane that is not in the mask"),
    ],
)
def test_what_would_hang_or_be_undefined_is_an_error(
    on_cpu: CudaOnCpu, name: str, given: list[float], why: str
) -> None:
    found, _ = on_cpu.trial(name, given, 32)
    assert re.search(why, found), found
    after, got = on_cpu.trial("reversed", COUNTED[:64], 64, (1,), (64,))
    assert not after and got == COUNTED[63::-1], "the next launch starts afresh"


@pytest.mark.parametrize(
    ("grid", "block", "why"),
    [
        ((1, 65536), (1,), "grid of 1 x 65536 x 1"),
        ((1, 1, 65536), (1,), "grid of 1 x 1 x 65536"),
        ((2**31,), (1,), "grid of 2147483648 x 1 x 1"),
        ((0,), (1,), "grid of 0 x 1 x 1"),
        ((1,), (1025,), "block of 1025 x 1 x 1"),
        ((1,), (32, 33), "block of 32 x 33 x 1"),
        ((1,), (1, 1, 65), "block of 1 x 1 x 65"),
    ],
    ids=str,
)
def test_launches_that_a_device_refuses(
    on_cpu: CudaOnCpu, grid: tuple[int, ...], block: tuple[int, ...], why: str
) -> None:
    found, _ = on_cpu.trial("block_numbers", [0.0], 1, grid, block)
    assert why in found


@pytest.mark.parametrize("order", ORDERS)
def test_every_block_runs_once_and_a_window_of_them_alone(on_cpu: CudaOnCpu, order: str) -> None:
    with on_cpu.order(order):
        assert on_cpu.trial("block_numbers", [0.0], 60, (3, 4, 5), (1,)) == ("", [1.0] * 60)
        with on_cpu.window(7, 31):
            _, got = on_cpu.trial("block_numbers", [0.0], 60, (3, 4, 5), (1,))
    assert got == [float(7 <= k <= 31) for k in range(60)]
    kernels = {launch.kernel.split("(")[1].partition("::")[2] for launch in on_cpu.launches()}
    assert "block_numbers" in kernels


# Whatever a sanitizer finds ends the process.


def run_python(code: str, library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    prelude = f"from support.cuda_on_cpu import build; build.use({str(library)!r}); on_cpu = build.cuda_on_cpu(); "
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=TESTS,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )


def trial(name: str, count: int, threads: int) -> str:
    return f"print(on_cpu.trial({name!r}, [0.0] * {count}, {count}, (1,), ({threads},)))"


def test_a_misaligned_vector_ends_the_process(on_cpu: CudaOnCpu) -> None:
    code = "import ctypes; on_cpu.trial('vectors', [0.0] * 256, 256, (1,), (64,)); print('whole'); "
    code += "on_cpu.trial('vectors shifted', [0.0] * 256, 256, (1,), (1,)); print('survived')"
    done = run_python(code, on_cpu.path)
    assert done.stdout == "whole\n" and "misaligned address" in done.stderr, done.stderr


def under_address_sanitizer(code: str, library: Path) -> subprocess.CompletedProcess[str]:
    """In the environment that the sanitizer needs inside Python."""
    preloaded = [build.runtime(name) for name in ("libasan.so", "libstdc++.so.6")]
    # Python leaks; the stacks of allocations cost more than all else.
    options = "detect_leaks=0:malloc_context_size=1"
    return run_python(code, library, LD_PRELOAD=" ".join(preloaded), ASAN_OPTIONS=options, OMP_NUM_THREADS="1")


@pytest.fixture
def address_sanitizer() -> Path:
    """The library built with it."""
    if reason := build.why_not():
        pytest.skip(reason)
    return build.address.result()


@pytest.mark.ahead(build.address)
@pytest.mark.parametrize(("name", "count", "threads"), [("vectors", 256, 65), ("shared_bounds", 256, 9)])
def test_what_lies_beyond_ends_the_process(address_sanitizer: Path, name: str, count: int, threads: int) -> None:
    code = trial(name, count, threads - 1) + "; print('inside'); " + trial(name, count, threads)
    done = under_address_sanitizer(code, address_sanitizer)
    assert "inside\n" in done.stdout and done.stdout.endswith("inside\n"), done.stdout
    assert "buffer-overflow" in done.stderr and "trials.cu" in done.stderr, done.stderr


# The cases that reach the ends of memory: odd sizes, both kernels of a step, all dtypes, several chunks of a reduction.
UNDER_ADDRESS_SANITIZER = [
    "gpu/test_cuda_noise.py::test_same_bits_as_the_cpu",
    *(f"gpu/test_cuda_step.py::test_modes[{mode}-{dtype}]" for mode in ("everything", "learned") for dtype in DTYPES),
    "gpu/test_cuda_step.py::test_in_place_and_the_entry_over_a_history[everything]",
    *(f"gpu/test_cuda_reductions.py::test_thresholds[{size}]" for size in (1, 9, 8193)),
    *(f"gpu/test_cuda_reductions.py::test_rescale_factors[{size}-{dtype}]" for size in (9, 8193) for dtype in DTYPES),
    *(
        f"gpu/test_cuda_reductions.py::test_posterior[{size}-learned_range-clip-{dtype}]"
        for size in (5, 8)
        for dtype in DTYPES
    ),
]


@Ahead
def stay_inside() -> subprocess.CompletedProcess[str]:
    arguments = ["-q", "-p", "no:cacheprovider", *UNDER_ADDRESS_SANITIZER]
    # The library is there: the address sanitizer's own tests come first.
    return under_address_sanitizer(
        f"import pytest; raise SystemExit(pytest.main({arguments!r}))", build.build("address")
    )


@pytest.mark.ahead(stay_inside)
def test_kernels_stay_inside_their_memory() -> None:
    if reason := build.why_not():
        pytest.skip(reason)
    done = stay_inside.result()
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout
