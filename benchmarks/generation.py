"""What `fastsample generate` promises, on this machine: equal sets, kills, throughput, memory, and idle workers.

same        1, 2 and 4 processes with batches of 1, 7 and 256 make the same set
kills       four processes of which a random one is killed again and again make it too
throughput  two processes against one, in turns, and what handing out and writing cost
memory      of a worker and of merge over 100,000 samples
idle        8, 64 and 1,024 workers, simulated with the chunk times of `throughput`
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore

from benchmarks.common.markers import replace_between
from benchmarks.common.report import machine
from benchmarks.sections.idle import idle_share
from benchmarks.sections.quality_page import table
from fastsample import Schedule
from fastsample.generation import Folder, generate, merge, verify
from fastsample.generation.crew import Crew
from fastsample.generation.recipe import Recipe
from fastsample.generation.work import Place, source_of
from fastsample.storage.writing import replace_text

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = Path(__file__).with_name("results") / "generation.json", ROOT / "docs" / "scale.md"
TEXT = "python:benchmarks.generation:small"
KILLS = 20
WHOLE: dict[str, Any] = {"num": 768, "batch": 32, "model_batch": 32, "steps": 10}
QUICK: dict[str, Any] = {"num": 64, "batch": 8, "model_batch": 8, "steps": 2}
WORKERS, CHUNKS, SAMPLES = (8, 64, 1024), (16, 64, 256, 1024), 50_000


class Small(torch.nn.Module):
    """A model that takes no time: what is measured with it is all else."""

    schedule, num_classes, prediction = Schedule.linear(), 10, "x0"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * x


def small() -> Small:
    """For processes that load it by name."""
    return Small()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts that are asked for."""
    options = ArgumentParser(
        "python -m benchmarks.generation", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    options.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="which parts (all)")
    options.add_argument("--quick", action="store_true", help="a smoke run of a minute")
    options.add_argument("--write", action="store_true", help="results into benchmarks/results and docs/scale.md")
    arguments = options.parse_args(argv)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            print(name, flush=True)
            found[name] = PARTS[name](Path(folder), arguments.quick, found)
            found[name] |= {"machine": {key: str(value) for key, value in machine().items()}}
        if arguments.write and not arguments.quick:
            write(found)
    return 0


def write(found: dict[str, Any]) -> None:
    """Keeps what there is, and puts its tables into the page."""
    replace_text(RESULTS, json.dumps(found, indent=1) + "\n")
    page = DOCS.read_text()
    for name, text in tables(found).items():
        marks = f"<!-- {name}, written by benchmarks.generation -->", f"<!-- end of {name} -->"
        page = replace_between(page, *marks, text)
    replace_text(DOCS, page)


def same(folder: Path, quick: bool, found: Any) -> dict[str, Any]:
    """Digests of the merged sets, which must be one."""
    num, sets = (40 if quick else 1500), {}
    for processes in (1, 2) if quick else (1, 2, 4):
        for batch in (7, 256) if quick else (1, 7, 256):
            out = folder / f"{processes}-{batch}"
            options = {"num": num, "batch": batch, "model_batch": 8, "seed": 5}
            finished(torchrun(out, processes, "zoo:progressive-1", options))
            sets[f"{processes} processes, batch {batch}"] = merged_bytes(out)
    wanted = next(iter(sets.values()))
    result = {"samples": num, "sets": len(sets), "equal": sum(one == wanted for one in sets.values())}
    print(result)
    return result


def kills(folder: Path, quick: bool, found: Any) -> dict[str, Any]:
    """Runs of four processes, of which torchrun starts all again when one is killed at a random moment."""
    wanted, generator, done, starts = (2 if quick else KILLS), random.Random(0), 0, 0
    options = {"num": 2_000 if quick else 200_000, "batch": 16, "model_batch": 16, "seed": 5}
    out = folder / "killed"
    while done < wanted:
        starts += 1
        running = torchrun(out, 4, "zoo:progressive-1", options, restarts=4)
        while done < wanted and running.poll() is None:
            time.sleep(generator.uniform(3, 7))
            ranks = processes_with("fastsample", str(out), parent=running.pid)
            # A kill counts where it can cost something.
            if len(ranks) == 4 and (out / "settings.json").exists() and Folder.open(out).missing():
                with suppress(ProcessLookupError):
                    os.kill(generator.choice(ranks), signal.SIGKILL)
                    done += 1
        running.wait()
        if running.returncode == 0 and done < wanted:
            raise RuntimeError(f"the set was complete after {done} of {wanted} kills: take a larger one")
    finished(torchrun(out, 4, "zoo:progressive-1", options))
    finished(torchrun(folder / "whole", 1, "zoo:progressive-1", options))
    equal = merged_bytes(out) == merged_bytes(folder / "whole")
    result = {"kills": done, "starts": starts, "chunks": Folder.open(out).recipe.chunks, "equal": equal}
    print(result | {"complete": verify(out).complete})
    return result | {"complete": verify(out).complete}


