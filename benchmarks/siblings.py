"""Trains the models that docs/improved-ddpm.md compares, under equal settings: small ones, for the comparison alone.

Each has a folder under --out with its model.safetensors and the losses of its training. A run that was stopped
continues, one that is finished is left alone. Nothing is timed.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastsample.train import Settings, load_data, train

# A fifth of the bundled model's cost; with widths (24, 48) the linear one was too weak to tell samplers apart.
# The network gives epsilon, as in the paper, whose schedules and losses differ.
EQUAL = Settings(steps=6000, widths=(32, 64), target="epsilon")
SIBLINGS: Mapping[str, Settings] = {
    "hybrid": EQUAL,
    "linear": replace(EQUAL, schedule="linear"),
    "simple": replace(EQUAL, loss="simple"),
    "vlb": replace(EQUAL, loss="vlb"),
    "vlb-importance": replace(EQUAL, loss="vlb", timestep_sampler="importance"),
    "hybrid-4000": replace(EQUAL, timesteps=4000),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the siblings one after the other."""
    options = ArgumentParser("python -m benchmarks.siblings", description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="the folder of their folders")
    options.add_argument("--only", choices=SIBLINGS, nargs="+", default=list(SIBLINGS), help="which ones (all)")
    options.add_argument("--quick", action="store_true", help="20 steps each: a smoke run")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    for name in arguments.only:
        settings = replace(SIBLINGS[name], steps=20) if arguments.quick else SIBLINGS[name]
        print(f"{name}: {settings}", flush=True)
        train(load_data("mnist5k-train"), arguments.out / name, settings, progress=not arguments.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
