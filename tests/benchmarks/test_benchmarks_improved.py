"""benchmarks.improved_ddpm: a smoke run on tiny siblings, its page, and verdicts that follow from intervals."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import improved_ddpm
from benchmarks.sections import improved_findings, improved_page, improved_training
from benchmarks.sections.improved_bits import BitsCase, BitsRow, binned, bins
from benchmarks.sections.improved_data import WEIGHTS, Data, Places
from benchmarks.sections.improved_findings import CONTRADICTED, MISSING, NOT_CLEAR, RE_FOUND
from benchmarks.sections.improved_siblings import Sibling
from benchmarks.sections.quality_rows import digest_of
from benchmarks.siblings import SIBLINGS
from fastsample import nll
from fastsample.evaluate import Figure
from fastsample.train import ImageData, load_data, train
from support.levels import on_threads

T = 30
MARKED = ("figure 2", "figure 4", "figure 6", "figure 7", "bits")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with on_threads(1):
        yield


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six, which have learned nothing."""
    folder = tmp_path_factory.mktemp("siblings")
    data = ImageData(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    for name, settings in SIBLINGS.items():
        tiny = replace(settings, steps=9, timesteps=T, widths=(8, 8), batch_size=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastsample.train.report._plot", lambda *arguments: None)  # which takes longer than this
            train(data, folder / name, tiny, progress=False)
    return folder


@pytest.fixture(scope="module")
def measured(siblings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert improved_ddpm.main(["--quick", "--siblings", str(siblings), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_one_pass_of_the_model_serves_all_variances(measured: Path, siblings: Path, variance: str) -> None:
    bits = Data(Places(measured, quick=True)).each("hybrid", variance, 5)
    model, data = Sibling(siblings / "hybrid").load(), load_data("mnist5k-held-out")
    x0, y = data.scaled(torch.arange(len(bits))), data.labels
    assert y is not None
    bound = nll(model, x0, steps=5, variance=variance, seed=0, model_kwargs={"y": y[: len(bits)]})
    assert bits.tolist() == pytest.approx(bound.total_bpd.tolist(), rel=1e-4)  # cells have five digits


def test_a_smoke_run_draws_all_figures(measured: Path) -> None:
    assert {path.name for path in measured.glob("*.png")} == {f"improved-ddpm-{number}.png" for number in range(1, 8)}
    assert max(path.stat().st_size for path in measured.glob("*.png")) < 60_000


def test_its_bits_are_sums_of_their_terms(measured: Path) -> None:
    """All but the prior's part, which a cosine schedule makes next to nothing."""
    rows = [row for row in Data(Places(measured, quick=True)).whole() if row["model"] != "linear"]
    assert len(rows) == 8
    for row in rows:
        total = np.diff(bins(T)) @ np.array(row["terms"].split(), dtype=float)
        assert total == pytest.approx(float(row["bits"]), rel=1e-3)  # cells have five digits


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than tiny models."""
    monkeypatch.setattr(improved_ddpm.improved_figures, "draw", lambda folder, data: [])


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_measures_nothing_again(measured: Path, siblings: Path) -> None:
    places = Places(measured, quick=True)
    before = [path.read_text() for path in places.measured]
    assert improved_ddpm.main(["--quick", "--siblings", str(siblings), "--out", str(measured)]) == 0
    assert [path.read_text() for path in places.measured] == before


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_or_of_other_weights_is_measured_again(
    measured: Path, siblings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in Places(measured, quick=True).measured:
        (tmp_path / path.name).write_text(path.read_text())
    places = Places(tmp_path, quick=True)
    header, *lines = places.bits.read_text().splitlines(keepends=True)
    kept = [line.replace(line.split(",")[1], "0123456789ab") if line.startswith("vlb,") else line for line in lines[1:]]
    places.bits.write_text("".join([header, *kept]))
    asked: list[BitsCase] = []
    measure = improved_ddpm.improved_bits.measured

    def noted(case: BitsCase, sibling: Sibling, seed: int) -> Iterator[BitsRow]:
        asked.append(case)
        return measure(case, sibling, seed)

    monkeypatch.setattr(improved_ddpm.improved_bits, "measured", noted)
    assert improved_ddpm.main(["--quick", "--siblings", str(siblings), "--out", str(tmp_path)]) == 0
    assert [case.model for case in asked] == ["hybrid", "vlb", "vlb"]
    columns = ("model", "digest", "variance", "steps", "bits")
    again, first = (
        sorted(tuple(row[name] for name in columns) for row in csv.DictReader(path.open()))
        for path in (places.bits, Places(measured, quick=True).bits)
    )
    assert again == first


def test_the_page_is_filled(measured: Path) -> None:
    page = improved_page.DOCS.read_text()
    drawn = {path.name for path in measured.glob("*.png")}
    filled = improved_page.filled(page, Data(Places(measured, quick=True)), drawn)
    assert improved_page.MISSING not in filled
    assert improved_page.filled(filled, Data(Places(measured, quick=True)), drawn) == filled
    empty = improved_page.filled(filled, Data(Places(Path("nowhere"))), set())
    assert empty.count(improved_page.MISSING) == len(MARKED) + 1  # and figure 3, which has no table


def test_the_page_is_that_of_the_results() -> None:
    places = Places(improved_ddpm.RESULTS)
    drawn = {path.name for path in improved_page.PICTURES.glob("improved-ddpm-*.png")}
    page = improved_page.DOCS.read_text()
    assert improved_page.filled(page, Data(places), drawn) == page


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Figure(1.0, 0.1, 2.0), RE_FOUND),
        (Figure(1.0, -0.1, 2.0), NOT_CLEAR),
        (Figure(-1.0, -2.0, 0.1), NOT_CLEAR),
        (Figure(-1.0, -2.0, -0.1), CONTRADICTED),
    ],
)
def test_a_verdict_is_where_the_interval_lies(difference: Figure, verdict: str) -> None:
    assert improved_findings.positive(difference) == verdict


@pytest.mark.parametrize(
    ("difference", "below", "near"),
    [
        (Figure(0.0, -0.5, 0.5), RE_FOUND, RE_FOUND),
        (Figure(0.8, 0.5, 1.5), NOT_CLEAR, NOT_CLEAR),
        (Figure(2.0, 1.5, 2.5), CONTRADICTED, CONTRADICTED),
        (Figure(-0.8, -1.5, -0.5), RE_FOUND, NOT_CLEAR),
        (Figure(-2.0, -2.5, -1.5), RE_FOUND, CONTRADICTED),
    ],
)
def test_a_verdict_with_a_limit(difference: Figure, below: str, near: str) -> None:
    assert improved_findings.within(difference, 1.0) == below
    assert improved_findings.within(difference, 1.0, either=True) == near


def test_the_interval_of_a_difference_adds_errors_in_squares() -> None:
    gap = improved_findings.minus(Figure(10.0, 7.0, 14.0), Figure(2.0, 1.5, 4.0), 2.0)
    assert gap == pytest.approx((6.0, 6.0 - 5.0, 6.0 + 17**0.5))


def test_findings_without_rows_are_not_measured() -> None:
    found = improved_findings.findings(Data(Places(Path("nowhere"))))
    assert len(found) > 20 and {finding.verdict for finding in found} == {MISSING}


def test_findings_of_quality_rows(tmp_path: Path) -> None:
    """The bundled model's lines, from a file as benchmarks.quality writes it."""
    figures = [f"{name}{end}" for name in ("frechet", "kernel") for end in ("", "_low", "_high")]
    frechet = {
        "DDIM": {10: 8.0, 20: 7.0, 50: 6.5, 100: 6.2, 1000: 6.0},
        "DDPM, learned range": {10: 20.0, 20: 12.0, 50: 5.0, 100: 6.0, 1000: 6.0},
        "DDPM, fixed small": {10: 40.0, 20: 14.5, 50: 9.0, 100: 4.0, 1000: 6.1},
        "DDPM, fixed large": {10: 90.0, 20: 40.0, 50: 20.0, 100: 9.0},
    }
    with (tmp_path / "quality-digits.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["digest", "sampler", "calls", "count", "guidance", *figures])
        for sampler, line in frechet.items():
            for calls, value in line.items():
                kernel = value / 10
                ends = (value, value - 0.5, value + 0.5, kernel, kernel - 0.05, kernel + 0.05)
                writer.writerow((digest_of(WEIGHTS), sampler, calls, 3000 if calls < 250 else 900, 1, *ends))
    found = improved_findings.findings(Data(Places(tmp_path)))
    verdicts = [finding.verdict for finding in found if "(bundled)" in finding.statement and finding.numbers]
    assert verdicts == [RE_FOUND, NOT_CLEAR, RE_FOUND, RE_FOUND, CONTRADICTED, RE_FOUND, RE_FOUND]


def test_the_spread_is_that_of_the_logarithm() -> None:
    """Of a loss that falls, with noise of a known size: 3,000 independent steps know it within 3 %."""
    steps = np.arange(3000)
    losses = np.exp(0.2 * np.random.default_rng(1).standard_normal(3000) - steps / 1000)
    value, low, high = improved_training.spread(losses)
    assert low < 0.2 < high and value == pytest.approx(0.2, rel=0.05)
    assert 0.01 < (high - low) / value < 0.1


def test_bins_are_whole() -> None:
    terms = np.arange(1000.0).tolist()
    assert bins(1000)[0] == 0 and bins(1000)[-1] == 1000
    assert np.diff(bins(1000)) @ binned(terms) == pytest.approx(sum(terms))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quick", "--write"], "--write is for the whole study"),
        (["--siblings", "nowhere"], "no model in nowhere"),
        (["--seed", "-1"], "--seed must lie in"),
    ],
    ids=["quick and write", "no siblings", "seed"],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        improved_ddpm.main([*flags, "--out", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
