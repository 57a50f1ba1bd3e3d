"""Command line, checkpoints, logger, episode lists and the episode runner, without a simulator."""

import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from common.run import evaluate, logs, runs

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    preset: str = "default"
    resume: str = ""
    lr: float = 0.1
    size: tuple[int, int] = (4, 3)


PRESETS = {"default": Args(), "paper": Args(preset="paper", lr=0.5)}


# --- command line ---
def test_preset_and_resume_choose_defaults_that_flags_override(tmp_path):
    """Stops a preset from overwriting a flag the user gave, and a resumed run from falling back to plain defaults."""
    assert runs.parse_args(Args, PRESETS, []).lr == 0.1
    assert runs.parse_args(Args, PRESETS, ["--preset", "paper"]).lr == 0.5
    assert runs.parse_args(Args, PRESETS, ["--lr", "0.7", "--preset=paper"]).lr == 0.7
    (tmp_path / "args.json").write_text(json.dumps({"preset": "paper", "lr": 0.9, "size": [8, 6], "resume": ""}))
    resumed = runs.parse_args(Args, PRESETS, ["--resume", str(tmp_path)])
    assert (resumed.lr, resumed.size, resumed.resume) == (0.9, (8, 6), str(tmp_path))
    assert runs.parse_args(Args, PRESETS, ["--resume", str(tmp_path), "--lr", "0.2"]).lr == 0.2
    with pytest.raises(ValueError, match="preset = 'default', the run to resume has 'paper', which is fixed"):
        runs.parse_args(Args, PRESETS, ["--resume", str(tmp_path), "--preset", "default"])
    (tmp_path / "args.json").write_text(json.dumps({"preset": "paper", "lr": 0.9, "group": 8, "resume": ""}))
    with pytest.raises(ValueError, match=r"of another script or version, the flags \['group', 'size'\] differ"):
        runs.parse_args(Args, PRESETS, ["--resume", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="--resume nowhere: no nowhere.args.json; give the directory"):
        runs.parse_args(Args, PRESETS, ["--resume", "nowhere"])


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(num_envs=0), "num_envs = 0 must be a positive multiple of the 1 ranks; use 64"),
        (dict(num_steps=100), "num_steps = 100 must be a multiple of max_episode_steps = 40; use --num-steps 80"),
        (dict(num_minibatches=7), "= 640 is not divisible by num_minibatches = 7; use --num-minibatches 5"),
        (dict(num_minibatches=0), "num_minibatches = 0 must be > 0"),
        (dict(micro_batch_size=-1), "micro_batch_size = -1 must be > 0"),
    ],
)
def test_impossible_sizes_are_refused_with_a_fix(sizes, message):
    """Stops a run from failing after its first rollout because its samples cannot be split."""
    possible = dict(num_envs=4, num_steps=160, max_episode_steps=40, num_minibatches=20)
    runs.check_rollout(**possible)
    with pytest.raises(ValueError, match=message):
        runs.check_rollout(**possible | sizes)


def test_environments_must_split_over_ranks(monkeypatch):
    """Stops torchrun with environments that no rank owns."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="num_envs = 3 must be a positive multiple of the 2 ranks; use 128"):
        runs.check_rollout(3, 160, 40, 20)


@pytest.mark.parametrize("wrong", [{"eval_every": -1}, {"eval_temperature": -0.6}, {"num_workers": -1}])
def test_negative_numbers_are_refused(wrong):
    """Stops -1 as "never", and an inverted policy whose best checkpoint is its worst."""
    args = SimpleNamespace(**dict(name="", resume="", track=False, eval_every=0, eval_episodes=0) | wrong)
    with pytest.raises(ValueError, match="= -.* must be >= 0"):
        runs.check_run(args)


def test_tracking_without_its_package(monkeypatch):
    """Stops --track from failing after the simulator has started."""
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the package wandb; pip install wandb"):
        runs.check_run(SimpleNamespace(name="", resume="", track=True, eval_every=0, eval_episodes=0))


def test_a_slow_dtype_is_named(monkeypatch, capsys):
    """Stops hours of bfloat16 on a processor that emulates it, eight times slower, with nothing said."""
    monkeypatch.setattr(runs, "bfloat16_speed", lambda: 0.0625)
    for device, dtype, rank in (("cpu", "float32", "0"), ("cuda", "bfloat16", "0"), ("cpu", "bfloat16", "1")):
        monkeypatch.setenv("RANK", rank)
        assert runs.choose_device(device, dtype) == device and capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    assert runs.choose_device("cpu", "bfloat16") == "cpu"
    said = capsys.readouterr().out
    assert "bfloat16 matmuls take 16 times as long as float32 ones on this CPU; use --dtype float32" in said
    monkeypatch.setattr(runs, "bfloat16_speed", lambda: 2.0)
    assert runs.choose_device("cpu", "bfloat16") == "cpu" and capsys.readouterr().out == ""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's features are read from /proc/cpuinfo")
def test_slow_dtype_is_measured_right():
    """Stops a measurement of something else: the processor's own list of features must agree."""
    features = set(Path("/proc/cpuinfo").read_text().split())
    if features & {"amx_bf16", "avx512_bf16"}:
        assert runs.bfloat16_speed() > 0.25
    elif "avx512f" in features or "avx2" not in features:
        pytest.skip("how fast bfloat16 is here is not known")
    else:
        assert runs.bfloat16_speed() < 0.25


