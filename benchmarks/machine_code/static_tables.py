"""The tables of docs/gpu.md, from the rows of gpu-static.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.common.markers import replace_between

BEGIN, END = "<!-- tables of benchmarks.gpu_static: begin -->", "<!-- end -->"
_Row = Mapping[str, str]


def replaced(document: str, tables: str) -> str:
    """The document with these tables between its markers."""
    return replace_between(document, BEGIN, END, tables.removesuffix("\n"))


def render(rows: Sequence[_Row]) -> str:
    """Resources, bounds and shortfalls."""
    return "\n".join([*_resources(rows), "", *_bounds(rows), "", *_shortfalls(rows), ""])


def _resources(rows: Sequence[_Row]) -> list[str]:
    lines = [
        "| kernel | registers | spills | stack | shared memory | least occupancy | 128-bit accesses | tensor cores |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for name, group in _groups(rows).items():
        nvidia = [row for row in group if row["arch"].startswith("sm_")]
        registers = sorted(int(row["registers"]) for row in nvidia)
        worst = min(nvidia, key=lambda row: float(row["occupancy"]))
        shown = next((row for row in nvidia if (row["arch"], row["dtype"]) == ("sm_90", "float32")), nvidia[0])
        tensor = dict.fromkeys(
            word
            for row in nvidia
            if on_tensor_cores(row["dtype"], row["variant"])
            for word in row["tensor"].split()
            if word.isalpha()
        )
        spills, stack, shared = (max(int(row[column]) for row in nvidia) for column in ("spills", "stack", "shared"))
        occupancy = f"{100 * float(worst['occupancy']):.0f} % ({worst['arch']})"
        wide = f"{shown['loads128']} of {shown['loads']}, {shown['stores128']} of {shown['stores']}"
        lines.append(
            f"| {name} | {registers[0]} to {registers[-1]} | {spills} | {stack} | {shared} | {occupancy} | {wide} "
            f"| {', '.join(tensor)} |"
        )
    return lines


def _bounds(rows: Sequence[_Row]) -> list[str]:
    bounded = [row for row in rows if row["bound"]]
    gpus = list(dict.fromkeys(row["gpu"] for row in sorted(bounded, key=lambda row: int(row["arch"][3:]))))
    lines = [
        f"| kernel | instructions, bytes an element | {' | '.join(gpus)} |",
        f"| --- | --- | {' | '.join('---:' for _ in gpus)} |",
    ]
    for name, group in _groups(bounded).items():
        shown = next((row for row in group if (row["arch"], row["dtype"]) == ("sm_90", "float32")), group[0])
        columns = []
        for gpu in gpus:
            worst = max(
                (row for row in group if row["gpu"] == gpu), key=lambda r: float(r["compute_by_memory"]), default=None
            )
            text = "" if worst is None else f"{float(worst['compute_by_memory']):.2f}"
            columns.append(text if worst is None or worst["bound"] == "memory" else f"**{text}** {worst['unit']}")
        per = f"{float(shown['instructions_per_element']):.0f}, {float(shown['bytes_per_element']):g}"
        lines.append(f"| {name} | {per} | {' | '.join(columns)} |")
    return lines


def _shortfalls(rows: Sequence[_Row]) -> list[str]:
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for shortfall in filter(None, row["shortfalls"].split("; ")):
            places.setdefault((_name(row), shortfall), []).append(f"{row['arch']} {row['dtype']}")
    if not places:
        return ["Shortfalls: none."]
    return ["Shortfalls:", "", *(f"- {name}: {what} ({', '.join(where)})" for (name, what), where in places.items())]


def on_tensor_cores(dtype: str, variant: str) -> bool:
    """Whether products are meant for them: all but those of float32 at full precision."""
    return dtype != "float32" or "tf32" in variant


def _groups(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(_name(row), []).append(row)
    return groups


def _name(row: _Row) -> str:
    return f"{row['source']} {row['op']} {row['variant']}".rstrip()
