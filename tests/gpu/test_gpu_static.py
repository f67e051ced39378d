"""What the GPU kernels' machine code must be, from the binaries: no GPU is needed, nothing is timed.

The kernels are compiled by `python -m benchmarks.gpu_static` in a process of its own: this one may have imported them
for Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu_static
from benchmarks.machine_code import binaries, sass
from benchmarks.machine_code.peaks import GPUS, LIMITS
from benchmarks.machine_code.static_tables import on_tensor_cores, render, replaced
from support.ahead import ENVIRONMENT, Ahead
from support.paths import ROOT

ELEMENT_WISE = (
    "noise float32",
    "step noise-free float32",
    "step noisy float32",
    "step noisy, learned variance float16",
)
PRODUCTS = ("lora_linear expand float16", "lora_linear shrink bfloat16", "lora_linear expand, tf32 float32")
BELOW_HALF = {
    # Nine sums in float64, two registers each, of three operands that all of them read.
    "triton bend sums, momentum": 0.375,
    # An m in 16 bits on sm_100, by two registers; instructions are the bound there.
    "triton likelihood terms": 0.4375,
    # Histograms in registers; instructions are the bound.
    "triton reductions digit 3": 0.3125,
    "triton reductions magnitudes": 0.4375,
    "triton reductions magnitudes, guided": 0.4375,
    # Without 128-bit accesses every element has its own address and mask; on sm_80 alone.
    "triton step noisy, odd size": 0.4375,
}
"""Kernels other than products that leave room for less than half of the warps, on the architecture with the least."""
Rows = list[dict[str, str]]


def collected(*flags: str) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.csv")
        command = [sys.executable, "-m", "benchmarks.gpu_static", "--out", str(out), *flags]
        done = subprocess.run(
            command, cwd=ROOT, env={**ENVIRONMENT, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return gpu_static.read_csv(out)


@Ahead
def from_triton() -> Rows:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    flags = [flag for label in (*ELEMENT_WISE, *PRODUCTS) for flag in ("--match", label)]
    return collected("--only", "triton", "--archs", "80,90,100,gfx942", *flags)


@Ahead
def from_cuda() -> Rows:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the disassembler comes with triton, which is not installed")
    if binaries.cuda_module() is None:
        pytest.skip("fastsample._cuda is not built here")
    return collected("--only", "cuda", "--archs", "75,90")


@pytest.fixture
def triton_rows() -> Rows:
    return from_triton.result()


@pytest.fixture
def cuda_rows() -> Rows:
    return from_cuda.result()


def label(row: dict[str, str]) -> str:
    return " ".join(filter(None, (row["op"], row["variant"], row["dtype"])))


def bad(rows: Rows, *columns: str) -> list[str]:
    return [
        f"{label(row)} {row['arch']}: {column} {row[column]}"
        for row in rows
        for column in columns
        if row[column] != "0"
    ]


def over_the_limit(rows: Rows) -> list[str]:
    limits = {"gfx942": 64 << 10, **{f"sm_{arch}": limit.block_shared for arch, limit in LIMITS.items()}}
    return [f"{label(row)} {row['arch']}" for row in rows if int(row["shared"]) > limits[row["arch"]]]


@pytest.mark.ahead(from_triton)
def test_triton_kernels_compile_for_every_architecture(triton_rows: Rows) -> None:
    assert {row["arch"] for row in triton_rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {label(row) for row in triton_rows} >= {*ELEMENT_WISE, *PRODUCTS}


def test_triton_kernels_neither_spill_nor_use_a_stack(triton_rows: Rows) -> None:
    assert not bad(triton_rows, "spills", "stack")


def test_shared_memory_is_within_the_limits(triton_rows: Rows) -> None:
    assert not over_the_limit(triton_rows)


def test_triton_s_element_wise_kernels_leave_half_the_warps_room(triton_rows: Rows) -> None:
    for row in triton_rows:
        assert row["op"] == "lora_linear" or float(row["occupancy"]) >= 0.5, row


def test_triton_s_element_wise_kernels_move_128_bits_at_a_time(triton_rows: Rows) -> None:
    """Every access to float32; a 16-bit m comes in 64 bits, which are the same elements. Nothing is narrower."""
    for row in triton_rows:
        if row["op"] == "lora_linear" or row["arch"] == "gfx942":
            continue
        assert row["stores128"] == row["stores"] != "0", row
        if row["op"] == "step":
            assert row["narrow"] == "0" and int(row["loads128"]) >= 2, row
            assert row["dtype"] != "float32" or row["loads128"] == row["loads"], row


@pytest.mark.parametrize(
    ("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")]
)
def test_lora_s_products_use_tensor_cores(triton_rows: Rows, arch: str, instruction: str) -> None:
    own = [row for row in triton_rows if row["op"] == "lora_linear" and row["arch"] == arch]
    assert {row["dtype"] for row in own} == {"float16", "bfloat16", "float32"}
    assert all(instruction in row["tensor"] for row in own), own


@pytest.mark.parametrize("variant", ["noise-free", "noisy", "noisy, learned variance"])
def test_triton_s_step_is_bound_by_memory(triton_rows: Rows, variant: str) -> None:
    own = [row for row in triton_rows if row["op"] == "step" and row["variant"] == variant and row["gpu"]]
    assert {row["gpu"] for row in own} >= {"A100 SXM", "H100 SXM"}
    for row in own:
        # On B200 noise takes about as long as the bytes: the table says how much.
        assert row["bound"] == "memory" or (row["gpu"] == "B200" and variant != "noise-free"), row


@pytest.mark.ahead(from_cuda)
def test_cuda_kernels(cuda_rows: Rows) -> None:
    assert {row["arch"] for row in cuda_rows} == {"sm_75", "sm_90"}
    assert {row["op"] for row in cuda_rows} >= {"noise", "step", "posterior"}
    assert not bad(cuda_rows, "spills", "stack")
    for row in cuda_rows:
        assert float(row["occupancy"]) >= 0.5, row
        # Four elements a thread are accessed one by one: where they are not aligned, and where their noise is summed.
        one_by_one = "unaligned" in row["variant"] or row["variant"] == "log_prob"
        if row["op"] in ("noise", "step", "posterior") and not one_by_one:
            assert row["stores128"] == row["stores"] != "0", row
    noisy = ("draws", "log_prob")
    steps = [row for row in cuda_rows if row["gpu"] and row["op"] == "step"]
    quiet = [row for row in steps if not any(word in row["variant"] for word in noisy)]
    assert quiet and all(row["bound"] == "memory" for row in quiet), quiet


def committed() -> Rows:
    return gpu_static.read_csv(gpu_static.RESULTS)


def test_no_kernel_of_the_results_spills() -> None:
    rows = committed()
    assert {row["source"] for row in rows} == {"cuda", "triton"}
    assert not bad(rows, "spills", "stack")


def test_the_results_are_within_the_limits_of_shared_memory() -> None:
    assert not over_the_limit(committed())


def test_the_results_leave_half_the_warps_room() -> None:
    least: dict[str, float] = {}
    for row in committed():
        if row["op"] != "lora_linear":
            name = f"{row['source']} {row['op']} {row['variant']}"
            least[name] = min(least.get(name, 1.0), float(row["occupancy"]))
    below = {name: share for name, share in least.items() if share < 0.5}
    assert below == pytest.approx(BELOW_HALF, rel=1e-3)


def test_products_of_the_results_use_tensor_cores() -> None:
    own = [row for row in committed() if row["op"] == "lora_linear" and on_tensor_cores(row["dtype"], row["variant"])]
    assert {row["variant"] for row in own} >= {"expand", "shrink", "one launch", "expand, tf32"}
    assert not [f"{label(row)} {row['arch']}" for row in own if not row["tensor"]]


def test_tables_show_tensor_cores_of_tf32_alone_in_float32() -> None:
    rows = [row for row in committed() if row["dtype"] == "float32" and row["op"] == "lora_linear"]
    lines = [line.split("|") for line in render(rows).splitlines() if line.startswith("| triton")]
    tensor = {line[1].strip().removeprefix("triton lora_linear "): line[8].strip() for line in lines}
    assert tensor.pop("expand, tf32") == "HMMA, HGMMA, UTCHMMA"
    assert tensor and not any(tensor.values())


def test_the_documented_tables_are_those_of_the_results() -> None:
    document = gpu_static.DOCS.read_text()
    assert replaced(document, render(committed())) == document


def test_the_results_are_what_the_kernels_compile_to(triton_rows: Rows) -> None:
    known = {(label(row), row["arch"]): row for row in committed() if row["source"] == "triton"}
    compilers = {row["compiler"] for row in known.values()}
    if compilers != {triton_rows[0]["compiler"]}:
        pytest.skip(f"the results are those of {', '.join(sorted(compilers))}")
    for row in triton_rows:
        assert known[label(row), row["arch"]] == row, "run python -m benchmarks.gpu_static --write"


def test_the_results_are_what_cuda_compiles_to(tmp_path: Path) -> None:
    """Registers, stack and shared memory of everything in the module that is built here."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the disassembler comes with triton, which is not installed")
    module = binaries.cuda_module()
    if module is None:
        pytest.skip("fastsample._cuda is not built here")
    built, compilers = {}, set()
    for cubin, arch in binaries.extract_cuda(module, tmp_path):
        if resources := binaries.cuda_resources(cubin, arch):
            built |= resources
            compilers.add(binaries.cuda_compiler(cubin))
    rows = [row for row in committed() if row["source"] == "cuda"]
    known = {row["compiler"] for row in rows}
    if known != compilers:
        pytest.skip(f"the results are those of {', '.join(sorted(known))}, here is {', '.join(sorted(compilers))}")
    columns = ("registers", "stack", "shared")
    expected = {
        (row["op"], row["variant"], row["dtype"], row["arch"]): tuple(int(row[column]) for column in columns)
        for row in rows
    }
    assert built == expected, "run python -m benchmarks.gpu_static --write"


