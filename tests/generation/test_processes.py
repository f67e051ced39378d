"""Many processes make the set that one makes: threads on a store, torchrun, and Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import HashStore

from fastsample.cli import main
from fastsample.generation import verify
from fastsample.generation.crew import Alone, Crew
from support.generated import SMALL, TEXT, arrays, merged

TESTS = Path(__file__).parents[1]
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_chunks_are_handed_out_once_and_to_whom_is_free() -> None:
    store, chunks, slow = HashStore(), list(range(100, 140)), 0.02

    def work(rank: int) -> tuple[list[int], int]:
        crew, made, seen = Crew(store, rank, 3), [], 0
        for chunk in crew.handed_out(crew.plan(chunks if rank == 0 else None)):
            made.append(chunk)
            time.sleep(slow if rank == 2 else slow / 10)
            crew.report(2)

        def watch(done: int) -> None:
            nonlocal seen
            seen = done

        crew.leave(watch)
        return made, seen

    with ThreadPoolExecutor(3) as pool:
        (first, seen), (second, _), (last, _) = pool.map(work, range(3))
    assert sorted(first + second + last) == chunks
    assert len(last) < min(len(first), len(second))
    assert seen in (0, 80)  # 0 where the first one ended last


def test_one_process_is_a_crew() -> None:
    crew = Alone()
    assert list(crew.handed_out(crew.plan([3, 1]))) == [3, 1]
    assert (crew.report(2), crew.report(3)) == (2, 5)


def torchrun(out: Path, model: str, options: Sequence[str] = (), **variables: str) -> None:
    """The command with two processes, and these options of torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # torchrun would take --num for the beginning of its own --numa-binding.
    command = ["-m", "fastsample", "--", "generate", "--model", model, "--out", str(out), *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **variables}
    subprocess.run([*run, *options, *command], check=True, env=environment, cwd=out.parent, capture_output=True)


def test_processes_of_torchrun_make_the_set_of_one(tmp_path: Path) -> None:
    wanted = merged(tmp_path / "one")
    torchrun(tmp_path / "many", TEXT)
    found = arrays(tmp_path / "many")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert verify(tmp_path / "many").complete
    assert (tmp_path / "many" / "manifest.json").read_text() == (tmp_path / "one" / "manifest.json").read_text()


def test_a_killed_process_costs_its_chunk_alone(tmp_path: Path) -> None:
    torchrun(
        tmp_path / "many",
        "python:support.generated:dying",
        ["--max-restarts=1"],
        FASTSAMPLE_TEST_MARKER=str(tmp_path / "killed"),
    )
    assert (tmp_path / "killed").exists() and verify(tmp_path / "many").complete
    found, wanted = arrays(tmp_path / "many"), merged(tmp_path / "one")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def cluster() -> object:
    """A local Ray cluster of two CPUs, whose workers find the tests' models."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(TESTS)}}
    )
    yield ray
    ray.shutdown()


def test_workers_of_ray_make_the_set_of_one(cluster: object, tmp_path: Path) -> None:
    wanted = merged(tmp_path / "one")
    command = ["generate", "--model", TEXT, "--out", str(tmp_path / "many"), *OPTIONS, "--engine", "ray"]
    assert main([*command, "--workers", "2"]) == 0
    found = arrays(tmp_path / "many")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "many")]
    assert manifests[0] == manifests[1]
    # What is there is not made again, by whatever engine.
    (tmp_path / "many" / manifests[0]["chunks"][2]["file"]).unlink()
    assert main([*command, "--workers", "1"]) == 0 and verify(tmp_path / "many").complete


def test_ray_needs_a_model_by_text(cluster: object, tmp_path: Path) -> None:
    from support.generated import unet

    with pytest.raises(TypeError, match="model by text"):
        merged(tmp_path / "set", unet(), engine="ray")
    assert not (tmp_path / "set").exists()
