"""k-diffusion's functions against the papers' loops in float64: results, noise and callbacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample.integrations import k_diffusion
from support.k_diffusion_loops import Given, adams_bashforth, consistency, ddpm_like, denoiser, dpmpp, edm, karras
from support.paths import ROOT
from support.pretend_device import Pretended, pretended

SHAPE = (3, 5, 7)
FLOAT32 = 20 * 2 * 2**-24  # in each of 20 steps x and x0 are rounded to 24 bits


class Case(NamedTuple):
    name: str
    loop: Callable[..., Tensor]
    options: Mapping[str, Any] = MappingProxyType({})
    of_loop: Mapping[str, Any] | None = None

    def sample(self, *args: Any, **more: Any) -> Tensor:
        return getattr(k_diffusion, self.name)(*args, disable=True, **self.options, **more)

    def want(self, given: Given) -> Tensor:
        return self.loop(given, **(self.options if self.of_loop is None else self.of_loop))

    @property
    def draws(self) -> bool:
        """Whether it takes a noise_sampler."""
        return self.name in DRAWING


DRAWING = ("sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_lcm", "sample_ddim")
CHURN: dict[str, Any] = {"s_churn": 3.0, "s_noise": 1.01}
PART: dict[str, Any] = {"s_churn": 30.0, "s_tmin": 0.5}
SOME = {"eta": 0.6, "s_noise": 0.9}
CASES = {
    "euler": Case("sample_euler", edm, {}, {"heun": False}),
    "euler churn": Case("sample_euler", edm, CHURN, {"heun": False, **CHURN}),
    "euler churned above s_tmin": Case("sample_euler", edm, PART, {"heun": False, **PART}),
    "heun": Case("sample_heun", edm, {}, {"heun": True}),
    "heun churn": Case("sample_heun", edm, CHURN, {"heun": True, **CHURN}),
    "ancestral": Case("sample_euler_ancestral", ddpm_like),
    "ancestral eta 0.6": Case("sample_euler_ancestral", ddpm_like, SOME),
    "ancestral eta 0": Case("sample_euler_ancestral", ddpm_like, {"eta": 0.0}),
    "ancestral eta 3": Case("sample_euler_ancestral", ddpm_like, {"eta": 3.0}),
    "2m": Case("sample_dpmpp_2m", dpmpp),
    "2m sde": Case("sample_dpmpp_2m_sde", dpmpp, {}, {"eta": 1.0}),
    "2m sde eta 0.6": Case("sample_dpmpp_2m_sde", dpmpp, SOME),
    "2m sde eta 0": Case("sample_dpmpp_2m_sde", dpmpp, {"eta": 0.0}),
    "2m sde heun": Case("sample_dpmpp_2m_sde", dpmpp, {"solver_type": "heun"}, {"eta": 1.0, "heun": True}),
    "2m sde heun eta 0.6": Case("sample_dpmpp_2m_sde", dpmpp, {**SOME, "solver_type": "heun"}, {**SOME, "heun": True}),
    "lcm": Case("sample_lcm", consistency),
    "ddim": Case("sample_ddim", ddpm_like, {}, {"eta": 0.0, "at_zero": False}),
    "ddim eta 0.6": Case("sample_ddim", ddpm_like, SOME, {**SOME, "at_zero": False}),
    **{f"ipndm {n}": Case("sample_ipndm", adams_bashforth, {"max_order": n}, {"most": n}) for n in (1, 2, 3, 4)},
}
ONCE = [name for name in CASES if name in ("euler", "heun", "ancestral", "2m", "2m sde heun", "lcm", "ddim", "ipndm 4")]


def start(sigmas: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(SHAPE, generator=generator) * sigmas[0]).to(dtype)


class Noise:
    """Draws from one seed, and remembers between which levels."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(1), dtype
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.drawn: list[Tensor] = []

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        self.asked.append((sigma, sigma_next))
        self.drawn.append(torch.randn(SHAPE, generator=self._generator).to(self._dtype))
        return self.drawn[-1]


def both(case: Case, sigmas: Tensor, x: Tensor, **given: Any) -> tuple[Tensor, Tensor, Noise, Noise]:
    """(the sample, what the loop in float64 comes to, the noise of each)."""
    ours, theirs = Noise(x.dtype), Noise(x.dtype)
    callbacks = given.pop("callbacks", (None, None))
    more = {"noise_sampler": ours} if case.draws else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        got = case.sample(denoiser, x, sigmas, callback=callbacks[0], **more)
        torch.manual_seed(2)
        z = theirs if case.draws else lambda *_: torch.randn_like(x)
        want = case.want(Given(denoiser, x.double(), sigmas, z, callbacks[1]))
    return got, want, ours, theirs


def check_close(got: Tensor, want: Tensor, tolerance: float = FLOAT32) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("to_zero", [True, False], ids=["to 0", "above 0"])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("name", CASES)
def test_is_the_papers_loop(name: str, steps: int, to_zero: bool) -> None:
    sigmas = karras(steps, to_zero=to_zero)
    x = start(sigmas)
    given = x.clone()
    got, want, ours, theirs = both(CASES[name], sigmas, x)
    check_close(got, want)
    assert got.dtype == torch.float32 and torch.equal(x, given)
    assert ours.asked == theirs.asked
    got, want, _, _ = both(CASES[name], sigmas.double(), x.double())
    check_close(got, want, 1e-11)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ONCE)
def test_half_precision_is_what_the_model_is_given_and_what_comes_back(name: str, dtype: torch.dtype) -> None:
    sigmas, seen = karras(20), set()
    x = start(sigmas, dtype)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add((x.dtype, sigma.dtype, tuple(sigma.shape)))
        return denoiser(x.double(), sigma.double()).to(x.dtype)

    more = {"noise_sampler": Noise(dtype)} if CASES[name].draws else {}
    got = CASES[name].sample(model, x, sigmas, **more)
    want = CASES[name].want(Given(denoiser, x.double(), sigmas, Noise(dtype)))
    assert seen == {(dtype, dtype, (3,))} and got.dtype == dtype
    # x, x0 and sigma are rounded to 11 or 8 bits in every step, of which later steps forget most.
    check_close(got, want, 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("last", [0.0, 0.25])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.draws])
def test_noise_is_asked_for_between_the_levels_of_each_step(name: str, last: float) -> None:
    sigmas, noise, case = torch.tensor([8.0, 3.0, 1.0, last]), Noise(), CASES[name]
    case.sample(denoiser, start(sigmas), sigmas, noise_sampler=noise)
    deterministic = case.options.get("eta", 0.0 if case.name == "sample_ddim" else 1.0) == 0
    silent = deterministic and case.name != "sample_euler_ancestral"
    steps = [(8.0, 3.0), (3.0, 1.0), (1.0, last)]
    assert [(float(a), float(b)) for a, b in noise.asked] == ([] if silent else [one for one in steps if one[1] > 0])
    assert all(one.ndim == 0 and one.dtype == sigmas.dtype for pair in noise.asked for one in pair)


def test_noise_keeps_its_bits() -> None:
    noise = Noise()
    got = k_diffusion.sample_lcm(
        lambda x, sigma: 0 * x, torch.ones(SHAPE), torch.tensor([4.0, 2.0]), None, None, True, noise
    )
    assert torch.equal(got, 2 * noise.drawn[0])


@pytest.mark.parametrize("name", ["ancestral", "ancestral eta 0", "2m sde", "lcm", "ddim eta 0.6", "euler churn"])
def test_without_a_source_noise_is_torchs(name: str) -> None:
    """Of x's dtype, and the generator is left where k-diffusion's loop leaves it."""
    sigmas, case = karras(4), CASES[name]
    x = start(sigmas, torch.float16)
    drawn = {"euler churn": 4}.get(name, 3)  # the last step ends at 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        got = case.sample(denoiser, x, sigmas)
        following = torch.rand(1)
        torch.manual_seed(3)
        z = [torch.randn_like(x) for _ in range(drawn)]
        assert torch.equal(torch.rand(1), following)
    if case.draws:
        left = iter(z)
        assert torch.equal(case.sample(denoiser, x, sigmas, noise_sampler=lambda *_: next(left)), got)


@pytest.mark.parametrize("name", ["euler churn", "heun churn", "ancestral", "2m sde", "lcm", "ddim eta 0.6"])
def test_seeds_name_samples(name: str) -> None:
    """Those of the whole library: a sample does not depend on its batch, and lists have a set for each."""
    sigmas, case = karras(5), CASES[name]
    x = start(sigmas)
    whole = case.sample(denoiser, x, sigmas, seed=7, index=4)
    assert torch.equal(case.sample(denoiser, x[1:2], sigmas, seed=7, index=5), whole[1:2])
    assert torch.equal(case.sample(denoiser, x, sigmas, seed=[7, 7, 7], index=[4, 5, 6]), whole)
    assert not torch.equal(case.sample(denoiser, x, sigmas, seed=8, index=4), whole)


def test_seeded_noise_is_that_of_randn() -> None:
    sigmas = torch.tensor([4.0, 2.0, 1.0])
    got = k_diffusion.sample_lcm(lambda x, sigma: 0 * x, torch.ones(SHAPE), sigmas, disable=True, seed=7, index=2)
    z = fastsample.ops.randn(SHAPE, seed=7, index=2, step=1, stream=1)
    torch.testing.assert_close(got, z, rtol=2e-7, atol=1e-9)  # the pass may make two roundings one


@pytest.mark.parametrize("name", ONCE)
def test_callbacks_record_each_step(name: str) -> None:
    """What they keep stays as it is, and the sample is that of a run without."""
    sigmas, case = karras(6), CASES[name]
    got, want, records, wanted = [], [], [], []  # type: ignore[var-annotated]
    for callbacks, to in (((None, None), got), ((records.append, wanted.append), want)):
        to.append(both(case, sigmas, start(sigmas), callbacks=callbacks)[0])
    assert torch.equal(got[0], want[0])
    assert [record["i"] for record in records] == list(range(6)) and set(records[0]) == set(wanted[0])
    for record, expected in zip(records, wanted, strict=True):
        assert record["sigma"] == record["sigma_hat"] == sigmas[record["i"]] and record["sigma"].ndim == 0
        check_close(record["x"], expected["x"])
        check_close(record["denoised"], expected["denoised"])


def test_callbacks_see_the_level_with_churn() -> None:
    sigmas, records = karras(4), []
    k_diffusion.sample_euler(denoiser, start(sigmas), sigmas, callback=records.append, disable=True, **PART)
    for record in records:
        factor = 2**0.5 if record["sigma"] >= 0.5 else 1
        assert float(record["sigma_hat"]) == pytest.approx(factor * float(record["sigma"]), rel=1e-6)


def halve_x(info: dict[str, Any]) -> None:
    info["x"].mul_(0.5).add_(info["i"])


def halve_denoised(info: dict[str, Any]) -> None:
    info["denoised"].mul_(0.5)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("change", [halve_x, halve_denoised])
@pytest.mark.parametrize("name", ONCE)
def test_callbacks_change_what_they_change_in_the_papers_loops(
    name: str, change: Callable[..., None], inference: bool
) -> None:
    """Euler's and Heun's slopes are there before the callback, and heed it no more."""
    sigmas = karras(6)
    with torch.inference_mode(inference):
        x = start(sigmas)
        given = x.clone()
        got, want, _, _ = both(CASES[name], sigmas, x, callbacks=(change, change))
        check_close(got, want)
        assert torch.equal(x, given)


@pytest.mark.parametrize("name", ["euler", "2m"])
def test_a_change_of_half_precision_counts(name: str) -> None:
    sigmas = karras(3)
    x = start(sigmas, torch.float16)
    got = CASES[name].sample(denoiser, x, sigmas, callback=halve_x)
    check_close(got, both(CASES[name], sigmas, x, callbacks=(None, halve_x))[1], 2e-2)


def test_models_may_keep_and_change_their_x() -> None:
    sigmas, kept = karras(4), []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(x)
        x.mul_(0.5)
        return denoiser(x, sigma)

    got = k_diffusion.sample_euler_ancestral(model, start(sigmas), sigmas, disable=True, eta=0.0)
    ours, kept = kept, []
    check_close(got, ddpm_like(Given(model, start(sigmas).double(), sigmas, Noise()), eta=0.0))
    for one, other in zip(ours, kept, strict=True):
        check_close(one, other)


@pytest.mark.parametrize("name", ONCE)
def test_memory_of_any_kind_is_read_right(name: str) -> None:
    """x with other strides, a model whose output is not contiguous and asks for gradients, a single level."""
    sigmas, case = karras(3), CASES[name]
    x, weight = start(sigmas), torch.ones((), requires_grad=True)

    def model(x: Tensor, sigma: Tensor, *, scale: Tensor) -> Tensor:
        with torch.enable_grad():
            return denoiser((x * scale).mT.contiguous().mT, sigma)

    more = {"seed": 0} if case.draws else {}
    want = case.sample(denoiser, x, sigmas, **more)
    got = case.sample(model, x.mT.contiguous().mT.requires_grad_(), sigmas, {"scale": weight}, **more)
    assert torch.equal(got, want) and not got.requires_grad
    assert torch.equal(case.sample(denoiser, x, sigmas[:1]), x)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", ["heun churn", "2m sde", "ipndm 4"])
def test_a_device_is_not_waited_for_between_steps(monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool) -> None:
    sigmas, case = karras(5), CASES[name]
    x = start(sigmas)
    more = {} if name == "ipndm 4" else {"seed": 1}
    if not kernels:
        monkeypatch.setattr("fastsample.ops.backend._override", "reference")
    want = case.sample(denoiser, x, sigmas, **more)
    with pretended(monkeypatch, kernels) as device:

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            device.strict = True
            return denoiser(x, sigma)

        got = case.sample(model, x.to("cuda"), sigmas.to("cuda"), **more)
    assert isinstance(got, Pretended) and torch.equal(got.host, want)


def test_progress_is_shown_unless_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    sigmas = karras(3)
    for disable, shown in ((True, False), (False, True)):
        k_diffusion.sample_heun(denoiser, start(sigmas), sigmas, disable=disable)
        assert ("3/3" in capsys.readouterr().err) == shown


def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "k-diffusion.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)), names)
    assert len(names["previews"]) == 20 and torch.equal(names["second"], names["images"][1:])
