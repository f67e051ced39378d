"""Entries of LoRA files and the modules that they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastsample.lora.files.formats import Entry
from support.lora_files import SMALL, Tree, assert_resolves, clip, entries_of, entry, flat, resolve, sd, sdxl

# Names


@pytest.mark.parametrize(
    ("rename", "kwargs"),
    [
        pytest.param(str, {}, id="dots"),
        pytest.param(str, {"component": "unet"}, id="component"),
        pytest.param(flat, {"component": "unet", "flat": True}, id="kohya"),
        pytest.param(flat, {"flat": True}, id="kohya-without-component"),
    ],
)
@pytest.mark.parametrize("make", [sd, sdxl])
def test_every_layer_of_a_unet(make: Callable[[], Any], rename: Callable[[str], str], kwargs: dict[str, Any]) -> None:
    assert_resolves(make(), entries_of(make(), rename, **kwargs))


@pytest.mark.parametrize(
    "projection", [pytest.param(False, id="CLIPTextModel"), pytest.param(True, id="WithProjection")]
)
@pytest.mark.parametrize("level", [pytest.param(True, id="text_model"), pytest.param(False, id="no-level")])
@pytest.mark.parametrize("kohya", [pytest.param(True, id="kohya"), pytest.param(False, id="dots")])
def test_text_encoders_with_and_without_a_level(projection: bool, level: bool, kohya: bool) -> None:
    """transformers 5 dropped the level from one class and kept it in the other; files stay as they are."""
    encoder = clip(projection)

    def rename(name: str) -> str:
        bare = name.removeprefix("text_model.")
        full = f"text_model.{bare}" if level and bare != "text_projection" else bare
        return flat(full) if kohya else full

    entries = entries_of(encoder, rename, component="text_encoder", flat=kohya)
    assert len(entries) == 12 + projection
    assert_resolves(encoder, entries)


@pytest.mark.parametrize(
    ("tree", "one", "name"),
    [
        pytest.param(
            Tree(unet=Tree(a=nn.Linear(5, 7))), entry("a", component="unet"), "unet.a", id="component-is-child"
        ),
        pytest.param(Tree(unet=Tree(a=nn.Linear(5, 7))), entry("a", component="unet", flat=True), "unet.a", id="flat"),
        pytest.param(
            Tree(unet=nn.Linear(5, 7), a=nn.Linear(5, 7)), entry("a", component="unet", key="unet.a"), "a", id="both"
        ),
        pytest.param(
            Tree(base_model=Tree(model=nn.Linear(5, 7))),
            entry("x", key="base_model.model"),
            "base_model.model",
            id="key",
        ),
        pytest.param(nn.Sequential(nn.Linear(5, 7)), entry("0"), "0", id="sequential"),
        pytest.param(Tree(a_b=nn.Linear(5, 7)), entry("a_b", flat=True), "a_b", id="underscore-of-its-own"),
        pytest.param(Tree(to_out=nn.ModuleList([nn.Linear(5, 7)])), entry("to_out"), "to_out.0", id="to_out"),
        pytest.param(
            Tree(a_b=nn.LayerNorm(5), a=Tree(b=nn.Linear(5, 7))), entry("a_b", flat=True), "a.b", id="norm-beside"
        ),
    ],
)
def test_one_name(tree: nn.Module, one: Entry, name: str) -> None:
    assert resolve(tree, [one]).entries == {name: one}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch of itself
def test_a_compiled_modules_wrapper_is_no_part_of_a_name() -> None:
    paths = ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_1_proj_in")
    found = resolve(torch.compile(sdxl()), [entry(path, (8, 8, 1, 1), "unet", True) for path in paths]).entries
    assert list(found) == [f"_orig_mod.down_blocks.1.attentions.{i}.proj_in" for i in (0, 1)]


def test_ambiguous_names_are_refused() -> None:
    tree = Tree(a=Tree(b_c=nn.Linear(5, 7)), a_b=Tree(c=nn.Linear(5, 7)))
    with pytest.raises(ValueError, match=r"lora_unet_a_b_c: may mean a\.b_c or a_b\.c"):
        resolve(tree, [entry("a_b_c", component="unet", flat=True, key="lora_unet_a_b_c")])
    assert list(resolve(tree, [entry("a.b_c")]).entries) == ["a.b_c"]


def test_two_keys_for_one_module_are_refused() -> None:
    tree = Tree(unet=Tree(a=nn.Linear(5, 7)))
    with pytest.raises(ValueError, match=r"first, second: first, second all name unet\.a"):
        resolve(tree, [entry("a", component="unet", key="first"), entry("unet.a", key="second")])


# Shapes


@pytest.mark.parametrize(
    ("layer", "shape", "fits"),
    [
        pytest.param(nn.Linear(5, 7), (7, 5), (7, 5), id="linear"),
        pytest.param(nn.Linear(5, 7), (7, 5, 1, 1), (7, 5), id="linear-from-point"),
        pytest.param(nn.Conv2d(5, 7, 1), (7, 5, 1, 1), (7, 5, 1, 1), id="point"),
        pytest.param(nn.Conv2d(5, 7, 1), (7, 5), (7, 5, 1, 1), id="point-from-linear"),
        pytest.param(nn.Conv2d(5, 7, (3, 1)), (7, 5, 3, 1), (7, 5, 3, 1), id="convolution"),
        pytest.param(nn.Conv2d(5, 7, 3, stride=2, padding=1), (7, 5, 3, 3), (7, 5, 3, 3), id="strided"),
    ],
)
def test_factors_take_the_modules_shape(layer: nn.Module, shape: tuple[int, ...], fits: tuple[int, ...]) -> None:
    one = entry("a", shape)
    fitted = resolve(Tree(a=layer), [one]).entries["a"]
    down, up = fitted.down, fitted.up
    assert down.shape == (2, *fits[1:]) and up.shape == (fits[0], 2, *(1 for _ in fits[2:]))
    assert torch.equal(down.flatten(), one.down.flatten()) and torch.equal(up.flatten(), one.up.flatten())
    assert fitted.factor == one.factor


def test_gradients_reach_factors_that_took_another_shape() -> None:
    one = entry("a", (7, 5, 1, 1))
    one.down.requires_grad_()
    resolve(Tree(a=nn.Linear(5, 7)), [one]).entries["a"].down.sum().backward()
    assert one.down.grad is not None and one.down.grad.shape == (2, 5, 1, 1)


class Replaced(nn.Module):
    """What stands in a linear's place and has its attributes."""

    in_features, out_features = 5, 7


