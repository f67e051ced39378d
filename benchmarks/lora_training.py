"""One training step of a LoRA against one of the whole model, in time and memory, on a UNet shaped as Stable Diffusion.

The LoRA has rank 8 on the attention projections, by fastsample and by PEFT. Every candidate has a process of its own,
as its peak of memory is that of the process; they take turns, round by round. The weights are random.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from benchmarks.common.report import machine
from benchmarks.sections.quality_page import table
from benchmarks.sections.unets import CONFIG, QUICK_CONFIG, TARGETS, TOKENS, build
from fastsample import lora
from fastsample.storage.writing import replace_text

RESULTS = Path(__file__).with_name("results") / "lora_training.csv"
RANK = 8
FULL, OURS, PEFT = "whole model", "LoRA, fastsample", "LoRA, PEFT"
CANDIDATES = (FULL, OURS, PEFT)
STEPS = 3  # timed ones of a process, after one that is not


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every candidate in turn and prints the table."""
    options = ArgumentParser("python -m benchmarks.lora_training", description=__doc__)
    options.add_argument("--rounds", type=int, default=3, help="processes of each candidate (%(default)s)")
    options.add_argument("--latents", type=int, default=16, help="height and width of the latents (%(default)s)")
    options.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options.add_argument("--quick", action="store_true", help="a tiny UNet, one round: a smoke run")
    options.add_argument("--write", action="store_true", help="results into benchmarks/results")
    options.add_argument("--candidate", choices=CANDIDATES, help="only this one, here: what the processes do")
    arguments = options.parse_args(argv)
    if arguments.candidate is not None:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measured(arguments.candidate, arguments.latents, arguments.quick)))
        return 0
    rounds = []
    for _ in range(1 if arguments.quick else arguments.rounds):
        rounds.append(
            {name: in_a_process(name, arguments.latents, arguments.threads, arguments.quick) for name in CANDIDATES}
        )
        print({name: f"{np.median(found['seconds']):.2f} s" for name, found in rounds[-1].items()}, flush=True)
    lines = lines_of(rounds)
    print(table(["", "numbers trained", "seconds a step", "of the whole model's", "peak memory, GiB"], lines))
    if arguments.write and not arguments.quick:
        write(lines, arguments.latents)
    return 0


def in_a_process(name: str, latents: int, threads: int, quick: bool) -> dict[str, list[float]]:
    """What a process of this candidate has found."""
    command = [sys.executable, "-m", "benchmarks.lora_training", "--candidate", name, "--latents", str(latents)]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, latents: int, quick: bool) -> dict[str, list[float]]:
    """Seconds of some steps, the peak of the process' memory in bytes, and how many numbers are trained."""
    torch.manual_seed(0)
    unet = build(QUICK_CONFIG if quick else CONFIG)
    if unet is None:
        raise SystemExit("this needs diffusers: pip install 'fastsample[bench]'")
    model = adapted(name, unet)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    shape, width = (1, 4, latents, latents), (QUICK_CONFIG if quick else CONFIG)["cross_attention_dim"]
    x, noise, tokens = torch.randn(shape), torch.randn(shape), torch.randn(1, TOKENS, width)
    seconds = []
    for _ in range(STEPS + 1):
        start = perf_counter()
        (model(x, torch.tensor([500]), tokens).sample - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds[1:], "peak": [peak], "trained": [sum(p.numel() for p in trained)]}


def adapted(name: str, unet: nn.Module) -> nn.Module:
    """The UNet as this candidate trains it, without a second one in memory."""
    if name == FULL:
        return unet.requires_grad_(True)
    if name == OURS:
        return lora.Trainable(unet, RANK, targets=TARGETS, copy=False)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(unet, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))


def lines_of(rounds: Sequence[dict[str, dict[str, list[float]]]]) -> list[list[str]]:
    """A line of the table for each candidate: medians, from 20 to 80 % of all steps; ratios within each round."""
    lines = []
    for name in CANDIDATES:
        seconds = np.concatenate([found[name]["seconds"] for found in rounds])
        ratios = [np.median(found[name]["seconds"]) / np.median(found[FULL]["seconds"]) for found in rounds]
        low, middle, high = np.quantile(seconds, (0.2, 0.5, 0.8))
        peak = np.median([found[name]["peak"][0] for found in rounds]) / 2**30
        trained = int(rounds[0][name]["trained"][0])
        lines.append(
            [name, f"{trained:,}", f"{middle:.2f} ({low:.2f} .. {high:.2f})", f"{np.median(ratios):.2f}", f"{peak:.1f}"]
        )
    return lines


def write(lines: Sequence[Sequence[str]], latents: int) -> None:
    """The lines and the machine as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["candidate", "trained", "seconds", "ratio", "peak_gib", "latents", *machine()])
    writer.writerows([*line, latents, *machine().values()] for line in lines)
    replace_text(RESULTS, text.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
