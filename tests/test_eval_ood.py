"""The evaluator: which episodes and settings, results that depend on nothing else, resume."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from hub_layout import write_reference_checkpoint
from test_checkpoints import edit_json

import eval_ood
from common.model.checkpoints import load_vla, save_vla
from common.run import evaluate as evaluation
from common.simulation.episodes import evaluation_ids, training_episodes
from common.simulation.tasks import REPORT_ROWS, decode
from scripts.policies import load_policy, name_policies
from scripts.provenance import find_model, fingerprint, short_names

WARMUP = Path(__file__).parent.parent / "checkpoints/tiny-warmup"
ALIKE = "main single main_carrot main_image carrot plate position ee_pose instruct".split()


def scenes(task, ids):  # what the ids stand for, however the task numbers them
    e = decode(task, "train", ids)
    columns = [e.object, e.plate, e.table, e.object_xyz, e.plate_xyz, e.object_quat]
    return set(map(tuple, np.column_stack(columns).round(4).tolist()))


@pytest.mark.parametrize("task", ALIKE)
def test_training_never_sees_an_evaluation_episode(task):
    """Stops success that is measured on training episodes, which other tasks number otherwise."""
    evaluated = scenes("carrot", evaluation_ids("carrot", "train", 4000))
    evaluated |= scenes("main", evaluation_ids("main", "train", 4000, seed=1))
    stream = training_episodes(task, np.random.default_rng(0))
    trained = np.array([next(stream) for _ in range(5000)])
    assert not evaluated & scenes(task, trained)
    assert task != "main" or len(set(trained // 12544)) == 64, "of all 64 parts of the table"
    uniform = np.random.default_rng(0).integers(802_816, size=5000)
    assert evaluated & scenes("main", uniform), "without the rule some would be met"


@pytest.mark.parametrize("task", ["main", "carrot", "multi_plate"])
def test_the_list_that_picked_a_checkpoint_never_judges_it(task, monkeypatch):
    """Stops a best checkpoint from being reported on the episodes that it is the best on."""
    lists = []
    run = lambda policy, envs, ids, record: lists.append(ids.tolist()) or 1 / 0  # noqa: E731
    monkeypatch.setattr(evaluation, "run_episodes", run)
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(None, SimpleNamespace(fidelity="fixed"), task, 16)
    rows = {n: row for n, row in eval_ood.plan_rows(f"{task},id,semantics").items() if task in row}
    for seed in range(3):
        for ids in eval_ood.plan_episodes(rows, 16, seed, "fixed").values():
            assert len(ids) == 16 and ids.tolist() != lists[0]


def test_rows_and_their_lists():
    """Stops rows out of order, training tasks left out, lists that change with length or repeat."""
    every = [(row[0], row[1:4]) for row in REPORT_ROWS]
    assert list(eval_ood.plan_rows(eval_ood.Args.tasks).items()) == every
    rows = eval_ood.plan_rows("noise_weak,noise_strong,main,id")
    assert list(rows) == ["main", "in_distribution", "noise_weak", "noise_strong"]
    long = eval_ood.plan_episodes(rows, 192, 0, "fixed")
    for name, ids in eval_ood.plan_episodes(rows, 64, 0, "fixed").items():
        assert np.array_equal(ids, long[name][:64])
    assert not set(long["noise_weak"]) & set(long["noise_strong"])


def model_in(directory, **groups):
    """A model directory; groups: those of its training's args.json."""
    shutil.copytree(WARMUP, directory)
    (directory / "args.json").write_text(json.dumps(groups))
    return str(directory)


