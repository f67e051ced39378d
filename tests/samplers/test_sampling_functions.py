"""The functions that are made from the samplers' classes: what they take, say of themselves, and tell type checkers."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, Schedule
from fastsample.loop.options import Decoded
from fastsample.samplers import catalogue
from fastsample.samplers.sampling_function import Model, sampling_function
from support import catalogue_stub
from support.ahead import Ahead
from support.chains import toy_model
from support.paths import ROOT

# Of each function its class, as its docstring says.
FUNCTIONS = {
    name: getattr(fastsample, re.findall(r"share a fastsample\.(\w+)", getattr(catalogue, name).__doc__)[0])
    for name in catalogue.__all__
    if inspect.isfunction(getattr(catalogue, name))
}


def arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The entries of the docstring's section Args, by name."""
    section = (function.__doc__ or "").split("\nArgs:\n")[1].split("\n\nCalls with")[0]
    entries = [entry.rstrip() for entry in re.split(r"^    (?=\S)", section, flags=re.M) if entry]
    return {name: text for name, _, text in (entry.partition(": ") for entry in entries)}


def test_every_sampler_has_its_function() -> None:
    kinds = {thing for thing in vars(fastsample).values() if inspect.isclass(thing) and "table_from" in dir(thing)}
    assert kinds == {*FUNCTIONS.values(), fastsample.Sampler}
    assert {*catalogue.__all__} == {*FUNCTIONS, *(kind.__name__ for kind in FUNCTIONS.values())}
    assert {*catalogue.__all__} <= {*fastsample.__all__}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_its_class_takes(name: str) -> None:
    parameters = inspect.signature(getattr(fastsample, name)).parameters
    for field in fields(FUNCTIONS[name]):  # type: ignore[arg-type]
        if field.name not in ("schedule", "prediction"):
            assert parameters[field.name].default == field.default
            assert parameters[field.name].annotation == field.type
        else:  # the model's own
            assert parameters[field.name].default is None
            assert parameters[field.name].annotation.endswith(" | None")
    own = {field.name for field in fields(FUNCTIONS[name])}  # type: ignore[arg-type]
    assert {*parameters} - own <= {"model", "x", "x0", "schedule", "guidance_embedding", "decode", "options"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(fastsample, name)
    documented = arguments(function)
    wanted = ["**options" if one == "options" else one for one in inspect.signature(function).parameters]
    assert [*documented] == wanted
    assert all(not text.startswith(("...", "as for")) for text in documented.values())
    sections = [line for line in inspect.getdoc(function).splitlines() if line in ("Args:", "Returns:", "Raises:")]
    assert sections == ["Args:", "Returns:", "Raises:"]


def test_what_a_class_adds_follows_what_holds_for_all() -> None:
    clip = arguments(fastsample.ddim)["clip"].splitlines()
    assert clip[0].startswith("clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays")
    assert clip[1].endswith("; None for none of them.")
    assert clip[2].strip().startswith("Needed where a list's first timestep is next to pure noise")
    assert arguments(fastsample.heun)["steps"].startswith("times visited; row, `noise`")
    assert "scaled_linear" in arguments(fastsample.tcd)["schedule"]
    assert "scaled_linear" not in arguments(fastsample.ddim)["schedule"]
    # Through two classes: what Inversion adds, and then EulerInverse.
    assert (
        arguments(fastsample.euler_invert)["clip"].splitlines()[-1].strip()
        == "But a flow keeps the model's own epsilon."
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_counts_as_one_of_its_module(name: str) -> None:
    function = getattr(fastsample, name)
    assert (function.__name__, function.__qualname__) == (name, name)
    assert function.__module__ == FUNCTIONS[name].__module__
    assert pickle.loads(pickle.dumps(function)) is function
    hints = get_type_hints(function)
    assert hints["return"] is Decoded and hints["model"] == Model
    assert inspect.signature(function, eval_str=True).return_annotation is Decoded


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name: str) -> None:
    """Those of the class are run with its module; a function shows the same ones."""
    found = doctest.DocTestFinder().find(getattr(fastsample, name), name)
    of_class = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name)
    assert [example.source for example in found[0].examples] == [example.source for example in of_class[0].examples]
    assert any(f"{name}(" in example.source for example in found[0].examples), "the function itself"


def test_the_errors_of_a_call_are_those_of_a_function() -> None:
    with pytest.raises(TypeError, match=r"ddim\(\) missing 1 required positional argument: 'x'"):
        fastsample.ddim(toy_model)
    with pytest.raises(TypeError, match=r"ddim\(\) takes 2 positional arguments but 3 were given"):
        fastsample.ddim(toy_model, (1, 2), 5)
    with pytest.raises(TypeError, match="DDIM has no argument etta; did you mean eta="):
        fastsample.ddim(toy_model, (1, 2), etta=1.0)
    with pytest.raises(TypeError, match=r"ddim_invert\(\) missing 1 required positional argument: 'x0'"):
        fastsample.ddim_invert(toy_model, x=torch.ones(1, 2))


# What type checkers are told


def test_the_stub_says_what_the_classes_say() -> None:
    """`cd tests && python -m support.catalogue_stub` renews it."""
    assert catalogue_stub.FILE.read_text() == catalogue_stub.stub()


