"""The docstrings of a sampler and its function, put together from its class, its base classes and a common part."""

from __future__ import annotations

import functools
import re
from inspect import cleandoc
from weakref import WeakKeyDictionary

# The entries of every sampler. A class may replace an entry, or add to it with "name: ... the text to add".
_EVERY_SAMPLER = """
Args:
    model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
        one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
        variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
        and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
        dropout and batch norm disturb samples, is warned of once.
    x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
        float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
        timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
    x0: the clean samples, a tensor of float16, bfloat16, float32, or float64 for the reference backend. Never
        modified.
    schedule: the one the model was trained with{of_function}.
    original_steps: how many timesteps the model was distilled at.
    prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"{of_the_model}.
    clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
        for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
    correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
    final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` as in Stable Diffusion.
    **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
        model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
        known, strength, start_step, callback, progress, out, backend, device.
"""

_OF_MODEL = """; default `model.schedule`, also that of the one model which a
        wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found"""

_PREDICTION_OF_MODEL = """; default
        `model.prediction`, found as the schedule is, else "epsilon\""""

_DOCSTRING = """\
{text}

Args:
{arguments}

Calls with the same arguments share a fastsample.{kind}, whose table takes some 0.3 ms to make.
{schedules}See `{kind}.prepare` for short runs.

Returns:
    {result}, float32 (float64 for a float64 {x}), without gradients unless {x} requires them: then the
    differentiable reference runs.

Raises:
    ValueError, TypeError: for arguments that cannot work, before the model is called.
{errors}
{example}"""

_SCHEDULES = "Make a schedule once, not in every call: two are told apart by identity.\n"


def function_docs(kind: type, parameters: list[str]) -> str:
    """The docstring of the function of this class, with an entry for each of the parameters."""
    sections = _sections(kind.__doc__)
    entries = _entries(kind)
    x = "x0" if "x0" in parameters else "x"
    return _DOCSTRING.format(
        text=sections[""],
        arguments="\n".join(f"    {name}: {entries[name]}" for name in parameters if name in entries)
        .replace("{of_function}", _OF_MODEL)
        .replace("{of_the_model}", _PREDICTION_OF_MODEL),
        kind=kind.__name__,
        schedules=_SCHEDULES if "schedule" in parameters else "",
        result="The noise" if x == "x0" else "The sample",
        x=x,
        errors=sections.get("Raises", "") + "\n" if "Raises" in sections else "",
        example="Example:\n" + sections["Example"] if "Example" in sections else "",
    ).rstrip()


# Docstrings of classes before `complete` replaced them.
_as_written: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


def complete(kind: type, fields: list[str]) -> None:
    """Replaces the docstring of the class by one with an entry for each of its fields."""
    _as_written[kind] = kind.__doc__
    entries = _entries(kind)
    arguments = "\n".join(f"    {name}: {entries[name]}" for name in fields if name in entries)
    if not arguments:  # python -OO, where dataclasses put the signature into the docstring's place
        return
    arguments = arguments.replace("{of_function}", "").replace("{of_the_model}", "")
    sections = {**_sections(kind.__doc__), "Args": arguments}
    order = ("Args", "Raises", "Example")
    kind.__doc__ = "\n\n".join([sections[""], *(f"{name}:\n{sections[name]}" for name in order if name in sections)])


def _entries(kind: type) -> dict[str, str]:
    """The entry of each argument; a class's own docstring overrides those of its bases."""
    documented = dict(_arguments(_EVERY_SAMPLER))
    call = _arguments(kind.__call__.__doc__)
    documented |= {name: text for name, text in call.items() if name not in documented}
    for base in reversed(kind.__mro__):
        for name, text in _arguments(_as_written.get(base, base.__doc__)).items():
            if text.startswith("... "):
                text = f"{documented[name]}\n        {text.removeprefix('... ')}"
            documented[name] = text
    return documented


@functools.lru_cache(64)
def _arguments(docstring: str | None) -> dict[str, str]:
    """The entries of the section Args, whose further lines keep their indentation."""
    entries: dict[str, str] = {}
    for names, text in re.findall(
        r"^    ((?:\*\*)?\w+(?:, \w+)*): (.*(?:\n(?:        .*)?$)*)", _sections(docstring).get("Args", ""), re.M
    ):
        entries |= dict.fromkeys(names.split(", "), text.rstrip())
    return entries


@functools.lru_cache(64)
def _sections(docstring: str | None) -> dict[str, str]:
    """The text of each section by its name; the text before the first section has the name ""."""
    text, *parts = re.split(r"^(Args|Returns|Raises|Example):\n", cleandoc(docstring or ""), flags=re.M)
    return {"": text.rstrip(), **{name: body.rstrip() for name, body in zip(parts[::2], parts[1::2], strict=True)}}
