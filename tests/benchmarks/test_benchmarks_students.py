"""benchmarks.students and benchmarks.quality --students: smoke runs, and the table of the page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from benchmarks import quality, students
from benchmarks.sections import quality_rows, students_page
from fastsample import Schedule, distill, zoo
from support.levels import on_threads

pytest.importorskip("torchmetrics")
pytest.importorskip("mlxtend")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "tiny" / "model.safetensors"
    path.parent.mkdir()
    zoo.save(zoo.UNet(zoo.UNetConfig(widths=(8, 16), target="v"), Schedule.cosine(100)), path)
    return path


@pytest.fixture
def tiny(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that takes no time in place of the bundled one, and no pictures."""
    monkeypatch.setattr(zoo, "digits", lambda student=None: zoo.load(teacher))
    monkeypatch.setattr(zoo, "latent_digits", latent)
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)
    with on_threads(1):
        yield


def latent() -> tuple[zoo.UNet, zoo.Autoencoder]:
    """A tiny model of latents and its autoencoder."""
    torch.manual_seed(0)
    config = zoo.UNetConfig(channels=4, image_size=7, fold=1, widths=(8, 16), target="v")
    autoencoder = zoo.Autoencoder(zoo.AutoencoderConfig(width=8)).eval().requires_grad_(False)
    return zoo.UNet(config, Schedule.cosine(100)).eval(), autoencoder


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", students.RUNS)
def test_students_are_made_and_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, package = tmp_path / "out", tmp_path / "package"
    package.mkdir()
    assert students.main(["--out", str(out), "--only", name, "--quick"]) == 0
    monkeypatch.setattr(students, "STUDENTS", {one: package / f"{one}.safetensors" for one in zoo.STUDENTS})
    monkeypatch.setattr(students, "RESULTS", tmp_path / "students.csv")
    _, files = students.RUNS[name]
    for _ in range(2):
        students.install(out / name, name, files)
    assert {path.stem for path in package.iterdir()} == set(files)
    for one in files:
        student = distill.load(package / f"{one}.safetensors", zoo.digits() if one == "lcm-lora" else None)
        assert student.facts.guidance in (students.GUIDANCE, students.RANGE)
        assert student.autoencoder is None
    with (tmp_path / "students.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["run"] == name and int(row["updates"]) >= 8


def test_every_student_is_made_by_one_run() -> None:
    made = [name for _, files in students.RUNS.values() for name in files]
    assert sorted(made) == sorted(zoo.STUDENTS)


def test_a_smoke_run_of_the_study(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsample.evaluate import Yardstick

    yardstick = Yardstick("mnist5k-held-out", draws=3)
    monkeypatch.setattr(quality_rows, "yardstick", lambda _: yardstick)
    cond = {"y": torch.arange(10)}
    settings = distill.Settings(iterations=1, batch_size=4)
    distill.trajectory(
        zoo.load(teacher),
        (1, 28, 28),
        tmp_path / "run",
        steps=(2, 1),
        paths=4,
        cond=cond,
        settings=settings,
        progress=False,
    )
    student = tmp_path / "run" / "student.safetensors"
    command = ["--students", str(student), "--quick", "--count", "10", "--workers", "1", "--model", str(teacher)]
    with on_threads(1):
        assert quality.main([*command, "--out", str(tmp_path)]) == 0
    with (tmp_path / "quality-students-quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["calls"] for row in rows if row["sampler"] == "student"] == ["2", "1"]
    assert (tmp_path / "quality-grid-students-quick.png").stat().st_size > 1000
    table = students_page.table_of(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    figures = students_page.figures_of(rows)
    assert figures["student, 2"] == float(next(row for row in rows if row["sampler"] == "student")["frechet"])
    assert figures.keys() >= {"DDIM, 50, guidance 1.25", "DDIM, 50"}


def row(**columns: str) -> Mapping[str, str]:
    figures = {f"{name}{end}": "0.9" for name in ("frechet", "class_agreement") for end in ("", "_low", "_high")}
    base = {
        "model": "digits",
        "guidance": "1",
        "count": "5000",
        "calls": "50",
        "sampler": "DDIM",
        "timesteps": "auto",
        "ms_per_image": "50",
    }
    return base | figures | columns


def test_the_table_compares_with_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students_page, "_minutes", lambda: {"trajectory-4": "12.5"})
    rows = [
        row(frechet="2"),
        row(frechet="2.2", guidance="1.25", ms_per_image="100"),
        row(
            sampler="digits-trajectory-4",
            timesteps="distilled",
            guidance="1.25",
            calls="4",
            frechet="1.5",
            ms_per_image="4",
        ),
    ]
    *_, teacher, student = students_page.table_of(rows).splitlines()
    assert teacher.startswith("| DDIM | 1.25 | 50 | 2.2 (0.9 .. 0.9) | 1.10 | 1.00 |")
    figures = "1.5 (0.9 .. 0.9) | 0.75 | 0.68 | 0.9 (0.9 .. 0.9) | 250 | 25.0 | 12.5"
    assert student == f"| digits-trajectory-4 | 1.25 | 4 | {figures} |"
    assert students_page.figures_of(rows) == {"DDIM, 50": 2.0, "DDIM, 50, guidance 1.25": 2.2, "trajectory-4, 4": 1.5}


def test_students_of_a_range_and_of_latents_are_named_and_compared_with_their_own() -> None:
    latent = {
        "model": students_page.LATENT,
        "sampler": "digits-guided-4-latent",
        "timesteps": "distilled",
        "calls": "4",
    }
    rows = [
        row(frechet="2"),
        row(frechet="3", model=students_page.LATENT, guidance="1.25"),
        row(frechet="4", model=students_page.LATENT, guidance="2"),
        row(frechet="3.3", guidance="1.25", **latent),
        row(frechet="5", guidance="2", **latent),
        row(frechet="6", guidance="1.25", **latent | {"timesteps": "distilled, stochastic"}),
    ]
    assert students_page.figures_of(rows) == {
        "DDIM, 50": 2.0,
        "DDIM, latents, 50, guidance 1.25": 3.0,
        "DDIM, latents, 50, guidance 2": 4.0,
        "guided-4-latent, 4, guidance 1.25": 3.3,
        "guided-4-latent, 4, guidance 2": 5.0,
        "guided-4-latent, 4, guidance 1.25, stochastic": 6.0,
    }
    lines = students_page.table_of(rows).splitlines()
    shares = [line.split(" | ")[4:6] for line in lines[-3:]]
    assert shares == [["", "1.10"], ["", "1.25"], ["", "2.00"]]
