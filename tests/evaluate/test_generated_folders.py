"""Folders of fastsample generate are measured as a stream, by any features."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsample.cli import main
from fastsample.evaluate import Yardstick, evaluate
from fastsample.generation import generate
from fastsample.train.data import ImageData
from support.generated import arrays, chunks_alive

REFERENCE = "mnist5k-held-out"


def corners(images: Tensor) -> Tensor:
    """Features of one's own: means of the four quarters."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits in four chunks."""
    out = tmp_path_factory.mktemp("generated") / "set"
    return generate("zoo:progressive-1", out, num=40, batch=12, model_batch=4, progress=False)


def test_a_folder_is_worth_what_its_images_are(folder: Path) -> None:
    images, labels = arrays(folder)
    data = ImageData(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))
    wanted = Yardstick(REFERENCE, draws=5).measure(data)
    found = evaluate(folder, REFERENCE, draws=5)
    # The classifier may round otherwise by the size of a batch.
    for name in ("frechet", "kernel", "precision", "recall"):
        assert getattr(found.samples, name) == pytest.approx(getattr(wanted.samples, name), rel=1e-3, abs=1e-5)
    assert (found.class_agreement, found.nearest) == (wanted.class_agreement, wanted.nearest)
    wrong = evaluate(folder, REFERENCE, labels=(torch.from_numpy(labels) + 1) % 10, draws=5)
    assert wrong.class_agreement is not None and wrong.class_agreement.value < 0.1
    with pytest.raises(ValueError, match="labels must be 40"):
        evaluate(folder, REFERENCE, labels=torch.zeros(39, dtype=torch.int64))


def test_one_chunk_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = chunks_alive(monkeypatch)
    evaluate(folder, REFERENCE, draws=2)
    assert len(alive) == 4 and max(alive) <= 2  # the one that was looked at last, and the next


def test_features_of_ones_own_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(folder), "--reference", REFERENCE, "--draws", "2", "--json", "--features"]
    assert main([*command, f"python:{__name__}:corners"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == "corners"
    assert main([*command, f"python:{__name__}:nothing"]) == 2
    assert "--features" in capsys.readouterr().err


@pytest.mark.skipif(
    find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed, and would fetch weights"
)
def test_inception_names_what_it_needs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--reference", REFERENCE, "--features", "inception"]) == 2
    assert "pip install torch-fidelity" in capsys.readouterr().err


def test_a_damaged_chunk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = generate("zoo:progressive-1", tmp_path / "set", num=20, batch=10, model_batch=10, progress=False)
    chunk = sorted(out.glob("chunk-*"))[1]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert main(["evaluate", str(out), "--reference", REFERENCE]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "is damaged" in error