def of_a_user() -> subprocess.CompletedProcess[str]:
    mypy = shutil.which("mypy", path=str(Path(sys.executable).parent)) or shutil.which("mypy")
    if mypy is None:
        pytest.skip("mypy is missing")
    command = [mypy, "tests/support/typed_user.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


OF_A_USER = Ahead(of_a_user)


@pytest.mark.ahead(OF_A_USER)
def test_type_checkers_know_every_argument_and_result() -> None:
    done = OF_A_USER.result()
    assert done.returncode == 0, done.stdout + done.stderr


# A sampler of one's own

OWN = '''
"""Sampling with a share of the noise drawn afresh in every step."""
from dataclasses import dataclass
import numpy as np
from fastsample.samplers.columns import direction_table
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.spaced import Spaced

@dataclass(frozen=True, kw_only=True)
class Renoised(Spaced):
    """Samples with x' = alpha' x0 + sigma' (sqrt(1 - fresh) epsilon + sqrt(fresh) z).

    Args:
        fresh: the share, in [0, 1]; 0 is DDIM.
        steps: ... More do no harm.
    """

    steps: int = 50
    fresh: float = 0.1
    prediction: str = "epsilon"

    def _rows(self, t, alpha, sigma):
        direction, s = sigma[1:] * np.sqrt(1 - self.fresh), sigma[1:] * np.sqrt(self.fresh)
        own = {"prediction": self.prediction, "clip": None, "rederive_epsilon": False}
        return direction_table(t, alpha, sigma, direction, s, **own)

renoised = sampling_function(Renoised, "renoised")
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "renoised_sampler.py").write_text(OWN)
    spec = importlib.util.spec_from_file_location("renoised_sampler", tmp_path / "renoised_sampler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "renoised_sampler", module)
    spec.loader.exec_module(module)
    return module


def test_a_sampler_is_a_class_with_rows(own: ModuleType) -> None:
    run: Callable[..., Tensor] = partial(
        own.renoised, toy_model, (2, 3, 5), schedule=Schedule.linear(), steps=7, seed=1
    )
    want = fastsample.ddim(toy_model, (2, 3, 5), schedule=Schedule.linear(), steps=7, seed=1)
    assert torch.equal(run(fresh=0.0), want)
    sampler = own.Renoised(Schedule.linear(), steps=7, fresh=0.5)
    assert torch.equal(run(fresh=0.5), sampler(toy_model, (2, 3, 5), seed=1)) and not torch.equal(run(), want)
    np.testing.assert_allclose(sampler.table.s, DDIM(Schedule.linear(), steps=7).table.sigma[1:] * np.sqrt(0.5))
    assert repr(sampler).endswith("steps=7, timesteps='auto', fresh=0.5, prediction='epsilon')")


def test_its_function_is_whole(own: ModuleType) -> None:
    assert [*inspect.signature(own.renoised).parameters] == [
        *("model", "x", "steps", "schedule", "timesteps", "fresh", "prediction", "decode", "options")
    ]
    documented = arguments(own.renoised)
    assert documented["fresh"] == "the share, in [0, 1]; 0 is DDIM."
    assert documented["steps"].endswith("More do no harm.") and documented["steps"].startswith("model calls")
    assert get_type_hints(own.renoised)["fresh"] is float
    assert pickle.loads(pickle.dumps(own.renoised)) is own.renoised
    with pytest.raises(TypeError, match="Renoised has no argument fresch; did you mean fresh="):
        own.renoised(toy_model, (1, 2), fresch=1.0)


def test_without_docstrings(own: ModuleType) -> None:
    """As under python -OO."""
    own.Renoised.__doc__ = None
    function = sampling_function(own.Renoised, "renoised")
    assert function(toy_model, (1, 2), steps=2, seed=0).shape == (1, 2)


@pytest.mark.parametrize("name", [name for name in catalogue.__all__ if isinstance(getattr(catalogue, name), type)])
def test_a_class_documents_its_fields_and_its_types_resolve(name: str) -> None:
    kind = getattr(catalogue, name)
    names = {field.name for field in fields(kind)}
    assert names <= set(re.findall(r"^    (\w+): ", kind.__doc__, re.M)) and not re.search(
        r"^    \w+: \.\.\. ", kind.__doc__, re.M
    )
    assert names <= set(get_type_hints(kind.__init__))


def test_the_source_of_a_function_is_found() -> None:
    assert inspect.getsource(fastsample.ddim).startswith("def ddim(model, x, *, steps, ")


def test_a_sampler_has_no_argument_of_others() -> None:
    assert not hasattr(DDIM, "original_steps") and not hasattr(
        fastsample.DDPM(Schedule.linear(8)), "final_alpha_cumprod"
    )


def test_a_field_without_a_default_is_refused(own: ModuleType) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unready(own.Renoised):  # type: ignore[misc, name-defined]
        power: float

    with pytest.raises(TypeError, match="power must be an argument with a default"):
        sampling_function(Unready, "unready")


def test_import_without_docstrings() -> None:
    code = (
        "import fastsample; print(fastsample.ddim(lambda x, t: x, (1, 2), schedule=fastsample.Schedule.linear()).shape)"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr
