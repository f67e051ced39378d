"""What the model is given and what it may not do: dtypes, wrappers, written inputs, training mode."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, Schedule, ddim, ops
from fastsample.model import Predictor, decoder_dtype, schedule_of

SHAPE = (2, 4, 6, 5)
X = ops.randn(SHAPE, seed=1)
BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    """Convolutions in one dtype and whatever else in others; refuses an input of another dtype, as torch does."""

    def __init__(self, dtype: torch.dtype = BF16, **islands: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, island in islands.items():
            setattr(self, name, island)
        self.conv = nn.Conv2d(4, 4, 1).to(dtype)
        self.seen: list[torch.dtype] = []
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return 0.1 * self.conv(x)


def dtype_of(model: Any) -> torch.dtype:
    return Predictor(model).dtype


# The dtype that computing layers want


@pytest.mark.parametrize(
    "islands",
    [
        pytest.param({"table": nn.Parameter(torch.zeros(1, 4, 1, 1))}, id="table"),
        pytest.param({"norm": nn.GroupNorm(2, 4)}, id="norm"),
        pytest.param({"classes": nn.Embedding(1000, 64)}, id="embedding"),
        pytest.param({"time": nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))}, id="time"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_an_island_of_float32_is_not_the_models_dtype(dtype: torch.dtype, islands: dict[str, Any]) -> None:
    net = Net(dtype, **islands)
    ddim(net, X, steps=2, schedule=Schedule.linear())
    assert net.seen == [dtype] * 2


def linears(**layers: torch.dtype) -> nn.Module:
    module = nn.Module()
    for name, dtype in layers.items():
        setattr(module, name, nn.Linear(64, 16 if "small" in name else 64).to(dtype))
    return module.eval()


class Stating(nn.Module):
    def __init__(self, dtype: Any, held: torch.dtype = FP32) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).to(held)
        self.dtype = dtype


def float8(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    return module


def quantised(bias: torch.dtype) -> nn.Module:
    """As bitsandbytes and others keep weights: integers, and scales in float32 beside them."""
    layer = nn.Linear(4, 4).to(bias)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(4, 1), requires_grad=False)
    return layer


class Packed(nn.Module):
    """Frozen weights as buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("packed", torch.zeros(3, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("module", "want"),
    [
        pytest.param(linears(time_mlp=FP32, small=BF16), BF16, id="time-embedding-apart"),
        pytest.param(linears(small=FP32, body=BF16), BF16, id="most-weights"),
        pytest.param(linears(time=HALF), HALF, id="nothing-but-time"),
        pytest.param(Stating(BF16), BF16, id="stated"),
        pytest.param(Stating(torch.float8_e4m3fn, BF16), BF16, id="stated-float8"),
        pytest.param(Stating(torch.int8, BF16), BF16, id="stated-integer"),
        pytest.param(Stating("bfloat16", HALF), HALF, id="stated-text"),
        pytest.param(Stating(None, HALF), HALF, id="stated-none"),
        pytest.param(float8(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))), FP32, id="float8"),
        pytest.param(float8(nn.Linear(4, 4).bfloat16()), BF16, id="float8-and-bias"),
        pytest.param(float8(nn.Linear(4, 4, bias=False)), FP32, id="float8-alone"),
        pytest.param(nn.Sequential(quantised(BF16), nn.LayerNorm(2, dtype=BF16)), BF16, id="integers"),
        pytest.param(nn.GRU(4, 4).to(HALF), HALF, id="recurrent"),
        pytest.param(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)).to(BF16), BF16, id="weight-norm"),
        pytest.param(nn.MultiheadAttention(8, 2, dtype=BF16), BF16, id="attention"),
        pytest.param(Packed(HALF), HALF, id="buffers"),
        pytest.param(nn.Linear(4, 4).double(), torch.float64, id="float64"),
        pytest.param(nn.Identity(), FP32, id="nothing"),
    ],
)
def test_the_dtype_of_a_module(module: nn.Module, want: torch.dtype) -> None:
    assert dtype_of(module) == want
    assert dtype_of(lambda x, t: module(x)) == want


