"""What all training scripts share, in the real simulator; a new one gets it by `SCRIPTS`."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_layout import write_reference_checkpoint
from running import SCRIPTS, flags_of, metrics_of, parse, state_of, weights_of

from common.model.checkpoints import load_vla, save_vla
from common.model.openvla import OpenVLA
from common.run import experiment
from common.run.args import flat, parse_args
from common.run.experiment import find_checkpoint
from common.simulation.env import SCENES
from common.simulation.episodes import held_out
from common.simulation.vec_env import CpuEnvs

ROOT = Path(__file__).parent.parent
FAST = "ppo"  # two ranks and signals are tested with it always, with the others in `make test-long`
ALL = [pytest.param(s, marks=[] if s == FAST else pytest.mark.long) for s in SCRIPTS]


@pytest.fixture
def begun(monkeypatch):
    """Lists of the episode ids that were begun: [for training], [for evaluation]."""
    ids, begin, evaluate, evaluating = ([], []), CpuEnvs._begin, experiment.evaluate, []

    def spy_begin(envs, new):
        ids[len(evaluating)].extend(new.values())
        begin(envs, new)

    def spy_evaluate(*args):
        evaluating.append(True)
        metrics = evaluate(*args)
        evaluating.pop()
        return metrics

    monkeypatch.setattr(CpuEnvs, "_begin", spy_begin)
    monkeypatch.setattr(experiment, "evaluate", spy_evaluate)
    return ids


def start_weights(directory, script):
    """Weights of the model that the short run starts from."""
    args = parse(script)[1]
    model = dict(dataclasses.asdict(args.model), seed=args.run.seed)
    save_vla(load_vla(model.pop("model"), **model), directory)
    return weights_of(directory)


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_and_exact_resume(script, train, begun, tmp_path, monkeypatch):
    """Stops a run that trains or writes too little, or on held-out episodes; an inexact resume."""
    straight = train(script, "--name straight")
    rows = metrics_of(straight)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[2]["step"] == 2 * rows[1]["step"] and rows[2]["eval/episodes"] == 3
    assert {"eval/success_at_end", "eval/low"} <= rows[0].keys() & rows[2].keys() - rows[1].keys()
    assert all(value is not None for value in rows[2].values())
    names = {path.name for path in straight.iterdir()}
    assert {"args.json", "curve.png", "checkpoint-000002"} <= names
    assert len(list(straight.glob("videos/00000[02]-[01]-*.mp4"))) == 4
    assert any(name.startswith("best-") for name in names) and "checkpoint-000001" not in names

    # What moved, and what the learning rate did
    before, after = start_weights(tmp_path / "start", script), weights_of(straight)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    start = load_vla("tiny")
    trained = {name for name, p in start.named_parameters() if p.requires_grad}
    assert moved <= trained and len(moved) > 0.8 * len(trained)
    rates = [row["charts/learning_rate"] for row in rows[1:]]
    assert rates[1] < rates[0] <= parse(script)[1].learning_rate

    # Episodes
    training, evaluation = begun
    assert held_out("main", "train", np.array(evaluation)).all() and len(evaluation) == 6
    if script != "sft":
        assert not held_out("main", "train", np.array(training)).any()
        repeats = 1 if script == "ppo" else 2  # members of a group begin alike
        counts = np.unique(training, return_counts=True)[1]
        assert (counts == repeats).sum() > 0.9 * len(counts), "streams are shared or repeat"

    # 1 + 1 = 2 iterations
    finish = experiment.Experiment.finish

    def finish_and_stop(*args, **kwargs):
        finish(*args, **kwargs)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "finish", finish_and_stop)
        with pytest.raises(InterruptedError):
            train(script, "--name parts")
    parts = train(script, "--resume runs/parts --name parts")
    assert metrics_of(parts) == rows
    assert all(torch.equal(weights, after[name]) for name, weights in weights_of(parts).items())
    states = [state_of(run) for run in (straight, parts)]
    for state in states:
        assert state.pop("seconds") > 0
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "sft"])
def test_seed(script, train, begun, monkeypatch):
    """Stops seeds from being repetitions of one run, and environments from drawing alike."""
    drawing, act = [], OpenVLA.act

    def spy(model, obs, instructions, temperature=1.0, generators=None):
        if generators:
            drawing.append({generator.initial_seed() for generator in generators})
        return act(model, obs, instructions, temperature, generators)

    monkeypatch.setattr(OpenVLA, "act", spy)
    for seed in (1, 2):
        train(script, f"--name seed{seed} --seed {seed} --num-iterations 1 --eval-every 0")
    half = len(begun[0]) // 2
    assert not set(begun[0][:half]) & set(begun[0][half:])
    assert all(len(seeds) == 4 for seeds in drawing) and not drawing[0] & drawing[-1]


# --- in processes of their own ---
RUNNING = str(ROOT / "tests/running.py")
ENVIRONMENT = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.parametrize("script", ALL)
def test_two_ranks_make_the_update_of_one(script, train, tmp_path):
    """Stops torchrun from being another algorithm: the same batch on one and two ranks."""
    one = train(script, "--name one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = "--name two" + (f" --demos {flags_of(script)[-1]}" if script == "sft" else "")
    run = [*torchrun, RUNNING, script, *flags.split()]
    subprocess.run(run, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=550)
    two = tmp_path / "runs/two"
    start, a, b = start_weights(tmp_path / "start", script), weights_of(one), weights_of(two)
    # Adam's first steps have size lr wherever a gradient is not exactly 0: compare all as a whole
    squares = [[(x[n] - y[n]).square().sum() for n in start] for x, y in ((a, start), (b, a))]
    moved, apart = [sum(each).sqrt() for each in squares]
    assert moved > 1e-2 and apart < 5e-3 * moved
    for x, y in zip(metrics_of(one), metrics_of(two), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert np.isclose(x[key], y[key], rtol=1e-2, atol=1e-4), key


@pytest.mark.parametrize("script", ALL)
def test_sigterm_leaves_a_run_that_continues(script, tmp_path):
    """Stops a preempted job from losing its run: its last line is the command that goes on."""
    flags = "--name stopped --num-iterations 1000 --eval-every 0".split()
    settings = dict(stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT)
    process = subprocess.Popen([sys.executable, RUNNING, script, *flags], **settings)
    while process.poll() is None and not (tmp_path / "runs/stopped/checkpoint-000001").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    last_line = process.communicate(timeout=120)[0].strip().splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert last_line.endswith(f"python {script}_vla.py --resume runs/stopped")
    checkpoint = find_checkpoint(tmp_path / "runs/stopped")
    load_vla(checkpoint)
    assert state_of(tmp_path / "runs/stopped")["iteration"] == int(checkpoint.name[-6:]) >= 1


REFUSED = """--num-iterations 0, --model runs/missing, --task no_such_task, --name taken
ppo: --learning-rate nan, --seed -1, --name a/b, --preset papper, --vf-coef 2, --no-such-flag 1,
    --resume runs/nothing, --sim-device cuda, --unnorm-key typo, --critic h0 --value-epochs 2
