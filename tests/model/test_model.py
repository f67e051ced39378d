"""What a model is given: the dtype that it wants, seen through wrappers, also of its keywords and of decoders."""

from __future__ import annotations

import functools
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
from support.networks import Net

SHAPE = (2, 4, 6, 5)
X = ops.randn(SHAPE, seed=1)
BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64, "float16"], ids=str)
def test_a_dtype_that_nothing_computes_in_cannot_be_asked_for(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"model_dtype must be a floating-point torch\.dtype"):
        ddim(Net(), X, steps=1, model_dtype=dtype, schedule=Schedule.linear())


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
    if name != "compile":  # tests/ops/test_compile.py compiles
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
