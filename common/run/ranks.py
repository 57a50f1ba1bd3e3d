"""Processes of torchrun ("ranks"), seeds and minibatches.
Without torchrun there is one rank, and functions over ranks return their input."""

import atexit
import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.run.files import check


def cores():  # that this process may use
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cores_per_rank():  # at least one
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return max(1, cores() // int(here))


def setup_ranks(device="auto", seed=0):
    """Join torchrun's process group, if any; use all cores; seed the global random generators.
    device: "auto", "cpu" or "cuda". Returns: rank, world_size, torch.device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device != "cuda" or torch.cuda.is_available(), "device = cuda: no GPU here; use cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # NCCL's 10 minutes are too few where rank 0 downloads or writes 15 GB
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
        atexit.register(dist.destroy_process_group)  # else gloo's threads may abort at the end
    torch.set_num_threads(cores_per_rank())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return *rank_and_world_size(), torch.device(device)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensor):  # in place
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(value):
    """List with every rank's picklable value, in the order of ranks."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_envs(tensor):
    """(T, N) of this rank's environments -> (T, num_envs) of all ranks, on the CPU."""
    return torch.cat(gather_over_ranks(tensor.cpu()), dim=1)


def sum_gradients(parameters):
    """Replace each gradient by its sum over ranks: one all-reduce of one flat vector."""
    parameters = list(parameters)
    if not dist.is_initialized() or not parameters:
        return
    # A rank may hold no sample of a minibatch and then contributes zeros. A parameter that has no
    # gradient on any rank keeps none, so that AdamW leaves it alone.
    used = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([used.to(gradients[0]), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    used, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, total in zip(parameters, used.tolist(), sums, strict=True):
        parameter.grad = total.view_as(parameter) if count else None


def minibatches(samples, num_envs, num_minibatches, rng):
    """Split the samples of all ranks into minibatches: one epoch.
    samples: (S,) int numbers t * num_envs + n of step t in environment n of all ranks;
    rng: np.random.Generator, in the same state on every rank. Returns: list of (rows, size): this
    rank's rows t * N + n (int64 tensor, N its environments), and the size over all ranks."""
    rank, world_size = rank_and_world_size()
    here = num_envs // world_size
    parts = []
    for part in np.array_split(rng.permutation(samples), num_minibatches):
        step, env = np.divmod(part, num_envs)
        mine = env // here == rank
        rows = step[mine] * here + env[mine] - rank * here
        parts.append((torch.as_tensor(rows), len(part)))
    return parts
