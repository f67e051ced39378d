"""The dtype and device that torch modules want their input in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.model.called_modules import called_modules
from fastsample.model.device import device_of
from fastsample.model.dtype import dtype_of, stated_outside
from fastsample.model.hooks import hooked
from fastsample.model.modules import parts_of


def placement(modules: Iterable[nn.Module]) -> tuple[torch.dtype | None, torch.device | None]:
    """The dtype that all these modules want, and where the first of them that lies anywhere computes.

    What a module wants, in this order: the compute dtype of diffusers' layerwise casting; its `dtype` attribute; what
    its layers that multiply by weights hold (the first convolution; else most of the weights of linears, those of the
    time's embedding aside where dtypes differ); what most of its other parameters hold, or of its buffers. Dtypes of
    storage alone (float8, integers of quantised weights) are passed over.

    A module computes where an offloading hook of accelerate or diffusers brings it, else where its first parameter
    lies, or buffer: never on "meta".

    Returns:
        A dtype that torch computes in, None where they differ or leave it open; a device, None where they leave it
        open.
    """
    dtypes, devices = set(), []
    for module in modules:
        parts = parts_of(module)
        with_hooks = hooked(parts)
        dtypes.add(dtype_of(module, parts, with_hooks))
        devices.append(device_of(parts, with_hooks))
    dtypes.discard(None)
    return dtypes.pop() if len(dtypes) == 1 else None, next((device for device in devices if device is not None), None)


def decoder_dtype(decode: Callable[[Tensor], Any]) -> torch.dtype | None:
    """The dtype that the modules which `decode` calls want, None where it calls none or they differ.

    For `decode=vae.decode` and `decode=lambda x: vae.decode(x / s).sample` it is that of the VAE.
    """
    return stated_outside(decode) or placement(called_modules(decode))[0]
