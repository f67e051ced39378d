"""Models by a text: those of the zoo, what a function of one's own returns, and folders of diffusers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from fastsample import zoo
from fastsample.schedule import Schedule
from fastsample.zoo.autoencoder import Autoencoder

FORMS = (
    "zoo:digits, zoo:latent-digits, zoo:STUDENT, zoo:FILE of fastsample train, python:MODULE:FUNCTION, whose result "
    "is a model, zoo:FILE of fastsample distill, or diffusers:PATH, a folder of a UNet2DModel or of its pipeline"
)

_BUNDLED = tuple(zoo.FILES)


def named_model(text: str) -> tuple[Any, Autoencoder | None]:
    """(model, autoencoder) that a text names; the autoencoder of a model of latents, which only the zoo has.

    Raises:
        ValueError: the text is of no form of FORMS, or its function returns no model.
        ImportError, FileNotFoundError: the model cannot be had.
    """
    kind, _, rest = text.partition(":")
    if kind == "zoo" and rest:
        return _of_zoo(rest)
    if kind == "diffusers" and rest:
        return _of_diffusers(Path(rest)), None
    if kind == "python" and rest.count(":") == 1:
        return _of_python(*rest.split(":")), None
    raise ValueError(f"model must be {FORMS}; got {text!r}")


def absolute(text: str) -> str:
    """The same model for a process in another folder: a path is spelled out.

    Example:
        >>> absolute("zoo:digits")
        'zoo:digits'
        >>> absolute("diffusers:unet") == f"diffusers:{Path.cwd() / 'unet'}"
        True
    """
    kind, _, rest = text.partition(":")
    is_path = kind == "diffusers" or (kind == "zoo" and Path(rest).exists() and rest not in _BUNDLED)
    return f"{kind}:{Path(rest).absolute()}" if is_path else text


def named_function(text: str, name: str) -> Any:
    """The function of "python:MODULE:FUNCTION", from a module that is installed or lies in the current folder.

    Raises:
        ValueError: the text has another form, or the module no such function. ImportError: there is no such module.
    """
    kind, _, rest = text.partition(":")
    module, _, function = rest.partition(":")
    if kind != "python" or not module or not function:
        raise ValueError(f"{name} must be python:MODULE:FUNCTION, got {text!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it, and the command that pip makes has not
    try:
        found: Any = getattr(importlib.import_module(module), function, None)
    except ImportError:
        raise
    except Exception as error:  # the user's own, and anything
        raise ValueError(f"{name}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{name}: {module} has no function {function!r}")
    return found


def _of_zoo(name: str) -> tuple[Any, Autoencoder | None]:
    if name == "digits":
        return zoo.digits(), None
    if name == "latent-digits":
        return zoo.latent_digits()
    if name in _BUNDLED:
        return zoo.digits(name), None
    if _is_of_distill(Path(name)):
        # Students know their samplers, and stand above the sets that are drawn with them.
        return importlib.import_module("fastsample.distill").load(name), None
    return zoo.load(name), None


def _is_of_distill(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "fastsample_student" in (file.metadata() or {})
    except Exception:  # zoo.load says what is wrong with it
        return False


def _of_python(module: str, name: str) -> Any:
    function = named_function(f"python:{module}:{name}", "model")
    try:
        model = function()
    except Exception as error:  # the user's own, and anything
        raise ValueError(f"model: {name}() raised {type(error).__name__}: {error}") from error
    if not callable(model):
        raise ValueError(f"model: {name}() must return a model, got {type(model).__name__}")
    return model


def _of_diffusers(path: Path) -> nn.Module:
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError as error:
        raise ImportError("model diffusers:PATH needs diffusers: pip install diffusers") from error
    inner = "unet" if (path / "unet").is_dir() else None
    if not (path / (inner or "") / "config.json").is_file():
        raise FileNotFoundError(f"model: no UNet at {path}: give a folder of save_pretrained")
    unet: nn.Module = UNet2DModel.from_pretrained(path, subfolder=inner)
    if any((path / name).is_dir() for name in ("vae", "vqvae")):
        raise ValueError(f"model: {path} is a pipeline of latents, whose autoencoder would be left out")
    if (path / "scheduler").is_dir():
        scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        stated, written = scheduler.config.prediction_type, path / "scheduler" / "scheduler_config.json"
        kind = str(json.loads(written.read_text()).get("_class_name", ""))
        predictions = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
        if "Flow" in kind or "EDM" in kind or stated not in predictions:
            raise ValueError(f"model: {path / 'scheduler'} is a {kind} of {stated!r}, of which no schedule is known")
        facts: Any = unet
        facts.schedule = Schedule.from_betas(scheduler.betas.double().numpy())
        facts.prediction = predictions[stated]
    return unet
