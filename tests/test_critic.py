"""The critic that reads the simulator's state."""

import numpy as np
import torch

import ppo_vla
from common.model.critic import NUM_FEATURES, StateCritic, state_features
from common.simulation.vec_env import make_envs


def test_features_of_the_real_simulator():
    """Stops features that are of another size than the critic, that mix up environments, or that ignore what moves."""
    envs = make_envs(num_envs=2, num_workers=1, max_episode_steps=4)
    try:
        envs.reset(np.array([3, 400000]))
        flags, clock = np.zeros((2, 3)), np.array([0.0, 0.5])
        before = state_features(envs.privileged_state(), flags, clock)
        assert before.shape == (2, NUM_FEATURES) and before.dtype == torch.float32 and torch.isfinite(before).all()
        assert before[:, 34].tolist() == [0.0, 0.5] and before[:, 35:].sum(1).tolist() == [1.0, 1.0]
        envs.step(np.array([[0.03, 0, 0, 0, 0, 0, 1], [0] * 6 + [1]], dtype=np.float32))
        after = state_features(envs.privileged_state(), flags, clock)
        moved = (after - before).abs()[:, :3].amax(1)  # object - TCP, in decimetres
        assert moved[0] > 0.05 and moved[1] < 0.02
        envs.reset(np.array([400000, 3]))
        swapped = state_features(envs.privileged_state(), flags, clock[::-1])
        assert torch.allclose(swapped.flip(0), before, atol=1e-5)
    finally:
        envs.close()


def test_an_object_far_below_the_table_has_bounded_features():
    """Stops values that grow with the fall of a lost object, which drown those of the rollout's other episodes."""
    pose = np.tile([0.0, 0, 0, 1, 0, 0, 0], (2, 1))
    state = {f"{name}_pose": pose for name in ("base", "tcp", "tcp_target", "plate")}
    state |= {"object_pose": pose + [[0.0] * 7, [0, 0, -500, 0, 0, 0, 0]], "object_index": np.array([0, 1])}
    state |= {"object_bbox": np.zeros((2, 2, 3)), "finger_qpos": np.zeros((2, 2))}
    features = state_features(state, np.zeros((2, 3)), np.zeros(2))
    assert features[1, 2] == -10 and features[1, 5] == 10 and features.abs().max() == 10
    assert features[0, :23].abs().max() == 0, "what is near is as it was"


def test_update_critic_fits_returns_and_leaves_the_policy_alone():
    """Stops a critic that does not learn, and policy weights that move (by momentum or decay) while it does."""
    torch.manual_seed(0)
    critic, policy = StateCritic(), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [policy], "lr": 1.0}, {"params": list(critic.parameters()), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups)
    policy.grad = torch.ones(3)
    optimizer.step()  # gives it momentum
    kept, states = policy.clone(), torch.randn(512, NUM_FEATURES)
    batch = {"states": states, "values": torch.zeros(512), "returns": states[:, 0].tanh(), "index": np.arange(512)}
    args, rng = ppo_vla.Args(num_minibatches=8, value_epochs=10), np.random.default_rng(0)
    first = ppo_vla.update_critic(critic, optimizer, batch, args, rng, ".")["losses/value_loss"]
    for _ in range(4):
        last = ppo_vla.update_critic(critic, optimizer, batch, args, rng, ".")["losses/value_loss"]
    assert last < 0.2 * first and torch.equal(policy, kept)