def test_unnorm_key():
    """Stops actions from being scaled by another robot's statistics."""
    assert runs.choose_key({"bridge": {}}, "") == "bridge"
    assert runs.choose_key({"bridge": {}, "other": {}}, "other") == "other"
    for stats, key in (({"bridge": {}, "other": {}}, ""), ({"bridge": {}}, "typo")):
        with pytest.raises(ValueError, match="use one of .'bridge'"):
            runs.choose_key(stats, key)


def test_model_of_another_asset_pack():
    """Stops hours of training or evaluation of a model that has never seen these bodies."""
    stats = {"cleanvla": {"assets": "primitive"}, "bridge_orig": {}}
    assert runs.choose_key(stats, "cleanvla", "primitive") == "cleanvla"
    assert runs.choose_key(stats, "bridge_orig", "bridge") == "bridge_orig", "published models do not say"
    with pytest.raises(ValueError, match="assets = primitive only.*'bridge'.*use --assets primitive"):
        runs.choose_key(stats, "cleanvla", "bridge")


# --- ranks of torchrun ---
def test_what_no_rank_has_used_keeps_no_gradient():
    """Stops torchrun from giving unused weights a gradient of zeros, with which AdamW would decay them."""
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    (3 * used).sum().backward()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    runs.sum_gradients([used, unused])
    torch.distributed.destroy_process_group()
    assert used.grad.tolist() == [3, 3] and unused.grad is None


# --- checkpoints ---
def write_weights(directory):
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")


