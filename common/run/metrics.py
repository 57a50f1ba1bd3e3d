"""What training reports: means over ranks, and checks of what was learned from."""

import torch

from common.run.ranks import gather_envs, gather_over_ranks


class Means:
    """Means of named quantities over all samples that were added, on all ranks."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, name, values):  # a tensor of any shape, or a number
        values = torch.as_tensor(values).detach().double()
        self.sums[name] = self.sums.get(name, 0.0) + values.sum().item()
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def means(self, prefix=""):  # dict prefix + name -> mean
        means, parts = {}, gather_over_ranks((self.sums, self.counts))
        for name in dict.fromkeys(name for sums, _ in parts for name in sums):
            total = sum(sums.get(name, 0.0) for sums, _ in parts)
            count = sum(counts.get(name, 0) for _, counts in parts)
            means[prefix + name] = total / count if count else float("nan")
        return means


def episode_metrics(episodes, prefix="train/"):
    """Means of the episodes that ended. episodes: list of `infos["episode"]`."""
    means = Means()
    for episode in episodes:
        for key in ("success_at_end", "success_once", "grasped", "return"):
            means.add(key, episode[key])
    return means.means(prefix)


def normalize(advantages):
    """(T, N) float32 -> mean 0 and std 1 over all ranks; equal ones become exactly 0 (float64)."""
    of_all_ranks = gather_envs(advantages).double()
    centred = advantages.double() - of_all_ranks.mean()
    return (centred / (of_all_ranks.std() + 1e-8)).float()


def explained_variance(values, rewards, dones, gamma):
    """Share of the variance of discounted returns that the values explain; 0 = none of it.
    Args: (T, N) float32. Only steps whose episode ended within the rollout count: their returns
        are known, so that the critic is not compared with its own next value."""
    returns, nextreturn = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        nextreturn = rewards[t] + gamma * (1.0 - dones[t]) * nextreturn
        returns[t] = nextreturn
    known = dones.flip(0).cumsum(0).flip(0) > 0  # the episode's end follows
    returns, values, known = gather_envs(returns), gather_envs(values), gather_envs(known)
    return 1 - (returns - values)[known].var() / returns[known].var()


def check_ratio(ratio, dtype):
    """99th percentile of |ratio - 1| of ratios (M,) before an update, which should be 0.
    RuntimeError if it is not: the policy that acted is then not the one that is scored."""
    gap = (ratio - 1).abs().quantile(0.99).item()
    most = 0.01 if dtype == "float32" else 0.1  # bfloat16 rounds: by up to .03 so far
    if not gap <= most:
        why = "the policy that acted is not the one that is scored; try --dtype float32"
        raise RuntimeError(f"|ratio - 1| = {gap:.1e} before the first update, not <= {most}: {why}")
    return gap


def peak_memory():
    """Metrics: the most memory that this process has used so far."""
    from resource import RUSAGE_SELF, getrusage  # here, as fcntl in experiment.py

    metrics = {"system/peak_ram_gb": getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9}  # from kB
    if torch.cuda.is_initialized():
        metrics["system/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics
