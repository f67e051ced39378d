"""The study of quality: its plan, a small run that is interrupted, and the tables of its page."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from benchmarks.sections import quality_page, quality_rows
from benchmarks.sections.quality_cases import AS_DIFFUSERS, SAMPLERS, BitsCase, Case, RealCase, plan
from benchmarks.sections.quality_rows import Run, key, load
from fastsample import Schedule, zoo
from support.levels import on_threads

pytest.importorskip("torchmetrics")
pytest.importorskip("mlxtend")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 1,000 held-out digits instead of 5,000, and few draws."""
    from fastsample.evaluate import Yardstick

    yardstick = Yardstick("mnist5k-held-out", draws=3)
    monkeypatch.setattr(quality_rows, "yardstick", lambda _: yardstick)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of digits in a folder of its own, as fastsample train leaves one."""
    torch.manual_seed(0)
    path = tmp_path / "tiny" / "model.safetensors"
    path.parent.mkdir()
    zoo.save(zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(40)), path)
    return path


def test_the_plan_is_the_issues_and_keys_tell_its_rows_apart() -> None:
    bundled = load(quality.BUNDLED)
    cases = plan(bundled, quick=False)
    run = Run(quality.BUNDLED, "mnist5k", 0)
    assert len({key(case, run) for case in cases}) == len(cases)
    samples = [case for case in cases if isinstance(case, Case)]
    few = {(case.sampler, case.calls) for case in samples if case.calls <= 10 and case.guidance == 1}
    assert {name for name, _ in few} == set(SAMPLERS) - {AS_DIFFUSERS}
    assert {case.count for case in samples if case.calls <= 100 and case.guidance == 1} >= {3000}
    assert {case.calls for case in samples if case.count == 900} == {50, 250, 1000}
    image_calls = sum(case.image_calls(bundled) for case in cases)
    assert 5e6 < image_calls < 1e7
    assert sum(case.image_calls(bundled) for case in plan(bundled, quick=True)) < 0.03 * image_calls


def test_a_model_without_a_learned_variance_is_not_asked_for_one() -> None:
    config = replace(zoo.digits().config, learned_variance=False)
    cases = plan(zoo.UNet(config, Schedule.cosine(40)), quick=False)
    assert not [case for case in cases if "learned" in str(case)]


def test_guidance_doubles_the_images_and_heun_has_an_odd_number_of_calls() -> None:
    bundled = load(quality.BUNDLED)
    assert Case("DDIM", 10, 20, 1.25).image_calls(bundled) == 2 * Case("DDIM", 10, 20).image_calls(bundled) == 400
    assert [len(Case("Heun", calls, 1).make(bundled).table) for calls in (3, 4, 5, 10)] == [3, 3, 5, 9]
    assert RealCase(5).image_calls(bundled) == 0
    assert BitsCase("fixed_small", 5000, 2).image_calls(bundled) == 2000


@pytest.mark.usefixtures("small_reference")
def test_a_run_goes_on_where_it_was_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quick", "--count", "10", "--workers", "1", "--model", str(model), "--out", str(tmp_path)]
    command += ["--match", "RealCase", "--match", "DDIM', calls=4", "--match", "fixed small', calls=4"]
    whole, measured = quality.measured, []

    def stopped(case: object, run: Run) -> object:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return whole(case, run)  # type: ignore[arg-type]

    with on_threads(1):
        monkeypatch.setattr(quality, "measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            quality.main(command)
        path = tmp_path / "quality-tiny-quick.csv"
        begun = read(path)
        assert [row["sampler"] for row in begun] == ["real images", "DDIM"]
        monkeypatch.setattr(quality, "measured", whole)
        assert quality.main(command) == 0
        assert "3 rows, 2 of them there already" in capsys.readouterr().out
        rows = read(path)
        assert rows[:2] == begun and rows[2]["sampler"] == "DDPM, fixed small"
        assert quality.main(command) == 0
    assert read(path) == rows
    assert (tmp_path / "quality-tiny-quick.png").stat().st_size > 1000
    assert {row["model"] for row in rows} == {"tiny"} and {row["count"] for row in rows} == {"10"}
    assert all(float(row["frechet_low"]) <= float(row["frechet"]) <= float(row["frechet_high"]) for row in rows)


def test_samples_are_the_same_whatever_else_is_drawn(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Common random numbers: sample i is that of its place, and of class i modulo 10, in batches of any size."""
    run = Run(model, "mnist5k", 3)
    with torch.inference_mode():
        together = quality_rows.samples(Case("Euler ancestral", 4, 12), run)
        monkeypatch.setattr(quality_rows, "BATCH", 5)
        apart = quality_rows.samples(Case("Euler ancestral", 4, 12), run)
    assert together.labels is not None and together.labels.tolist() == [*range(10), 0, 1]
    # The model's own rounding may move a value that lies between two bytes.
    assert (together.images.int() - apart.images.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--count", "3"], "--count must be at least 10, got 3"),
        (["--write", "--quick"], "--write is for the whole study of the bundled model"),
    ],
    ids=["model", "workers", "count", "write"],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, on_threads(1):
        quality.main(["--out", str(tmp_path), *arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line
    assert list(tmp_path.iterdir()) == []


def row(**columns: str) -> Mapping[str, str]:
    figures = {f"{name}{end}": "1.5" for name in ("frechet", "kernel", "precision", "recall", "class_agreement")
               for end in ("", "_low", "_high")}  # fmt: skip
    return {"guidance": "1", "count": "3000", "calls": "10", "sampler": "DDIM", **figures, **columns}


def test_the_tables_of_the_page() -> None:
    rows = [
        row(),
        row(calls="4", frechet="nan"),
        row(sampler="Heun", calls="9"),
        row(guidance="1.25"),
        row(count="900"),
    ]
    tables = quality_page.tables([*rows, row(sampler="real images", calls="0")], [])
    assert tables["Frechet distances"].splitlines() == [
        "| sampler | 4 calls | 9 calls | 10 calls |",
        "| --- | --- | --- | --- |",
        "| DDIM |  |  | 1.5 (1.5 .. 1.5) |",
        "| Heun |  | 1.5 (1.5 .. 1.5) |  |",
    ]
    assert "| DDIM | 10 | 1.25 | 1.5 (1.5 .. 1.5) |" in tables["guided"]
    assert len(tables["many calls"].splitlines()) == len(tables["real"].splitlines()) == 3
    assert tables["bits"].startswith("Not measured yet")


def test_the_page_has_a_place_for_every_table() -> None:
    page = quality_page.DOCS.read_text()
    for name in quality_page.tables([], []):
        assert re.search(f"<!-- {name}, written by benchmarks.quality -->\n\n.+\n\n<!-- end of {name} -->", page, re.S)
