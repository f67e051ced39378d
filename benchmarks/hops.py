"""How far it is from `fastsample.ddim` to the kernel: the Python functions and files that a run goes through.

`python benchmarks/hops.py` in any checkout; nothing is timed. Functions of fastsample alone are counted, each once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import Tensor

import fastsample

PACKAGE = Path(fastsample.__file__).parent
STEPS = 5


class Watch:
    """The functions of fastsample that run, in order, and how deep calls go, up to the first call of the model."""

    def __init__(self) -> None:
        self.seen: dict[CodeType, None] = {}
        self.deepest = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and _is_ours(frame.f_code):
            self.seen.setdefault(frame.f_code)
            depth, above = 0, frame.f_back
            while above is not None:
                depth += _is_ours(above.f_code)
                above = above.f_back
            self.deepest = max(self.deepest, depth + 1)


def _is_ours(code: CodeType) -> bool:
    # Comprehensions are part of the function they stand in.
    file = code.co_filename  # functions such as fastsample.ddim are made at import
    return file.startswith("<fastsample.") or (Path(file).is_relative_to(PACKAGE) and not code.co_name.startswith("<"))


def main() -> int:
    """Prints both counts, and with an argument the functions themselves."""
    setup, rows = Watch(), Watch()
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        sys.setprofile(rows if 2 <= calls < STEPS else None)
        return x

    schedule = fastsample.Schedule.linear()
    fastsample.ddim(lambda x, t: x, (1, 16, 7), schedule=schedule, steps=STEPS + 1, seed=0)
    sys.setprofile(setup)
    fastsample.ddim(model, (1, 16, 7), schedule=schedule, steps=STEPS, seed=0)
    sys.setprofile(None)
    torch.manual_seed(0)
    for name, watch in (("set-up", setup), ("a row", rows)):
        files = {code.co_filename for code in watch.seen}
        print(f"{name}: {len(watch.seen)} functions in {len(files)} files, {watch.deepest} deep")
        if len(sys.argv) > 1:
            for code in watch.seen:
                print(f"  {code.co_filename.removeprefix(f'{PACKAGE}/')}:{code.co_firstlineno} {code.co_name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
