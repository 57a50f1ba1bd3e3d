"""Critics: what each one reads, what it trains, and the weights that it starts with."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.model.checkpoints import load_vla, trainable_parameters
from common.model.critic import make_critic
from common.simulation.env import STATE_SIZE

OBS = np.random.default_rng(0).integers(0, 256, (3, 120, 160, 3), dtype=np.uint8)
TEXTS = ["put carrot on plate", "put banana on cloth", "put 7up can on plate"]
TOKENS = torch.arange(21).reshape(3, 7) + 256


@pytest.mark.parametrize("kind", ["state", "h0", "hn", "concat", "separate"])
def test_a_critic_reads_and_trains_what_its_name_says(kind):
    """An ablation of another input than its name, or a critic that trains the policy by itself."""
    model = load_vla("tiny")
    critic = make_critic(kind, model, seed=1)
    hidden = model.evaluate_actions(OBS, TEXTS, TOKENS)[2]
    state = torch.randn(3, STATE_SIZE)
    values = critic(OBS, TEXTS, hidden, state)
    assert values.shape == (3,) and values.dtype == torch.float32
    values.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(critic)[-2:])
    assert (model.projector.fc1.weight.grad is not None) == (kind in ("h0", "hn", "concat"))
    changed = {"state": (OBS, hidden, state + 1), "obs": (OBS[::-1].copy(), hidden, state)}
    for i in range(7):
        changed[i] = (OBS, hidden + F.one_hot(torch.tensor(i), 7)[:, None], state)
    reads = set()
    for name, (obs, other, numbers) in changed.items():
        if not torch.equal(critic(obs, TEXTS, other, numbers), values):
            reads.add(name)
    expected = {"h0": {0}, "hn": {6}, "concat": set(range(7)), "separate": {"obs"}}
    assert reads == expected.get(kind, {kind})


@pytest.mark.parametrize("rank", [0, 2])
def test_a_separate_critic_has_its_own_trained_weights(rank):
    """A critic that shares weights with the policy, or that copies 15 GB of frozen ones."""
    model = load_vla("checkpoints/tiny-warmup", lora_rank=rank, freeze_vision=True)
    critic = make_critic("separate", model, seed=1)
    policy = {id(p): p.requires_grad for p in model.parameters()}
    shared = [policy[id(p)] for p in critic.model.parameters() if id(p) in policy]
    assert shared and not any(shared)
    assert len(trainable_parameters(critic.model)) == len(trainable_parameters(model))
    obs = model.preprocess(OBS)  # image tokens of the eyes that both have
    hidden = model.prompt_hidden(obs, TEXTS)
    assert torch.equal(critic(obs, TEXTS, None, None), critic.head(None, None, hidden, None))


def test_first_weights_are_those_of_the_published_results():
    """Runs that start elsewhere than the committed ones of the same seed."""
    model = load_vla("checkpoints/tiny-warmup")
    before = torch.get_rng_state()
    state, h0 = make_critic("state", model, seed=1), make_critic("h0", model, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state"
    assert state.layers[4].weight[0, :2].tolist() == [0.012191571295261383, 0.05755876004695892]
    assert h0.head_l3.weight[0, :2].tolist() == [0.012666321359574795, 0.006461343728005886]
