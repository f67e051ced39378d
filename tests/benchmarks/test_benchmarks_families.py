"""Which CPU family results belong to, and the table of families in docs/performance.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from benchmarks.common import cpu
from support.paths import ROOT

DOCS = ROOT / "docs" / "performance.md"


def x86(vendor: str, family: int, model: int, stepping: object = 1) -> str:
    """/proc/cpuinfo of two cores, as far as it matters."""
    core = (
        f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: Some CPU\n"
        f"stepping\t: {stepping}\nflags\t\t: fpu avx512f\npower management:\n"
    )
    return f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}\n"


ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "family", "slug"),
    [
        (x86("AuthenticAMD", 25, 0x01), "Zen 3", "zen3"),
        (x86("AuthenticAMD", 25, 0x11), "Zen 4", "zen4"),
        (x86("AuthenticAMD", 25, 0x61), "Zen 4", "zen4"),
        (x86("AuthenticAMD", 25, 0xA0), "Zen 4", "zen4"),
        (x86("AuthenticAMD", 26, 0x02), "Zen 5", "zen5"),
        (x86("GenuineIntel", 6, 0x8F, 8), "Sapphire Rapids", "sapphire-rapids"),
        (x86("GenuineIntel", 6, 0xCF), "Emerald Rapids", "emerald-rapids"),
        (x86("GenuineIntel", 6, 0xAD), "Granite Rapids", "granite-rapids"),
        (x86("GenuineIntel", 6, 0x6A), "Ice Lake", "ice-lake"),
        (x86("GenuineIntel", 6, 0x55, 4), "Skylake", "skylake"),
        (x86("GenuineIntel", 6, 0x55, 7), "Cascade Lake", "cascade-lake"),
        (x86("GenuineIntel", 6, 0x55, 11), "Cooper Lake", "cooper-lake"),
        (x86("GenuineIntel", 6, 0x55, "unknown"), "GenuineIntel family 6 model 85", "genuineintel-family6-model85"),
        (x86("AuthenticAMD", 25, 0xF0), "AuthenticAMD family 25 model 240", "authenticamd-family25-model240"),
        (x86("HygonGenuine", 24, 1), "HygonGenuine family 24 model 1", "hygongenuine-family24-model1"),
        (ARM, "aarch64 implementer 0x41 part 0xd4f", "aarch64-implementer0x41-part0xd4f"),
    ],
)
def test_family(cpuinfo: str, family: str, slug: str) -> None:
    assert (cpu.family_of(cpuinfo), cpu.slug(family)) == (family, slug)


def test_without_cpuinfo_it_is_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert cpu.family_of("") == "arm64"


def test_names_have_files_of_their_own() -> None:
    assert len({cpu.slug(name) for name in cpu.NAMES}) == len(cpu.NAMES)


def write(path: Path, *rows: dict[str, Any]) -> None:
    empty = dict.fromkeys(("benchmark", "case", "provider", "p50_us", "baseline", "ratio_p50"), "")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(empty | rows[0]))
        writer.writeheader()
        writer.writerows(empty | row for row in rows)


def projections(*ratios: float, **columns: str) -> list[dict[str, Any]]:
    """Rows of rank 16 over bare linears, PEFT at three times our time."""
    made = []
    for shape, ratio in zip(("4x8", "8x8", "9x8"), ratios, strict=False):
        own = {"case": shape, "baseline": "nn.Linear", **columns}
        made += [
            {**own, "provider": "fastsample rank 16", "p50_us": 10 * ratio, "ratio_p50": ratio, "peak_p50": ratio / 8},
            {**own, "provider": "fastsample rank 64", "p50_us": 90, "ratio_p50": ratio * 9, "peak_p50": 0.5},
            {**own, "provider": "PEFT rank 16", "p50_us": 30 * ratio, "ratio_p50": 3 * ratio, "peak_p50": 0.1},
        ]
    return made


def cells(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_families_stand_side_by_side_and_never_for_each_other(tmp_path: Path) -> None:
    write(tmp_path / "lora-projections-float32-zen4.csv", *projections(2, 8))  # from before there was a column
    write(tmp_path / "lora-projections-float32-zen5.csv", *projections(3, cpu_family="Zen 5"))
    write(tmp_path / "lora-projections-bfloat16-sapphire-rapids.csv", *projections(1, cpu_family="Sapphire Rapids"))
    text = families.table(families.read(tmp_path))
    assert text.splitlines()[0] == "| | Zen 4 | Sapphire Rapids | Zen 5 |"
    none = "not measured"
    over, peft = "rank 16 / three bare `nn.Linear`", "PEFT / ours, rank 16"
    assert cells(text, f"q, k, v in float32: {over}") == [
        "4 (2 shapes), largest 8.00 at 8x8",
        none,
        "3, largest 3.00 at 4x8",
    ]
    assert cells(text, f"q, k, v in bfloat16: {over}") == [none, "1, largest 1.00 at 4x8", none]
    assert cells(text, f"q, k, v in float32: {peft}") == ["3 (2 shapes)", none, "3"]
    assert cells(text, "q, k, v in float32: rank 16, share of the multiply-add peak") == [
        "25 to 100 %",
        none,
        "38 to 38 %",
    ]
    # 64 (8 + 8) / 64 more FLOPs: 17 times as many.
    by_flops = cells(text, "q, k, v in float32: rank 64 / three bare `nn.Linear`, divided by the FLOPs it adds")
    assert by_flops[2] == "1.59, largest 1.59 at 4x8"
    assert cells(text, "UNet in float32: PEFT rank 16 / no LoRA") == [none] * 3


def test_errors_are_shown_where_rows_have_them(tmp_path: Path) -> None:
    own = {"baseline": "nn.Linear", "cpu_family": "Zen 4", "p50_us": 1, "ratio_p50": 1, "peak_p50": 1}
    write(
        tmp_path / "lora-projections-float32-zen4.csv",
        *(
            {**own, "case": case, "provider": who, "error": error}
            for case, who, error in (
                ("4x8", "fastsample rank 16", 1e-7),
                ("4x8", "addmm rank 16", 2e-7),
                ("8x8", "fastsample rank 16", 3e-7),
                ("8x8", "addmm rank 16", 4e-7),
            )
        ),
    )
    shown = cells(
        families.table(families.read(tmp_path)), "q, k, v in float32: rank 16, largest error of ours / addmm's"
    )
    assert shown == ["0.75 at 8x8 (3.0e-07)", "not measured"]


def test_shares_of_the_triad(tmp_path: Path) -> None:
    rows = [
        {"benchmark": f"step ddim, {name} model", "case": "8x4x64x64", "provider": "fastsample", "baseline": "triad",
         "ratio_p50": ratio}
        for name, ratio in (("float16", 2), ("float16", 1.25), ("bfloat16", 1))
    ]  # fmt: skip
    write(tmp_path / "step-dtypes-sapphire-rapids.csv", *rows)
    text = families.table(families.read(tmp_path))
    assert cells(text, "step of a float16 model: share of the triad's speed") == ["not measured", "50 to 80 %"]
    assert cells(text, "step of a bfloat16 model: share of the triad's speed") == ["not measured", "100 to 100 %"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("lora-projections-float32-zen4-quick.csv", {"cpu_family": "Zen 4"}),
        ("lora-projections-float32-nvidia-h100.csv", {"cpu_family": "Zen 4", "device": "NVIDIA H100"}),
        ("lora-projections-float32-zen4.csv", {"cpu_family": "Zen 5"}),
        ("lora-projections-float32.csv", {}),
    ],
    ids=["quick", "gpu", "another family's name", "no family"],
)
def test_what_belongs_to_no_family_is_left_out(name: str, columns: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / name, *projections(2, **columns))
    assert families.read(tmp_path) == {}


def test_the_page_holds_the_table_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    """Renew it with python -m benchmarks.families --write."""
    page = DOCS.read_text()
    assert families.main([]) == 0
    printed = capsys.readouterr().out
    assert page.count(families.BEGIN) == page.count(families.END) == 1
    assert page.partition(families.BEGIN)[2].partition(families.END)[0].strip() == printed.strip()


def test_writing_replaces_what_is_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{families.BEGIN}\nold\n{families.END}\nafter\n")
    monkeypatch.setattr(families, "DOCS", page)
    assert families.main(["--results", str(tmp_path), "--write"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{families.BEGIN}\n\n| |") and text.endswith(f"|\n\n{families.END}\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="begin -->"):
        families.replaced("no markers", "")