def test_hooks_of_diffusers_and_accelerate_state_what_weights_do_not() -> None:
    diffusers, accelerate = pytest.importorskip("diffusers"), pytest.importorskip("accelerate")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    assert dtype_of(unet) == FP32
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    assert dtype_of(unet) == BF16 and dtype_of(lambda x, t: unet(x, t).sample) == BF16
    x = ops.randn((1, 4, 8, 8), seed=2)
    got = ddim(unet, x, steps=2, schedule=Schedule.linear())
    assert (
        torch.equal(got, ddim(unet, x, steps=2, schedule=Schedule.linear(), model_dtype=BF16)) and got.isfinite().all()
    )

    offloaded = Net(HALF)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    predictor = Predictor(offloaded)
    assert next(offloaded.parameters()).is_meta
    assert predictor.device == torch.device("cpu") and predictor.dtype == HALF


def test_nobody_computes_on_meta() -> None:
    with torch.device("meta"):
        net = Net(HALF)
    assert Predictor(net).device is None
    net.register_buffer("here", torch.zeros(1, device="cpu"))
    assert Predictor(net).device == torch.device("cpu")


def test_a_library_that_guesses_a_dtype_is_not_asked() -> None:
    """diffusers gives the dtype of the first parameter for that of the model; layers know better."""
    diffusers = pytest.importorskip("diffusers")

    class Mixin(diffusers.ModelMixin):
        def __init__(self, **islands: nn.Parameter) -> None:
            super().__init__()
            for name, island in islands.items():
                setattr(self, name, island)
            self.conv = nn.Conv2d(4, 4, 1).to(BF16)
            self.last = nn.Linear(4, 4)

    assert Mixin(table=nn.Parameter(torch.zeros(1, 4, 1, 1, dtype=HALF))).dtype == HALF
    assert dtype_of(Mixin(table=nn.Parameter(torch.zeros(1, 4, 1, 1, dtype=HALF)))) == BF16
    assert dtype_of(Mixin()) == BF16


# What hides the model

NET = Net()
NET.schedule = Schedule.cosine(50)
HOLDER = SimpleNamespace(pipe=SimpleNamespace(unet=NET), other=Net(HALF))


def globally(x: Tensor, t: Tensor) -> Tensor:
    return NET(x, t)


class Denoiser:
    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        self.net, self.other = net, other

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoise(x, t)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x, t)