def test_what_the_documentation_says_of_noise() -> None:
    """The text below the tables."""

    def ratios(source: str, variant: str, gpu: str, *dtypes: str) -> list[float]:
        rows = [row for row in committed() if (row["source"], row["gpu"]) == (source, gpu)]
        own = [row for row in rows if row["op"] == "step" and row["variant"].startswith(variant)]
        return [float(row["compute_by_memory"]) for row in own if not dtypes or row["dtype"] in dtypes]

    alone = [row for row in committed() if row["op"] == "noise" and row["gpu"]]
    assert {row["gpu"] for row in alone if row["bound"] == "memory"} == {"RTX 4090"}
    assert all(39 <= float(row["instructions_per_element"]) <= 47 for row in alone)
    for gpu in ("A100 SXM", "H100 SXM"):
        assert max(ratios("triton", "noisy", gpu)) < 1
        plain = [row for row in committed() if (row["source"], row["variant"], row["gpu"]) == ("cuda", "draws", gpu)]
        assert plain and all(row["bound"] == "memory" for row in plain)
        assert min(ratios("cuda", "draws, learned", gpu, "float16", "bfloat16")) > 0.95
    assert min(ratios("cuda", "draws", "B200")) > 1
    assert min(ratios("triton", "noisy", "B200")) < 1 < max(ratios("triton", "noisy", "B200"))