class ReplacedConv(nn.Module):
    in_channels, out_channels, kernel_size = 5, 7, (3, 3)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [pytest.param(Replaced(), (7, 5), id="linear"), pytest.param(ReplacedConv(), (7, 5, 3, 3), id="conv")],
)
def test_modules_with_a_layers_attributes_count_as_it(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_resolves(Tree(a=layer), {"a": entry("a", shape)})


@pytest.mark.parametrize("is_flat", [pytest.param(True, id="kohya"), pytest.param(False, id="dots")])
@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        pytest.param(nn.Linear(5, 8), (7, 5), r"factors \(2, 5\) and \(7, 2\) .* the Linear a, .* \(8, 5\)", id="out"),
        pytest.param(nn.Linear(4, 7), (7, 5), r"\(7, 4\)", id="in"),
        pytest.param(nn.Linear(5, 7), (7, 5, 3, 3), r"\(2, 5, 3, 3\)", id="kernel-on-linear"),
        pytest.param(nn.Conv2d(5, 7, 3), (7, 5), r"Conv2d a, .* \(7, 5, 3, 3\)", id="linear-on-kernel"),
        pytest.param(nn.Conv2d(5, 7, 3), (7, 5, 1, 1), r"\(7, 5, 3, 3\)", id="point-on-kernel"),
        pytest.param(nn.LayerNorm(5), (7, 5), "a LayerNorm, neither", id="norm"),
        pytest.param(nn.Embedding(5, 7), (7, 5), "a Embedding, neither", id="embedding"),
        pytest.param(nn.Conv1d(5, 7, 3), (7, 5), r"Conv1d a, .* \(7, 5, 3\)", id="linear-on-conv1d"),
        pytest.param(nn.ConvTranspose2d(5, 7, 1), (7, 5, 1, 1), "a ConvTranspose2d, neither", id="transposed"),
        pytest.param(nn.MultiheadAttention(6, 2).out_proj, (6, 6), "MultiheadAttention, which does not", id="mha"),
    ],
)
def test_modules_that_an_entry_does_not_fit(
    layer: nn.Module, shape: tuple[int, ...], message: str, is_flat: bool
) -> None:
    with pytest.raises(ValueError, match=f"1 of its parts .* another model.* the_key: .*{message}"):
        resolve(Tree(a=layer, b=nn.Linear(5, 7)), [entry("b"), entry("a", shape, flat=is_flat, key="the_key")])


