"""Which torch modules a model calls: those behind wrappers, partial applications, methods, closures and lambdas."""

from __future__ import annotations

import dis
import functools
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from fastsample.model.modules import only_children, unwrapped_module

_DEPTH = 3  # functions that call functions, and attributes of attributes
_PLAIN = (type(None), Tensor, int, float, str, type)


def called_modules(model: Any) -> tuple[nn.Module, ...]:
    """The outermost torch modules that a callable is seen to call, without the wrappers that hide their attributes.

    A function is seen to call what its closure, its defaults and the globals it names hold, and what these hold under
    an attribute that it names, as in `lambda x, t: pipe.unet(x, t).sample`. Nothing is run and no property is read.
    """
    modules: dict[int, nn.Module] = {}
    _gather(model, modules, _DEPTH)
    return tuple(modules.values())


def attribute(model: Any, name: str, kind: type) -> Any:
    """The attribute of a model, else the one of this kind that all modules it calls agree on, None where there is none.

    A module without it may hold a single one, of which it is then asked.
    """
    value = getattr(model, name, None)
    if value is not None:
        return value
    parts = (part for module in called_modules(model) for part in only_children(module))
    held = [value for part in parts if isinstance(value := getattr(part, name, None), kind)]
    alike = all(value is held[0] or (kind is str and value == held[0]) for value in held)
    return held[0] if held and alike else None


def _gather(value: Any, modules: dict[int, nn.Module], depth: int) -> None:
    if isinstance(value, nn.Module):
        inner = unwrapped_module(value)
        modules[id(inner)] = inner
    elif depth <= 0:
        return
    elif isinstance(value, FunctionType):
        _gather_from_function(value, None, modules, depth)
    elif isinstance(value, MethodType):
        if isinstance(value.__self__, nn.Module):
            _gather(value.__self__, modules, depth)
        elif isinstance(value.__func__, FunctionType):
            _gather_from_function(value.__func__, value.__self__, modules, depth)
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            _gather(part, modules, depth - 1)
    elif callable(value) and isinstance(call := type(value).__call__, FunctionType):
        _gather_from_function(call, value, modules, depth)


def _gather_from_function(function: FunctionType, owner: Any, modules: dict[int, nn.Module], depth: int) -> None:
    """What a function is seen to call, where it is a method with what its owner holds."""
    global_names, attribute_names = _names(function.__code__)
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    if function.__defaults__ is not None:
        held += function.__defaults__
    if function.__kwdefaults__ is not None:
        held += function.__kwdefaults__.values()
    for name in global_names:
        value = function.__globals__.get(name)
        # Functions of other files belong to libraries.
        if not isinstance(value, FunctionType) or value.__globals__ is function.__globals__:
            held.append(value)
    for value in held:
        if not isinstance(value, _PLAIN):
            _gather(value, modules, depth - 1)
            _gather_attributes(value, attribute_names, modules, depth - 1)
    if owner is not None:
        _gather_attributes(owner, attribute_names, modules, depth - 1)
        for name in attribute_names & vars(type(owner)).keys() if depth > 1 else ():
            if isinstance(method := vars(type(owner))[name], FunctionType):
                _gather_from_function(method, owner, modules, depth - 1)


def _gather_attributes(value: Any, names: frozenset[str], modules: dict[int, nn.Module], depth: int) -> None:
    """What a function that names these attributes is seen to call of an object's own."""
    attributes = getattr(value, "__dict__", None)
    if depth < 0 or isinstance(value, nn.Module | FunctionType) or type(attributes) is not dict:
        return
    for name in names & attributes.keys():
        inner = attributes[name]
        if isinstance(inner, _PLAIN) or (isinstance(value, ModuleType) and not isinstance(inner, nn.Module)):
            continue
        _gather(inner, modules, depth)
        _gather_attributes(inner, names, modules, depth - 1)


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that a function, or one written inside it, names."""
    global_names, attribute_names = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            global_names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attribute_names.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            global_names |= inner[0]
            attribute_names |= inner[1]
    return frozenset(global_names), frozenset(attribute_names)
