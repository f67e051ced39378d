"""Tests of the CPU kernels under the address and undefined behaviour sanitizers:
`cd tests && python -m support.sanitized`.

The extension is built as it is shipped, vectors and -O3 included, into a folder of its own: five minutes on two cores,
as many for the tests. Arguments are pytest's, in place of the list of files. See amx_on_cpu for lora_linear on AMX.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from support.cuda_on_cpu.build import UNDEFINED, runtime
from support.paths import ROOT, TESTS

SANITIZERS = ["-fsanitize=address", *UNDEFINED, "-g1"]
FILES = [
    "ops/step",
    "ops/noise",
    "ops/posterior",
    "ops/test_memory.py",
    "test_tables.py",
    "test_packed_rows.py",
    "package/test_odd_arguments.py",
    "loop/test_entries.py",
    "loop/test_loop.py",
    "loop/test_noise_source.py",
    "loop/test_prepared.py",
    "loop/test_nothing_lost.py",
    "loop/test_partial_runs.py",
    "samplers/test_flows.py",
    "samplers/test_batcher.py",
    "samplers/test_batcher_life.py",
    "ops/lora/test_lora.py",
    "ops/lora/test_lora_op.py",
]
# The CUDA sources have sanitizers of their own, and Triton's kernels no addresses.
RUN = """
import importlib.util, sys
import pytest
spec = importlib.util.spec_from_file_location("fastsample._cpu", {library!r})
sys.modules["fastsample._cpu"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import fastsample.ops.backend as backend
assert backend.cpu_module() is module
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not cuda and not triton", *{arguments!r}]))
"""


def main(arguments: list[str]) -> int:
    """Builds the extension and runs the tests in a process that has the sanitizers from its start."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        preloaded = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
        # Python leaks; the stacks of allocations cost more than all else.
        options = "detect_leaks=0:malloc_context_size=1:allocator_may_return_null=1"
        environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": options}
        code = RUN.format(library=str(library), arguments=arguments or FILES)
        return subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environment).returncode


def build(folder: Path) -> Path:
    """fastsample._cpu with the sanitizers."""
    flags = " ".join(SANITIZERS)
    environment = {**os.environ, "CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags, "FASTSAMPLE_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/objects"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (library,) = folder.glob("fastsample/_cpu*.so")
    return library


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