def test_which_checkpoint_its_name_and_settings(tmp_path, monkeypatch):
    """Stops another simulation or decoding than training's, a user's copy, paths of one name."""
    scene = dict(scene="published", sim_device="cuda")
    model = dict(unnorm_key="x", dtype="bfloat16")
    path = model_in(tmp_path / "a", scene=dict(scene, task="main"), model=model)
    monkeypatch.setattr(eval_ood, "choose_key", lambda *arguments: None)
    flags = dict(scene="small", sim_device="cpu", unnorm_key="y")
    training, given = dict(scene, **model, num_envs=16), dict(flags, dtype="float32", num_envs=None)
    for args, device, expected in (({}, "cuda", training), (flags, "cpu", given)):
        settings = eval_ood.plan_policy(eval_ood.Args(**args), path, torch.device(device))
        assert {name: settings.get(name) for name in expected} == expected
    latest = ("checkpoint-000012", "best-000010-copy", "best-000099.tar")
    for found, *names in (latest, ("best-000010", "best-000004")):
        for name in (found, *names):
            (tmp_path / name).mkdir()
        assert find_model(tmp_path) == str(tmp_path / found)
    assert name_policies(["pi0=ws://a:1", "b.py:c"], []) == {"pi0": "ws://a:1", "b-c": "b.py:c"}
    assert short_names(["/a/runs/x", "/b/runs/x"]) == ["a-runs-x", "b-runs-x"]
    assert short_names(["/a/best-000010", "tiny/"]) == ["a-best-000010", "tiny"]


REFUSED = """--policy model; --policy zero zero; --policy gone.py:act; --policy ws://127.0.0.1:1
    --policy zero --num-episodes 0; --policy zero --num-envs 15; --policy zero --tasks noise_weka
    --policy zero --num-episodes 5000; --checkpoint tiny ./tiny; --checkpoint runs/no-such-run
    --checkpoint tiny --unnorm-key other; --checkpoint WARMUP --scene published
    --checkpoint OPENVLA; --checkpoint WARMUP OTHER-SCENE"""
NAMED = {"published": "bridge", "OPENVLA": "--scene", "OTHER-SCENE": "cuda"}


@pytest.mark.parametrize("flags", re.split("[;\n] *", REFUSED))
def test_wrong_arguments_are_refused_at_once(flags, tmp_path, monkeypatch):
    """Stops a mistake that shows after an hour, or never. Nothing is loaded or written."""
    monkeypatch.setattr(eval_ood, "make_envs", lambda *a, **k: pytest.fail("simulator started"))
    monkeypatch.setattr(eval_ood, "load_vla", lambda *a, **k: pytest.fail("model loaded"))
    paths = {"WARMUP": str(WARMUP), "OPENVLA": str(write_reference_checkpoint(tmp_path / "a"))}
    edit_json(tmp_path / "a/config.json", stem=None)  # as save_vla writes it
    paths["OTHER-SCENE"] = model_in(tmp_path / "b", scene={"sim_device": "cuda"})
    *_, value = words = flags.split()
    argv = [paths.get(word, word) for word in words] + ["--output", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError), match=NAMED.get(value, value)):
        eval_ood.main(tyro.cli(eval_ood.Args, args=argv))
    assert not (tmp_path / "out").exists()


def test_actions_do_not_depend_on_num_envs():
    """Stops results that change with --num-envs: padded prompts, shared generators, rounding."""
    model, settings = load_vla("tiny", trainable=False), {"policy": "model", "temperature": 1.0}
    actions = {16: [], 32: [], 48: []}
    for num_envs, first in ((n, first) for n in actions for first in range(0, 40, n)):
        seeds = range(first, min(first + num_envs, 40))
        policy = eval_ood.make_policy(settings, model, None, seeds, None)
        texts = [f"put {'big ' * (n % 3)}carrot on plate" for n in seeds]
        pictures = [np.random.default_rng(n).integers(256, size=(60, 80, 3)) for n in seeds]
        actions[num_envs].extend(policy(np.array(pictures, np.uint8), texts, np.arange(len(seeds))))
    assert len(np.unique(actions[16], axis=0)) > 30
    assert np.array_equal(actions[16], actions[32]) and np.array_equal(actions[16], actions[48])


