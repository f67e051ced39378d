"""What is said to users of other libraries: their words, their values, their callbacks, their objects in our places."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, TCD, Batcher, Consistency, DPMSolver, Euler, Options, Sampler, Schedule, Step
from fastsample.hints import meant_value
from fastsample.samplers.diffusers.door import KINDS
from fastsample.samplers.hints import FUNCTIONS, no_option
from fastsample.times import timesteps as spacings
from fastsample.times.align_your_steps import PUBLISHED
from fastsample.vocabulary import ARGUMENTS, VALUES

SHAPE = (2, 3)
LINEAR = Schedule.linear(100)
SCHEDULER = diffusers.DDIMScheduler()
UNKNOWN = "the model's own keywords go into model_kwargs="


def model(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model is not called")


def sampled(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def taken(kind: type[Sampler]) -> set[str]:
    """What a sampler takes where it is made and where it is called."""
    return {"model", "x", *Options.__annotations__, *(one.name for one in dataclasses.fields(kind))}  # type: ignore[arg-type]


def of_schedulers() -> Iterator[str]:
    """What the schedulers of diffusers that have an equivalent are given."""
    for name in KINDS:
        kind = getattr(diffusers, name)
        for method in (kind.__init__, kind.set_timesteps, kind.step):
            yield from inspect.signature(method).parameters


def of_pipelines() -> Iterator[str]:
    """What some pipelines are called with, by their sources, which need more than is installed."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "qwenimage"):
        for node in ast.walk(ast.parse((folder / name / f"pipeline_{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__call__":
                yield from (argument.arg for argument in node.args.args)


K_DIFFUSION = """
    sigmas extra_args callback disable s_churn s_tmin s_tmax s_noise eta noise_sampler solver_type order sigma_min
    sigma_max rho atol rtol h_init pcoeff icoeff dcoeff accept_safety
"""
IMPROVED_DIFFUSION = """
    shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress eta betas model_mean_type model_var_type
    rescale_timesteps use_timesteps timestep_respacing diffusion_steps noise_schedule learn_sigma sigma_small
    predict_xstart
"""
LATENT_DIFFUSION = """
    batch_size conditioning callback img_callback quantize_x0 mask x0 temperature noise_dropout score_corrector verbose
    x_T log_every_t unconditional_guidance_scale unconditional_conditioning ddim_eta
"""
WORDS = {
    "schedulers of diffusers": [*of_schedulers()],
    "pipelines of diffusers": [*of_pipelines()],
    "k-diffusion": K_DIFFUSION.split(),
    "improved-diffusion": IMPROVED_DIFFUSION.split(),
    "latent diffusion": LATENT_DIFFUSION.split(),
    "torch": ["generator", "dtype", "requires_grad", "manual_seed", "pin_memory", "layout"],
}


@pytest.mark.parametrize("library", WORDS)
def test_every_word_of_a_library_is_known(library: str) -> None:
    assert len(WORDS[library]) > 5
    ours = taken(Euler) | {"self", "args", "kwargs"}
    unknown = {word for word in WORDS[library] if word not in ours and UNKNOWN in str(no_option(Euler, word))}
    assert unknown == set()


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)
def test_what_is_suggested_is_there(kind: type[Sampler]) -> None:
    for word in (*ARGUMENTS, "sigma", "device_map", "guidances", "stepz"):
        message = str(no_option(kind, word))
        for phrase in re.findall(r"(\w+)=", (re.findall("did you mean (.*?)[?]", message) or [""])[0]):
            assert phrase in taken(kind), message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **k: fastsample.ddim(model, SHAPE, **k), "did you mean steps= of ddim(...) or DDIM(...)?"),
        (lambda **k: DDIM(LINEAR).prepare(model, SHAPE, **k), "did you mean steps= of ddim(...) or DDIM(...)?"),
        (lambda **k: DDIM(LINEAR, **k), "DDIM has no argument num_inference_steps; did you mean steps=?"),
        (Consistency, "Consistency has no argument num_inference_steps, nor steps="),
        (lambda **k: fastsample.nll(model, torch.zeros(SHAPE), **k), "nll has no argument num_inference_steps; did"),
        (lambda **k: fastsample.spaced_timesteps(100, **k), "did you mean steps=?"),
        (lambda **k: Batcher(model, DDIM(LINEAR), batch=2, **k), "did you mean steps= of the sampler?"),
        (DDIM(LINEAR).prepare(sampled, SHAPE), "did you mean steps= of the sampler?"),
    ],
    ids=["function", "prepare", "class", "without", "nll", "spaced_timesteps", "Batcher", "Prepared"],
)
def test_a_word_means_what_the_callee_takes(call: Callable[..., object], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(num_inference_steps=5)


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (DPMSolver, "sigmas", "did you mean timesteps="),
        (
            DPMSolver,
            "latents",
            "did you mean x=? (x is the state to start from, and for samplers also the shape (B, ...)",
        ),
        (DPMSolver, "callback_on_step_end", "did you mean callback=? (it is called with a fastsample.Step"),
        (DPMSolver, "eta", "did you mean sde=True"),
        (TCD, "eta", "did you mean gamma="),
        (Euler, "eta", "eta belongs to fastsample.ddim, not here"),
        (Euler, "mu", "did you mean shift=math.exp(mu) of euler(...) or Euler(...)?"),
        (DDIM, "use_karras_sigmas", ": solvers, such as fastsample.euler, have timesteps='karras'"),
        (DDPM, "clip_denoised", "did you mean clip=1.0 of ddpm(...) or DDPM(...)? (the number is the range)"),
        (DDIM, "scheduler", ": fastsample.from_diffusers(scheduler, steps=...) makes a sampler"),
        (DDIM, "noise_pred", ": a sampler calls its model itself"),
        (DDIM, "Num_Inference_Steps", "did you mean steps="),
        (DDIM, "steps", "steps belongs to ddim(...) or DDIM(...), not here"),
        (DDIM, "mask_of_the_words", UNKNOWN),
    ],
)
def test_words(kind: type[Sampler], word: str, message: str) -> None:
    assert message in str(no_option(kind, word))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(LINEAR, guidance=2.0), "guidance belongs to the sampler's call, not here"),
        (lambda: DDIM(LINEAR, guidance_scale=2.0), "did you mean guidance= of the sampler's call?"),
        (lambda: Euler(LINEAR, eta=1.0), "eta belongs to fastsample.ddim, not here"),
        (lambda: DDIM(LINEAR, clip_sample=True), "did you mean clip=1.0?"),
        (
            lambda: Schedule.linear(num_train_timesteps=10),
            "linear has no argument num_train_timesteps; did you mean T=",
        ),
        (lambda: Schedule(trained_betas=[0.1]), "Schedule has no argument trained_betas: fastsample.Schedule makes"),
        (lambda: Batcher(model, DDIM(LINEAR), batch=2, seed=3), "seed belongs to submit, not here"),
        (lambda: DDIM(LINEAR).prepare(sampled, SHAPE)(guidance=2.0), r"guidance belongs to prepare(...), not here"),
        (
            lambda: Batcher(sampled, DDIM(LINEAR), batch=2).submit((3,), generator=torch.Generator()),
            "generator must be a tensor or a number of one sample, got Generator; what all requests share goes into "
            "model_kwargs; did you mean seed=?",
        ),
    ],
)
def test_where_an_argument_belongs(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("v_prediction", "'v'"),
        ("V-Prediction", "'v'"),
        ("sample", "'x0'"),
        ("noise", "'epsilon'"),
        ("eps", "'epsilon'"),
        ("flow_prediction", "'flow'"),
        ("velocity", "'v' or 'flow'"),
        ("epsilom", "'epsilon'"),
        (SimpleNamespace(name="START_X"), "'x0'"),  # as improved-diffusion's ModelMeanType
    ],
    ids=str,
)
def test_predictions(value: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"did you mean {meant}?")):
        fastsample.ddim(model, SHAPE, prediction=value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIM(LINEAR, timesteps="karras"), "solvers, such as fastsample.euler, have karras and log_snr"),
        (lambda: Euler(LINEAR, timesteps="Karras"), "did you mean 'karras'?"),
        (lambda: Euler(LINEAR, timesteps="exponential"), "did you mean 'log_snr'?"),
        (lambda: Euler(prediction="flow", timesteps="linear"), "did you mean 'linspace'?"),
        (lambda: DDIM(LINEAR, timesteps="sgm_uniform"), "did you mean 'trailing'?"),
        (lambda: DDPM(LINEAR, variance="fixed_small_log"), "did you mean 'fixed_small'?"),
        (lambda: fastsample.UniPC(LINEAR, variant="bh-1"), "did you mean 'bh1'?"),
        (lambda: fastsample.DDIMInverse(LINEAR, convention="diffusers"), "did you mean 'mirror'?"),
        (lambda: fastsample.ddim(model, SHAPE, backend="gpu"), "did you mean 'cuda'?"),
        (lambda: fastsample.velocity(torch.ones(1), torch.ones(1), 5, prediction="v_prediction"), "did you mean 'v'?"),
    ],
)
def test_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_sent_to_no_choice_that_is_not_there(name: str) -> None:
    for words in VALUES[name].values():
        for word in words.split():
            assert meant_value(name, word, ["none_of_these"]) == ""


