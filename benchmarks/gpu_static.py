"""What the GPU kernels' machine code says, on a machine without a GPU: nothing is timed.

Triton kernels are compiled ahead of time for sm_80, 89, 90, 100, 120 and gfx942, the CUDA ones taken out of the built
fastsample._cuda. For each: registers, spills, shared memory, occupancy, 128-bit accesses, tensor-core instructions, and
what its instructions take on the published peaks of four GPUs beside what its bytes take.

Writes benchmarks/results/gpu-static.csv and, with --write, the tables of docs/gpu.md.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from benchmarks.machine_code import binaries, sass
from benchmarks.machine_code.binaries import GFX942, TRITON_ARCHS, Code
from benchmarks.machine_code.peaks import GPUS, ISSUED, LIMITS, Gpu
from benchmarks.machine_code.static_tables import on_tensor_cores, render, replaced
from fastsample.storage.writing import replace_text

RESULTS = Path(__file__).with_name("results") / "gpu-static.csv"
DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
WORKERS = 2
HALF = 0.5  # of the warps: with fewer, memory's latency is no longer hidden by others
PRODUCTS = ("lora_linear", "lora")  # matrix products, which trade occupancy for tiles in registers


@dataclass(frozen=True)
class Row:
    """A kernel on an architecture, as in the CSV file; most columns as in Code.

    Attributes:
        compiler: what made it.
        gpu: the product whose peaks the bound refers to; empty where none of the four has this architecture.
        instructions_per_element, bytes_per_element: on the way that is worst for this GPU.
        compute_by_memory: the time of its busiest unit by that of its bytes, both at the peak.
        unit: that unit; "issue" where it is the schedulers.
        bound: "memory", or the unit.
        shortfalls: what is not as it should be.
    """

    source: str
    op: str
    variant: str
    dtype: str
    arch: str
    compiler: str
    registers: int
    spills: int
    stack: int
    shared: int
    occupancy: float
    loads128: int
    loads: int
    stores128: int
    stores: int
    narrow: int
    tensor: str
    instructions: int
    gpu: str = ""
    instructions_per_element: float = 0.0
    bytes_per_element: float = 0.0
    compute_by_memory: float = 0.0
    unit: str = ""
    bound: str = ""
    shortfalls: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints, and writes the results."""
    parser = ArgumentParser(
        "python -m benchmarks.gpu_static", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("triton", "cuda"), help="one source instead of both")
    parser.add_argument("--archs", help="comma separated, as in 80,90,gfx942")
    parser.add_argument(
        "--match", action="append", help="only kernels whose 'op variant dtype' contains this; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="sm_90 alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"also the tables of {DOCS.name}, from the CSV file")
    arguments = parser.parse_args(argv)
    # Kernels that were imported for the interpreter cannot be compiled; the workers inherit this.
    os.environ.pop("TRITON_INTERPRET", None)
    archs = arguments.archs.split(",") if arguments.archs else ["90"] if arguments.quick else None
    rows, failed = [], 0
    for kernels in collect(arguments.only, archs, arguments.match or [""]):
        if isinstance(kernels, str):
            print(kernels, flush=True)
            failed += 1
            continue
        for row in kernels:
            print(line(row), flush=True)
        rows += kernels
    rows.sort(key=key)
    partial = bool(arguments.only or archs or arguments.match)
    if partial and arguments.out == RESULTS:
        print(f"{RESULTS.name} is left as it is: this was not all of it")
    elif rows and not failed:
        write_csv(arguments.out, rows)
    short = [row for row in rows if row.shortfalls]
    print(f"\n{len(rows)} kernels, {len(short)} with a shortfall, {failed} that could not be compiled")
    if arguments.write and not failed:
        replace_text(DOCS, replaced(DOCS.read_text(), render(read_csv(arguments.out))))
    return 1 if failed else 0


def collect(only: str | None, archs: Sequence[str] | None, match: Sequence[str]) -> Iterator[list[Row] | str]:
    """All kernels, in the order in which they are done; a text for each that cannot be compiled."""
    with (
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
        tempfile.TemporaryDirectory() as folder,
    ):
        jobs: list[tuple[str, Future[list[Row]]]] = []
        if only != "cuda":
            wanted = [GFX942 if arch == GFX942 else int(arch) for arch in archs or (*TRITON_ARCHS, GFX942)]
            for module, number, label in pool.submit(binaries.triton_variants).result():
                if any(part in label for part in match):
                    jobs += [
                        (f"{label} for {arch}", pool.submit(triton_rows, module, number, arch))
                        for arch in wanted
                        if arch in _KNOWN
                    ]
        module_file = binaries.cuda_module()
        if only != "triton" and module_file is None:
            print("CUDA C++ is left out: fastsample._cuda is not built here (FASTSAMPLE_CUDA=1 pip install -e .)")
        elif only != "triton" and module_file is not None:
            for cubin, arch in binaries.extract_cuda(module_file, Path(folder)):
                if archs is None or arch.removeprefix("sm_") in archs:
                    jobs.append((cubin.name, pool.submit(cuda_rows, cubin, arch, match)))
        for name, job in jobs:
            try:
                yield job.result()
            except Exception as error:  # one kernel that does not compile must not hide the others
                yield f"FAILED {name}: {type(error).__name__}: {error}"


_KNOWN = (*LIMITS, GFX942)


