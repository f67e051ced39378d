"""A live pipeline of diffusers on this package's samplers, fused projections and LoRA layers, and back.

    fastsample.accelerate(pipeline)
    fastsample.restore(pipeline)

pipeline     the two functions
component    one network: what is taken out, what stands in its place, how it comes back
projections  attention's q, k and v as one product, whatever processor calls them
peft         what PEFT's layers hold, and which of them can be moved
scaling      diffusers' keyword `scale` on moved adapters
report       what was done and what was left
"""

from fastsample.integrations.acceleration.pipeline import accelerate, restore
from fastsample.integrations.acceleration.report import ComponentReport, Report

__all__ = ["ComponentReport", "Report", "accelerate", "restore"]
