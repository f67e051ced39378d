"""lora_linear on AMX: its kernels over a model of the instructions (amx_on_cpu/): parts, marks, counts."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.ops.backend import cpu_module
from fastsample.ops.lora import lora_linear
from fastsample.ops.lora.adapters import LowRank, pack_adapters
from fastsample.ops.lora.weights import PackedLinear, pack_linear
from support.amx_on_cpu.build import AmxOnCpu, amx_on_cpu, undefined
from support.levels import AMX_ON_CPU, at_level, on_threads
from support.lora_formula import MEASURED, Problem, exact, problem
from support.paths import ROOT

_cpu = cpu_module()

pytestmark = pytest.mark.ahead(undefined)

DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def amx() -> Iterator[AmxOnCpu]:
    """At this level; every thread has given its tiles back when the test is over."""
    with at_level(AMX_ON_CPU):
        model = amx_on_cpu()
        model.take_counts()
        yield model
        assert model.take_counts()[3] == 0


@contextmanager
def torch_precision(name: str) -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = name
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def packed_bits(weight: Tensor) -> Tensor:
    (unpacked,) = pack_linear([weight]).unpack()
    return unpacked


def product(x: Tensor, weight: Tensor) -> Tensor:
    return lora_linear(x, pack_linear([weight]), backend="cpu")[0]


def as_avx512(x: Tensor, weight: Tensor, group: LowRank | None = None) -> Tensor:
    """What the float kernels make of the same."""
    with at_level("avx512" if "avx512" in _cpu.available_isas() else "avx2"):
        packed = pack_linear([weight])
        adapters = None if group is None else pack_adapters(packed, [[group]])
        return lora_linear(x, packed, adapters, backend="cpu")[0]


def test_the_model_is_the_instruction_as_it_was_measured(amx: AmxOnCpu) -> None:
    """One chain over the even k, one over the odd, both from 0, their sum last; each step rounded once.

    Products of bfloat16 are exact in float64, and so is their sum with a float32 of like size.
    """
    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(16, 32, generator=made).bfloat16() for _ in range(2))
    even, odd = (np.zeros((16, 16), np.float32) for _ in range(2))
    for k in range(0, 32, 2):
        for chain, i in ((even, k), (odd, k + 1)):
            chain[:] = (np.outer(x[:, i].double(), w[:, i].double()) + chain).astype(np.float32)
    want = torch.from_numpy(even + odd)
    assert torch.equal(amx_product(x, w), want)


@pytest.mark.parametrize(
    ("x", "w", "want"),
    [
        pytest.param(2.0**-127, 1.0, 0.0, id="a subnormal input is 0"),
        pytest.param(2.0**-126, 1.0, 2.0**-126, id="the smallest normal one is not"),
        pytest.param(2.0**-100, 2.0**-27, 0.0, id="a subnormal product is 0"),
        pytest.param(math.inf, 1.0, math.inf, id="infinity"),
        pytest.param(math.inf, 0.0, math.nan, id="infinity by 0"),
    ],
)
def test_the_model_at_the_edges(amx: AmxOnCpu, x: float, w: float, want: float) -> None:
    rows = [torch.zeros(16, 32, dtype=torch.bfloat16) for _ in range(2)]
    rows[0][3, 5], rows[1][7, 5] = x, w
    got = amx_product(*rows)[3, 7].item()
    assert got == want or (math.isnan(want) and np.float32(got).view(np.uint32) == 0xFFC00000)


def amx_product(x: Tensor, w: Tensor) -> Tensor:
    """The sum of one product of tiles: x (16, 32) by w (16, 32)."""
    sums = torch.zeros(16, 16)
    # A tile of W has 16 rows of 16 pairs.
    pairs = w.reshape(16, 16, 2).transpose(0, 1).contiguous()
    amx_on_cpu().tile_product(sums.data_ptr(), x.contiguous().data_ptr(), pairs.data_ptr())
    return sums


def test_every_float16_is_restored_from_its_parts(amx: AmxOnCpu) -> None:
    """NaN's payloads among them; 64 columns are two panels with ordinary and with special values."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(64, 1024)
    assert torch.equal(packed_bits(every.view(torch.float16)).view(torch.int16), every)


