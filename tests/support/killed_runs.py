"""`python -m support.killed_runs FOLDER`: a training that SIGKILL ends five times and that is then extended.

FOLDER/straight has 300 steps in one go. FOLDER/killed has 200, killed at random moments, and then 300. Every run is a
fork of this process, which has imported all that a run needs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer imports otherwise, in every fork

from fastsample.train import ImageData, Settings, train

SETTINGS = Settings(steps=200, batch_size=2, warmup=2, timesteps=20, widths=(8, 16), lr=1e-2)
KILLS = 5


def data() -> ImageData:
    """Ten images, three classes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 3, 9, 6), generator=draw, dtype=torch.uint8)
    return ImageData(images, torch.arange(10) % 3)


def main(folder: Path) -> None:
    """Makes both runs."""
    torch.set_num_threads(1)
    straight, killed = folder / "straight", folder / "killed"
    killed_five_times(lambda: _run(killed, 200, save_every=3), killed)
    for out, steps in ((killed, 200), (killed, 300), (straight, 300)):
        completed(lambda out=out, steps=steps: _run(out, steps, save_every=50))  # type: ignore[misc]


def killed_five_times(run: Callable[[], object], out: Path) -> None:
    """Begins the run in a fork of this process, and kills it at a random moment after it has saved, five times."""
    moments = random.Random(0)
    for _ in range(KILLS):
        child, seen = _forked(run), _written(out)
        while _written(out) == seen and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            raise RuntimeError("a run ended before it was killed")


def completed(run: Callable[[], object]) -> None:
    """The run in a fork of this process, to its end."""
    if os.waitstatus_to_exitcode(os.waitpid(_forked(run), 0)[1]) != 0:
        raise RuntimeError("a run failed")


def _run(out: Path, steps: int, save_every: int) -> None:
    train(data(), out, replace(SETTINGS, steps=steps), save_every=save_every, progress=False)


def _forked(run: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        run()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _written(out: Path) -> int:
    try:
        return (out / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
