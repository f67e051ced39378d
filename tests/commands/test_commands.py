"""What a user gets wrong at the command line is one line on stderr and exit status 2, before anything is computed."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import selftest
from fastsample.cli import main
from fastsample.commands import demo, demo_rows
from fastsample.commands import train as train_command
from fastsample.commands.console import one_line

SMALL = ["--batch-size", "4", "--widths", "8", "16", "--timesteps", "20"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with data, a file, a folder named as a picture and a FIFO."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", images=np.zeros((4, 8, 8), np.uint8))
    Path("file").touch()
    Path("folder.png").mkdir()
    os.mkfifo("fifo.npz")
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line."""
    try:
        status: Any = main(arguments)
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2
    assert not shown.out
    [line] = shown.err.splitlines()
    return line


def _no_model(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be computed")


DEMO = {
    "format": (["--out", "x.bogus"], r"--out must end in one of \.png.*'x\.bogus'"),
    "no-format": (["--out", "x"], "--out must end in"),
    "device": (["--out", "/dev/full"], "--out must end in"),
    "folder": (["--out", "folder.png"], r"folder\.png is a folder"),
    "no-folder": (["--out", "missing/x.png"], "no such folder: .*missing"),
    "below-a-file": (["--out", "file/x.png"], "no such folder: .*file"),
    "unwritable": (["--out", "/proc/x.png"], "no file can be made here.*/proc"),
    "rounds": (["--rounds", "0"], "--rounds must be at least 1"),
    "rounds-text": (["--rounds", "x"], "argument --rounds: invalid int value"),
    "option": (["--bogus"], "there is no option --bogus"),
}


@pytest.mark.parametrize("case", DEMO)
def test_demo_refuses_before_sampling(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "digits", _no_model)
    before = sorted(os.listdir())
    arguments, message = DEMO[case]
    line = refused(["demo", *arguments], capsys)
    assert line.startswith("fastsample")
    assert re.search(message, line), line
    assert sorted(os.listdir()) == before


def test_demo_on_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("x.png").write_text("old")
    monkeypatch.setattr(demo, "BUDGET", 0.0)
    monkeypatch.setattr(demo_rows, "MANY", 2)
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device: 'x.png'" in refused(["demo", "--out", "x.png"], capsys)
    assert Path("x.png").read_text() == "old"
    assert len(os.listdir()) == 5


def test_demo_does_not_write_through_a_link(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BUDGET", 0.0)
    monkeypatch.setattr(demo_rows, "MANY", 2)
    Path("x.png").symlink_to("file")
    assert main(["demo", "--out", "x.png", "--rounds", "1"]) == 0
    assert not Path("x.png").is_symlink()
    assert Path("file").read_bytes() == b""


TRAIN = {
    "no-data": (["--out", "run"], "required: --data"),
    "no-gpu": (["--data", "data.npz", "--out", "run", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "device": (["--data", "data.npz", "--out", "run", "--device", "bogus"], "device 'bogus' cannot be used"),
    "meta": (["--data", "data.npz", "--out", "run", "--device", "meta"], "device 'meta' cannot be used"),
    "threads": (["--data", "data.npz", "--out", "run", "--threads", "0"], "--threads must be from 1"),
    "many-threads": (["--data", "data.npz", "--out", "run", "--threads", str(10**30)], "--threads must be"),
    "lr": (["--data", "data.npz", "--out", "run", "--lr", "nan"], "lr must be finite"),
    "decay": (["--data", "data.npz", "--out", "run", "--weight-decay", "inf"], "weight_decay must be finite"),
    "seed": (["--data", "data.npz", "--out", "run", "--seed", str(2**64)], "seed must be below"),
    "timesteps": (["--data", "data.npz", "--out", "run", "--timesteps", "1"], "timesteps must be at least 2"),
    "widths": (["--data", "data.npz", "--out", "run", "--widths", "7", "9"], "widths must be multiples"),
    "save-every": (["--data", "data.npz", "--out", "run", "--save-every", "0"], "save_every must be at least 1"),
    "file": (["--data", "data.npz", "--out", "file"], "Not a directory|folder"),
    "below-a-file": (["--data", "data.npz", "--out", "file/run"], "Not a directory"),
    "unwritable": (["--data", "data.npz", "--out", "/proc/run"], "no file can be made here"),
    "missing": (["--data", "none.npz", "--out", "run"], r"no data at none\.npz"),
    "fifo": (["--data", "fifo.npz", "--out", "run"], r"fifo\.npz is a FIFO"),
    "null": (["--data", "/dev/null", "--out", "run"], "/dev/null is a device"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses_before_it_makes_a_folder(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    arguments, message = TRAIN[case]
    line = refused(["train", *arguments], capsys)
    assert re.search(message, line), line
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("case", ["no-gpu", "file", "unwritable", "save-every"])
def test_train_looks_at_the_place_before_the_data(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_command, "load_data", _no_model)
    refused(["train", *TRAIN[case][0]], capsys)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "junk": lambda path: path.write_bytes(b"junk" * 100),
    "foreign": lambda path: torch.save({"model": torch.zeros(2)}, path),
    "tensor": lambda path: torch.save(torch.zeros(2), path),
    "settings": lambda path: torch.save({"settings": [1]}, path),
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_train_on_what_is_no_checkpoint(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    CHECKPOINTS[kind](Path("run", "checkpoint.pt"))
    line = refused(["train", "--data", "data.npz", "--out", "run", *SMALL], capsys)
    assert "run/checkpoint.pt" in line or "/dev/zero" in line
    assert os.listdir("run") == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--device", "bogus"], "bogus", id="device"),
        pytest.param(["--device", "meta"], "must be cpu or cuda", id="meta"),
        pytest.param(["--device", "cuda:99"], "cuda:99", id="no-gpu"),
        pytest.param(["--backend", "bogus"], "--backend must be one of", id="backend"),
    ],
)
def test_selftest_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["selftest", *arguments], capsys)


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["--bogus"]], ids=["nothing", "command", "option"])
def test_fastsample_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(arguments, capsys).startswith("fastsample: ")


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError(), 2), (RuntimeError("a\nb"), 2), (KeyboardInterrupt(), 130)], ids=str
)
def test_other_errors_are_one_line_too(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr(selftest, "run", fails)
    assert main(["selftest"]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line in ("fastsample selftest: MemoryError", "fastsample selftest: a b", "fastsample selftest: stopped")


@pytest.mark.parametrize(
    ("output", "status", "lines"), [("/dev/full", 2, 1), ("closed", 141, 0)], ids=["full-disk", "closed-pipe"]
)
def test_output_that_cannot_be_written(output: str, status: int, lines: int, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fastsample import selftest\nfrom fastsample.cli import main\n"
        "selftest.run = lambda *arguments: print('a table') or 0\nsys.exit(main(['selftest']))"
    )
    if output == "closed":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, lines), done.stderr


def test_one_line() -> None:
    assert one_line("a\n\n  b\tc ") == "a b c"
    assert one_line("a" * 2000) == "a" * 1000 + " ..."
