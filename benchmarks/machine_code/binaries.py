"""The GPU kernels as machine code, without a GPU: Triton's compiled ahead of time, CUDA's taken out of the module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.machine_code import peaks, sass

MODULES = ("noise", "step", "posterior", "reductions", "bend", "likelihood", "lora")
TRITON_ARCHS = (80, 89, 90, 100, 120)
GFX942 = "gfx942"
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
TENSOR = re.compile(r"^(HMMA|HGMMA|QGMMA|IMMA|DMMA|QMMA|OMMA|UTC\w*MMA)$")


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture.

    Attributes:
        source: "triton" or "cuda".
        op, variant, dtype: what it is; dtype as in fastsample.kernels.variants.Variant.
        arch: such as "sm_90" or "gfx942".
        registers, stack, shared: a thread's registers and bytes of stack, bytes of shared memory a block.
        spills: loads and stores of registers that found no place.
        warps: of a block.
        loads128, loads: of global memory on the heaviest way, those of 128 bits and all; stores likewise.
        narrow: of loads and stores those below 64 bits, coefficients among them.
        tensor: which tensor-core instructions, and how many.
        instructions: in the whole kernel.
        elements: that a thread takes; 0 where that says nothing.
        bytes_per_element: as the kernel's own description has it; 0 where it has none.
        ways: the ways through it; None where the machine code is not NVIDIA's.
    """

    source: str
    op: str
    variant: str
    dtype: str
    arch: str
    registers: int
    stack: int
    shared: int
    spills: int
    warps: int
    loads128: int = 0
    loads: int = 0
    stores128: int = 0
    stores: int = 0
    narrow: int = 0
    tensor: str = ""
    instructions: int = 0
    elements: float = 0.0
    bytes_per_element: float = 0.0
    ways: sass.Ways | None = None

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that its registers and shared memory leave room for."""
        if self.arch == GFX942:
            waves = min(peaks.GFX942_WAVES, peaks.GFX942_REGISTERS // max(8, -(-self.registers // 8) * 8))
            blocks = peaks.GFX942_SHARED // max(self.shared, 1)
            return min(waves, blocks * self.warps / 4) / peaks.GFX942_WAVES
        return peaks.LIMITS[int(self.arch[3:])].occupancy(self.registers, self.shared, self.warps)


def triton_variants() -> list[tuple[str, int, str]]:
    """(module, number, label) of every variant of every kernel."""
    labels = []
    for module in MODULES:
        if importlib.util.find_spec(f"fastsample.kernels.variants.{module}") is not None:
            labels += [(module, number, variant.label) for number, variant in enumerate(_variants(module))]
    return labels


def compile_triton(module: str, number: int, arch: int | str) -> Code:
    """One variant for one architecture, 90 or "gfx942". In a process without TRITON_INTERPRET."""
    from triton.backends.compiler import GPUTarget

    variant = _variants(module)[number]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        if arch == GFX942:
            return _of_amd(variant, variant.compile(GPUTarget("hip", GFX942, 64)))
        compiled = variant.compile(GPUTarget("cuda", arch, 32))
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, blocks, registers, stack, _),) = _read(cubin)
    warps = compiled.metadata.num_warps
    own = _measured(blocks)
    elements = variant.elements / (peaks.WARP * warps)
    return Code(
        "triton", variant.op, variant.name, variant.dtype, f"sm_{arch}", registers, stack, compiled.metadata.shared,
        warps=warps, elements=elements, bytes_per_element=variant.bytes_per_element, **own,
    )  # fmt: skip


def cuda_module() -> Path | None:
    """The built fastsample._cuda, without importing it."""
    specification = importlib.util.find_spec("fastsample")
    folders = (specification.submodule_search_locations or []) if specification else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("_cuda*.so"))), None)


def extract_cuda(module: Path, folder: Path) -> list[tuple[Path, str]]:
    """(cubin, such as "sm_90") of everything in the module, written into the folder."""
    _tool("cuobjdump", "-xelf", "all", module.absolute(), cwd=folder)
    return [(path, match[0]) for path in sorted(folder.glob("*.cubin")) if (match := re.search(r"sm_\d+", path.name))]


def cuda_compiler(cubin: Path) -> str:
    """What made a cubin, such as "nvcc 13.0.88"; without a number where the file does not tell."""
    match = re.search(r"Cuda compilation tools, release \S+, V(\S+)", _elf(cubin))
    return f"nvcc {match[1]}" if match else "nvcc"


def cuda_resources(cubin: Path, arch: str) -> dict[tuple[str, str, str, str], tuple[int, int, int]]:
    """(registers, stack, shared memory) by (op, variant, dtype, arch), without a look at the instructions."""
    resources = {}
    for name, (registers, stack, shared) in _resources(cubin).items():
        op, dtype, _, variant = describe(name)
        resources[op, variant, dtype, arch] = registers, stack, _own_shared(shared, arch)
    return resources


def _own_shared(counted: int, arch: str) -> int:
    """From 9.0 on the tool counts the system's own in."""
    return counted - peaks.RESERVED_SHARED if int(arch[3:]) >= 90 and counted else counted


