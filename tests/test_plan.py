"""What a run will be, before a model is loaded or downloaded."""

import pytest

from scripts.plan import plan


def test_weights_steps_and_memory_of_both_sizes():
    """Stops a plan that is of another model or update than the run; 7B numbers are OpenVLA's."""
    small, large = plan("ppo_vla", ["--num-envs", "32"]), plan("ppo_vla", ["--preset", "paper"])
    assert small["million weights"] == "1.6, trains 0.9"
    assert small["optimizer steps"] == "1,700, each of 256 samples"
    assert small["num_envs (default 64)"] == 32
    assert large["million weights"] == "7,607.3, trains 109.1"
    assert large["optimizer steps"] == "12,512, each of 160 samples"
    assert large["environment steps"] == "2,001,920, 5,120 per iteration"
    assert large["GB of weights"] == pytest.approx(15.43, abs=0.01)
    assert large["GB of activations in an update"] == pytest.approx(14.28, abs=0.01)
    assert large["GB of cache in acting"] == pytest.approx(10.17, abs=0.01)


@pytest.mark.parametrize(
    "command, steps",
    [
        ("grpo_vla.py --num-minibatches 5", "425, each of 2048 samples"),
        ("dpo_vla --preset paper", "12,512, each of 160 samples"),
        ("sft_vla --preset warmup", "2,000, each of 32 samples"),
    ],
)
def test_every_script_has_a_plan(command, steps):
    """Stops a script whose flags the plan does not understand."""
    script, *argv = command.split()
    assert plan(script, argv)["optimizer steps"] == steps


@pytest.mark.parametrize("model", ["checkpoints/tiny-warmpu", "runs/gone", "./gone"])
def test_a_misspelt_directory_is_refused(model):
    """Stops a typing error from being planned, or downloaded, as OpenVLA-7B."""
    with pytest.raises(FileNotFoundError, match="gone|warmpu"):
        plan("ppo_vla", ["--model", model])