def test_checkpoint_round_trip_restores_random_streams(tmp_path):
    """Stops a resumed run from drawing other numbers than the uninterrupted one, and old checkpoints from piling up."""
    runs.seed_everything(3)
    runs.save_checkpoint(tmp_path, "checkpoint", 7, write_weights, {"optimizer": {"step": torch.ones(2)}, "n": [0.5]})
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    runs.save_checkpoint(tmp_path, "best", 7, write_weights, {})
    state = runs.load_training_state(runs.find_checkpoint(tmp_path))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == drawn
    assert state["n"] == [0.5] and state["optimizer"]["step"].tolist() == [1, 1]
    (tmp_path / "checkpoint-000007-mine").mkdir()
    (tmp_path / "checkpoint-000009.tar").write_bytes(b"an archive")
    assert runs.find_checkpoint(tmp_path).name == "checkpoint-000007"
    runs.save_checkpoint(tmp_path, "checkpoint", 8, write_weights, {})
    runs.save_checkpoint(tmp_path, "best", 7, write_weights, {})  # the same iteration again, after a resume
    kept = ["best-000007", "checkpoint-000007-mine", "checkpoint-000008", "checkpoint-000009.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept, "copies of one's own are not the run's"
    with pytest.raises(FileNotFoundError, match="nothing can be resumed"):
        runs.find_checkpoint(tmp_path / "empty")


def test_the_last_best_stays_whatever_its_number(tmp_path):
    """Stops a best that a run left behind, which was resumed from before it, from outliving the one written now."""
    for number in (20, 12):
        runs.save_checkpoint(tmp_path, "best", number, write_weights, {})
        assert [path.name for path in tmp_path.iterdir()] == [f"best-{number:06d}"]


def test_kill_in_the_middle_of_a_write_keeps_the_previous_checkpoint(tmp_path):
    """Stops kill -9 during a save from destroying the only checkpoint, or leaving half a one that is loaded later."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.run import runs
def write(directory):
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"half")
    if runs_done:
        os.kill(os.getpid(), 9)
runs_done = 0
runs.save_checkpoint({str(tmp_path)!r}, "checkpoint", 1, write, {{"n": 1}})
runs_done = 1
runs.save_checkpoint({str(tmp_path)!r}, "checkpoint", 2, write, {{"n": 2}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert runs.find_checkpoint(tmp_path).name == "checkpoint-000001"
    assert runs.load_training_state(tmp_path / "checkpoint-000001")["n"] == 1
    runs.save_checkpoint(tmp_path, "checkpoint", 2, write_weights, {"n": 2})  # the resumed run cleans up
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]


def test_non_finite_batch_is_saved(tmp_path):
    """Stops a NaN from ending a run without the data to find out why."""
    batch = {"returns": torch.tensor([1.0, float("nan")]), "instructions": ["a", "b"]}
    with pytest.raises(FloatingPointError, match="the loss is not finite; the batch is in .*nonfinite_batch-0.pt"):
        runs.stop_non_finite(tmp_path, "loss", batch, torch.tensor([1]))
    assert torch.load(tmp_path / "nonfinite_batch-0.pt")["instructions"] == ["b"]


# --- log ---
def test_metrics_continue_where_the_checkpoint_was(tmp_path):
    """Stops lines of iterations that are done again after a resume from standing twice in the file."""
    logger = logs.Logger(tmp_path, {"lr": 0.1})
    for step in (10, 20, 30):
        logger.log({"losses/x": torch.tensor(step / 10), "losses/y": float("nan")}, step)
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "losses')  # killed while writing
    logger = logs.Logger(tmp_path, {"lr": 0.2, "resume": "x"}, step=20)
    logger.log({"losses/x": 9.0}, 30)
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["losses/x"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 9.0)]
    assert rows[0]["losses/y"] is None, "NaN is not JSON"
    assert json.loads((tmp_path / "args.json").read_text()) == {"lr": 0.2, "resume": ""}
    logger = logs.Logger(tmp_path, {"resume": ""})
    logger.log({"losses/x": 7.0}, 0)
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["losses/x"] for row in rows] == [7.0], "a new run keeps no line of one that ended before a checkpoint"
    silent = logs.Logger(tmp_path / "other", {}, enabled=False)
    silent.log({"a": 1}, 1)
    silent.close()
    assert not (tmp_path / "other").exists(), "only rank 0 writes"


def test_status_line_and_summary(tmp_path):
    """Stops the line people watch for hours from losing its numbers."""
    metrics = {"train/success_at_end": 0.31, "train/success_once": 0.42, "charts/SPS": 118.2, "time/rollout_s": 41}
    line = logs.status_line(12, 300, metrics, 40.0)
    assert line == "iter 012/300 | success 0.31 (once 0.42) | 118 steps/s | rollout 41s | eta 3h12m"
    (tmp_path / "args.json").write_text('{"dtype": "bfloat16"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/return": 0.5}\n{"step": 2, "train/return": null}\n')
    text = logs.summary(tmp_path, 5120, 90, [0.25, 0.5], [["train/return"], ["losses/approx_kl"]])
    assert "5,120 in 0h02m" in text and "0.250 -> 0.500" in text
    assert f"eval_ood.py --checkpoint {tmp_path} --dtype bfloat16" in text, "evaluated as the run was"
    assert imageio.imread(tmp_path / "curve.png").shape[0] > 200


# --- evaluation ---
def test_training_never_sees_an_evaluation_episode():
    """Stops training on test initial states: the lists are disjoint for every task, whatever the seed."""
    train = evaluate.training_ids("main", "train", 50_000, np.random.default_rng(0))
    lists = [
        evaluate.evaluation_ids(task, "train", 192, seed) for task in ("main", "carrot", "plate") for seed in (0, 1)
    ]
    assert not set(train) & set(np.concatenate(lists))
    assert len(set(lists[0])) == 192 and train.dtype == lists[0].dtype == np.int64
    assert 0.9 < len(set(train // 12544)) / 64 <= 1, "training ids do not cover the configurations"
    naive = np.random.default_rng(0).integers(802_816, size=50_000)
    assert set(naive) & set(np.concatenate(lists)), "the check sees nothing"


def test_evaluation_lists_are_paired():
    """Stops two evaluations from running on different episodes: a shorter list is the beginning of a longer one."""
    long = evaluate.evaluation_ids("main", "train", 192)
    assert np.array_equal(long[:64], evaluate.evaluation_ids("main", "train", 64))
    assert not np.array_equal(long, evaluate.evaluation_ids("main", "train", 192, seed=1))
    assert len(evaluate.evaluation_ids("single", "train", 192)) == 192, "few held-out configurations repeat"


class CountingEnvs:
    """Episodes of two steps whose outcome is the episode id: even ids succeed."""

    num_envs = 3

    def reset(self, episode_ids):
        self.ids, self.elapsed = np.asarray(episode_ids), 0
        return self.images(), [f"put {i}" for i in self.ids]

    def images(self):
        return np.stack([np.full((6, 8, 3), 10 * i + self.elapsed, np.uint8) for i in self.ids])

    def step(self, actions):
        assert actions.shape == (3, 7) and actions.dtype == np.float32
        self.elapsed += 1
        zero = np.zeros(3, bool)
        infos = {"success": self.ids % 2 == 0, "success_once": ~zero, "grasped": zero, "held": zero}
        infos["return"] = (self.ids + actions[:, 0]).astype(np.float32)
        return self.images(), infos["return"], np.full(3, self.elapsed == 2), infos


def test_every_episode_runs_once_whatever_the_batch():
    """Stops the last, short batch from being dropped, padded into the result, or mixed up with another row."""
    seen = []

    def policy(images, instructions, rows):
        assert len(images) == len(instructions) == len(rows)
        seen.extend(rows.tolist())
        return np.stack([np.full(7, row / 10) for row in rows])

    ids = np.array([4, 1, 2, 3, 6])
    result = evaluate.run_episodes(policy, CountingEnvs(), ids, record=4)
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 2)
    assert result["success_at_end"].tolist() == [True, False, True, False, True]
    assert np.allclose(result["return"], ids + np.arange(5) / 10)
    assert result["instruction"].tolist() == ["put 4", "put 1", "put 2", "put 3", "put 6"]
    assert {row: [frame[0, 0, 0] for frame in frames] for row, frames in result["frames"].items()} == {
        0: [40, 41, 42], 1: [10, 11, 12], 2: [20, 21, 22], 3: [30, 31, 32]
    }  # fmt: skip


def test_ranks_share_an_evaluation(monkeypatch):
    """Stops ranks from running the same episodes, from drawing other numbers than one rank, and a rate of a part."""

    class Model:
        def act(self, images, instructions, temperature, generators):
            return torch.stack([torch.rand(7, generator=g) for g in generators]), None, None

        def actions_from_tokens(self, tokens, unnorm_key):
            return tokens.numpy()

    def evaluation(rank, world_size):
        """-> metrics, this rank's episodes; `others`: what the other rank hands in."""
        handed_in = []
        monkeypatch.setattr(evaluate, "rank_and_world_size", lambda: (rank, world_size))
        monkeypatch.setattr(evaluate, "gather_over_ranks", lambda part: handed_in.append(part) or [part, *others])
        metrics = evaluate.evaluate(Model(), CountingEnvs(), "main", "train", 5, 1.0, "", only=(4, 1, 2, 3, 6))
        return metrics, handed_in[0]

    others = []
    whole, one = evaluation(0, 1)
    others = [evaluation(1, 2)[1]]
    shared, first = evaluation(0, 2)
    for key in ("success_at_end", "return"):
        assert np.array_equal(first[key], one[key][0::2]) and np.array_equal(others[0][key], one[key][1::2]), key
    assert whole["eval/main/success_at_end"] == shared["eval/main/success_at_end"] == 0.6
    assert (whole["eval/main/low"], shared["eval/main/low"]) == (evaluate.wilson(3, 5)[0],) * 2


def test_repeated_episodes_draw_differently():
    """Stops 192 episodes of a small task from being the same few trajectories counted several times."""
    seeds = list(evaluate._episode_seeds(np.array([5, 7, 5]), 0))
    assert len(set(seeds)) == 3 and seeds[:2] == list(evaluate._episode_seeds(np.array([5, 7]), 0))


def test_wilson_interval():
    """Stops a wrong interval; 60 of 64 is [85.0, 97.5] in the paper's notes, 0 of n stays above 0 at the upper end."""
    low, high = evaluate.wilson(60, 64)
    assert math.isclose(low, 0.850, abs_tol=1e-3) and math.isclose(high, 0.9754, abs_tol=1e-3)
    assert evaluate.wilson(0, 10)[0] == 0 and 0.27 < evaluate.wilson(0, 10)[1] < 0.28


def test_video_is_written_whole(tmp_path):
    """Stops videos that no player opens, odd sizes included, and half-written files."""
    frames = [np.full((60, 80, 3), 60 * i, np.uint8) for i in range(3)]
    evaluate.write_video(tmp_path / "videos/a.mp4", frames, "put carrot on plate")
    video = imageio.mimread(tmp_path / "videos/a.mp4")
    assert len(video) == 3 and video[0].shape == (480, 640, 3)
    assert video[2][300:, :].mean() > 100 and video[0][:28].max() > 150, "no picture or no instruction"
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    """Stops a half-written result after a kill or a full disk."""
    path = tmp_path / "results.json"
    runs.write_atomic(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError):
        runs.write_atomic(path, fails)
    assert path.read_text() == "old"
