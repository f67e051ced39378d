"""What is said of arguments and values that other libraries have, and of their objects in the place of ours."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import ParamSpec, TypeVar

from fastsample.vocabulary import ARGUMENTS, FROM_DIFFUSERS, NEARBY, OF_SCHEDULERS, OF_STEP, VALUES, Word

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])

_NEAR = 0.75  # difflib's ratio of a slip of the pen; that of sigmas and mask is 0.6


def no_argument(
    callee: str,
    name: str,
    arguments: Mapping[str, str],
    *,
    others: Mapping[str, str] | None = None,
    otherwise: str = "",
) -> str:
    """The message for an argument that a function does not have.

    Args:
        callee: the function, as messages call it.
        arguments: those that may be meant, each with where it belongs; "" is this function.
        others: more of them, which count only where the name is one of theirs.
        otherwise: what to say of a name of which nothing is known.

    Example:
        >>> no_argument("euler", "num_inference_steps", {"steps": ""})
        'euler has no argument num_inference_steps; did you mean steps=?'
        >>> no_argument("euler", "num_inference_steps", {"steps": "Euler(...)"})
        'euler has no argument num_inference_steps; did you mean steps= of Euler(...)?'
    """
    word = _word(name, arguments)
    meant = _suggestion(word, name, arguments)
    if arguments.get(name) or (name in (others or ()) and not meant):
        return f"{name} belongs to {arguments.get(name) or (others or {})[name]}, not here"
    note = word.note if not word.of or f"{word.of}=" in meant else ""
    if meant or note or not word.here:
        note = note or ("" if meant else otherwise)
        return f"{callee} has no argument {name}{meant}{note and (f' ({note})' if meant else f': {note}')}"
    here = word.here[0].partition("=")[0]
    return f"{callee} has no argument {name}{f', nor {here}=' if here != name else otherwise and f': {otherwise}'}"


def meant_argument(name: str, arguments: Mapping[str, str]) -> str:
    """What a message ends with, "; did you mean steps=?", where a name stands for one of these arguments, else ""."""
    return _suggestion(_word(name, arguments), name, arguments)


def meant_names(name: str, arguments: Iterable[str]) -> list[str]:
    """Those of these arguments that a name may stand for, the likeliest first.

    Example:
        >>> meant_names("num_inference_steps", ["seed", "steps"])
        ['steps']
    """
    here = dict.fromkeys(arguments, "")
    return [*dict.fromkeys(_phrases(_word(name, here), name, here).values())]


def _word(name: str, arguments: Mapping[str, str]) -> Word:
    """What is known of a name; of words that only some functions know, where this one has such an argument."""
    word = ARGUMENTS.get(name.lower(), Word(()))
    if any(phrase.partition("=")[0] in arguments for phrase in word.here):
        return word
    nearby = tuple(phrase for phrase in NEARBY.get(name.lower(), ()) if arguments.get(phrase[:-1]) == "")
    return Word(nearby) if nearby else word


def _phrases(word: Word, name: str, arguments: Mapping[str, str]) -> dict[str, str]:
    """What may be meant, each with its argument."""
    phrases = {phrase.format(name): phrase.partition("=")[0] for phrase in word.here}
    if not word.here and not word.note:
        phrases = {f"{near}=": near for near in difflib.get_close_matches(name, arguments, n=1, cutoff=_NEAR)}
    return {phrase: argument for phrase, argument in phrases.items() if argument in arguments}


def _suggestion(word: Word, name: str, arguments: Mapping[str, str]) -> str:
    places = {phrase: arguments[argument] for phrase, argument in _phrases(word, name, arguments).items()}
    if not places:
        return ""
    place = min(places.values())  # "", where one of them belongs here
    listed = " or ".join(phrase for phrase, there in places.items() if there == place)
    return f"; did you mean {listed}{place and f' of {place}'}?"


def meant_value(name: str, value: object, choices: Iterable[str]) -> str:
    """What a message ends with, "; did you mean 'v'?", where a value stands for one of the choices, else ""."""
    choices = list(choices)
    said = str(getattr(value, "name", value)).strip().lower().replace("-", "_").replace(" ", "_")
    words = VALUES.get(name, {})
    meant = [choice for choice in choices if said == choice.lower() or said in words.get(choice, "").split()]
    meant = meant or difflib.get_close_matches(said, choices, n=1, cutoff=_NEAR)
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def hinting(**elsewhere: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the same function, which says of an argument that it lacks what may be meant.

    Args:
        **elsewhere: arguments of other functions, and where each of them belongs.
    """

    def with_hints(function: Callable[P, R]) -> Callable[P, R]:
        own = dict.fromkeys(inspect.signature(function).parameters, "")

        @functools.wraps(function)
        def call(*given: P.args, **named: P.kwargs) -> R:
            for name in named:
                if name not in own:
                    raise _unknown_to(function, name, elsewhere | own)
            return function(*given, **named)

        return call

    return with_hints