@pytest.mark.parametrize("flush", [False, True], ids=["", "while torch flushes subnormals"])
def test_every_kind_of_float32_is_restored_from_its_parts(amx: AmxOnCpu, flush: bool) -> None:
    """All exponents and signs by fractions whose parts round up, down, to even and over into the next exponent."""
    made = np.random.default_rng(0)
    fractions = [
        0,
        1,
        0x7FFFFF,
        0x7FFF,
        0x8000,
        0x8001,
        0x7F8000,
        0x7F7FFF,
        0x18000,
        0x80,
        0x7F80,
        *made.integers(1 << 23, size=53),
    ]
    bits = np.add.outer(np.arange(512, dtype=np.uint32) << 23, np.array(fractions, np.uint32))
    weight = torch.from_numpy(bits.view(np.int32).copy())
    torch.set_flush_denormal(flush)
    try:
        restored = packed_bits(weight.view(torch.float32))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(restored.view(torch.int32), weight)


def spoiled(rows: Tensor, value: float) -> Tensor:
    """The rows with this value in row 5, or all of row 5 of its size."""
    rows = rows.clone()
    if abs(value) < 1:
        rows[5] *= value
    else:
        rows[5, 7] = value
    return rows


SPECIAL = {
    torch.float32: [math.nan, math.inf, -math.inf, 3e38, 2.0**61, 2.0**-54, 2.0**-100, 1e-40],
    torch.float16: [math.nan, math.inf, -math.inf],
}
CASES = [pytest.param(dtype, value, id=f"{str(dtype)[6:]} {value:.3g}") for dtype in DTYPES for value in SPECIAL[dtype]]


@pytest.mark.parametrize(("dtype", "value"), CASES)
def test_rows_that_parts_cannot_give_are_the_float_kernels(amx: AmxOnCpu, dtype: torch.dtype, value: float) -> None:
    """The same bits as of the float kernels, and the other rows keep theirs."""
    p = problem(MEASURED, 77, (65,), (5,), dtype)
    (weight,), group = p.weights, p.groups[0][0]
    for rows in (13, 40):
        x = spoiled(p.x[:rows], value)
        got = lora_linear(x, *Problem(x, (weight,), (None,), p.groups).packs(), backend="cpu")[0]
        clean = lora_linear(p.x[:rows], *Problem(x, (weight,), (None,), p.groups).packs(), backend="cpu")[0]
        others = torch.arange(rows) != 5
        assert torch.equal(got[others], clean[others])
        assert_same_bits(got[5], as_avx512(x, weight, group)[5])


@pytest.mark.parametrize(("dtype", "value"), CASES)
def test_panels_that_parts_cannot_give_are_the_float_kernels(amx: AmxOnCpu, dtype: torch.dtype, value: float) -> None:
    """Of 96 columns in three panels the one with the special column; the others keep their bits."""
    p = problem(MEASURED, 77, (96,), (None,), dtype)
    weight = spoiled(p.weights[0].roll(-32, 0), value).roll(32, 0)  # column 37
    for rows in (13, 40):
        got, clean = product(p.x[:rows], weight), product(p.x[:rows], p.weights[0])
        others = torch.arange(96) // 32 != 1
        assert torch.equal(got[:, others], clean[:, others])
        assert_same_bits(got[:, 32:64], as_avx512(p.x[:rows], weight)[:, 32:64])
        torch.set_flush_denormal(True)  # the user's own setting changes no weight that is normal
        try:
            flushed = product(p.x[:rows], weight)
            assert_same_bits(flushed[:, 32:64], as_avx512(p.x[:rows], weight)[:, 32:64])
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(packed_bits(weight).nan_to_num(7.0), weight.nan_to_num(7.0))