def nested(net: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inner(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([net(one[None], t) for one in x])

    def outer(x: Tensor, t: Tensor) -> Tensor:
        return inner(x, t)

    return outer


def given(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return net(x, t)


WRAPPED: dict[str, Callable[..., Tensor]] = {
    "lambda": lambda x, t: NET(x, t),
    "lambda-closure": (lambda net: lambda x, t: net(x, t))(NET),
    "lambda-default": lambda x, t, net=NET: net(x, t),
    "attribute": lambda x, t: HOLDER.pipe.unet(x, t),
    "function": globally,
    "function-of-a-function": lambda x, t: globally(x, t),
    "nested": nested(NET),
    "partial": functools.partial(NET),
    "partial-argument": functools.partial(given, NET),
    "partial-keyword": functools.partial(lambda x, t, net: net(x, t), net=NET),
    "method": NET.forward,
    "object": Denoiser(NET, Net(HALF)),
    "object-method": Denoiser(NET, Net(HALF)).denoise,
    "no-grad": torch.no_grad()(globally),
    "wraps": functools.wraps(globally)(lambda x, t: globally(x, t)),
    "module": Wrapper(NET).eval(),
    "modules": Wrapper(Wrapper(NET)).eval(),
    "data-parallel": nn.DataParallel(NET).eval(),
    "compile": torch.compile(NET, backend="eager"),  # type: ignore[dict-item]
    "lambda-data-parallel": (lambda net: lambda x, t: net(x, t))(nn.DataParallel(NET).eval()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_hide_neither_dtype_nor_schedule(name: str) -> None:
    model = WRAPPED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert schedule_of(model, None) is NET.schedule
        predictor = Predictor(model)
    assert predictor.dtype == predictor.known_dtype == BF16 and predictor.device == torch.device("cpu")
    if name != "compile":  # tests/test_compile.py compiles
        assert torch.equal(ddim(model, X, steps=2), ddim(NET, X, steps=2))


def test_where_modules_differ_nothing_is_assumed() -> None:
    def both(x: Tensor, t: Tensor) -> Tensor:
        return NET(x.to(BF16), t).float() + HOLDER.other(x.to(HALF), t).float()

    predictor = Predictor(both)
    assert predictor.known_dtype is None and predictor.dtype == FP32
    assert ddim(both, X, steps=2).isfinite().all()
    named_like_a_module = {"conv": NET}
    assert Predictor(lambda x, t: x * len(named_like_a_module)).known_dtype is None
    assert Predictor(lambda x, t: SimpleNamespace(NET=x).NET).known_dtype is None, "an attribute is no global"


def test_what_a_callable_states() -> None:
    class Session:
        dtype = HALF

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == HALF
            return x * 0.1

    ddim(Session(), X, steps=2)


def test_a_function_of_a_module_without_a_schedule_is_warned_of() -> None:
    bare = Net()
    with pytest.warns(UserWarning, match=r"Net has no \.schedule") as caught:
        ddim(lambda x, t: bare(x, t), X, steps=2)
    assert [one.filename for one in caught] == [__file__]


# Keywords in the model's dtype


def test_keywords_are_cast_like_x() -> None:
    seen: list[dict[str, Any]] = []

    def spy(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return NET(x, t)

    words, labels, half = torch.ones(2, 3), torch.tensor([1, 2]), torch.ones(2, 3, dtype=BF16)
    keywords = {
        "words": words,
        "double": words.double(),
        "labels": labels,
        "flags": labels > 1,
        "same": half,
        "more": {"pooled": words, "pair": (words, "text"), "list": [words[0], words[1]]},
        "table": fastsample.Shared(words),
        "scale": 0.5,
    }
    ddim(spy, X, steps=1, model_kwargs=keywords)
    got = seen.pop()
    assert got["words"].dtype == got["double"].dtype == got["table"].dtype == BF16
    assert got["labels"] is labels and got["flags"].dtype == torch.bool and got["same"] is half
    assert got["more"]["pooled"].dtype == got["more"]["pair"][0].dtype == got["more"]["list"][1].dtype == BF16
    assert type(got["more"]["list"]) is list and got["more"]["pair"][1] == "text" and got["scale"] == 0.5
    assert words.dtype == FP32 and keywords["words"] is words, "the caller's own are left alone"

    ddim(spy, X, steps=1, model_kwargs=keywords, cast_kwargs=False)
    got = seen.pop()
    assert got["words"] is words and got["double"].dtype == torch.float64 and got["table"] is words
    guided: dict[str, Any] = {"guidance": 2.0, "cond": {"c": words}, "uncond": {"c": words * 0}}
    ddim(spy, X, steps=1, **guided)
    assert seen.pop()["c"].dtype == BF16
    ddim(spy, X, steps=1, cast_kwargs=False, **guided)
    assert seen.pop()["c"].dtype == FP32


def test_what_an_unknown_function_is_given_stays_as_it_is() -> None:
    half = torch.ones(2, 1, 1, 1, dtype=HALF)

    def opaque(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert c is half and x.dtype == FP32
        return x * c.float()

    ddim(opaque, X, steps=2, model_kwargs={"c": half})


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["", "guided"])
def test_a_batcher_casts_too(guidance: float | None) -> None:
    class Told(Net):
        def forward(self, x: Tensor, t: Tensor, c: Tensor, w: Tensor) -> Tensor:
            assert x.dtype == c.dtype == w.dtype == BF16
            return super().forward(x, t) + c.reshape(-1, 1, 1, 1)

    options: dict[str, Any] = {} if guidance is None else {"guidance": guidance, "uncond": {"c": 0.0}}
    batcher = fastsample.Batcher(
        Told(), DDIM(Schedule.linear(), steps=2), batch=2, model_kwargs={"w": torch.ones(2, 1)}, **options
    )
    requests = [batcher.submit(SHAPE[1:], seed=1, c=torch.tensor(0.5)), batcher.submit(SHAPE[1:], seed=1, c=2)]
    assert all(request.result().isfinite().all() for request in requests)


# What a model may not do


def writes_x(x: Tensor, t: Tensor) -> Tensor:
    return x.mul_(0.5)


def writes_t(x: Tensor, t: Tensor) -> Tensor:
    t += 1
    return 0.1 * x


def writes_a_view(x: Tensor, t: Tensor) -> Tensor:
    x[:, 0].clamp_(-1, 1)
    return 0.1 * x


RUNS: dict[str, Callable[[Any], object]] = {
    "plain": lambda model: ddim(model, X, steps=2),
    "from-a-shape": lambda model: ddim(model, SHAPE, steps=2),
    "guided": lambda model: ddim(model, X, steps=2, guidance=2.0, uncond={}),
    "outside-the-interval": lambda model: ddim(model, X, steps=2, guidance=2.0, uncond={}, guidance_interval=(0, 1)),
    "half": lambda model: ddim(model, X, steps=2, model_dtype=HALF),
    "reference": lambda model: ddim(model, X, steps=2, backend="reference"),
    "double": lambda model: ddim(model, X.double(), steps=2),
    "watched": lambda model: ddim(model, X, steps=2, callback=lambda step: None),
    "iterate": lambda model: list(DDIM(Schedule.linear(), steps=2).iterate(model, X)),
    "gradients": lambda model: ddim(model, X.clone().requires_grad_(), steps=2),
    "inference-mode": lambda model: torch.inference_mode()(ddim)(model, X, steps=2),
    "multistep": lambda model: fastsample.dpm_solver(model, X, steps=2),
    "batcher": lambda model: (
        fastsample.Batcher(model, DDIM(Schedule.linear(), steps=2), batch=2).submit(SHAPE[1:], seed=1).result()
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(writes_x, "x", id="x"),
        pytest.param(writes_t, "t", id="t"),
        pytest.param(writes_a_view, "x", id="view-of-x"),
    ],
)
def test_a_model_that_writes_its_input_is_refused(run: str, model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"the model wrote to its argument {name} in place"):
        RUNS[run](model)


@pytest.mark.parametrize("run", RUNS)
def test_a_model_may_return_its_input(run: str) -> None:
    """As it is or as a view: what a step writes in place is then also what it reads."""

    def tensors(value: Any) -> list[Tensor]:
        return [value.detach()] if isinstance(value, Tensor) else [step.x for step in value]

    torch.manual_seed(0)
    want = tensors(RUNS[run](lambda x, t: x.clone()))
    for view in (lambda x: x, lambda x: x.view(x.shape), lambda x: x.flatten(1).unflatten(1, x.shape[1:])):
        torch.manual_seed(0)
        got = tensors(RUNS[run](lambda x, t, view=view: view(x)))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_view_of_the_input_in_another_order_is_read_before_it_is_written() -> None:
    x = ops.randn((2, 4, 5, 5), seed=3)
    for guided in ({}, {"guidance": 2.0, "uncond": {}}):
        got = ddim(lambda x, t: x.mT, x, steps=3, **guided)  # type: ignore[arg-type]
        assert torch.equal(got, ddim(lambda x, t: x.mT.clone(), x, steps=3, **guided))  # type: ignore[arg-type]
        expanded = ddim(lambda x, t: x[:, :1].expand(x.shape), x, steps=3, **guided)  # type: ignore[arg-type]
        assert torch.equal(expanded, ddim(lambda x, t: x[:, :1].repeat(1, 4, 1, 1), x, steps=3, **guided))  # type: ignore[arg-type]


def test_gradients_that_a_model_takes_of_its_input_end_with_the_call() -> None:
    """Energy-based models: x.grad of one row must not add to that of the next."""

    def energy(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            (0.05 * x.requires_grad_() ** 2).sum().backward()
        return x.grad

    for options in ({}, {"guidance": 2.0, "uncond": {}}, {"model_dtype": HALF}):
        got = ddim(energy, X, steps=4, **options)  # type: ignore[arg-type]
        want = ddim(lambda x, t: 0.1 * x, X, steps=4, **options)  # type: ignore[arg-type]
        assert not got.requires_grad and got.grad is None
        assert (got - want).abs().max() <= 4 * 2**-9 * want.abs().max()


@pytest.mark.parametrize("rows", [1, 2, 3, 8], ids=lambda rows: f"{rows}-of-4")
def test_the_batch_of_a_guided_output(backend: str, rows: int) -> None:
    def some(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(rows, *SHAPE[1:]) if len(x) == 4 else 0.1 * x

    with pytest.raises(ValueError, match=r"an output for every sample that it is given.*: 4 in this row"):
        ddim(some, X, steps=2, guidance=2.0, uncond={}, backend=backend)


def test_outside_the_interval_the_output_is_that_of_one_half(backend: str) -> None:
    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * (torch.cat([x, x]) if len(x) == 2 else x)

    options: dict[str, Any] = dict(steps=4, guidance=2.0, uncond={}, guidance_interval=(0, 300), backend=backend)
    with pytest.raises(ValueError, match=r"an output for every sample that it is given.*: 2 in this row"):
        ddim(doubled, X, **options)
    with pytest.raises(ValueError, match="every sample"):
        ddim(lambda x, t: torch.tensor(0.5), X, **options)
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="every sample"):
        ddim(doubled, x, **{**options, "backend": None})


def test_a_batcher_compares_batches_too() -> None:
    batcher = fastsample.Batcher(
        lambda x, t: 0.1 * x[: len(x) // 2], DDIM(Schedule.linear(), steps=2), batch=2, guidance=2.0, uncond={}
    )
    batcher.submit(SHAPE[1:], seed=1)
    with pytest.raises(ValueError, match="every sample"):
        batcher.step()


# Training mode


def warnings_of(model: Any, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            ddim(model, X, steps=1, schedule=Schedule.linear())
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_training_mode_is_warned_of_once_for_each_model() -> None:
    net = Net().train()
    (message,) = warnings_of(net, times=3)
    assert "Net is in training mode" in message and ".eval()" in message
    assert warnings_of(lambda x, t: net(x, t)) == [], "it is the same model"
    assert len(warnings_of(Net().train())) == 1, "another model"
    other = Net().train()
    assert len(warnings_of(lambda x, t: other(x, t))) == 1
    assert warnings_of(Net()) == []


@pytest.mark.parametrize(
    "part", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.BatchNorm2d(4)], ids=lambda one: type(one).__name__
)
def test_a_part_in_training_mode_is_warned_of(part: nn.Module) -> None:
    net = Net(part=nn.Sequential(part.train()))
    net.eval()
    assert warnings_of(net) == []
    part.train()
    (message,) = warnings_of(net, times=2)
    assert f"Net has a {type(part).__name__} in training mode" in message
    part.eval()


def test_parts_that_are_the_same_in_both_modes_are_not_warned_of() -> None:
    net = Net()
    net.conv.train()
    assert warnings_of(net) == []


def test_the_warning_keeps_no_model_alive() -> None:
    import weakref

    net = Net().train()
    warnings_of(net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


# The dtype that decode wants


class Vae(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 1).to(dtype)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        image = self.conv(z)
        return SimpleNamespace(sample=image) if return_dict else (image,)

    forward = decode


@pytest.mark.parametrize("dtype", [HALF, BF16, FP32, torch.float64], ids=str)
def test_the_dtype_that_decode_wants(dtype: torch.dtype) -> None:
    vae, s = Vae(dtype).eval(), 0.18215
    pipe = SimpleNamespace(vae=vae, unet=Net(BF16))
    decoders: list[Callable[[Tensor], Any]] = [
        vae,
        vae.decode,
        functools.partial(vae.decode, return_dict=False),
        lambda x: vae.decode(x / s).sample,
        lambda x: pipe.vae.decode(x / s, return_dict=False)[0],
        torch.no_grad()(lambda x: vae.decode(x / s)),
    ]
    for decode in decoders:
        assert decoder_dtype(decode) == dtype
        decode(X.to(dtype))


def test_a_decoder_that_states_nothing() -> None:
    half, single = Vae(HALF), Vae(FP32)
    assert decoder_dtype(lambda x: x / 2) is None
    assert decoder_dtype(torch.tanh) is None
    assert decoder_dtype(lambda x: single.decode(half.decode(x.half()).sample.float())) is None
