"""What a run is made of beside its algorithm; without a simulator: what is counted is tested."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from scripted_envs import ScriptedEnvs
from test_checkpoints import refused

import grpo_vla
import ppo_vla
from common.run import evaluate, experiment, metrics, ranks
from common.run.args import check_args, flat, parse_args
from common.run.experiment import Experiment, find_checkpoint
from common.simulation.episodes import evaluation_ids

ROOT = Path(__file__).parent.parent


def parse(flags, script=ppo_vla):
    return parse_args(script.Args, script.PRESETS, flags.split())


def test_presets_resume_and_ranks(tmp_path, monkeypatch):
    """Stops presets over given flags, another run by --resume, environments that no rank owns."""
    args = parse("--gae-lambda 0.7 --preset=paper --lora-rank 8")
    assert (args.gae_lambda, args.model.lora_rank, args.model.dtype) == (0.7, 8, "bfloat16")
    assert args.run.preset == "paper"
    args.run.name = "old"
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    assert dict(flat(parse(f"--resume {tmp_path}")), resume="") == flat(args)
    assert parse(f"--resume {tmp_path} --num-iterations 9 --device cpu").num_iterations == 9
    for change in ("--seed 2", "--num-envs 32", "--model tiny", "--critic state", "--task plate"):
        refused(change.split()[1], parse, f"--resume {tmp_path} {change}")
    refused("script", parse, f"--resume {tmp_path}", grpo_vla)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_args(parse("--model tiny --num-envs 8"), ppo_vla.PRESETS, {})
    for flags, value in (("--num-envs 6", "6"), ("--num-envs 8 --eval-episodes 3", "3")):
        refused(value, check_args, parse(f"--model tiny {flags}"), ppo_vla.PRESETS, {})


def of_rank(monkeypatch, rank, world_size, module=ranks):
    monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_minibatches_share_out_every_sample_once(monkeypatch, world_size):
    """Stops samples from being learned twice or never, and ranks from disagreeing on a size."""
    samples = np.random.default_rng(0).choice(8 * 5, 33, replace=False)  # some are left out
    here, found, sizes = 8 // world_size, [], []
    for rank in range(world_size):
        of_rank(monkeypatch, rank, world_size)
        parts = ranks.minibatches(samples, 8, 4, np.random.default_rng(7))
        sizes.append([size for _, size in parts])
        step, env = np.divmod(np.concatenate([rows for rows, _ in parts]), here)
        found.append(step * 8 + env + rank * here)
    assert sorted(np.concatenate(found)) == sorted(samples)
    assert sizes == [[9, 8, 8, 8]] * world_size


TWO_RANKS = """
import torch
from common.run.metrics import Means
from common.run.ranks import setup_ranks, sum_gradients, sum_over_ranks
rank, world_size, device = setup_ranks("cpu", seed=3)
used, mine, unused = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
((rank + 1) * used).sum().backward()
if rank == 0:
    (5 * mine).sum().backward()
sum_gradients([used, mine, unused])
assert used.grad.tolist() == [3, 3] and mine.grad.tolist() == [5, 5] and unused.grad is None
means = Means()
means.add("both", torch.full((rank + 1,), float(rank)))
if rank == 1:
    means.add("one", 7)
assert means.means("x/") == {"x/both": 2 / 3, "x/one": 7} and sum_over_ranks(torch.ones(())) == 2
"""


def test_sums_and_means(tmp_path):
    """Stops those of one rank or of means, NaN, zero gradients, by which AdamW decays weights."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([*run, str(tmp_path / "two.py")], env=environment, check=True, timeout=300)
    assert torch.equal(metrics.normalize(torch.full((6, 4), 0.1)), torch.zeros(6, 4)), "no NaN"
    names = ("success_at_end", "success_once", "grasped", "return")
    steps = [dict.fromkeys(names, np.array(values)) for values in ([1.0], [], [0.0, 0.0, 1.0])]
    assert metrics.episode_metrics(steps)["train/success_at_end"] == 0.5
    assert math.isnan(metrics.episode_metrics(steps[1:2])["train/return"])


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """begin(flags, successes) -> Experiment of a toy model, in runs/x, with planted evaluations."""

    def run(flags="", successes=()):
        found = [{"eval/success_at_end": x, "eval/low": math.nan} for x in successes]
        monkeypatch.setattr(experiment, "evaluate", lambda *_: found.pop(0))
        args = parse(f"--name x --eval-every {int(bool(successes))} {flags}")
        model = torch.nn.Linear(2, 1)
        model.device = "cpu"
        model.save_pretrained = lambda folder, state_dict: folder.mkdir()
        model.tokenizer = SimpleNamespace(save=lambda path: None)
        state = {"policy": torch.optim.AdamW(model.parameters()), "critic": torch.nn.Linear(2, 1)}
        return Experiment(args, model, None, state)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "stop_on_signals", lambda _: None)
    return run


def kinds():
    """What stands in the run directory as checkpoints, hidden leftovers included."""
    names = [path.name for path in Path("runs/x").iterdir() if path.is_dir()]
    return sorted(name for name in names if "checkpoint" in name or "best" in name)


def test_the_best_checkpoint_is_the_one_with_the_highest_success(begin):
    """Stops the worst or the last from being kept as the best, and a resume from forgetting it."""
    run = begin("--num-iterations 9 --keep-every 2", [0.2, 0.8, 0.5])
    for iteration, best in enumerate((1, 1, 1, 4), 1):
        if iteration == 3:
            run = begin("--resume runs/x", [0.6, 0.9])
            assert run.iteration == 2 and run.evaluations == [0.2, 0.8, 0.5]
        run.finish(iteration, {}, step=iteration)
        kept = [f"checkpoint-00000{k}" for k in range(iteration + 1) if k in (0, 2, 4, iteration)]
        assert kinds() == [f"best-00000{best}", *kept]


@pytest.mark.parametrize("where", ["save", "fsync", "rename"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(begin, monkeypatch, where):
    """Stops half a checkpoint in the place of the only one, and lost copies of the user's."""
    run = begin()
    run.finish(1, {}, step=1)
    mine = [Path("runs/x", name) for name in ("checkpoint-000001-mine", ".notes.tmp")]
    for path in mine:
        path.mkdir()
    killed = Mock(side_effect=KeyboardInterrupt)  # as kill -9: nothing may depend on cleaning up
    with monkeypatch.context() as patch:
        patch.setattr(torch if where == "save" else os, where, killed)
        with pytest.raises(KeyboardInterrupt):
            run.finish(2, {}, step=2)
    run = begin("--resume runs/x")
    assert run.iteration == 1 and kinds() == ["checkpoint-000001", "checkpoint-000001-mine"]
    run.finish(2, {}, step=2)
    assert kinds() == ["checkpoint-000001-mine", "checkpoint-000002"]
    assert all(path.is_dir() for path in mine)


def test_metrics_continue_where_the_checkpoint_was(begin, monkeypatch):
    """Stops repeated iterations, lines of another run, numbers that are no JSON, half a curve."""
    run, path = begin() and begin("--resume runs/x"), Path("runs/x/metrics.jsonl")
    for iteration in (1, 2):
        run.finish(iteration, {"losses/x": torch.tensor(iteration / 10)}, step=iteration)
    run.iteration = 3
    run._log({"losses/x": math.inf}, step=3)  # what a run logs before it is killed
    path.write_text(path.read_text() + '{"iteration": 4, "los')
    begin("--resume runs/x").finish(3, {"losses/x": 9.0, "losses/y": math.nan}, step=3)
    strict = dict(parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = [json.loads(line, **strict) for line in path.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["losses/x"] == 9.0 and rows[3]["losses/y"] is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        experiment.draw_curves("runs/x", "losses/x")
    assert not Path("runs/x/curve.png").exists()
    saved = json.loads((find_checkpoint("runs/x") / "args.json").read_text(), **strict)
    assert saved["run"]["name"] == "x" and saved["run"]["resume"] == ""
    begin("--num-iterations 2")
    assert len(path.read_text().splitlines()) == 1
    of_rank(monkeypatch, 1, 2, experiment)  # which writes nothing
    begin("--name other").finish(1, {}, step=1)
    assert not Path("runs/other").exists()


def test_a_stop_promises_what_is_saved(tmp_path, monkeypatch, capsys):
    """Stops a command to continue with where nothing is saved yet."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    experiment.stop_on_signals(tmp_path)
    for said in ("SIGINT: nothing is saved", f"--resume {tmp_path}"):
        with pytest.raises(SystemExit, match="130"):
            handlers[signal.SIGINT](signal.SIGINT, None)
        assert said in capsys.readouterr().out
        (tmp_path / "checkpoint-000000").mkdir(exist_ok=True)


def test_every_episode_runs_once_and_in_the_order_of_the_list():
    """Stops dropped last episodes, results of another row, and videos that end in the next one."""

    def policy(obs, instructions, rows):
        assert instructions == [f"put {ids[row]}" for row in rows]
        played.extend(rows)
        return np.zeros((len(obs), 7))

    ids, played = np.array([4, 1, 2, 3, 6]), []
    # Training would end an episode with its success; an evaluation may not
    envs = ScriptedEnvs(3, {4: (3,), 3: (1,)}, reset_after_success=1)
    results = evaluate.run_episodes(policy, envs, ids, record=4)
    assert sorted(played) == sorted([0, 1, 2, 3, 4] * 3) and results["id"].tolist() == ids.tolist()
    assert results["success_at_end"].tolist() == [True, False, False, False, False]
    assert results["success_once"].tolist() == [True, False, False, True, False]
    shown = {row: [frame[0, 0, 0] for frame in frames] for row, frames in results["frames"].items()}
    assert shown == {row: [10 * ids[row] + t for t in range(4)] for row in range(4)}
    envs.reset([iter([3]) for _ in range(3)])
    assert envs.step(np.zeros((3, 7)))[2].all(), "training goes on ending them"


class Policy:
    """Draws seven numbers per row."""

    decode_actions = staticmethod(torch.Tensor.numpy)

    def act(self, obs, instructions, temperature, generators):
        assert temperature == 0.6, "never compare success across temperatures"
        return torch.stack([torch.rand(7, generator=g) for g in generators]), None, None


def test_ranks_share_an_evaluation(monkeypatch, tmp_path):
    """Stops ranks that run the same episodes, rates of one rank, draws that depend on others."""
    ids = evaluation_ids("main", "train", 5).tolist()

    def evaluation(rank, world_size, others=()):
        """Metrics, this rank's sums, its actions."""
        parts = []
        gather = lambda part: parts.append(part) or [*others, part]  # noqa: E731
        of_rank(monkeypatch, rank, world_size, evaluate)
        monkeypatch.setattr(metrics, "gather_over_ranks", gather)
        envs, stem = ScriptedEnvs(2, {i: (3,) for i in ids[:3]}), tmp_path / f"{world_size}/0"
        result = evaluate.evaluate(Policy(), envs, "main", 5, stem, num_videos=1)
        return result, parts[0], {x for x in np.concatenate(envs.actions)[:, 0] if x}

    whole, _, draws = evaluation(0, 1)
    _, first, some = evaluation(0, 2)
    shared, _, more = evaluation(1, 2, [first])
    assert draws == some | more and not some & more and whole["eval/success_at_end"] == 0.6
    assert (whole["eval/low"], whole["eval/high"]) == evaluate.wilson(3, 5)
    assert all(whole[key] == shared[key] for key in whole if key != "time/eval_s")
    assert [path.name for path in tmp_path.glob("2/*")] == ["0-0-success.mp4"]
    repeated = [torch.rand(1, generator=g).item() for g in evaluate.episode_generators([5, 7, 5])]
    alone = [torch.rand(1, generator=g).item() for g in evaluate.episode_generators([5, 5])]
    assert len(set(repeated)) == 3 and alone == repeated[::2]


def test_video_is_written_whole(tmp_path, monkeypatch):
    """Stops videos that no player opens, odd sizes included, half-written files, no ffmpeg."""
    frames = [np.full((60, 80, 3), 60 * i, np.uint8) for i in range(3)]
    evaluate.write_video(tmp_path / "videos/a.mp4", frames, "put carrot on plate")
    video = imageio.mimread(tmp_path / "videos/a.mp4")
    assert len(video) == 3 and video[0].shape == (480, 640, 3)
    assert video[2][300:, :].mean() > 100 and video[0][:28].max() > 150, "picture and instruction"
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["a.mp4"]
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")
    refused("b.mp4.*IMAGEIO_FFMPEG_EXE", evaluate.write_video, tmp_path / "b.mp4", frames, "put")
