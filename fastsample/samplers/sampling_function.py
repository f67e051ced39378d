"""A function for every sampler, such as fastsample.ddim: it makes the sampler and calls it."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.options import Decode, Decoded, Undecoded
from fastsample.model import Model, prediction_of, schedule_of
from fastsample.samplers.function_docs import complete, function_docs
from fastsample.samplers.hints import FUNCTIONS, check_not_compiling
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.solver import Solver, schedule_for
from fastsample.schedule import Schedule

# The names in annotations of every function.
_NAMES = {
    "Model": Model,
    "Decode": Decode,
    "Decoded": Decoded,
    "Schedule": Schedule,
    "Sequence": Sequence,
    "Tensor": Tensor,
    "Undecoded": Undecoded,
    "Unpack": Unpack,
}


def sampling_function(kind: type[Sampler], name: str, x: str = "x") -> Callable[..., Any]:
    """The function `name(model, x, *, ..., **options)` of a sampler: `ddim = sampling_function(DDIM, "ddim")`.

    It takes the fields of the class, and what its call takes beside fastsample.Options, with their defaults and types,
    but that a schedule and a prediction which are not given are the model's. It is documented by the class. For type
    checkers and editors catalogue.pyi says the same.

    Args:
        kind: the class, a dataclass that is made as kind(schedule, ...), or kind(...) where it has no schedule.
        name: of the function.
        x: how the function calls what it starts from; "x0" for clean samples, which must be given as a tensor.

    Raises:
        TypeError: for a field without a default (but the schedule), with a default_factory or with init=False.
    """
    # Written out and compiled, as dataclasses do with __init__: to sort keywords in every call would cost short runs.
    own_fields = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for field in own_fields.values():
        if not field.init or (field.default is MISSING and field.name != "schedule"):
            raise TypeError(f"{kind.__name__}.{field.name} must be an argument with a default")
    of_call = kind.__call__.__kwdefaults__ or {}
    keywords = [*sorted(own_fields, key=lambda field: field != "steps"), *of_call]
    source = (
        f"def {name}(model, {x}, *, {', '.join(keywords)}, **options):\n"
        f"    check_not_compiling({kind.__name__})\n"
        f"{_of_model(kind, own_fields)}"
        f"    sampler = sampler_of({kind.__name__}, {_schedule(kind, own_fields)}{_passed(own_fields)})\n"
        f"    return sampler(model, {x}{_passed(of_call)}, **options)\n"
    )
    namespace = _names(kind)
    filename = f"<fastsample.{name}>"
    exec(compile(source, filename, "exec"), namespace)
    # For tracebacks, inspect.getsource and IPython's ??.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    function = namespace[name]
    FUNCTIONS[kind] = name
    types = {field.name: field.type for field in own_fields.values()}
    of_model = types.keys() & {"schedule", "prediction"}  # the model's own where they are not given
    types |= {name: _or_none(types[name]) for name in of_model}
    types |= {keyword: kind.__call__.__annotations__[keyword] for keyword in of_call}
    function.__kwdefaults__ = {field.name: field.default for field in own_fields.values()} | of_call
    function.__kwdefaults__ |= dict.fromkeys(of_model)
    function.__annotations__ = {
        "model": "Model",
        x: "Tensor" if x == "x0" else "Tensor | Sequence[int]",
        **{keyword: types[keyword] for keyword in keywords},
        "options": "Unpack[Undecoded]",
        "return": "Decoded",
    }
    function.__doc__ = function_docs(kind, ["model", x, *keywords, "**options"])
    complete(kind, [*own_fields])
    # typing.get_type_hints looks up the types of inherited fields where the class stands.
    module = vars(sys.modules[kind.__module__])
    module |= {name: value for name, value in namespace.items() if name not in module and name in _types(own_fields)}
    generated: Callable[..., Any] = function
    return generated


def _or_none(annotation: Any) -> Any:
    return f"{annotation.removesuffix(' | None')} | None" if isinstance(annotation, str) else annotation | None


def _types(own_fields: dict[str, Any]) -> set[str]:
    """The names in the types of these fields."""
    return set(re.findall(r"\w+", " ".join(str(field.type) for field in own_fields.values())))


def _of_model(kind: type[Sampler], own_fields: dict[str, Any]) -> str:
    if "prediction" not in own_fields:
        return ""
    return "    prediction = prediction_of(model, prediction)\n"


def _schedule(kind: type[Sampler], own_fields: dict[str, Any]) -> str:
    if "schedule" not in own_fields:
        return "None"
    return "schedule_for(prediction, model, schedule)" if issubclass(kind, Solver) else "schedule_of(model, schedule)"


def _passed(names: dict[str, Any]) -> str:
    return "".join(f", {name}={name}" for name in names if name != "schedule")


def _names(kind: type[Sampler]) -> dict[str, Any]:
    """The values of all names in the function's code and annotations; the namespace counts as the sampler's module."""
    namespace: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        namespace |= vars(sys.modules[base.__module__])
    called = {one.__name__: one for one in (sampler_of, schedule_of, schedule_for, prediction_of, check_not_compiling)}
    return namespace | _NAMES | called | {kind.__name__: kind}