@pytest.mark.parametrize("which", ["down", "up", "t"])
def test_factors_that_parts_cannot_give(amx: AmxOnCpu, which: str) -> None:
    """t of 2^90 in one row, whose x is ordinary, and factors with an infinity: as the float kernels have it."""
    p = problem(MEASURED, 77, (65,), (5,), torch.float32)
    one, x = p.groups[0][0], p.x[:40].clone()
    assert one is not None
    down, up = one.down.clone(), one.up.clone()
    if which == "t":
        x[:, 3], x[5, 3] = 0, 2.0**45
        down[:, 3], up = 2.0**45, up * 2.0**-80
    else:
        (down if which == "down" else up)[2, 3] = math.inf
    group = LowRank(down, up, one.scale)
    got = lora_linear(x, *Problem(x, p.weights, (None,), ([group],)).packs(), backend="cpu")[0]
    want = as_avx512(x, p.weights[0], group)
    assert_same_bits(got[5], want[5]) if which == "t" else assert_same_bits(got.isfinite(), want.isfinite())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """NaN for NaN: which one comes out of two is not fixed by the sources."""
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def test_single_tiny_values_stay_in_tiles(amx: AmxOnCpu) -> None:
    """Beside larger ones they cost no float arithmetic, are restored, and lose less than the row's own rounding."""
    p = problem(MEASURED, 64, (64,), (None,), torch.float32)
    x, weight = p.x[:32].clone(), p.weights[0].clone()
    x[::2, ::3], weight[::5, 1::4] = 1e-41, 3e-39
    got = product(x, weight)
    assert torch.equal(packed_bits(weight), weight)
    assert_only_tiles(amx, products=2 * 24 * 2)
    want = x.double() @ weight.double().T
    sizes = x.double().abs().amax(1, keepdim=True) * weight.double().abs().amax(1)
    assert ((got.double() - want).abs() <= (64 + 3) * 2.0**-24 * 64 * sizes).all()


def assert_only_tiles(amx: AmxOnCpu, products: int) -> None:
    assert amx.take_counts()[0] == products


# Tiles of x by tiles of W, then products and loads for one step along k; a step of 16 rows keeps x's parts in tiles.
COUNTS = [
    pytest.param(torch.bfloat16, "ieee", 32, 32, 4, 4, id="bfloat16 32x32"),
    pytest.param(torch.bfloat16, "ieee", 16, 64, 4, 5, id="bfloat16 16x64"),
    pytest.param(torch.float16, "ieee", 32, 32, 16, 10, id="float16 32x32"),
    pytest.param(torch.float16, "ieee", 16, 64, 16, 10, id="float16 16x64"),
    pytest.param(torch.float32, "ieee", 32, 32, 24, 14, id="float32 32x32"),
    pytest.param(torch.float32, "ieee", 16, 64, 24, 15, id="float32 16x64"),
    pytest.param(torch.float32, "none", 32, 32, 24, 14, id="float32 by default"),
    pytest.param(torch.float32, "tf32", 32, 32, 12, 8, id="tf32 32x32"),
    pytest.param(torch.float32, "bf16", 32, 32, 4, 4, id="bf16 32x32"),
]


@pytest.mark.parametrize(("dtype", "precision", "rows", "n", "products", "loads"), COUNTS)
def test_instructions_of_a_step(
    amx: AmxOnCpu, dtype: torch.dtype, precision: str, rows: int, n: int, products: int, loads: int
) -> None:
    steps = 5
    with torch_precision(precision):
        product(torch.ones(rows, 32 * steps, dtype=dtype), torch.ones(n, 32 * steps, dtype=dtype))
    assert amx.take_counts()[:3] == (products * steps, loads * steps, 4)


def test_the_page_counts_what_the_model_counts() -> None:
    page = (ROOT / "docs" / "cpu.md").read_text()
    rows = re.findall(
        r"^\| (\w+)(?:, (\w+) products)?, (\d+) rows by (\d+) columns \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M
    )
    precision = {"": "ieee", "six": "ieee", "three": "tf32"}
    found = {(getattr(torch, dtype), precision[name], *map(int, sizes)) for dtype, name, *sizes in rows}
    counted: set[tuple[object, ...]] = {(*case.values, 2 * case.values[4]) for case in COUNTS}  # type: ignore[operator]
    assert len(found) == 6 and found <= counted


