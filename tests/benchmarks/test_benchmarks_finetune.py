"""benchmarks.finetune and benchmarks.lora_training: the statistic of the style, and smoke runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import finetune, lora_training
from benchmarks.sections import finetune_page, style
from fastsample import Schedule, distill, zoo
from fastsample.train import ImageData
from support.levels import on_threads

pytest.importorskip("torchmetrics")
pytest.importorskip("mlxtend")


@pytest.mark.parametrize("lean", [-0.5, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("floating", [False, True], ids=["uint8", "float"])
def test_the_slant_of_a_stroke(lean: float, floating: bool) -> None:
    """A straight stroke that moves so many columns to the right in every row upwards."""
    rows = torch.arange(4, 25)
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    for row in rows.tolist():
        place = 14 - lean * (row - 14)
        left = int(place // 1)
        images[0, 0, row, left] = round(200 * (1 - place % 1))
        images[0, 0, row, left + 1] = round(200 * (place % 1))
    given = images.float() / 127.5 - 1 if floating else images
    assert float(style.slant(given)) == pytest.approx(lean, abs=0.01)


def test_leaning_digits_lean_by_so_much() -> None:
    from fastsample.train import load_data

    source = load_data("mnist5k-train")
    data, others = style.leaning(source, 3), style.leaning(source, 3, skip=3)
    assert torch.bincount(data.labels).tolist() == [3] * 10  # type: ignore[arg-type]
    assert not any(torch.equal(one, other) for one in data.images for other in others.images)
    chosen = torch.cat([(source.labels == y).nonzero()[:3, 0] for y in range(10)])
    moved = style.slant(data.images) - style.slant(source.images[chosen])
    assert float(moved.mean()) == pytest.approx(style.SHEAR, abs=0.05)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that takes no time, with an LCM-LoRA of its own, and few images."""
    torch.manual_seed(0)
    model = zoo.UNet(zoo.UNetConfig(widths=(8, 16), target="v"), Schedule.cosine(100)).eval()
    data = ImageData(torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10)
    settings = distill.Settings(iterations=1, batch_size=2)
    distill.lcm_lora(model, data, tmp_path / "lcm", scales=4, settings=settings, progress=False)
    monkeypatch.setattr(zoo, "digits", lambda: model)
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)
    monkeypatch.setitem(zoo.LORAS, "lcm", tmp_path / "lcm" / "student.safetensors")
    with on_threads(1):
        yield


@pytest.mark.usefixtures("tiny")
def test_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    table_of = finetune_page.table_of

    def kept(runs: Any, rows: Any) -> str:
        seen.update(runs=runs, rows=rows)
        return table_of(runs, rows)

    monkeypatch.setattr(finetune_page, "table_of", kept)
    monkeypatch.setattr(finetune_page, "Yardstick", lambda *arguments, **options: Judge())
    assert finetune.main(["--out", str(tmp_path / "runs"), "--quick"]) == 0
    assert list(seen["runs"]) == list(finetune.RUNS)
    small, large = (seen["runs"][name].trained for name in ("LoRA, rank 2", "LoRA, rank 8"))
    assert 4 * small == large < seen["runs"]["whole, 1e-3"].trained
    assert [row.name for row in seen["rows"]][:3] == ["the model", "style", "LCM-LoRA"]
    assert capsys.readouterr().out.count("| LoRA, rank 8 |") == 1


class Judge:
    """Takes every digit for its label."""

    def measure(self, samples: ImageData) -> Any:
        assert samples.images.shape[1:] == (1, 28, 28)
        return type("Seen", (), {"class_agreement": type("Figure", (), {"value": 1.0})})


@pytest.mark.parametrize("name", lora_training.CANDIDATES)
def test_a_training_step_of_a_tiny_unet(name: str) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    with on_threads(1):
        found = lora_training.measured(name, 8, quick=True)
    assert len(found["seconds"]) == lora_training.STEPS and min(found["seconds"]) > 0
    assert (found["trained"][0] > 500_000) == (name == lora_training.FULL)
    lines = lora_training.lines_of([dict.fromkeys(lora_training.CANDIDATES, found)])
    assert [line[0] for line in lines] == list(lora_training.CANDIDATES) and lines[0][3] == "1.00"