def test_fingerprint_sees_weights_statistics_and_base(tmp_path):
    """Stops finished tasks of old weights from being taken for those of new ones."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_vla(load_vla("tiny"), base)
    save_vla(load_vla(str(base), lora_rank=2), adapter)
    (adapter / "args.json").touch()
    seen = [fingerprint(adapter)]
    files = "args.json adapter_model.safetensors ../base/model.safetensors dataset_statistics.json"
    for path in map(adapter.joinpath, files.split()):
        old = path.read_bytes()
        path.write_bytes(old + b" " if path.suffix == ".json" else old[:-1] + bytes([old[-1] ^ 1]))
        seen.append(fingerprint(adapter))
    assert seen[0] == seen[1] and len(set(seen)) == 4


@pytest.fixture
def evaluate(simulators, monkeypatch, tmp_path):
    """evaluate(output, steps, **flags) -> policies of results.json without machine and minutes."""

    def run(output, steps=8, **flags):
        def short(num_envs, **settings):
            envs = simulators(num_envs, **settings)
            envs.max_episode_steps = steps
            return envs

        monkeypatch.setattr(eval_ood, "make_envs", short)
        monkeypatch.setattr(eval_ood, "BLOCK", 1)
        defaults = dict(tasks="main,mid_episode_reposition", num_episodes=3, num_envs=2)
        eval_ood.main(eval_ood.Args(output=str(tmp_path / output), **{**defaults, **flags}))
        policies = json.loads((tmp_path / output / "results.json").read_text())["policies"]
        for row in (row for policy in policies.values() for row in policy["rows"].values()):
            assert row.pop("minutes") > 0 and row.pop("commit")
        return policies

    return run


def test_same_results_for_any_num_envs_and_after_a_kill(evaluate, tmp_path, monkeypatch):
    """Stops results that depend on chance, on --num-envs or on an interruption."""
    first = evaluate("first", policy=("random",))
    real = eval_ood.evaluate_row
    calls = iter((real, lambda *_: 1 / 0, real))  # the finished row never runs again
    monkeypatch.setattr(eval_ood, "evaluate_row", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(ZeroDivisionError):
        evaluate("killed", policy=("random",))
    assert evaluate("killed", policy=("random",), num_envs=3) == first
    for flags in (dict(seed=1), dict(tasks="main"), dict(temperature=0.0)):
        with pytest.raises(ValueError, match="killed"):
            evaluate("killed", policy=("random",), **flags)
    for name in ("report.md", "figure.png", "videos/random/main-failure.mp4"):
        assert (tmp_path / "first" / name).stat().st_size > 500
    assert not list(tmp_path.rglob(".*")), "a temporary file is left"


def test_checkpoints_of_runs_and_baselines(evaluate, tmp_path):
    """Stops a need for flags, unpaired episodes, a broken measure of success, a tireless expert."""
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    for seed, run in enumerate(runs):
        save_vla(load_vla("tiny", seed=seed), f"{run}/best-000003")
        Path(run, "best-000003/args.json").write_text('{"model": {"dtype": "bfloat16"}}')
    flags = dict(checkpoint=runs, policy=("model", "expert", "zero"), tasks="id", device="cpu")
    results = evaluate("four", 40, **flags)
    a, b = (results[name]["arguments"] for name in "ab")
    assert (a["temperature"], a["dtype"]) == (0.6, "float32") and a["weights"] != b["weights"]
    rows = {name: policy["rows"]["in_distribution"] for name, policy in results.items()}
    ids = evaluation_ids("carrot", "train", 3).tolist()
    assert [row["episode_ids"] for row in rows.values()] == [ids] * 4
    for row, k in ((rows["expert"], 3), (rows["zero"], 0)):
        assert (row["k"], sum(row["success"]), row["success_at_end"]) == (k, k, k / 3)
        assert row["return"] == pytest.approx(1.2 if k else 0) and row["held"] == (k > 0)


DOCS = WARMUP.parents[1] / "docs"


def test_the_page_s_commands_for_published_checkpoints(evaluate, tmp_path, monkeypatch):
    """Stops docs/hub.md from being wrong: as it stands, but for a copy in place of a download."""
    model = write_reference_checkpoint(tmp_path / "model")
    stats = json.loads((model / "config.json").read_text())["norm_stats"]
    stats["sft"] = stats["bridge_orig"]
    (model / "dataset_statistics.json").write_text(json.dumps(stats))
    *_, download, _, command = re.findall(r"```bash\n(.*?)```", (DOCS / "hub.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    copies = f'mkdir checkpoints; hf() {{ cp -r {model} "$4"; }}; {download}'
    subprocess.run(["bash", "-ec", copies], check=True)
    args = tyro.cli(eval_ood.Args, args=shlex.split(command.replace("\\\n", ""))[2:])
    args.scene = args.scene if "MS_ASSET_DIR" in os.environ else "small"
    found = evaluate(steps=1, **dict(vars(args), num_episodes=1, tasks="id"))
    keys = {name: policy["arguments"]["unnorm_key"] for name, policy in found.items()}
    assert keys == {"warmup": "bridge_orig", "rl": "bridge_orig", "sft_16k": "sft"}


PAGE = (DOCS / "your_policy.md").read_text()
PAGE = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S))
RECORDER = """calls = []
class Recorder:
    reset = lambda self, rows: calls.append(rows.tolist())
    def __call__(self, images, instructions, rows):
        calls.append((images, instructions, rows.tolist()))
        return [[0, 0, 0, 0, 0, 0, 1]] * len(rows)"""


@pytest.mark.parametrize("file, name", [*zip(PAGE, ("act", "Chunks", ""), strict=True)])
def test_the_page_s_adapters_play(file, name, evaluate, tmp_path):
    """Stops a page whose code does not run: as it stands, in the real simulator, on a socket."""
    path, _ = tmp_path / file, name or pytest.importorskip("websockets")
    command = f"echo {path}:{name}" if name else f"timeout 60 {sys.executable} {path} 0"
    path.write_text(PAGE[file])
    with subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True) as process:
        policy = process.stdout.readline().strip()
        (results,) = evaluate("page", policy=(policy,), tasks="id").values()
        process.terminate()
    assert results["rows"]["in_distribution"]["success"] == [0, 0, 0]
    assert len(list(tmp_path.glob("page/videos/*/in_distribution-failure.mp4"))) == 1


def test_a_policy_plays_its_own_episodes_once(evaluate, simulators, tmp_path):
    """Stops another episode's picture or memory in a row, and results of a file's earlier text."""
    path = tmp_path / "mine.py"
    path.write_text(RECORDER)
    flags = dict(policy=(f"{path}:Recorder", "zero"), tasks="main,unseen_receptacles")
    results = evaluate("out", **flags)
    mine, zero = (policy["rows"] for policy in results.values())
    assert mine == zero, "the same policy, once from a file"
    calls, envs = iter(sys.modules.pop("policy_mine").calls), simulators(2)
    for task, split, seed in (("main", "train", 1), ("plate", "test", 0)):
        envs.set_task(task, split)
        ids = evaluation_ids(task, split, 3, seed)
        for rows in ([0, 1], [2]):
            obs, infos = envs.reset([iter(ids[rows][n : n + 1]) for n in (0, 1)])
            assert next(calls) == rows
            images, texts, _ = first = next(calls)
            assert all(call[2] == rows for call in (first, *(next(calls) for _ in range(7))))
            assert texts == infos["instruction"][: len(rows)]
            np.testing.assert_array_equal(images, obs[: len(rows)])
    assert not list(calls) and evaluate("out", **flags) == results
    assert "policy_mine" not in sys.modules, "it runs again"
    for version, num_envs in (("", 3), ("\n# another version", 2)):
        path.write_text(RECORDER + version)
        with pytest.raises(ValueError, match="mine-Recorder"):
            evaluate("out", **flags, num_envs=num_envs)
    with pytest.raises(ValueError, match="changed"):  # between the plan and the first episode
        load_policy(results["mine-Recorder"]["arguments"])
