"""A robot's actions at a high rate: Diffusion Policy's loop with one line changed, then a prepared run in its place.

The network has random weights. For yours take its weights, and the least and largest action of its data.
"""

import torch
from torch import nn

import fastsample
from fastsample.integrations.diffusers import DDIMScheduler  # was: from diffusers import DDIMScheduler

HORIZON, ACTIONS, DONE = 16, 7, 8
least, largest = -torch.linspace(0.5, 2.0, ACTIONS), torch.linspace(1.0, 3.0, ACTIONS)  # of each joint


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(HORIZON * ACTIONS + 11, 64), nn.Mish(), nn.Linear(64, HORIZON * ACTIONS))

    def forward(self, x, t, observation):
        return self.net(torch.cat([x.flatten(1), observation, t.expand(len(x), 1) / 100], dim=1)).view_as(x)


torch.manual_seed(0)
policy, observation = Policy().eval().requires_grad_(False), torch.randn(1, 10)
scheduler = DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
scheduler.set_timesteps(10)
chunk = start = torch.randn(1, HORIZON, ACTIONS)
for t in scheduler.timesteps:
    chunk = scheduler.step(policy(chunk, t, observation), t, chunk).prev_sample

sampler = fastsample.from_diffusers(scheduler)
act = sampler.prepare(policy, start, model_kwargs={"observation": observation})
prepared = act(start)  # the same chunk, with less between the calls of the network
again = sampler.prepare(policy, start, strength=0.4, model_kwargs={"observation": observation})
for tick in range(5):  # a robot does the first half of a chunk; what is left of it begins the next one, in 4 steps
    robot = (chunk.clamp(-1, 1) + 1) / 2 * (largest - least) + least  # each joint in its own units
    ahead = torch.cat([chunk[:, DONE:], chunk[:, -1:].expand(-1, DONE, -1)], dim=1)
    chunk = again(ahead, seed=0, index=tick, model_kwargs={"observation": torch.randn(1, 10)})