def test_named_spacings_are_there() -> None:
    assert {*spacings._SPACINGS, "lcm"} == {*spacings.SPACINGS}
    assert {"auto", *PUBLISHED} == {*get_args(spacings.SpacingOfSchedule)}
    for name in spacings.SPACINGS_OF_SOLVERS:
        assert Euler(LINEAR, steps=4, timesteps=name).timesteps == name
        if name in spacings.SPACINGS_OF_SAMPLERS:
            assert DDIM(LINEAR, steps=4, timesteps=name).timesteps == name


# Callbacks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": lambda pipe, step, t, kwargs: kwargs}, "callback(step), with a fastsample.Step after every row"),
        ({"callback": lambda: None}, "callback(step)"),
        ({"callback": lambda *, step: None}, "callback(step)"),
        ({"decode": lambda x, t: x}, "decode(sample)"),
        ({"noise": lambda sigma, next_sigma: None, "eta": 1.0}, "noise(row)"),
        ({"correct_x0": lambda x0: x0}, "correct_x0(x0, t)"),
    ],
    ids=["diffusers", "of-nothing", "by-keyword", "decode", "k-diffusion", "correct_x0"],
)
def test_functions_of_other_arguments_are_refused_before_the_run(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"is called as {message}")):
        fastsample.ddim(model, SHAPE, steps=2, **arguments)


