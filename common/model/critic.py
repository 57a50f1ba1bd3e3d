"""Critics, with one call: `critic(obs, instructions, hidden, state)` -> values (N,) float32.
obs, instructions: what the policy was asked; hidden (N, 7, D): what it returned with its actions;
state (N, D) float32: `env.state_features`. Each critic reads one of them."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common.simulation.env import STATE_SIZE


class StateCritic(nn.Module):
    """Reads the simulator's state, which the policy never sees (Pinto et al. 2017)."""

    def __init__(self, state_size, width=256):
        super().__init__()
        layers = nn.Linear(state_size, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, obs, instructions, hidden, state):
        return self.layers(state)[:, 0]


class HiddenCritic(nn.Module):
    """RL4VLA's value head, float32; reads "h0" (of the prompt alone), "hn" (last) or "concat"."""

    def __init__(self, width, reads="h0", inner=(512, 128)):
        super().__init__()
        self.reads = reads
        self.head_l1 = nn.Linear(width * 7 if reads == "concat" else width, inner[0])
        self.head_l2, self.head_l3 = nn.Linear(*inner), nn.Linear(inner[1], 1, bias=False)
        for layer in self.children():
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head_l1.bias)
        nn.init.zeros_(self.head_l2.bias)

    def forward(self, obs, instructions, hidden, state):
        x = {"h0": hidden[:, 0], "hn": hidden[:, -1], "concat": hidden.flatten(1)}[self.reads]
        x = F.gelu(self.head_l1(x.float()))
        return self.head_l3(F.gelu(self.head_l2(x)))[:, 0]


class SeparateCritic(nn.Module):
    """Reads h0 of its own copy of the policy's network; the weights that are frozen are shared."""

    def __init__(self, model, head):
        super().__init__()
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model, self.head = copy.deepcopy(model, frozen), head

    def forward(self, obs, instructions, hidden, state):
        return self.head(obs, instructions, self.model.prompt_hidden(obs, instructions), state)


def make_critic(kind, model, seed):
    """A new critic on the model's device. kind: "state", "h0", "hn", "concat" or "separate"."""
    width, inner = model.config.text_config.hidden_size, model.config.value_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "state":
            critic = StateCritic(STATE_SIZE)
        elif kind == "separate":
            head = HiddenCritic(width, "h0", inner)
            critic = SeparateCritic(getattr(model, "model", model), head)  # without PEFT's wrapper
        else:
            critic = HiddenCritic(width, kind, inner)
    return critic.to(model.device)