def hinting_class(**elsewhere: str) -> Callable[[type[T]], type[T]]:
    """A decorator: the same class, which does so where it is made."""

    def with_hints(kind: type[T]) -> type[T]:
        kind.__init__ = hinting(**elsewhere)(kind.__init__)  # type: ignore[method-assign]
        return kind

    return with_hints


def answering(function: F) -> F:
    """A decorator for `def f(..., **unknown: Never)`: the function itself, whose signature does not show the last one.

    Where a call is short, this is what `hinting` costs too much for. The function raises `no_such_argument` where
    `unknown` is not empty.
    """
    shown = inspect.signature(function)
    parameters = [one for one in shown.parameters.values() if one.kind is not one.VAR_KEYWORD]
    function.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def no_such_argument(function: Callable[..., object], unknown: Iterable[str]) -> TypeError:
    """The error to raise in a function that is `answering`."""
    return _unknown_to(function, next(iter(unknown)), dict.fromkeys(inspect.signature(function).parameters, ""))


def _unknown_to(function: Callable[..., object], name: str, arguments: Mapping[str, str]) -> TypeError:
    own = [argument for argument in inspect.signature(function).parameters if argument != "self"]
    callee = function.__qualname__.removesuffix(".__init__")
    return TypeError(no_argument(callee, name, arguments, otherwise=f"it has {', '.join(own)}"))


def check_takes(name: str, function: Callable[..., object], call: str, given: str) -> None:
    """Raises TypeError where a function is seen not to take these arguments; what does not show its own passes.

    Args:
        call: the function and its arguments as messages have it, such as "callback(step)".
        given: what these arguments are.
    """
    arguments = call.partition("(")[2].rstrip(")").split(", ")
    if type(function) is FunctionType:  # nearly all, and a signature takes some 10 us
        code = function.__code__
        least = code.co_argcount - len(function.__defaults__ or ())
        if least <= len(arguments) <= code.co_argcount and not code.co_kwonlyargcount:
            return
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # of some that are written in C
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(f"{name} is called as {call}, with {given}; got one that takes {signature}") from None


def of_diffusers(value: object) -> str:
    """What to do with an object of diffusers that was given in place of one of ours, "" for anything else."""
    if hasattr(value, "set_timesteps") and hasattr(value, "config"):
        return f": {FROM_DIFFUSERS}"
    if is_pipeline(value):
        return (
            ": give a part of the pipeline, its unet or transformer as the model; fastsample.from_diffusers("
            "pipe.scheduler, steps=...) makes a sampler"
        )
    return ""


def is_pipeline(value: object) -> bool:
    """Whether this is a pipeline of diffusers."""
    return hasattr(value, "components") and hasattr(value, "scheduler")


def no_attribute_of_sampler(kind: type, name: str) -> str:
    """The message for an attribute that a sampler does not have."""
    if name not in OF_SCHEDULERS.split():
        return f"{kind.__name__!r} object has no attribute {name!r}"
    return (
        f"{kind.__name__} has no {name!r}: it is no scheduler of diffusers, and no pipeline can use it as "
        "one. It calls the model itself, sampler(pipe.unet, shape, ...). " + FROM_DIFFUSERS
    )


def of_step(name: object) -> str:
    """What a fastsample.Step has in place of this name, or key, of another library."""
    for attribute, words in OF_STEP.items():
        if name == attribute or str(name) in words.split():
            return f"did you mean step.{attribute}?"
    return f"a Step has the attributes {', '.join(OF_STEP)}"
