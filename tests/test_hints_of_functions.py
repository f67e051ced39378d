"""What functions with a plain signature say of arguments that they lack, and what that leaves alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastsample
from fastsample import DDPM, Schedule, Table, ops
from fastsample.hints import meant_names
from fastsample.integrations import k_diffusion
from fastsample.loop.options import Options
from fastsample.tables import COLUMNS
from fastsample.vocabulary import NEARBY, OF_RUNS

X = torch.zeros(2, 3)
TABLE = DDPM(Schedule.linear(10)).table
PACKED = ops.pack_linear([torch.eye(3)])
SIGMAS = torch.tensor([1.0, 0.0])


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


# Each function with what it needs, and by words of others what they stand for.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]] = {
    "step": (
        ops.step,
        (X, X, TABLE, 0),
        {
            "sample": "x",
            "noise_pred": "model_output",
            "timestep": "row",
            "generator": "seed= or noise",
            "variance_noise": "noise",
            "guidance_scale": "guidance",
            "rescale_cfg": "guidance_rescale",
            "bakend": "backend",
        },
    ),
    "randn": (ops.randn, (X.shape,), {"size": "shape", "generator": "seed", "torch_device": "device", "sead": "seed"}),
    "posterior": (ops.posterior, (X, X, TABLE, 0), {"t": "row", "sample": "x", "model_outptu": "model_output"}),
    "likelihood": (ops.likelihood, (X, X, X, TABLE, 0), {"t": "row", "x0": "x_start"}),
    "prior_bits": (ops.prior_bits, (X, TABLE), {"x0": "x_start", "tables": "table"}),
    "lora_linear": (ops.lora_linear, (X, PACKED), {"adapter": "adapters", "adapter_idx": "adapter_index"}),
    "pack_linear": (ops.pack_linear, ([torch.eye(3)],), {"bias": "biases"}),
    "pack_adapters": (ops.pack_adapters, (PACKED, []), {"group": "groups"}),
    "save_grid": (
        fastsample.save_grid,
        (X, "grid.png"),
        {"nrow": "columns", "normalize": "value_range", "range": "value_range", "fp": "path", "images": "samples"},
    ),
    "add_noise": (
        fastsample.add_noise,
        (X, 5),
        {"original_samples": "x0", "timesteps": "t", "generator": "seed= or noise", "prediction_type": "prediction"},
    ),
    "velocity": (fastsample.velocity, (X, X, 5), {"sample": "x0", "timesteps": "t"}),
    "sample_euler": (
        k_diffusion.sample_euler,
        (denoiser, X, SIGMAS),
        {
            "model_kwargs": "extra_args",
            "progress": "disable",
            "steps": "sigmas",
            "generator": "seed",
            "schurn": "s_churn",
        },
    ),
    "sample_dpmpp_2m_sde": (
        k_diffusion.sample_dpmpp_2m_sde,
        (denoiser, X, SIGMAS),
        {"solver": "solver_type", "noise": "noise_sampler"},
    ),
    "sample_ipndm": (k_diffusion.sample_ipndm, (denoiser, X, SIGMAS), {"order": "max_order"}),
}
WORDS = [(name, word) for name, (*_, words) in CALLS.items() for word in words]


@pytest.mark.parametrize(("name", "word"), WORDS)
def test_a_word_of_others(name: str, word: str) -> None:
    function, given, words = CALLS[name]
    message = f"{name} has no argument {word}; did you mean {words[word]}=?"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        function(*given, **{word: 1})


@pytest.mark.parametrize("name", CALLS)
def test_a_word_that_nobody_knows(name: str) -> None:
    function, given, _ = CALLS[name]
    listed = ", ".join(inspect.signature(function).parameters)
    with pytest.raises(TypeError, match=f"^{name} has no argument colour: it has {re.escape(listed)}$"):
        function(*given, colour=1)


@pytest.mark.parametrize("name", CALLS)
def test_signatures_show_the_arguments_alone(name: str) -> None:
    kinds = {one.kind for one in inspect.signature(CALLS[name][0]).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", [name for name in dir(ops) if inspect.isfunction(getattr(ops, name))])
def test_every_op_answers(name: str) -> None:
    assert name in CALLS


@pytest.mark.parametrize("name", k_diffusion.__all__)
def test_every_function_of_k_diffusion_answers(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} has no argument model_kwargs; did you mean extra_args=?"):
        getattr(k_diffusion, name)(denoiser, X, SIGMAS, model_kwargs={})


def test_what_other_functions_of_k_diffusion_have() -> None:
    with pytest.raises(TypeError, match=r"^eta belongs to sample_euler_ancestral and others that add noise, not here"):
        k_diffusion.sample_euler(denoiser, X, SIGMAS, eta=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("column", "meant"),
    [("clip", "limit"), ("alphas_cumprod", "alpha"), ("timesteps", "t"), ("threshold", "quantile"), ("boxs", "box")],
)
def test_columns_of_a_table(column: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no column {column}; its columns are .*; did you mean {meant}=\\?$"):
        Table([1, 0], **{column: 1.0})


def test_an_unknown_column_that_is_like_none() -> None:
    with pytest.raises(ValueError, match=r"no column colour; its columns are p, .*, e$"):
        Table([1, 0], colour=1.0)


def test_names_for_a_command_line() -> None:
    assert meant_names("num_inference_steps", ["steps", "seed"]) == ["steps"]
    assert meant_names("clip_sample", ["clip"]) == ["clip"]
    assert meant_names("colour", ["steps", "seed"]) == []


def test_the_lists_of_words_agree() -> None:
    of_functions = {name for function, *_ in CALLS.values() for name in inspect.signature(function).parameters}
    have = of_functions | inspect.signature(fastsample.Guidance).parameters.keys() | {*COLUMNS, "alpha", "sigma"}
    assert set(OF_RUNS) <= Options.__annotations__.keys()
    assert {phrase.removesuffix("=") for phrases in NEARBY.values() for phrase in phrases} <= have