def test_a_file_for_another_model_names_the_first_mismatches() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        wider = diffusers.UNet2DConditionModel(block_out_channels=(6, 6, 12, 12), **SMALL)
    with pytest.raises(
        ValueError, match=r"for another model\?: conv_in: .*; time_embedding.*; .* and \d+ more reasons"
    ) as caught:
        resolve(sd(), entries_of(wider, component="unet").values())
    assert len(str(caught.value)) < 1000


# Components


def test_entries_of_other_components_are_elsewhere() -> None:
    unet = [
        entry("down_blocks.0.attentions.0.proj_in", (4, 4, 1, 1), "unet"),
        entry("down_blocks.9.proj", component="unet"),
    ]
    text = [entry(name, component="text_encoder", key=f"te.{name}") for name in ("text_model.q", "text_model.k")]
    found = resolve(sd(), [*unet, *text, entry("loose")])
    assert list(found.entries) == ["down_blocks.0.attentions.0.proj_in"]
    assert list(found.elsewhere) == ["te.text_model.q", "te.text_model.k"]
    assert list(found.unmatched) == ["down_blocks.9.proj", "loose"], "an entry of no component may be the module's"


def test_where_nothing_resolves_nothing_is_elsewhere() -> None:
    found = resolve(Tree(a=nn.Linear(5, 7)), [entry("b", component="unet"), entry("c", component="text_encoder")])
    assert (found.entries, list(found.unmatched), found.elsewhere) == ({}, ["b", "c"], {})
    assert resolve(Tree(a=nn.Linear(5, 7)), []).entries == {}


def test_a_transformer_takes_what_kohya_calls_a_unet() -> None:
    tree = Tree(blocks=nn.ModuleList([Tree(to_q=nn.Linear(5, 7))]))
    assert_resolves(tree, {"blocks.0.to_q": entry("blocks_0_to_q", component="unet", flat=True)})


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_of_two_text_encoders_the_one_that_fits_is_meant(which: int) -> None:
    """Their modules have the same names."""
    sizes = [dict(width=8, layers=2), dict(width=12, layers=3)]
    parts = [
        entries_of(clip(False, **size), component=component, rename=lambda name: f"text_model.{name}")
        for size, component in zip(sizes, ("text_encoder", "text_encoder_2"), strict=True)
    ]
    found = resolve(clip(False, **sizes[which]), [*parts[0].values(), *parts[1].values()])
    assert set(found.entries) == set(parts[which])
    assert all(found.entries[name].down is one.down for name, one in parts[which].items())
    assert not found.unmatched
    assert list(found.elsewhere) == [one.key for one in parts[1 - which].values()]


def test_two_text_encoders_that_fit_alike_are_refused() -> None:
    encoder = clip(False)
    parts = [entries_of(encoder, component=component) for component in ("text_encoder", "text_encoder_2")]
    with pytest.raises(ValueError, match="entries of text_encoder and text_encoder_2 fit the module equally well"):
        resolve(encoder, [*parts[0].values(), *parts[1].values()])
    both = Tree(text_encoder=encoder, text_encoder_2=clip(False))
    assert len(resolve(both, [*parts[0].values(), *parts[1].values()]).entries) == 24


def test_a_module_is_wanted() -> None:
    with pytest.raises(TypeError, match="module must be a torch module, got dict"):
        resolve({}, [])  # type: ignore[arg-type]
