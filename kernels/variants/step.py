"""The step's specialisations, mode by mode."""

from __future__ import annotations

from typing import Any

from fastsample.kernels.blocks import QUADS
from fastsample.kernels.coefficients import ALWAYS, NEVER, SOMETIMES
from fastsample.kernels.step import SUMMED_QUADS, step_kernel
from fastsample.kernels.variants import BYTES, DTYPES, Variant


def variants() -> list[Variant]:
    """What the static checks compile."""
    mixed = dict.fromkeys(("P", "Q", "B", "C1", "S", "LIMITED"), SOMETIMES.value)
    specialisations = []
    for dtype in DTYPES:
        specialisations += [
            _variant("noise-free", dtype, "A D"),
            _variant("clipped", dtype, "P Q A B LIMITED"),
            _variant("noisy", dtype, "A D S", "keys"),
            _variant("noisy, clipped", dtype, "P Q A B S LIMITED", "keys"),
            _variant("noisy, learned variance", dtype, "P Q A B S G1 LIMITED", "keys", M_PARTS=2),
            _variant("noisy, log density", dtype, "A D S", "keys log_prob_sums", QUADS=SUMMED_QUADS),
            _variant(
                *("learned variance, log density", dtype, "P Q A B S G1 LIMITED", "keys log_prob_sums"),
                M_PARTS=2,
                QUADS=SUMMED_QUADS,
            ),
            _variant("clipped by element", dtype, "P Q A B LIMITED", "low high"),
            _variant("guided", dtype, "A D", "guidance"),
            _variant("two histories", dtype, "P Q A C1 C2 D", "h1 h2 x0_out"),
            _variant("three epsilons, clipped", dtype, "P Q A B C1 C2 C3 LIMITED ENTRY", "h1 h2 h3 x0_out"),
            _variant("next input twice", dtype, "A D", "input_out", INPUTS=2),
            _variant("guided, rescaled, dynamic threshold", dtype, "P A LIMITED Q B", "guidance factors bounds"),
            _variant("rows of samples", dtype, "A D", "row_of keys h1 x0_out", **mixed),
        ]
    return [*specialisations, _variant("noisy, odd size", "float32", "A D S", "keys", ALIGNED=False)]


def _variant(name: str, dtype: str, used: str, present: str = "", **changed: Any) -> Variant:
    """A specialisation: the coefficients that every row uses and the tensors present, other than those of any step."""
    floats = ("rows", "x", "z", "guidance", "factors", "bounds", "h1", "h2", "h3", "out", "x0_out", "low", "high")
    types = dict.fromkeys(floats, "*fp32")
    types |= {"row_of": "*i64", "keys": "*i64", "m": f"*{DTYPES[dtype]}", "input_out": f"*{DTYPES[dtype]}"}
    types["log_prob_sums"] = "*fp64"
    present_tensors = {"rows", "x", "m", "out", *present.split()}
    names = ("P", "Q", "A", "B", "C1", "C2", "C3", "D", "S", "G1", "LIMITED", "ENTRY")
    constants: dict[str, Any] = dict.fromkeys(names, NEVER.value)
    constants |= dict.fromkeys(used.split(), ALWAYS.value)
    constants |= {"M_PARTS": 1, "INPUTS": 0, "QUADS": QUADS, "ALIGNED": True, **changed}
    signature = {argument: types.get(argument, "i64") for argument in step_kernel.arg_names}
    constants |= {argument: None for argument in types if argument not in present_tensors}
    signature |= dict.fromkeys(constants, "constexpr")
    streams = 4 * len(present_tensors & {"x", "z", "h1", "h2", "h3", "out", "x0_out"})
    streams += BYTES[dtype] * (1 + ("guidance" in present_tensors) + bool(constants["G1"]) + constants["INPUTS"])
    return Variant(
        "step", name, dtype, step_kernel, signature, constants, tuple(present_tensors), 4 * constants["QUADS"], streams
    )
