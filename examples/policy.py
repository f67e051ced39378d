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
policy, seen = Policy().eval().requires_grad_(False), {"observation": torch.randn(1, 10)}
scheduler = DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
scheduler.set_timesteps(10)
chunk = start = torch.randn(1, HORIZON, ACTIONS)
for t in scheduler.timesteps:
    chunk = scheduler.step(policy(chunk, t, **seen), t, chunk).prev_sample

sampler = fastsample.from_diffusers(scheduler)
prepared = sampler.prepare(policy, start, model_kwargs=seen)(start)  # the same, with less between the network's calls
act = sampler.prepare(policy, start, strength=0.4, model_kwargs=seen)
for tick in range(5):  # the robot does half of a chunk; the other half begins the next one, of 4 calls instead of 10
    robot = (chunk.clamp(-1, 1) + 1) / 2 * (largest - least) + least  # each joint in its own units
    ahead = torch.cat([robot[:, DONE:], robot[:, -1:].expand(-1, DONE, -1)], dim=1)
    ahead = 2 * (ahead - least) / (largest - least) - 1  # and all of them in [-1, 1], where the network has them
    chunk = act(ahead, seed=0, index=tick, model_kwargs={"observation": torch.randn(1, 10)})