class Counts:
    def __call__(self, step: Step) -> None: ...


@functools.wraps(max)
def wrapping(step: Step) -> None: ...


@pytest.mark.parametrize(
    "callback",
    [
        lambda *steps: None,
        lambda step, more=1: None,
        lambda step, *, more=1: None,
        [].append,
        print,
        Counts(),
        wrapping,
    ],
    ids=["any", "default", "keyword", "method", "builtin", "object", "wrapping"],
)
def test_functions_that_take_a_step_are_called(callback: Callable[[Step], object]) -> None:
    assert fastsample.ddim(sampled, SHAPE, steps=2, callback=callback).shape == SHAPE


@pytest.mark.parametrize(
    ("look", "error", "message"),
    [
        (lambda step: step["denoised"], TypeError, "no key 'denoised', only attributes: did you mean step.x0?"),
        (lambda step: step["i"], TypeError, "did you mean step.index?"),
        (lambda step: step.sigma_hat, AttributeError, "no 'sigma_hat': did you mean step.sigma?"),
        (lambda step: step.latents, AttributeError, "did you mean step.x?"),
        (lambda step: step.pipe, AttributeError, "a Step has the attributes x, x0, index, t, sigma, alpha"),
    ],
)
def test_other_names_of_what_a_step_has(look: Callable[[Any], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastsample.ddim(sampled, SHAPE, steps=2, callback=look)


def test_a_step_can_be_copied() -> None:
    step = Step(1, 5, torch.ones(1), torch.ones(1), 0.5, 0.5)
    for again in (copy.copy(step), pickle.loads(pickle.dumps(step)), dataclasses.replace(step)):
        assert (again.index, again.t) == (1, 5)


# Samplers as schedulers, and schedulers as samplers


@pytest.mark.parametrize("name", ["config", "set_timesteps", "step", "scale_model_input", "init_noise_sigma"])
def test_a_sampler_is_no_scheduler(name: str) -> None:
    with pytest.raises(AttributeError, match=f"DDIM has no '{name}': it is no scheduler of diffusers"):
        getattr(DDIM(LINEAR), name)
    assert not hasattr(DDIM(LINEAR), name)


def test_class_methods_of_schedulers_and_unknown_attributes() -> None:
    for name in ("from_config", "from_pretrained"):
        with pytest.raises(AttributeError, match=rf"Euler has no '{name}': .*fastsample\.from_diffusers"):
            getattr(Euler, name)(SCHEDULER.config)
    with pytest.raises(AttributeError, match="'DDIM' object has no attribute 'tabel'"):
        DDIM(LINEAR).tabel  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "place",
    [
        lambda: fastsample.ddim(model, SHAPE, schedule=SCHEDULER),  # type: ignore[arg-type]
        lambda: DDIM(SCHEDULER),  # type: ignore[arg-type]
        lambda: Euler(SCHEDULER),  # type: ignore[arg-type]
        lambda: fastsample.ddim(SCHEDULER, SHAPE),
        lambda: fastsample.ddim(SimpleNamespace(scheduler=SCHEDULER, components={}), SHAPE),  # type: ignore[arg-type]
        lambda: Batcher(model, SCHEDULER, batch=2),
        lambda: fastsample.graph(SCHEDULER, model, SHAPE),
        lambda: fastsample.interpolate(model, torch.ones(1, 2), torch.ones(1, 2), 3, sampler=SCHEDULER),
        lambda: fastsample.optimal_timesteps(model, SHAPE, 5, sampler=SCHEDULER),
        lambda: Sampler(SCHEDULER),
    ],
    ids=["schedule", "DDIM", "Euler", "model", "pipeline", "Batcher", "graph", "interpolate", "optimal", "table"],
)
def test_a_scheduler_is_no_sampler(place: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"fastsample\.from_diffusers\("):
        place()


@pytest.mark.parametrize("value", ["no", "True", 0, None], ids=repr)
@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (fastsample.DDIM, "rederive_epsilon"),
        (fastsample.DPMSolver, "sde"),
        (fastsample.DPMSolver, "lower_order_final"),
        (fastsample.UniPC, "corrector"),
    ],
    ids=["ddim", "sde", "last-order", "corrector"],
)
def test_what_is_true_or_false_is_no_text(sampler: type[fastsample.Sampler], name: str, value: object) -> None:
    """Every text is true."""
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got {value!r}"):
        sampler(Schedule.linear(), steps=4, **{name: value})
