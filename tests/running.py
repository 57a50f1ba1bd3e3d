"""Training scripts in the real simulator, made short: an episode has two steps, and success is
planted: a policy that knows nothing sees rewards. `python tests/running.py ppo --name NAME ...`"""

import contextlib
import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from common.run.args import parse_args
from common.run.experiment import find_checkpoint
from common.simulation.env import SCENES
from common.simulation.vec_env import CpuEnvs

SCRIPTS = ("ppo", "grpo", "dpo", "sft")
COMMON = "--model tiny --device cpu --dtype float32 --num-iterations 2 --eval-every 2 "
COMMON += "--eval-episodes 3 --num-envs 4"
SMALL = {
    "ppo": "--num-steps 4 --num-minibatches 4 --value-warmup-iterations 0",
    "grpo": "--num-steps 4 --group-size 2 --num-minibatches 2 --filter-low 0 --filter-high 1",
    "dpo": "--num-steps 4 --num-trajectories 2 --pairs-per-state 1",
    "sft": "--num-updates 2 --val-demos 2 --batch-size 8 --micro-batch-size 8 --warmup-updates 0",
}


def flags_of(script, flags=""):
    """The short run's flags and then those given, which win: list of words."""
    words = f"{COMMON} {SMALL[script]} {flags}".split()
    if script == "sft" and "--demos" not in words:
        from recorded_demos import recorded_demos

        words += ["--demos", str(recorded_demos())]
    return words


def parse(script, flags=""):
    """The script's module and the Args of a short run."""
    module = importlib.import_module(f"{script}_vla")
    return module, parse_args(module.Args, module.PRESETS, flags_of(script, flags))


@contextlib.contextmanager
def short_episodes(success=None):
    """success: iterator of (N,) bool, one per step of the run; None: by the action's sign."""
    simulate = CpuEnvs._simulate

    def planted(envs, actions):
        simulate(envs, actions)
        now = actions[:, 0] > 0 if success is None else next(success)  # about half of them
        envs.scalars["success"] = (envs.active & now).astype("float32")
        envs.scalars["reward"] = envs.scalars["success"] * envs.scalars["elapsed_steps"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCENES["small"], "max_episode_steps", 2)
        patch.setattr(CpuEnvs, "_simulate", planted)
        yield


def metrics_of(run_dir):
    """Lines of metrics.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "system/", "charts/SPS")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def weights_of(directory):
    """dict name -> tensor of a checkpoint, or of a run's last one."""
    if list(directory.glob("checkpoint-*")):
        directory = find_checkpoint(directory)
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def state_of(run_dir):
    """What the last checkpoint has beside the weights: critic, optimizers, progress."""
    return torch.load(find_checkpoint(run_dir) / "training_state.pt", weights_only=True)


if __name__ == "__main__":
    module, args = parse(sys.argv[1], " ".join(sys.argv[2:]))
    sys.argv[0] = f"{sys.argv[1]}_vla.py"
    with short_episodes():
        module.main(args)
