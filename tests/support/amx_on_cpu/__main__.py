"""The tests of lora_linear for AMX under the address sanitizer:
`cd tests && python -m support.amx_on_cpu`, two minutes."""

from __future__ import annotations

import os
import subprocess
import sys

from support.amx_on_cpu import build
from support.cuda_on_cpu.build import runtime
from support.paths import TESTS

FILES = [f"ops/lora/test_{name}.py" for name in ("lora", "lora_op", "lora_amx")]
RUN = """
import pytest
from support.amx_on_cpu import build
build.use({library!r})
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "amx", *{tests!r}]))
"""


def main() -> int:
    """Builds the kernels and runs the tests in a process that has the sanitizer from its start."""
    preloaded = " ".join(runtime(name) for name in ("libasan.so", "libstdc++.so.6"))
    # Python leaks; the stacks of allocations cost more than all else.
    environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1"}
    code = RUN.format(library=str(build.build("address")), tests=FILES)
    return subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
