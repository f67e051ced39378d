"""A whole UNet of diffusers with a LoRA on all attention projections, against the same UNet without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.harness import Candidate, measure, ratio
from benchmarks.common.optional import optional
from benchmarks.common.options import Run, Shape, label
from benchmarks.common.report import OURS, Row, against, rows_of, table
from benchmarks.peers.lora import set_peft
from benchmarks.sections.projections import name_of, provider
from fastsample import lora
from fastsample.lora.layers.attention import FusedAttnProcessor

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANKS, PEER_RANK = (16, 64), 16
DTYPES = (torch.float32, torch.bfloat16)
BARE = "no LoRA"
TOKENS = 77
FLOAT32_ROUNDING = 1e-4  # what roundings may do to the output in float32, by its deviation; a few 1e-7 is usual
# Of the published Stable Diffusion 1.5; the weights are random.
CONFIG: dict[str, Any] = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
    norm_num_groups=32,
)
QUICK_CONFIG: dict[str, Any] = {
    **CONFIG,
    "block_out_channels": (32, 64),
    "down_block_types": CONFIG["down_block_types"][2:],
    "up_block_types": CONFIG["up_block_types"][:2],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
# A quarter of the published latents' area: with them one forward takes four times as long.
SHAPES: tuple[Shape, ...] = ((1, 4, 32, 32),)
QUICK_SHAPES: tuple[Shape, ...] = ((2, 4, 8, 8),)


def section(run: Run, dtype: torch.dtype) -> list[Row]:
    """Times one forward for latents of every shape; nothing where diffusers is absent."""
    unet = build(QUICK_CONFIG if run.quick else CONFIG)
    if unet is None:
        return []
    sizes = {shape: (shape, (shape[0], TOKENS, unet.config.cross_attention_dim)) for shape in run.shapes}
    inputs = {shape: [torch.randn(size, device=run.device) for size in sizes[shape]] for shape in run.shapes}
    unet.to(run.device)
    exact = {shape: forward(unet, *inputs[shape]) for shape in run.shapes} if dtype != torch.float32 else {}
    unet.to(dtype)
    models: dict[str, nn.Module] = {BARE: unet}
    for rank in RANKS:
        models[provider(OURS, rank)] = with_ours(unet, rank)
    if (theirs := with_peft(unet, PEER_RANK)) is not None:
        models[provider("PEFT", PEER_RANK)] = theirs
    rows: list[Row] = []
    for shape in run.shapes:
        x, tokens = (value.to(dtype) for value in inputs[shape])
        calls = {name: partial(forward, model, x, tokens) for name, model in models.items()}
        rounding = distance(calls[BARE](), exact[shape]) if exact else FLOAT32_ROUNDING
        check_agreement(calls, rounding)
        timings = measure([Candidate(name, call) for name, call in calls.items()], run.rounds, clock=run.loop_clock)
        new_rows = rows_of(f"unet {name_of(dtype)}", f"latents {label(shape)}", timings, against(BARE, timings))
        print(table(new_rows))
        whole, per_rank = flops(unet, calls[BARE])
        for rank in RANKS:
            low, middle, high = ratio(timings[provider(OURS, rank)], timings[BARE])
            print(
                f"  rank {rank}: {middle:.4f} ({low:.4f} .. {high:.4f}) of the time without LoRA; "
                f"its FLOPs make {1 + rank * per_rank / whole:.4f} of {whole / 1e9:.1f} GFLOP",
                flush=True,
            )
        rows += new_rows
    return rows


def build(config: dict[str, Any]) -> Any:
    """The UNet with random weights, the same every time; None without diffusers."""
    diffusers = optional("diffusers", "the UNet")
    if diffusers is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: Any = diffusers.UNet2DConditionModel(**config)
    return unet.eval().requires_grad_(False)


def forward(unet: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    """The predicted noise."""
    return unet(x, torch.tensor(500, device=x.device), encoder_hidden_states=tokens).sample


def with_ours(unet: nn.Module, rank: int) -> nn.Module:
    """Another tree of the same parameters, with this package's LoRA attached."""
    model: Any = sharing(unet)
    lora.attach(model, state_dict(unet, rank))
    processors = model.attn_processors
    if any(not isinstance(processor, FusedAttnProcessor) for processor in processors.values()):
        raise AssertionError(f"attach left some of {len(processors)} attention blocks with their own processor")
    return model


def with_peft(unet: nn.Module, rank: int) -> nn.Module | None:
    """The same with PEFT's."""
    peft = optional("peft", "PEFT")
    if peft is None:
        return None
    model: Any = sharing(unet)
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    factors, modules = state_dict(unet, rank), dict(model.named_modules())
    for name in targets(unet):
        set_peft(modules[name], factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"])
    return model.eval().requires_grad_(False)


def sharing(unet: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters: of 860 million one set is enough, for caches too."""
    return copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})


def state_dict(unet: nn.Module, rank: int) -> dict[str, Tensor]:
    """Random factors for all attention projections, as PEFT names them, of an effect that is easily seen."""
    draws, factors = torch.Generator().manual_seed(rank), {}
    for name, linear in targets(unet).items():
        n, k = linear.weight.shape
        factors[f"{name}.lora_A.weight"] = (torch.randn(rank, k, generator=draws) / k**0.5).to(linear.weight)
        factors[f"{name}.lora_B.weight"] = (torch.randn(n, rank, generator=draws) * 0.3 / rank**0.5).to(linear.weight)
    return factors


def targets(unet: nn.Module) -> dict[str, nn.Linear]:
    """The attention projections by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(TARGETS) and isinstance(module, nn.Linear)
    }


def check_agreement(calls: Mapping[str, Callable[[], Tensor]], rounding: float = FLOAT32_ROUNDING) -> None:
    """Fails unless ours and PEFT's of one rank agree, and differ from no LoRA by far more than roundings do.

    `rounding` is what the dtype's roundings do to the output of one UNet. Two that compute the same have different
    ones, so they differ by about sqrt(2) times as much; allowed is twice as much.
    """
    outputs = {name: call() for name, call in calls.items()}
    for rank in RANKS:
        ours = outputs[provider(OURS, rank)]
        if distance(outputs[BARE], ours) < 5 * rounding:
            raise AssertionError(f"{provider(OURS, rank)} computes what the UNet without LoRA does")
        theirs = outputs.get(provider("PEFT", rank))
        if theirs is not None and (apart := distance(theirs, ours)) > 2 * rounding:
            raise AssertionError(f"{provider(OURS, rank)} and PEFT differ by {apart:.2g}, roundings by {rounding:.2g}")


def distance(one: Tensor, other: Tensor) -> float:
    """The deviation of the difference by the other's, in float64."""
    return float((one.double() - other.double()).std() / other.double().std())


def flops(unet: nn.Module, call: Callable[[], object]) -> tuple[int, int]:
    """Of one forward, and of a LoRA of rank 1 on all targets."""
    added = 0

    def count(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal added
        n, k = linear.weight.shape
        added += 2 * (inputs[0].numel() // k) * (k + n)

    hooks = [linear.register_forward_pre_hook(count) for linear in targets(unet).values()]
    # The fused attention of CPUs is not among what is counted; its products written out are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), added
