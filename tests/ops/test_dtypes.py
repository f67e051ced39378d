"""What kernels call the dtypes that they read and write."""

from __future__ import annotations

import re

from fastsample.ops.dtypes import DTYPE_CODES
from support.paths import ROOT


def test_codes_are_those_of_the_kernels() -> None:
    header = (ROOT / "csrc" / "common" / "step_args.h").read_text()
    declared = re.search(r"enum DType \{([^}]*)\}", header)
    assert declared is not None
    codes = dict(re.findall(r"k(\w+) = (\d+)", declared[1]))
    assert {str(dtype)[6:]: str(code) for dtype, code in DTYPE_CODES.items()} == {
        name.lower(): code for name, code in codes.items()
    }
