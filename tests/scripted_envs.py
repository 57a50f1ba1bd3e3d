"""A vector environment without a simulator: an episode is what its id says. Its picture after step
t is 10 * id + t, modulo 256; its reward in each step is 1."""

import numpy as np

from common.simulation.vec_env import VectorEnv


class ScriptedEnvs(VectorEnv):
    def __init__(self, num_envs, success, max_episode_steps=3, reset_after_success=0):
        """success: dict id -> steps (1, 2, ...) after which the episode is in success."""
        settings = dict(image_size=(8, 6), max_episode_steps=max_episode_steps, fidelity="fixed")
        super().__init__(num_envs, settings, reset_after_success, state=False)
        self.planned = success
        self.actions = []

    def _begin(self, ids):
        for env in ids:
            self._show(env, 0)

    def _simulate(self, actions):
        self.actions.append(actions)
        for env in np.flatnonzero(self.active):
            self._show(env, int(self.scalars["elapsed_steps"][env]) + 1)

    def _show(self, env, step):
        episode_id = int(self.ids[env])
        steps = [s for s in self.planned.get(episode_id, ()) if s <= step]
        now = dict(reward=step > 0, elapsed_steps=step, grasped=episode_id % 2, held=0)
        for name, value in dict(now, success=step in steps, success_once=bool(steps)).items():
            self.scalars[name][env] = value
        self.images[env] = (10 * episode_id + step) % 256
        self.instructions[env] = f"put {episode_id}"

    def close(self):
        pass
