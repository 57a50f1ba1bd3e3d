"""The evaluator: which episodes and settings, results that do not depend on how they were computed, resume, outputs."""

import ast
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_layout import write_reference_checkpoint

import common.run.evaluate
import eval_ood
from common.model.openvla import VLA, load_vla, save_vla
from common.run.evaluate import evaluation_ids, training_ids
from common.run.runs import save_checkpoint
from common.simulation.assets import load_pack
from common.simulation.tasks import REPORT_ROWS, decode
from common.simulation.vec_env import make_envs

ROOT = Path(__file__).parent.parent


# --- which episodes ---
def configurations(task, split, ids):
    """What the ids stand for, whatever the task calls them: object, plate, table, places and yaw."""
    e = decode(task, split, ids)
    rows = np.column_stack([e.object, e.plate, e.table, e.object_xyz, e.plate_xyz, e.object_quat]).round(4)
    return set(map(tuple, rows.tolist()))


IN_DISTRIBUTION = ["main", "single", "main_carrot", "main_image", "carrot", "plate", "position", "ee_pose", "instruct"]


@pytest.mark.parametrize("task", IN_DISTRIBUTION)
def test_training_never_sees_an_in_distribution_evaluation_episode(task):
    """Stops success measured on training episodes: compared as decoded scenes, since ids count differently per task."""
    evaluated = configurations("carrot", "train", evaluation_ids("carrot", "train", 2000, seed=0))
    evaluated |= configurations("main", "train", evaluation_ids("main", "train", 2000, seed=1))
    trained = configurations(task, "train", training_ids(task, "train", 20_000, np.random.default_rng(0)))
    assert len(evaluated) > 3000 and not evaluated & trained
    with pytest.raises(ValueError, match="split = 'all' holds what is evaluated under 'train' and 'test' too"):
        training_ids(task, "all", 1, np.random.default_rng(0))


def test_uniform_draws_would_meet_evaluation_episodes():
    """Negative control of the test above: without the hold-out rule 20,000 draws do meet 4,000 of 802,816 scenes."""
    evaluated = configurations("carrot", "train", evaluation_ids("carrot", "train", 4000))
    assert evaluated & configurations("main", "train", np.random.default_rng(0).integers(802_816, size=20_000))


def test_a_run_s_own_evaluations_are_not_those_of_the_report(monkeypatch):
    """Stops the best checkpoint from being judged on the very episodes that picked it, whatever task it trains on."""
    lists, envs = [], types.SimpleNamespace(fidelity="fixed")
    monkeypatch.setattr(common.run.evaluate, "run_episodes", lambda policy, envs, ids, record: lists.append(ids) or 1 / 0)
    for task, split in {row[2:4] for row in REPORT_ROWS} | {("main", "train")}:
        with pytest.raises(ZeroDivisionError):
            common.run.evaluate.evaluate(None, envs, task, split, 64, 0.6, "")
        same = set(lists[-1].tolist()) & set(evaluation_ids(task, split, 64).tolist())
        assert len(same) == 64 if task == "main" else len(same) <= 20, "main is no row of the report"


def test_lists_are_paired_and_prefixes():
    """Stops lists that change with their length, and the same scenes in all rows, which would correlate the tests."""
    for _, _, task, split, *_ in REPORT_ROWS:
        ids = evaluation_ids(task, split, 192)
        assert len(set(ids.tolist())) == 192 and np.array_equal(ids[:64], evaluation_ids(task, split, 64))
        assert not np.array_equal(ids, evaluation_ids(task, split, 192, seed=1))
    weak, strong = (evaluation_ids(f"vision_texture{r}", "test", 192).tolist() for r in ("03", "05"))
    assert not set(weak) & set(strong)


def test_select_rows():
    """Stops a typing error from evaluating nothing, and rows out of the report's order."""
    assert eval_ood.select_rows("all") == list(REPORT_ROWS)
    assert [row[0] for row in eval_ood.select_rows("noise_weak,in_distribution")] == ["in_distribution", "noise_weak"]
    assert [row[0] for row in eval_ood.select_rows("execution,id")][:2] == ["in_distribution", "unseen_position"]
    with pytest.raises(ValueError, match="noise_weka.*use one or more of all, id, vision.*noise_weak"):
        eval_ood.select_rows("vision,noise_weka")


def test_evaluation_never_imports_training_code():
    """Stops an evaluator that changes with a training script: the import graph, imports inside functions included."""
    training = {path.stem for path in ROOT.glob("*_vla.py")} | {"sft_vla", "grpo_vla", "dpo_vla"}
    seen, todo = set(), [ROOT / "eval_ood.py"]
    while todo:
        path = todo.pop()
        seen.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            base = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in base + names + [f"{base[0]}.{name}" for name in names if base]:
                file = ROOT / f"{name.replace('.', '/')}.py"
                if file.is_file() and file.stem not in seen:
                    todo.append(file)
    assert {"report", "vec_env", "env", "vla", "tasks"} <= seen and not seen & training


