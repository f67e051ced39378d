"""A UNet that returns what its network gives."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from fastsample.zoo.unet import UNet


def plain(model: UNet) -> UNet:
    """A copy that returns v, without a variance, where the network gives v or x0; else only a copy.

    Turned into epsilon and used for x0 next to pure noise, the rounding of its output alone is multiplied by thousands.
    """
    network, config = copy.deepcopy(model), model.config
    given = config.target or config.prediction
    if given == "epsilon":
        return network
    leave, learned = network.leave, config.learned_variance
    if learned and type(leave) is nn.Conv2d:  # not where an adapter is in its place
        rows, learned = config.channels * config.fold**2, False
        leave.out_channels = rows
        for name, parameter in list(leave.named_parameters()):
            setattr(leave, name, nn.Parameter(parameter.detach()[:rows].clone(), parameter.requires_grad))
    network.config = replace(config, prediction="v", target=given, learned_variance=learned)
    return network
