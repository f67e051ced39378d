"""The attention of diffusers with q, k and v from one fused projection."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fastsample.lora.layers.adapted import check_replaceable
from fastsample.lora.layers.frozen import FrozenLayers
from fastsample.lora.layers.linear import QKVProjection

# What diffusers' fuse_projections() adds to a block, and the layers whose weights it copies.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


class FusedAttnProcessor:
    """Does what diffusers' AttnProcessor2_0 does, with q, k and v (in cross-attention k and v) computed together.

    Attributes:
        projection: the block's to_q, to_k and to_v, or to_k and to_v, run as one. Where it is None, as in processors
            that diffusers' IP-Adapter loader makes of this class, each linear is called by itself.
        original: the processor that the block had before.
    """

    def __init__(self, projection: QKVProjection | None = None, original: Any = None) -> None:
        self.projection, self.original = projection, original

    # diffusers reads the names of the parameters to tell which of a pipeline's keywords it may pass.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if len(shape) == 4:
            x = x.flatten(2).transpose(1, 2)
        batch, tokens = (x if encoder_hidden_states is None else encoder_hidden_states).shape[:2]
        mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
        if mask is not None:
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = encoder_hidden_states
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in self._project(attn, x, context))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).to(q.dtype)
        for layer in attn.to_out:
            y = layer(y)

        if len(shape) == 4:
            y = y.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor

    def _project(self, attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        linears = [] if self.projection is None else list(self.projection.children())
        names = ("to_q", "to_k", "to_v")[3 - len(linears) :]
        # The user may have put other modules in the block, or hooks on the linears.
        if any(
            attn._modules[name] is not linear or _hooked(linear) for name, linear in zip(names, linears, strict=True)
        ):
            linears = []
        if self.projection is not None and len(linears) == 3 and context is None:
            return self.projection(x)
        context = x if context is None else context
        if self.projection is not None and len(linears) == 2:
            return attn.to_q(x), *self.projection(context)
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def fusible(
    module: nn.Module, touched: Iterable[nn.Module], moving: Container[nn.Module] = ()
) -> dict[nn.Module, list[nn.Linear]]:
    """The attention blocks with a touched projection, and for each block the linears that can run as one.

    Linears that are `moving`, whose weights hooks move, stay single.
    """
    # A tree can only hold diffusers' blocks where diffusers is imported.
    diffusers: Any = sys.modules.get("diffusers.models.attention_processor")
    if diffusers is None:
        return {}
    wanted, taken = set(touched), set[nn.Module]()
    blocks: dict[nn.Module, list[nn.Linear]] = {}
    for block in module.modules():
        if not isinstance(block, diffusers.Attention) or not _known(block, diffusers):
            continue
        linears = [block.to_k, block.to_v] if block.is_cross_attention else [block.to_q, block.to_k, block.to_v]
        if wanted.isdisjoint(linears) or not taken.isdisjoint(linears) or not _alike(linears):
            continue
        if any(linear in moving for linear in linears):
            continue
        taken.update(linears)
        blocks[block] = linears
    return blocks


def check_called(module: nn.Module, touched: Iterable[nn.Module]) -> None:
    """Raises ValueError for touched layers that their block does not call, since diffusers has fused or unfused it."""
    wanted = set(touched)
    for path, block in module.named_modules():
        for name, parts in fused_parts(block).items():
            fused = runs_fused(block)
            if wanted.isdisjoint(parts if fused else [block._modules[name]]):
                continue
            where = path or "the module"
            if fused:
                raise ValueError(
                    f"{where} runs {name}, which fuse_qkv_projections() made of the layers that the adapter is for: "
                    "call unfuse_qkv_projections() before attach"
                )
            raise ValueError(f"{where} does not run {name}: call fuse_qkv_projections() before attach")


def runs_fused(block: nn.Module) -> bool:
    """Whether a block calls what diffusers' fuse_qkv_projections() made, not the layers of which it was made.

    After unfuse_qkv_projections() the blocks of a UNet still have both.
    """
    diffusers: Any = sys.modules.get("diffusers.models.attention_processor")
    if diffusers is not None and isinstance(block, diffusers.Attention):
        processor = block.processor
        return type(processor).__name__.startswith("Fused") and not isinstance(processor, FusedAttnProcessor)
    return bool(getattr(block, "fused_projections", False))


def fused_parts(block: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers that diffusers made by fusing others, by name, and for each the others that are there."""
    if not callable(getattr(type(block), "fuse_projections", None)):
        return {}
    children = block._modules
    return {
        name: [part for part in map(children.get, parts) if part is not None]
        for name, parts in FUSED.items()
        if children.get(name) is not None
    }


def install(projections: Mapping[nn.Module, QKVProjection]) -> None:
    for block, projection in projections.items():
        vars(block)["processor"] = FusedAttnProcessor(projection, block.processor)


def uninstall(module: nn.Module, freed: Container[FrozenLayers]) -> None:
    """Gives each block whose projection was detached its original processor."""
    for block in module.modules():
        processor = getattr(block, "processor", None)
        if not isinstance(processor, FusedAttnProcessor):
            continue
        if processor.projection is None:
            diffusers: Any = sys.modules["diffusers.models.attention_processor"]
            block.processor = diffusers.AttnProcessor2_0()
        elif processor.projection._frozen in freed:
            block.processor = processor.original


def _known(block: Any, diffusers: Any) -> bool:
    """Whether the block computes what FusedAttnProcessor does."""
    plain = type(block.processor) is diffusers.AttnProcessor
    if not plain and type(block.processor) is not diffusers.AttnProcessor2_0:
        return False
    # The older processor has options of its own, and no norms of q and k.
    odd = block.upcast_attention or block.upcast_softmax or not block.scale_qk or block.norm_q or block.norm_k
    whole = None not in (block.to_q, block.to_k, block.to_v, block.to_out)
    return whole and block.add_k_proj is None and not (plain and odd)


def _alike(linears: list[Any]) -> bool:
    try:
        for linear in linears:
            check_replaceable(linear, nn.Linear)
    except TypeError:
        return False
    return len({(linear.in_features, linear.weight.dtype, linear.weight.device) for linear in linears}) == 1


def _hooked(linear: nn.Module) -> bool:
    return bool(
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
    )