def read_cuda(cubin: Path, arch: str) -> list[Code]:
    """The kernels in one cubin."""
    codes = []
    for name, blocks, registers, stack, shared in _read(cubin):
        op, dtype, elements, variant = describe(name)
        warps, own = -(-_threads(cubin, name) // peaks.WARP), _measured(blocks)
        if "unaligned" not in variant:
            elements = elements or 4.0 * own["stores128"]
        shared = _own_shared(shared, arch)
        codes.append(
            Code("cuda", op, variant, dtype, arch, registers, stack, shared, warps=warps, elements=elements, **own)
        )
    return codes


def describe(mangled: str) -> tuple[str, str, float, str]:
    """(op, dtype, elements a thread, variant) of a kernel's name, by the template's parameters in its source file."""
    # A file's hash before its name may be all digits, as the length of the name is.
    place = re.search(r"_\d+_([a-z]\w*?)_cu_[0-9a-f]{8}(?:_\d+)?(\d+)(\w+)", mangled)
    if place is None:
        return mangled, "", 0, ""
    op, length, rest = place[1], int(place[2]), place[3]
    name, arguments = rest[:length], rest[length:]
    dtype, elements = "float32", 0.0
    words = [] if name == f"{op}_kernel" else [name.removesuffix("_kernel")]
    if arguments.startswith("I"):
        if dtypes := re.match(r"I(?:NS0_\d+(Half|Bfloat)E|f)", arguments):
            dtype = {"Half": "float16", "Bfloat": "bfloat16", None: "float32"}[dtypes[1]]
        parameters = [parameter for parameter in _parameters(op, name) if not parameter.startswith("class")]
        for parameter, value in zip(parameters, re.findall(r"L[a-z](\d+)E", arguments), strict=False):
            kind, _, label = parameter.partition(" ")
            label = label.removeprefix("k").lower()
            if label == "count":
                elements = int(value)
            elif kind != "bool":
                words.append(f"{label} {value}")
            elif value == "1":
                words.append(label)
    if 0 < elements < 8:
        words.append("unaligned")
        elements = 0  # its accesses are not those that the ways are chosen by
    return op, dtype, elements, ", ".join(words)


def _parameters(op: str, name: str) -> list[str]:
    source = (SOURCES / f"{op}.cu").read_text()
    match = re.search(rf"template <([^>]*)>\s*__global__[^{{;]*?\b{name}\(", source)
    return [parameter.strip() for parameter in match[1].split(",")] if match else []


def _variants(module: str) -> list[Any]:
    variants: list[Any] = importlib.import_module(f"fastsample.kernels.variants.{module}").variants()
    return variants


def _measured(blocks: Sequence[sass.Block]) -> dict[str, Any]:
    ways = sass.Ways(blocks)
    way = ways.heaviest()
    loads, stores = sass.accesses(way, sass.LOADS), sass.accesses(way, sass.STORES)
    opcodes = sass.count(blocks)
    tensor = {name: number for name, number in opcodes.items() if TENSOR.match(name)}
    return {
        "spills": opcodes["STL"] + opcodes["LDL"],
        "loads128": loads[128],
        "loads": loads.total(),
        "stores128": stores[128],
        "stores": stores.total(),
        "narrow": sum(number for match in (loads, stores) for bits, number in match.items() if bits < 64),
        "tensor": ", ".join(f"{number} {name}" for name, number in sorted(tensor.items())),
        "instructions": sum(len(block.instructions) for block in blocks),
        "ways": ways,
    }


def _read(cubin: Path) -> list[tuple[str, list[sass.Block], int, int, int]]:
    """(name, blocks, registers, stack, shared memory) of each kernel."""
    code = sass.functions(_tool("nvdisasm", "-c", cubin))
    return [(name, code[name], *own) for name, own in _resources(cubin).items()]


def _resources(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """(registers, stack, shared memory) of each kernel."""
    resources = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", _tool("cuobjdump", "--dump-resource-usage", cubin)):
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", line)}
        resources[name] = numbers["REG"], numbers["STACK"], numbers["SHARED"]
    return resources


@cache
def _elf(cubin: Path) -> str:
    return _tool("cuobjdump", "-elf", cubin)


def _threads(cubin: Path, name: str) -> int:
    """The launch bound of a kernel."""
    text = _elf(cubin)
    section = re.search(rf"^\.nv\.info\.{re.escape(name)}\n(.*?)(?=^\.nv|\Z)", text, re.M | re.S)
    match = section and re.search(r"EIATTR_MAX_THREADS.*?Value:\s+(0x[0-9a-f]+) (0x[0-9a-f]+)", section[1], re.S)
    return int(match[1], 16) * int(match[2], 16) if match else 1024


def _of_amd(variant: Any, compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    counted = {name: len(re.findall(rf"^\s*{name}", text, re.M)) for name in _AMD}
    matrix = counted["v_mfma"]
    wide = [counted["(?:global|buffer)_load_dwordx4"], counted["(?:global|buffer)_store_dwordx4"]]
    every = [counted["(?:global|buffer)_load_"], counted["(?:global|buffer)_store_"]]
    return Code(
        "triton", variant.op, variant.name, variant.dtype, GFX942,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        shared=number("group_segment_fixed_size") or compiled.metadata.shared,
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        warps=compiled.metadata.num_warps,
        loads128=wide[0], loads=every[0], stores128=wide[1], stores=every[1],
        tensor=f"{matrix} MFMA" if matrix else "",
        instructions=len(re.findall(r"^\s+[vs]_|^\s+(?:global|buffer|flat|ds)_", text, re.M)),
        elements=variant.elements / (64 * compiled.metadata.num_warps),
        bytes_per_element=variant.bytes_per_element,
    )  # fmt: skip


_AMD = (
    "(?:global|buffer)_load_dwordx4", "(?:global|buffer)_store_dwordx4", "(?:global|buffer)_load_",
    "(?:global|buffer)_store_", "v_mfma",
)  # fmt: skip


def _tool(name: str, *arguments: object, cwd: Path | None = None) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout
