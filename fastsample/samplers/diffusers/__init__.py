"""Samplers from live schedulers of diffusers, which compute what the scheduler would.

door         from_diffusers, and which classes have an equivalent
reading      a scheduler that is recognised, with its timesteps set, and its options
alpha_bars   DDIM and DDPM
distilled    LCM, TCD and consistency models
levels       the solvers' base: through noise levels that are given
sigmas       Euler, Euler ancestral and Heun, whose state is clean data + sigma z
flow         flow matching
multistep    DPM-Solver++, UniPC and DEIS

diffusers is not imported: who has a scheduler of it has it.
"""