LISTING = """
\t.section\t.text.k,"ax",@progbits
.text.k:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   LD.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R12, desc[UR4][R8.64+0x30] ;
        /*0040*/              @!P1 LDG.E.128 R16, desc[UR4][R10.64] ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   CALL.REL.NOINC `($slow) ;
        /*0070*/                   MOV R1, R2 ;
        /*0080*/                   MOV R1, R2 ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00a0*/                   FFMA R4, R4, R5, R6 ;
.L_x_2:
        /*00b0*/               @P3 BRA `(.L_x_3) ;
        /*00c0*/                   IMAD.WIDE.U32 R6, R6, R7, RZ ;
        /*00d0*/                   MUFU.RSQ R6, R6 ;
.L_x_3:
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""


def test_the_way_through_a_listing() -> None:
    """12 instructions: the branch that is longer, but not the one with the call; 32 bytes that surely move."""
    (blocks,) = sass.functions(LISTING).values()
    ways = sass.Ways(blocks)
    way = ways.heaviest()
    assert sum(len(block.instructions) for block in way) == 12
    assert sass.units(way) == {"fma": 1, "imad": 1, "alu": 0, "xu": 1, "fp64": 0}
    assert (sass.accesses(way, sass.LOADS), sass.accesses(way, sass.STORES)) == ({128: 3}, {128: 1})
    # Not the coefficients behind 0x30, and not the load that has a predicate.
    assert sum(map(sass.streamed, way)) == 32


LOOP = """
\t.section\t.text.k,"ax",@progbits
.text.k:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   FADD R4, R4, R4 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   STG.E.128 [R2.64], R4 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_the_way_round_a_loop() -> None:
    (blocks,) = sass.functions(LOOP).values()
    ways = sass.Ways(blocks)
    assert ways.heaviest()[0].instructions[0].startswith("LDG")
    assert sum(len(block.instructions) for block in ways.heaviest()) == 5
    assert ways.inner_loops == 1


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "occupancy"),
    [
        (80, 32, 0, 4, 1.0),
        (80, 33, 0, 4, 0.75),
        (90, 64, 0, 4, 0.5),
        (90, 16, 113 << 10, 4, 0.125),
        (89, 40, 0, 4, 1.0),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, occupancy: float) -> None:
    assert LIMITS[arch].occupancy(registers, shared, warps) == occupancy


