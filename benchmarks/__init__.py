"""Benchmarks: `python -m benchmarks.COMMAND`, where COMMAND is a module of this folder.

step, noise and lora time an op; sampler, digits and nll whole runs; convergence is about errors, choice about which
arithmetic processes take, gpu_static about machine code, and families puts results of several machines side by side.
quality is about samples and bits; siblings trains small models, and improved_ddpm compares them.

A command writes sections/, a table of results each. They time cases/, what is measured, beside peers/, the same work as
others have it, with what common/ offers: clocks, options, reports. machine_code/ reads compiled kernels, models/ holds
small networks. Imports point down: commands, sections, peers, cases, common.
"""