# --- settings ---
def test_settings_flag_then_checkpoint_then_default():
    """Stops an evaluation in another simulation than the training's, and unequal settings of paired checkpoints."""
    small, large = {"image_size": [320, 240], "sim_freq": 500, "lr": 1.0}, {"image_size": [640, 480]}
    chosen = eval_ood.environment(eval_ood.Args(sim_freq=100), [small])
    assert chosen == eval_ood.ENVIRONMENT | {"image_size": [320, 240], "sim_freq": 100}
    assert eval_ood.environment(eval_ood.Args(), [{"shader_pack": "default"}])["shader_pack"] == "default"
    with pytest.raises(ValueError, match=r"different image_size: \[\[320, 240\], \[640, 480\]\]; set it by its flag"):
        eval_ood.environment(eval_ood.Args(), [small, large])
    assert eval_ood.environment(eval_ood.Args(image_size=(64, 48)), [small, large])["image_size"] == [64, 48]
    assert eval_ood.environment(eval_ood.Args(), [{"dtype": "bfloat16"}])["dtype"] == "bfloat16"


def test_find_model(tmp_path):
    """Stops an evaluation of the wrong checkpoint of a run, and of a directory without a model."""
    assert eval_ood.find_model("tiny") == ("tiny", {})
    for name in ("checkpoint-000009", "best-000004", "best-000012", "best-000012-copy", "best-000099.tar", "videos"):
        (tmp_path / name).mkdir()
    state = {"args": {"image_size": (64, 48)}, "optimizer": {}}  # a tuple here, a list in args.json: the same value
    torch.save(state, tmp_path / "best-000012" / "training_state.pt")
    assert eval_ood.find_model(str(tmp_path)) == (str(tmp_path / "best-000012"), {"image_size": [64, 48]})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "args.json").write_text('{"sim_freq": 250}')
    assert eval_ood.find_model(str(tmp_path)) == (str(tmp_path), {"sim_freq": 250})
    (tmp_path / "args.json").unlink()
    torch.save({"vh": {}}, tmp_path / "training_state.pt")  # of the study's code
    assert eval_ood.find_model(str(tmp_path)) == (str(tmp_path), {})
    for wrong in (tmp_path / "videos", tmp_path / "none", "tinny", "openvla/openvla-7b"):
        with pytest.raises(FileNotFoundError, match=f"{wrong}: not tiny, a model, or a run"):
            eval_ood.find_model(str(wrong))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(policy="model"), "--policy model, 0 checkpoints: model needs some, others none"),
        (dict(policy="zero", checkpoint=("tiny",)), "--policy zero, 1 checkpoints: model needs some, others none"),
        (dict(policy="zero", num_episodes=0), "num_episodes = 0 must be >= 1"),
        (dict(policy="zero", tasks="nothing"), "--tasks nothing: not known; use one or more of all, id"),
        (dict(policy="zero", temperature=-1.0), "temperature = -1.0 must be >= 0"),
        (dict(policy="zero", num_workers=-1), "num_workers = -1 must be >= 0"),
        (dict(policy="zero", seed=-1), "seed = -1 must be >= 0"),
        (
            dict(policy="zero", num_episodes=5000, tasks="unseen_table,id"),
            "held-out ones than unseen_table [1-4][0-9]{3}$",
        ),
        (dict(checkpoint=("tiny", "./tiny")), "give each once, or rename one"),
        (dict(checkpoint=("tiny",), max_episode_steps=0), "max_episode_steps = 0 must be >= 1"),
        (dict(checkpoint=("tiny",), image_size=(600, 480)), "image_size"),
        (dict(checkpoint=("tiny",), sim_freq=251), "sim_freq"),
        (dict(checkpoint=("tiny",), unnorm_key="other"), "unnorm_key = 'other' is none of the model's"),
    ],
)
def test_wrong_arguments_are_refused_at_once(wrong, message, tmp_path, monkeypatch):
    """Stops a mistake that shows after an hour: refused before model or simulator start, nothing written."""
    monkeypatch.setattr(eval_ood, "make_envs", lambda *a, **k: pytest.fail("the simulator was started"))
    monkeypatch.setattr(eval_ood, "load_vla", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        eval_ood.main(eval_ood.Args(output=str(tmp_path / "out"), **wrong))
    assert not (tmp_path / "out").exists()


def test_a_foreign_openvla_must_have_its_scene_named(tmp_path, monkeypatch):
    """Stops a downloaded 7B model from being reported with 0, because it was shown the embedded scene at 160x120."""
    monkeypatch.setattr(eval_ood, "make_envs", lambda *a, **k: pytest.fail("the simulator was started"))
    model = write_reference_checkpoint(tmp_path / "model")
    args = eval_ood.Args(checkpoint=(str(model),), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="without the args.json of its training.*--assets bridge --image-size 640 480"):
        eval_ood.main(args)


# --- the model's rows ---
def play(model, num_envs, temperature=1.0, num_episodes=21, block_size=8, steps=3):
    """Actions (steps, E, 7) when num_envs episodes run at a time; images depend on the episode and step alone."""
    names = [f"{body.name}" for body in load_pack("primitive").objects]
    texts = [eval_ood.instruction(i % 3, names[i % 16], "plate") for i in range(num_episodes)]
    policy = eval_ood.model_policy(model, "primitive", temperature, texts, range(100, 100 + num_episodes), block_size)
    actions = np.zeros((steps, num_episodes, 7), np.float32)
    for first in range(0, num_episodes, num_envs):
        rows = np.arange(first, min(first + num_envs, num_episodes))
        for t in range(steps):
            images = [np.random.default_rng([t, row]).integers(256, size=(120, 160, 3)) for row in rows]
            actions[t, rows] = policy(np.array(images, np.uint8), [texts[row] for row in rows], rows)
    return actions


@pytest.fixture(scope="module")
def tiny():
    model = load_vla("tiny", trainable=False)
    model.norm_stats["primitive"] = next(iter(model.norm_stats.values()))
    return model


def test_actions_do_not_depend_on_num_envs(tiny):
    """Stops results that change with --num-envs: prompt padding, shared generators, rounding by batch size."""
    expected = play(tiny, num_envs=8)
    for num_envs in (1, 3, 5, 16, 64):
        assert np.array_equal(play(tiny, num_envs), expected), num_envs
    assert not np.array_equal(expected[0, 0], expected[0, 3])  # other image, text and generator


def test_greedy_actions_do_not_depend_on_seeds_or_num_envs(tiny):
    """Stops sampling noise in a greedy evaluation."""
    assert np.array_equal(play(tiny, 4, temperature=0), play(tiny, 7, temperature=0))


def test_instructions_must_be_those_of_the_task_table(tiny):
    """Stops a policy that is told another instruction than the environment scores."""
    policy = eval_ood.model_policy(tiny, "primitive", 1.0, ["put carrot on plate"], [1], 2)
    with pytest.raises(RuntimeError, match="put bread on plate"):
        policy(np.zeros((1, 120, 160, 3), np.uint8), ["put bread on plate"], np.array([0]))


def test_fingerprint_sees_weights(tmp_path, tiny):
    """Stops finished tasks of old weights from being taken for those of new ones under the same path."""
    save_vla(tiny, tmp_path / "a")
    before = eval_ood.fingerprint(str(tmp_path / "a"))
    assert before == eval_ood.fingerprint(str(tmp_path / "a"))
    path = next((tmp_path / "a").glob("model*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert (weights := eval_ood.fingerprint(str(tmp_path / "a"))) != before
    (tmp_path / "a/dataset_statistics.json").write_text("{}")  # decodes the tokens of an adapter's policy
    assert (statistics := eval_ood.fingerprint(str(tmp_path / "a"))) != weights
    shutil.copytree(tmp_path / "a", tmp_path / "a/base")  # an adapter's base of its own
    assert eval_ood.fingerprint(str(tmp_path / "a")) != statistics


def test_fingerprint_sees_an_adapter_s_base(tmp_path):
    """Stops rows of an adapter on one base from being mixed with rows of the same adapter on a base made anew."""
    save_vla(load_vla("tiny", value_head=False), tmp_path / "base")
    save_vla(load_vla(str(tmp_path / "base"), lora_rank=2, value_head=False), tmp_path / "adapter")
    before = eval_ood.fingerprint(str(tmp_path / "adapter"))
    path = next((tmp_path / "base").glob("model*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert eval_ood.fingerprint(str(tmp_path / "adapter")) != before


# --- in the real simulator ---
@pytest.fixture(scope="module")
def simulators():
    """make_envs that starts each kind of simulator once for all tests of this file."""
    running = {}

    def cached(task, split, max_episode_steps, **kwargs):
        key = json.dumps(kwargs, sort_keys=True)
        if key not in running:
            running[key] = make_envs(task, split, **kwargs)
            running[key].really_close, running[key].close = running[key].close, lambda: None
        running[key].max_episode_steps = max_episode_steps
        return running[key]

    yield cached
    for envs in running.values():
        envs.really_close()


@pytest.fixture
def evaluate(simulators, monkeypatch, tmp_path):
    """evaluate(output, **Args) -> results.json without timings, on two short tasks with 3 episodes."""
    monkeypatch.setattr(eval_ood, "make_envs", simulators)

    def run(output, **kwargs):
        defaults = dict(tasks="in_distribution,mid_episode_reposition", num_episodes=3, num_envs=2, num_workers=1)
        eval_ood.main(eval_ood.Args(output=str(tmp_path / output), **defaults | dict(max_episode_steps=8) | kwargs))
        results = json.loads((tmp_path / output / "results.json").read_text())
        for policy in results["policies"].values():
            for row in policy["rows"].values():
                assert row.pop("minutes") > 0 and row.pop("commit")  # a commit may be made while the tests run
        return results

    return run


@pytest.mark.slow  # starts two simulators
def test_same_results_twice_for_any_num_envs_and_after_a_kill(evaluate, tmp_path, monkeypatch):
    """Stops results that depend on chance, on --num-envs, or on having been interrupted; and half-written files."""
    first = evaluate("first", policy="random")
    assert evaluate("again", policy="random") == first
    assert evaluate("envs", policy="random", num_envs=3) == first
    rows = first["policies"]["random"]["rows"]
    returns = [row["return"] for row in rows.values()]
    assert rows["in_distribution"]["episode_ids"] == evaluation_ids("carrot", "train", 3).tolist() and len(returns) == 2

    real, started = eval_ood.run_task, []

    def killed(*args):
        started.append(args)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(eval_ood, "run_task", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate("killed", policy="random")
    assert [path.name for path in tmp_path.glob("killed/tasks/random/*")] == ["in_distribution.json"]
    assert not (tmp_path / "killed" / "results.json").exists()
    finished = (tmp_path / "killed/tasks/random/in_distribution.json").stat().st_mtime_ns
    assert evaluate("killed", policy="random") == first
    assert (tmp_path / "killed/tasks/random/in_distribution.json").stat().st_mtime_ns == finished
    assert len(started) == 3  # the finished task did not run again

    with pytest.raises(ValueError, match="seed was 0, is 1; repeat its arguments or choose another --output"):
        evaluate("killed", policy="random", seed=1)
    for name in ("report.md", "figure.png", "videos/random/in_distribution-failure.mp4"):
        assert (tmp_path / "first" / name).stat().st_size > 1000
    assert not list(tmp_path.rglob(".*"))  # no temporary file is left


def test_two_checkpoints_of_training_runs(evaluate, tmp_path, monkeypatch):
    """Stops a checkpoint that does not evaluate by itself: its training's settings, paired episodes, temperature."""
    temperatures, act = set(), VLA.act
    monkeypatch.setattr(VLA, "act", lambda self, *inputs: (temperatures.add(inputs[2]), act(self, *inputs))[1])
    for number, name in enumerate(("a", "b")):
        model = load_vla("tiny", seed=number)
        state = {"args": {"max_episode_steps": 5, "unnorm_key": sorted(model.norm_stats)[0]}}
        state["args"]["dtype"] = ("bfloat16", "float32")[number]  # on a CPU both are evaluated in float32
        save_checkpoint(tmp_path / name, "best", 3, lambda path, model=model: save_vla(model, path), state)
    runs = (str(tmp_path / "a"), str(tmp_path / "b"))
    results = evaluate("two", checkpoint=runs, max_episode_steps=None, tasks="id", num_envs=3)
    assert results["config"]["dtype"] == "float32"
    assert results["config"]["max_episode_steps"] == 5 and temperatures == {results["config"]["temperature"]} == {0.6}
    a, b = (policy["rows"]["in_distribution"] for policy in results["policies"].values())
    assert a["episode_ids"] == b["episode_ids"] and a["arguments"]["weights"] != b["arguments"]["weights"]
    assert [t["name"] for t in results["comparisons"][0]["tests"]] == ["in_distribution"]
    assert "McNemar" in (tmp_path / "two" / "report.md").read_text()


def test_expert_solves_in_distribution_and_zero_does_not(evaluate):
    """Stops a broken success measure: sanity rows at both ends."""
    expert = evaluate("expert", policy="expert", tasks="id", max_episode_steps=40)
    zero = evaluate("zero", policy="zero", tasks="id", max_episode_steps=40)
    row = expert["policies"]["expert"]["rows"]["in_distribution"]
    assert row["k"] == 3 and row["return"] == pytest.approx(1.2) and row["held"] == 1.0
    assert zero["policies"]["zero"]["rows"]["in_distribution"]["grasped"] == 0.0


def test_a_model_that_names_its_assets_needs_no_flag(evaluate):
    """Stops the command that ends every run from refusing the run's own checkpoint for want of --assets."""
    results = evaluate("named", checkpoint=(str(ROOT / "checkpoints/tiny-warmup"),), tasks="id", num_episodes=1)
    assert results["config"]["assets"] == "primitive"
