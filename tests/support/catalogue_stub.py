"""The stub of the list of samplers: what type checkers and editors are told of the functions made from classes.

`cd tests && python -m support.catalogue_stub` writes it, after a change of a sampler's arguments or docstring.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from types import FunctionType, ModuleType
from typing import Any

from fastsample.samplers import catalogue, multistep, sampling_function, solver, spaced
from support.paths import ROOT

FILE = ROOT / "fastsample" / "samplers" / "catalogue.pyi"
_HEAD = '''\
"""The list of all samplers, written from their classes by `python -m support.catalogue_stub`, run in tests/."""
'''


def stub() -> str:
    """The text of the file."""
    things = {name: getattr(catalogue, name) for name in catalogue.__all__}
    functions = {name: thing for name, thing in things.items() if _is_generated(thing)}
    imports = {name: thing.__module__ for name, thing in things.items() if name not in functions}
    for function in functions.values():
        imports |= _annotated(function)
    listed = "".join(f'    "{name}",\n' for name in catalogue.__all__)
    parts = [_HEAD, *_import_lines(imports), f"\n__all__ = [\n{listed}]\n", *map(_definition, functions.values())]
    return "".join(parts)


def _is_generated(thing: Any) -> bool:
    return isinstance(thing, FunctionType) and thing.__code__.co_filename.startswith("<")


def _definition(function: FunctionType) -> str:
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{stars}{parameter.name}: {parameter.annotation}{default}".replace("'", '"'))
    listed = "".join(f"    {parameter},\n" for parameter in parameters)
    docstring = "\n".join(f"    {line}".rstrip() for line in (function.__doc__ or "").splitlines()).strip()
    result = function.__annotations__["return"]
    return f'\ndef {function.__name__}(\n{listed}) -> {result}:\n    """{docstring}\n    """\n'


def _annotated(function: FunctionType) -> dict[str, str]:
    """The names in a function's annotations, each with the module that it comes from."""
    names = set(re.findall(r"\w+", " ".join(function.__annotations__.values()))) - {*vars(builtins), "None"}
    known: dict[str, str] = {}
    for module in (sampling_function, spaced, solver, multistep, sys.modules[function.__module__]):
        known |= _imported(module) | dict.fromkeys(_assigned(module), module.__name__)
    return {name: known[name] for name in names}


def _imported(module: ModuleType) -> dict[str, str]:
    """What a module imports by name, with the modules that it comes from."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    return {name.name: node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}


def _assigned(module: ModuleType) -> list[str]:
    """The names that a module gives to types of its own."""
    nodes = ast.parse(inspect.getsource(module)).body
    return [
        node.targets[0].id for node in nodes if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]


def _import_lines(imports: dict[str, str]) -> list[str]:
    """As ruff sorts them: Python's own, others', ours."""
    lines = []
    for belongs in (
        lambda module: module.split(".")[0] in sys.stdlib_module_names,
        lambda module: module.split(".")[0] not in {*sys.stdlib_module_names, "fastsample"},
        lambda module: module.split(".")[0] == "fastsample",
    ):
        lines.append("\n")
        for module in sorted({module for module in imports.values() if belongs(module)}):
            names = sorted(name for name, one in imports.items() if one == module)
            lines.append(f"from {module} import {', '.join(names)}\n")
    return lines


if __name__ == "__main__":
    FILE.write_text(stub())