@pytest.fixture(scope="module")
def machine_code() -> str:
    """Of the installed extension, whose tile instructions a compiler has placed."""
    if _cpu is None or "compiler" in _cpu.why_no_amx() or shutil.which("objdump") is None:
        pytest.skip("no kernels for AMX, or no objdump to look into them")
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", _cpu.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("parts", "products", "dots", "loads"),
    [
        pytest.param(1, 1, 4, 4, id="bfloat16"),
        pytest.param(2, 4, 16, 10, id="float16"),
        pytest.param(3, 6, 24, 14, id="float32"),
        pytest.param(3, 3, 12, 8, id="tf32"),
        pytest.param(3, 1, 4, 4, id="bf16"),
    ],
)
def test_a_step_of_32_rows_compiles_to_tile_instructions_alone(
    machine_code: str, parts: int, products: int, dots: int, loads: int
) -> None:
    """No vector register and no stack between the first load of a step along k and its last product."""
    name = rf"fastsample::amx::tile_sums<{parts}, {products}, 2, 2>"
    found = re.search(rf"^[0-9a-f]+ <[^\n]*{name}[^\n]*>:\n((?:.+\n)+)", machine_code, re.M)
    assert found is not None
    lines = found.group(1).splitlines()
    tiles = [i for i, line in enumerate(lines) if "tileloadd" in line or "tdpbf16ps" in line]
    step = lines[tiles[0] : tiles[-1] + 1]
    assert sum("tdpbf16ps" in line for line in step) == dots and sum("tileloadd" in line for line in step) == loads
    assert not [line for line in step if re.search(r"%[xyz]mm|%rsp", line)]


@pytest.mark.parametrize(
    ("setter", "least", "most"),
    [
        pytest.param("highest", 0, 2e-7, id="six products"),
        pytest.param("high", 1e-6, 1e-5, id="three products"),
        pytest.param("medium", 1e-3, 4e-3, id="one product"),
    ],
)
def test_what_each_precision_loses(amx: AmxOnCpu, setter: str, least: float, most: float) -> None:
    """By torch's own switch. One product rounds both factors to 8 bits, three lose 2^-16 or so, six less than torch."""
    p = problem(MEASURED, 769, (96,), (16,), torch.float32)
    packs, before = p.packs(), torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision(setter)
    try:
        (got,) = lora_linear(p.x, *packs, backend="cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
    (want,) = exact(p, p.x)
    error = float((got.double() - want).norm() / want.norm())
    assert least <= error <= most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_torchs(amx: AmxOnCpu, dtype: torch.dtype) -> None:
    """Relative, of the whole product; float16 against one that torch sums in float32."""
    p = problem(256, 768, (256,), (None,), dtype)
    (weight,) = p.weights
    want = p.x.double() @ weight.double().T
    theirs = torch.nn.functional.linear(p.x.float(), weight.float()).to(dtype)
    ours = product(p.x, weight)
    assert (ours.double() - want).norm() <= (theirs.double() - want).norm() * (1 if dtype == torch.float32 else 1.001)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 6), (torch.float16, 4), (torch.bfloat16, 2)], ids=str)
def test_bytes_of_a_weight(amx: AmxOnCpu, dtype: torch.dtype, size: int) -> None:
    """And a header of 64 bytes and of a byte a panel, rounded up to 64."""
    packed = pack_linear([torch.zeros(640, 320, dtype=dtype)])
    assert packed.data.nbytes == 640 * 320 * size + (128 if size != 2 or dtype == torch.float16 else 0)


def test_weights_packed_for_amx_are_refused_without_it(amx: AmxOnCpu) -> None:
    packed = pack_linear([torch.ones(512, 256)])
    if "amx" in _cpu.available_isas():
        return
    # Large enough for two threads, which an exception may not leave.
    with at_level("scalar"), on_threads(2):
        elsewhere = PackedLinear(packed.data, None, 256, (512,), packed.sizes, packed.layout)
        with pytest.raises(RuntimeError, match="packed for AMX, which is absent here"):
            lora_linear(torch.ones(2, 256), elsewhere)
        with pytest.raises(RuntimeError, match="packed for AMX, which is absent here"):
            elsewhere.unpack()


@pytest.mark.skipif("_cpu is None or 'amx' not in _cpu.available_isas()", reason="this CPU has no AMX to compare with")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_the_hardware_gives_the_models_bits(amx: AmxOnCpu, dtype: torch.dtype) -> None:
    p = problem(MEASURED, 385, (96, 65), (17,), dtype)
    for rows in (13, 77):
        modelled = lora_linear(p.x[:rows], *p.packs(), backend="cpu")
        with at_level("amx"):
            real = lora_linear(p.x[:rows], *p.packs(), backend="cpu")
        assert all(torch.equal(y, other) for y, other in zip(modelled, real, strict=True))