def triton_rows(module: str, number: int, arch: int | str) -> list[Row]:
    """One variant on one architecture."""
    return [row_of(binaries.compile_triton(module, number, arch), f"triton {version('triton')}")]


def cuda_rows(cubin: Path, arch: str, match: Sequence[str]) -> list[Row]:
    """The kernels of one file."""
    codes, compiler = binaries.read_cuda(cubin, arch), binaries.cuda_compiler(cubin)
    labels = [" ".join(filter(None, (code.op, code.variant, code.dtype))) for code in codes]
    wanted = [any(part in label for part in match) for label in labels]
    return [row_of(code, compiler) for code, take in zip(codes, wanted, strict=True) if take]


def row_of(code: Code, compiler: str) -> Row:
    """With the bound on the GPU that has this architecture."""
    names = {field.name for field in fields(Row)} & {field.name for field in fields(Code)} - {"bytes_per_element"}
    columns = {name: getattr(code, name) for name in names}
    gpu = next((gpu for gpu in GPUS if f"sm_{gpu.arch}" == code.arch), None)
    if gpu is not None and code.ways is not None and code.elements:
        columns |= bound(code, gpu)
    row = Row(compiler=compiler, occupancy=code.occupancy, **columns)
    return Row(**{**asdict(row), "shortfalls": "; ".join(shortfalls(row))})


def bound(code: Code, gpu: Gpu) -> dict[str, object]:
    """The way through the kernel on which instructions take longest beside the bytes moved, unit by unit."""
    assert code.ways is not None
    best: tuple[float, str, list[sass.Block]] = (0.0, "issue", [])
    for unit in ("issue", "fma", "imad", "alu", "xu", "fp64"):
        least = 0.0
        # The largest quotient of two sums: at the quotient of one way look for a heavier one, until there is none.
        for _ in range(20):
            way = code.ways.heaviest(
                [_seconds(gpu, unit, [b]) - least * gpu.memory_seconds(_bytes(code, [b])) for b in code.ways.blocks]
            )
            moved = gpu.memory_seconds(_bytes(code, way) or code.bytes_per_element * code.elements)
            quotient = _seconds(gpu, unit, way) / moved if moved else 0.0
            if quotient <= least * (1 + 1e-9):
                break
            least = quotient
            if quotient > best[0]:
                best = quotient, unit, way
    quotient, unit, way = best
    if not way:
        return {}
    return {
        "gpu": gpu.name,
        "instructions_per_element": sum(len(block.instructions) for block in way) / code.elements,
        "bytes_per_element": code.bytes_per_element or _bytes(code, way) / code.elements,
        "compute_by_memory": quotient,
        "unit": unit,
        "bound": "memory" if quotient < 1 else unit,
    }


def _bytes(code: Code, way: Iterable[sass.Block]) -> int:
    """What a thread moves; nothing where the kernel's description says it for all ways alike."""
    return 0 if code.bytes_per_element else sum(map(sass.streamed, way))


def _seconds(gpu: Gpu, unit: str, way: Iterable[sass.Block]) -> float:
    blocks = list(way)
    if unit == "issue":
        count, a_clock = sum(len(block.instructions) for block in blocks), ISSUED
    else:
        counts = sass.units(blocks)
        count, a_clock = counts[unit] + (counts["imad"] if unit == "fma" else 0), gpu.units[unit]
    return count / (a_clock * gpu.processors * gpu.clock)


def shortfalls(row: Row) -> Iterator[str]:
    """What keeps a kernel from being what it should be."""
    if row.spills:
        yield f"{row.spills} spills"
    if row.stack:
        yield f"{row.stack} bytes of stack"
    limit = 64 << 10 if row.arch == GFX942 else LIMITS[int(row.arch[3:])].block_shared
    if row.shared > limit:
        yield f"{row.shared} bytes of shared memory, the limit is {limit}"
    if row.op in PRODUCTS:
        if on_tensor_cores(row.dtype, row.variant) and not row.tensor:
            yield "no tensor-core instructions"
        return
    if row.occupancy < HALF:
        yield f"{100 * row.occupancy:.0f} % occupancy"
    if row.bound not in ("", "memory"):
        yield f"bound by {row.unit} on {row.gpu}: {row.compute_by_memory:.2f} of the memory's time"


def key(row: Row) -> tuple[object, ...]:
    """The order of the CSV file."""
    number = int(row.arch[3:]) if row.arch.startswith("sm_") else 1000
    return row.source, row.op, row.variant, row.dtype, number


def line(row: Row) -> str:
    """A row on the screen."""
    what = f"{row.source} {row.op} {row.variant}".rstrip()
    per = f"{row.instructions_per_element:.0f}" if row.instructions_per_element else ""
    rest = f"{row.compute_by_memory:.2f} {row.bound}" if row.bound else ""
    return (
        f"{what:<44} {row.dtype:<8} {row.arch:<6} {row.registers:>4} regs {row.spills:>2} spills {row.shared:>6} B "
        f"{100 * row.occupancy:>4.0f} % {row.loads128:>2}/{row.loads:<2} {row.stores128:>2}/{row.stores:<2} "
        f"{row.tensor:<10} {per:>4} {rest} {'! ' + row.shortfalls if row.shortfalls else ''}"
    ).rstrip()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All or nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    raise SystemExit(main())