def test_bounds_of_a_way() -> None:
    """Twelve instructions and 32 bytes: on an H100 the bytes take 32 / 3.35e12 s."""
    (blocks,) = sass.functions(LISTING).values()
    gpu = next(one for one in GPUS if one.arch == 90)
    code = binaries.Code("cuda", "step", "", "float32", "sm_90", 32, 0, 0, 0, 4, elements=4, ways=sass.Ways(blocks))
    found = gpu_static.bound(code, gpu)
    assert (found["instructions_per_element"], found["bytes_per_element"]) == (12 / 4, 32 / 4)
    issue = 12 / (128 * 132 * 1.83e9) / (32 / 3.35e12)
    unit = 1 / (16 * 132 * 1.83e9) / (32 / 3.35e12)
    assert found["compute_by_memory"] == pytest.approx(max(issue, unit))
    assert (found["unit"], found["bound"]) == ("issue", "memory")


def test_shortfalls_are_named() -> None:
    good = dict(
        source="triton", op="step", variant="", dtype="float32", arch="sm_90", compiler="", registers=32, spills=0,
        stack=0, shared=0, occupancy=1.0, loads128=1, loads=1, stores128=1, stores=1, narrow=0, tensor="",
        instructions=9, gpu="H100 SXM", unit="alu", bound="memory", compute_by_memory=0.5,
    )  # fmt: skip

    def of(**changes: object) -> Sequence[str]:
        return list(gpu_static.shortfalls(gpu_static.Row(**{**good, **changes})))  # type: ignore[arg-type]

    assert of() == []
    assert of(spills=3, stack=8) == ["3 spills", "8 bytes of stack"]
    assert of(occupancy=0.44) == ["44 % occupancy"]
    assert of(bound="alu", compute_by_memory=1.4) == ["bound by alu on H100 SXM: 1.40 of the memory's time"]
    assert of(shared=300 << 10) == ["307200 bytes of shared memory, the limit is 232448"]
    assert of(op="lora_linear", dtype="float16", occupancy=0.1) == ["no tensor-core instructions"]


@pytest.mark.parametrize(
    ("mangled", "described"),
    [
        ("11step_kernelIfLi8ELb1ELb0ELb0EEEvNS0_14DeviceStepArgsE", ("step", "float32", 8, "draws")),
        ("11step_kernelINS0_4HalfELi8ELb0ELb0ELb0EEEvNS0_14DeviceStepArgsE", ("step", "float16", 8, "")),
        ("11step_kernelINS0_6BfloatELi4ELb0ELb0ELb0EEEvNS0_14DeviceStepArgsE", ("step", "bfloat16", 0, "unaligned")),
    ],
)
def test_names_of_cuda_kernels(mangled: str, described: tuple[object, ...]) -> None:
    for file in ("9581946c_7_step_cu_70d48d3e", "95819460_7_step_cu_70d48d30"):
        assert binaries.describe(f"_ZN10fastsample4cuda39_GLOBAL__N__{file}{mangled}") == described
