"""What ordinary calls import beside torch: nothing that a user would wait for."""

from __future__ import annotations

import os
import subprocess
import sys

ORDINARY = """
import pickle, copy, sys, tempfile, torch, fastsample
from fastsample import lora, ops
from torch import nn

model = lambda x, t: 0.1 * x
x = torch.ones(2, 3, 8, 8)
for sampler in (fastsample.ddim, fastsample.ddpm, fastsample.dpm_solver, fastsample.heun):
    sampler(model, (2, 3, 8, 8), steps=3)
for sampler in (fastsample.euler, fastsample.euler_ancestral):
    sampler(model, (2, 3, 8, 8), steps=3, prediction="flow" if sampler is fastsample.euler else "epsilon")
fastsample.ddim_invert(model, x, steps=3)
fastsample.DDIM(fastsample.Schedule.cosine(20), steps=3)(model, (2, 3, 8, 8))
fastsample.to_uint8(x)
ops.randn((2, 3), seed=0)
weight = torch.ones(40, 40)
packed = ops.pack_linear([weight])
adapters = ops.pack_adapters(packed, [[ops.LowRank(torch.ones(2, 40), torch.ones(40, 2), torch.tensor(1.0))]])
ops.lora_linear(torch.ones(1, 40), packed, adapters)
packed.unpack()
state = {"0.lora_A.weight": torch.ones(2, 40), "0.lora_B.weight": torch.ones(40, 2)}
state |= {"1.lora_A.weight": torch.ones(2, 3, 1, 1), "1.lora_B.weight": torch.ones(3, 2, 1, 1)}
for keep_weight in (True, False):
    net = nn.ModuleList([nn.Linear(40, 40), nn.Conv2d(3, 3, 1)])
    lora.attach(net, state, keep_weight=keep_weight)
    net[0](torch.ones(1, 40)), net[1](x)
    net[0](torch.ones(1, 40, requires_grad=True)).sum().backward()
    lora.swap(net, state), lora.set_adapters(net, {"default": 2.0}), lora.state_dict(net)
    lora.set_adapter_index(net, torch.tensor([0])), lora.set_adapter_index(net, None)
    net.state_dict(), net.load_state_dict(net.state_dict()), net.double(), net.float()
    net[0].merge(), net[0].unmerge(), net[0].repack()
    copy.deepcopy(net), pickle.dumps(net)
    lora.detach(net)
with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    torch.save(state, file.name)
    lora.attach(net, file.name)
fastsample.zoo.digits()(torch.ones(1, 1, 28, 28), torch.tensor([3]))
names = "torch._dynamo torch._inductor sympy triton diffusers transformers peft matplotlib PIL".split()
print([name for name in names if name in sys.modules])
"""


def test_ordinary_calls_import_no_compiler_and_no_peer() -> None:
    """torch's compiler alone takes 145 MB and two seconds."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ORDINARY], env=plain, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
