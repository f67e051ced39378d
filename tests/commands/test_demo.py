"""The command line: the demo as a newcomer runs it, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastsample
from fastsample.cli import main
from fastsample.commands import demo

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def test_demo_writes_its_picture_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in shorter runs of the model than a newcomer waits for."""
    monkeypatch.setattr(demo, "MANY", 5)
    picture = tmp_path / "samples.png"
    assert main(["demo", "--out", str(picture), "--rounds", "1"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for part in ("teacher, DDIM", "student, trajectory", "images a second", "model free", "noise bits identical"):
        assert part in shown


def test_the_plain_loop_computes_the_same_samples() -> None:
    """The comparison is honest only if both do the same guided work.

    In float64, since the network passes on what each step rounds, by how much depends on a CPU's convolutions.
    """
    model, y = fastsample.zoo.digits().double(), torch.arange(3)
    x = fastsample.ops.randn(demo.SHAPE, seed=1)[:3].double()
    calls: list[tuple[torch.Size, list[int]]] = []
    model.register_forward_hook(
        lambda module, arguments, keywords, output: calls.append((arguments[0].shape, keywords["y"].tolist())),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain = demo.plain_ddim(model, x, 4, y)
    calls_of_plain, calls[:] = calls[:], []
    ours = fastsample.ddim(model, x, steps=4, model_dtype=torch.float64, **demo.guided(y))
    # 2^-53 of a value in each rounding, some millions of times that after four steps through the network.
    assert (plain - ours).abs().max() < 1e-9
    assert calls == calls_of_plain == [(torch.Size((6, 1, 28, 28)), [10] * 3 + [0, 1, 2])] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--out", "missing-folder/samples.png"], "no such folder", id="folder"),
        pytest.param(["--rounds", "0"], "at least 1", id="rounds"),
    ],
)
def test_demo_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_demo_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["demo"]) == 2
    assert "fastsample[demo]" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["train", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert fastsample.__version__ in capsys.readouterr().out
