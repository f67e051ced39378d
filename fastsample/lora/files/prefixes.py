"""What stands before and inside modules' names in files: a pipeline's components, and what wrapped the model."""

from __future__ import annotations

import re

# The component that each beginning of a name with dots means. Two text encoders of one file must differ here.
_COMPONENTS = {
    **{name: name for name in ("unet", "transformer", "transformer_2", "prior", "connectors", "vae", "controlnet")},
    **{name: name for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "image_encoder")},
    "text_encoder_1": "text_encoder",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "t5",
    "t5xxl": "t5",
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "cond_stage_model.transformer": "text_encoder",
    "conditioner.embedders.0.transformer": "text_encoder",
    "conditioner.embedders.1.model": "text_encoder_2",
    "text_embedding_projection": "connectors",
}
# ComfyUI's text encoders, by their own names.
_COMFY = re.compile(r"text_encoders\.(?P<name>[^.]+)\.(?:transformer\.)?(?P<rest>.+)")
# kohya's, OneTrainer's and LyCORIS' names, in which "_" may stand for a dot.
_FLAT = {
    **{name: _COMPONENTS[name] for name in ("unet", "transformer", "prior")},
    **{name: _COMPONENTS[name] for name in ("te", "te1", "te2", "te3", "clip_l", "clip_g", "t5", "t5xxl")},
    "prior_unet": "prior",
    "prior_te": "text_encoder",
}
_FLAT_STEM = re.compile(
    rf"(?:(?P<mark>lora|lycoris)_)?(?P<component>{'|'.join(sorted(_FLAT, key=len, reverse=True))})_(?P<path>.+)"
)
_LYCORIS = "lycoris_"
_HEADS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "module.")
# Modules that wrap others anywhere in a tree, and have the wrapped one as their only child.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INNER_DOTS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_INNER)})\.")
_INNER_FLAT = re.compile(rf"(?:^|(?<=_))(?:{'|'.join(_INNER)})_")


def unwrapped(name: str) -> str:
    """A module's name without the levels of torch.compile, FSDP, activation checkpoints and DistributedDataParallel.

    Example:
        >>> unwrapped("module.blocks._orig_mod.0._fsdp_wrapped_module.proj")
        'blocks.0.proj'
    """
    return _INNER_DOTS.sub("", name).removeprefix("module.")


def split(stem: str) -> tuple[str, str]:
    """A name with dots as its component, "" where it says none, and the module's path without component and wrappers.

    Example:
        >>> split("base_model.model.unet._orig_mod.mid.to_q")
        ('unet', 'mid.to_q')
        >>> split("text_encoders.clip_l.transformer.text_model.final")
        ('text_encoder', 'text_model.final')
    """
    component, path = "", _INNER_DOTS.sub("", stem)
    while True:
        head = next((head for head in _HEADS if path.startswith(head) and path != head), None)
        if head is not None:
            path = path.removeprefix(head)
        elif component:
            return component, path
        else:
            component, path = _component(path)
            if not component:
                return "", path


def split_flat(stem: str, marked: bool) -> tuple[str, str] | None:
    """A name by kohya as its component and path; None for other names.

    Args:
        stem: the name.
        marked: whether it has to begin with kohya's or LyCORIS' own mark to be one.

    Example:
        >>> split_flat("lora_te2__orig_mod_text_model_final", True)
        ('text_encoder_2', 'text_model_final')
        >>> split_flat("te1_text_model_final", True), split_flat("te1_text_model_final", False)
        (None, ('text_encoder', 'text_model_final'))
    """
    match = _FLAT_STEM.fullmatch(stem)
    if match and (match["mark"] or not (marked or "." in stem)):
        return _FLAT[match["component"]], _INNER_FLAT.sub("", match["path"])
    if stem.startswith(_LYCORIS) and stem != _LYCORIS:
        return "", _INNER_FLAT.sub("", stem.removeprefix(_LYCORIS))
    return None


def _component(path: str) -> tuple[str, str]:
    if match := _COMFY.fullmatch(path):
        return _COMPONENTS.get(match["name"], match["name"]), match["rest"]
    for levels in (1, 2, 4):
        head = ".".join(path.split(".")[:levels])
        rest = path[len(head) + 1 :]
        if head in _COMPONENTS and rest:
            return _COMPONENTS[head], rest
    return "", path