def throughput(folder: Path, quick: bool, found: Any) -> dict[str, Any]:
    """Images a second of one process and of two, and the parts of a chunk's time."""
    rounds, options = (1, QUICK) if quick else (7, WHOLE)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for processes in rates if number % 2 else reversed(rates):
            out = folder / f"{number}-{processes}"
            finished(torchrun(out, processes, "zoo:digits", options))
            rates[processes].append(rate_of(out, processes))
        print({processes: f"{values[-1]:.1f} images/s" for processes, values in rates.items()}, flush=True)
    ratios = np.array(rates[2]) / np.array(rates[1])
    result: dict[str, Any] = {"one": quantiles(rates[1]), "two": quantiles(rates[2]), "ratio": quantiles(ratios)}
    return result | parts_of_a_chunk(folder / "parts", quick, options)


def parts_of_a_chunk(folder: Path, quick: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds that drawing, writing and handing out take, of one process."""
    recipe, store = Recipe("zoo:digits", **options), TCPStore("127.0.0.1", 0, is_master=True)
    seconds: dict[str, list[float]] = {"drawing": [], "writing": [], "handing_out": []}
    torch.set_num_threads(1)
    with source_of("zoo:digits", recipe, Place(folder)) as source:
        target = Folder(folder, source.settings())
        with target.written():
            numbers = Crew(0, 2, store).chunks(target.digest, target.missing)
            for _ in range(min(recipe.chunks, 3 if quick else 24)):
                number = timed(seconds["handing_out"], partial(next, numbers))
                chunk = timed(seconds["drawing"], partial(source.chunk, recipe.places(number)))
                timed(seconds["writing"], partial(target.put, number, chunk))
    median = {name: float(np.median(values[1:])) for name, values in seconds.items()}  # the first draws warm up
    shares = {name: median[name] / median["drawing"] for name in ("handing_out", "writing")}
    print(f"{median['drawing']:.3f} s a chunk of {recipe.batch}; {shares}")
    drawn = [value / recipe.batch for value in seconds["drawing"][1:]]
    return {"seconds_a_sample": drawn, "shares": shares, "batch": recipe.batch}


def timed(seconds: list[float], function: Callable[[], Any]) -> Any:
    """What the function returns; how long it took is added."""
    start = time.perf_counter()
    made = function()
    seconds.append(time.perf_counter() - start)
    return made


def memory(folder: Path, quick: bool, found: Any) -> dict[str, Any]:
    """Resident bytes of this process while it draws, and while it merges."""
    num = 2_000 if quick else 100_000
    seen: dict[str, list[int]] = {"worker": [], "merge": []}
    put, get = Folder.put, Folder.get

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen[name].append(resident())
            return function(*arguments)

        return call

    Folder.put, Folder.get = watched("worker", put), watched("merge", get)  # type: ignore[method-assign]
    try:
        generate(
            small(), folder / "set", num=num, batch=100, model_batch=100, steps=1, shape=(1, 28, 28), progress=False
        )
        merge(folder / "set", folder / "set.npz")
    finally:
        Folder.put, Folder.get = put, get  # type: ignore[method-assign]
    tenth = {name: len(values) // 10 for name, values in seen.items()}
    grown = {name: max(values[tenth[name] :]) - max(values[: tenth[name]]) for name, values in seen.items()}
    result = {"samples": num, "mebibytes_grown": {name: value / 2**20 for name, value in grown.items()}}
    print(result)
    return result


def idle(folder: Path, quick: bool, found: Any) -> dict[str, Any]:
    """Shares of idle time by workers and chunk size, handed out and dealt beforehand."""
    seconds = np.array(found["throughput"]["seconds_a_sample"])
    shares = {
        f"{workers}": {
            f"{chunk}": [
                float(np.median([idle_share(SAMPLES, chunk, workers, seconds, seed, static) for seed in range(5)]))
                for static in (False, True)
            ]
            for chunk in CHUNKS
        }
        for workers in WORKERS
    }
    print(json.dumps(shares))
    return {"samples": SAMPLES, "shares": shares}


PARTS: dict[str, Callable[[Path, bool, Any], dict[str, Any]]] = {
    "same": same,
    "kills": kills,
    "throughput": throughput,
    "memory": memory,
    "idle": idle,
}


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by name, of the parts that are there."""
    made = {}
    if all(name in found for name in ("same", "kills", "memory")):
        same, kills, memory = found["same"], found["kills"], found["memory"]
        outcome = "the same set" if kills["equal"] and kills["complete"] else "ANOTHER SET"
        lines = [
            [f"{same['sets']} ways to make {same['samples']:,} samples", f"{same['equal']} are the same to the byte"],
            [f"{kills['kills']} kills of one of four processes, {kills['chunks']:,} chunks", outcome],
        ]
        for name, grown in memory["mebibytes_grown"].items():
            lines.append([f"memory of a {name} over {memory['samples']:,} samples", f"grows by {grown:.1f} MiB"])
        made["promises"] = table(["what was done", "outcome"], lines)
    if "throughput" in found:
        part = found["throughput"]
        lines = [[name, *(f"{part[key][quantile]:.3g}" for quantile in ("p20", "p50", "p80"))] for name, key in _RATES]
        lines += [[f"{name}, share of a chunk's time", "", f"{part['shares'][key]:.2%}", ""] for name, key in _SHARES]
        made["throughput"] = table(["", "p20", "p50", "p80"], lines)
    if "idle" in found:
        shares = found["idle"]["shares"]
        lines = [
            [f"{int(workers):,}", how, *(f"{by_chunk[str(chunk)][static]:.0%}" for chunk in CHUNKS)]
            for workers, by_chunk in shares.items()
            for static, how in enumerate(("handed out", "dealt beforehand"))
        ]
        made["idle"] = table(["workers", "chunks are", *(f"{chunk:,} a chunk" for chunk in CHUNKS)], lines)
    return made


_RATES = (
    ("images a second, one process", "one"),
    ("images a second, two processes", "two"),
    ("two by one", "ratio"),
)
_SHARES = (("handing out", "handing_out"), ("writing", "writing"))


def torchrun(
    out: Path, processes: int, model: str, options: dict[str, Any], restarts: int = 0
) -> subprocess.Popen[bytes]:
    """Starts the command, one thread a process."""
    values = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["-m", "fastsample", "--", "generate", "--model", model, "--out", str(out), *values]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*run, f"--max-restarts={restarts}", *command], env=environment, cwd=out.parent, stdout=quiet, stderr=quiet
    )


def finished(running: subprocess.Popen[bytes]) -> None:
    """Waits for a run, which must succeed."""
    if running.wait():
        raise RuntimeError(f"{running.args!r} ended with {running.returncode}")


def processes_with(*words: str, parent: int) -> list[int]:
    """The processes that this one has started whose command lines hold these words."""
    listed, found = Path(f"/proc/{parent}/task/{parent}/children"), []
    with suppress(OSError):
        for word in listed.read_text().split():
            line = Path(f"/proc/{word}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(one in line for one in words):
                found.append(int(word))
    return found


def merged_bytes(out: Path) -> bytes:
    """The merged set, which has the same bytes where all of its samples are the same."""
    file = out.with_suffix(".npz")
    merge(out, file)
    return file.read_bytes()


def rate_of(out: Path, processes: int) -> float:
    """Images a second between the first chunks, one a process, and the last."""
    times = sorted(stored.path.stat().st_mtime for stored in Folder.open(out).stored())
    batch = Folder.open(out).recipe.batch
    return batch * (len(times) - processes) / (times[-1] - times[processes - 1])


def quantiles(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{share}": float(np.percentile(values, share)) for share in (20, 50, 80)}


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
