"""Models that need fewer steps, distilled from models that need many: four, two or one.

trajectory      along the student's own path from noise, without data
progressive     the number of steps is halved again and again
guided          a student of all weights of guidance, whose number of steps is halved: pixels or latents
consistency     every point of a path leads to its end, in one step
lcm             the same of a guided model, between few timesteps: pixels or latents
lcm_lora        the same in a LoRA alone, which makes any model of the teacher's kind one
"""

from fastsample.distill.common import Common
from fastsample.distill.conditions import Conditions
from fastsample.distill.consistency import consistency
from fastsample.distill.consistency_student import ConsistencyStudent
from fastsample.distill.guided import guided
from fastsample.distill.lcm import lcm
from fastsample.distill.lcm_lora import lcm_lora
from fastsample.distill.lcm_student import LCMStudent
from fastsample.distill.progressive import progressive
from fastsample.distill.settings import Settings
from fastsample.distill.store import load, save
from fastsample.distill.student import Facts, Student
from fastsample.distill.trajectory import trajectory

__all__ = [
    "Common",
    "Conditions",
    "ConsistencyStudent",
    "Facts",
    "LCMStudent",
    "Settings",
    "Student",
    "consistency",
    "guided",
    "lcm",
    "lcm_lora",
    "load",
    "progressive",
    "save",
    "trajectory",
]
