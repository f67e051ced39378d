"""Many processes make the set that one makes: threads on a store, torchrun, and Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from fastsample import zoo
from fastsample.cli import main
from fastsample.generation import verify
from fastsample.generation.crew import Crew
from support.generated import SMALL, TEXT, arrays, merged, unet

TESTS = Path(__file__).parents[1]
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


class Shelf:
    """What is there of forty chunks, of which every third one was there before."""

    def __init__(self) -> None:
        self.there = set(range(0, 40, 3))

    def missing(self) -> list[int]:
        return [number for number in range(40) if number not in self.there]


def test_chunks_are_handed_out_once_and_to_whom_is_free() -> None:
    """In turns: a process asks for its next chunk when it is done; the third is slow."""
    shelf, store = Shelf(), HashStore()
    wanted = shelf.missing()
    crews = [Crew(rank, 3, store).chunks("set", shelf.missing) for rank in range(3)]
    made: list[list[int]] = [[], [], []]
    working: dict[int, int | None] = {rank: next(crews[rank]) for rank in range(3)}
    for turn in range(60):
        for rank in (0, 1) if turn % 4 else (0, 1, 2):
            if (chunk := working[rank]) is not None:
                made[rank].append(chunk)
                shelf.there.add(chunk)
                working[rank] = next(crews[rank], None)
    assert not shelf.missing() and set(working.values()) == {None}
    assert len(made[2]) < min(len(made[0]), len(made[1]))
    # None is made twice but those that the slow one still has when the others are done.
    every = sorted(made[0] + made[1] + made[2])
    assert set(every) == set(wanted) and len(every) <= len(wanted) + 3


@pytest.mark.parametrize("count", [1, 7, 1000], ids="{} were handed out before".format)
def test_a_counter_of_dead_processes_loses_nothing(count: int) -> None:
    shelf, store = Shelf(), HashStore()
    PrefixStore("fastsample.generate set", store).add("next", count)
    for chunk in Crew(0, 2, store).chunks("set", shelf.missing):
        assert chunk not in shelf.there
        shelf.there.add(chunk)
    assert not shelf.missing()


def test_a_store_that_is_gone_loses_nothing() -> None:
    shelf = Shelf()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", store.port, is_master=False)
    made = Crew(1, 2, client).chunks("set", shelf.missing)
    shelf.there.add(next(made))
    del store
    for chunk in made:
        shelf.there.add(chunk)
    assert not shelf.missing()
    with pytest.raises(RuntimeError, match="the first process has ended before it began the set"):
        Crew(1, 2, client).check()


def test_one_process_makes_what_is_missing_in_order() -> None:
    shelf = Shelf()
    assert list(Crew().chunks("set", shelf.missing)) == shelf.missing()


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
    times = [path.stat().st_mtime_ns for path in (tmp_path / "many").glob("chunk-*")]
    assert min(times) < (tmp_path / "killed").stat().st_mtime_ns < max(times)  # what was there has stayed
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


def test_workers_of_ray_make_the_set_of_one(
    cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = merged(tmp_path / "one")
    command = ["generate", "--model", TEXT, "--out", str(tmp_path / "many"), *OPTIONS, "--engine", "ray"]
    assert main([*command, "--workers", "3"]) == 2
    assert "the cluster has room for 2 of 1 CPU each, 3 are asked for" in capsys.readouterr().err
    assert not (tmp_path / "many").exists()
    assert main([*command, "--workers", "2"]) == 0
    found = arrays(tmp_path / "many")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "many")]
    assert manifests[0] == manifests[1]
    # What is there is not made again, by whatever engine.
    (tmp_path / "many" / manifests[0]["chunks"][2]["file"]).unlink()
    assert main([*command, "--workers", "1"]) == 0 and verify(tmp_path / "many").complete


def test_ray_needs_a_model_by_text(cluster: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model by text"):
        merged(tmp_path / "set", unet(), engine="ray")
    assert not (tmp_path / "set").exists()


def test_ray_tells_what_a_worker_refuses(
    cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "set"
    command = ["generate", "--out", str(out), *OPTIONS, "--engine", "ray", "--workers", "1"]
    assert main([*command, "--model", "python:support.generated:failing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()
    zoo.save(unet(), tmp_path / "model.safetensors")
    assert main([*command, "--model", "zoo:model.safetensors"]) == 0 and verify(out).complete