grpo: --group-size 3, --num-steps 3, --filter-high 1.1, --filter-low 0.95, --advantage other
dpo: --num-trajectories 1, --beta 0, --num-envs 3
sft: --demos no/such/demos, --val-demos 0, --unnorm-key x, --eval-every 0 --sim-device cuda"""
REFUSED, *OWN = re.split(r"\n(?=\w)", REFUSED)
REFUSED = [(script, flags) for script in SCRIPTS for flags in REFUSED.split(", ")]
for script, flags in [line.split(": ") for line in OWN]:
    REFUSED += [(script, each) for each in re.split(r",\s+", flags)]


@pytest.mark.parametrize("script, flags", REFUSED)
def test_refused_flags(script, flags, tmp_path, monkeypatch, capsys):
    """Stops late errors, flags that would do nothing, and a finished run's being overwritten."""
    module = importlib.import_module(f"{script}_vla")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken/checkpoint-000001").mkdir(parents=True)
    for name in ("make_envs", "load_start"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("not refused in time"))
    words = ["--model", "tiny", *flags.split()]
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError, SystemExit)) as error:
        module.main(parse_args(module.Args, module.PRESETS, words))
    said = f"{error.value} {''.join(capsys.readouterr())}"
    name, value = flags.split()[-2:]
    assert value in said or name.strip("-").replace("-", "_") in said, said


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets(script):
    """Stops a preset from losing a value that its script's comments give as the paper's."""
    module = importlib.import_module(f"{script}_vla")
    source = Path(module.__file__).read_text()
    stated = re.findall(r"^    (\w+): .*# .*\[[PG]\] ([\w.+/-]+)$", source, re.MULTILINE)
    assert len(stated) >= 3
    default = flat(module.PRESETS["default"])
    for preset in module.PRESETS.keys() - {"default"}:
        values = flat(parse_args(module.Args, module.PRESETS, ["--preset", preset]))
        assert (values["scene"], values["dtype"]) == ("published", "bfloat16")
        assert values["lora_rank"] == 32 and not values["freeze_vision"]
        for name, text in stated:
            if (preset, name) == ("warmup", "val_demos"):
                continue  # its other value is the paper's too
            expected = text if isinstance(values[name], str) else eval(text)
            assert values[name] == pytest.approx(expected), (name, text)
            assert values[name] != default[name], f"{name}: [P] is the default"


@pytest.mark.bridge
@pytest.mark.parametrize("script", ["ppo", "grpo", "dpo"])
def test_paper_preset_on_a_small_hub_checkpoint(script, train, tmp_path, monkeypatch):
    """Stops the real recipe from breaking unseen: hub layout, LoRA, bfloat16, published scene."""
    monkeypatch.setitem(SCENES["published"], "max_episode_steps", 2)
    model = write_reference_checkpoint(tmp_path / "model")
    flags = f"--preset paper --name paper --model {model} --sim-device cpu --unnorm-key="
    checkpoint = find_checkpoint(train(script, f"{flags} --num-iterations 1 --eval-every 0"))
    assert checkpoint.name == "checkpoint-000001" and (checkpoint / "adapter_config.json").exists()
    load_vla(checkpoint)
