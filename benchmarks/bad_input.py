"""The bad input of benchmarks/reliability.py: damaged files, and commands that must be refused."""

import numpy as np

# --- files: new folder, what it is a copy of, the file that is changed, and what it holds then ---
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6000000\n"
STATE, WEIGHTS = "checkpoint-000002/training_state.pt", "checkpoint-000002/model.safetensors"
WARMUP = "checkpoints/tiny-warmup"
LOW, HIGH, NAN = [-1.0] * 7, [1.0] * 7, [np.nan] * 7


def stats(q01=LOW, q99=HIGH):
    return {"norm_stats": {"a": {"action": {"q01": q01, "q99": q99}}}}


def replace(file, key, values):
    del file[f"traj_0/{key}"]
    file[f"traj_0/{key}"] = values


def of(scene, task="main"):
    return {"settings": {"scene": scene, "task": task}}


FILES = [  # bytes: the content; a number: this share of it; None: no such file; dict: JSON's keys
    ("m/cut", WARMUP, "model.safetensors", 0.5),
    ("m/pointer", WARMUP, "model.safetensors", POINTER),
    ("m/header", WARMUP, "model.safetensors", b"\xff" * 64),
    ("m/no-weights", WARMUP, "model.safetensors", None),
    ("m/list", WARMUP, "config.json", b"[1, 2]"),
    ("m/latin", WARMUP, "config.json", '{"a": "é"}'.encode("latin-1")),
    ("m/deep", WARMUP, "config.json", b"[" * 100_000),
    ("m/text-config", WARMUP, "config.json", {"text_config": "llama"}),
    ("m/width", WARMUP, "config.json", {"projector": 1, "image_tokens": 35, "stem": [[9, 4, 4]]}),
    ("m/no-key", WARMUP, "config.json", {"norm_stats": {"cleanvla": {}}}),
    ("m/six", WARMUP, "config.json", stats(LOW[1:])),
    ("m/nan", WARMUP, "config.json", stats(q99=NAN)),
    ("m/stats", WARMUP, "dataset_statistics.json", b'{"cleanvla": 3}'),
    ("m/tokens", WARMUP, "tokenizer.json", b"{}"),
    ("m/adapter", "empty", "adapter_config.json", b'{"peft_type": "LORA", "r": 4}'),
    ("m/base", WARMUP, "adapter_config.json", b'{"base_model_name_or_path": "base"}'),
    ("m/pickle", "empty", "pytorch_model.bin", b"\x80\x04."),
    ("runs/utf", "runs/done", "args.json", "{}".encode("utf-16")),
    ("runs/cut", "runs/done", "args.json", 0.5),
    ("runs/list", "runs/done", "args.json", b"[]"),
    ("runs/four", "runs/done", "args.json", {"num_envs": "four"}),
    ("runs/null", "runs/done", "args.json", {"gamma": None}),
    ("runs/group", "runs/done", "args.json", {"run": 7}),
    ("runs/half", "runs/done", "args.json", {"num_steps": 4.5}),
    ("runs/choice", "runs/done", "args.json", {"critic": "both"}),
    ("runs/older", "runs/done", "args.json", {"entropy": 0.1}),
    ("runs/weights", "runs/done", WEIGHTS, 0.9),
    ("runs/lfs", "runs/done", WEIGHTS, POINTER),
    ("runs/state", "runs/done", STATE, 0.5),
    ("runs/text", "runs/done", STATE, b"hello"),
    ("runs/evil", "runs/done", STATE, b"cposix\nsystem\n(S'touch executed'\ntR."),
    ("runs/no-state", "runs/done", STATE, None),
    ("runs/log", "runs/done", "metrics.jsonl", b'{"iteration": 0}\noops\n'),
    ("runs/log-type", "runs/done", "metrics.jsonl", b'{"iteration": "0"}\n'),
    ("runs/log-list", "runs/done", "metrics.jsonl", b"[]\n"),
    ("runs/new", "empty", "args.json", b"{}"),
    ("d/cut", "demos/ok", "trajectory.h5", 0.5),
    ("d/pointer", "demos/ok", "trajectory.h5", POINTER),
    ("d/no-json", "demos/ok", "trajectory.json", None),
    ("d/list", "demos/ok", "trajectory.json", b"[]"),
    ("d/keys", "demos/ok", "trajectory.json", {"episodes": [{"episode_id": 0}]}),
    ("d/nothing", "demos/ok", "trajectory.json", {"episodes": []}),
    ("d/string", "demos/ok", "trajectory.json", {"episodes": "four"}),
    ("d/settings", "demos/ok", "trajectory.json", of("attic")),
    ("d/other-task", "demos/ok", "trajectory.json", of("small", "cup")),
    ("d/published", "demos/ok", "trajectory.json", of("published")),
    ("d/six", "demos/ok", "trajectory.h5", lambda file: replace(file, "actions", np.zeros((9, 6)))),
    ("d/nan", "demos/ok", "trajectory.h5", lambda file: file["traj_0/actions"].write_direct(
        np.full(file["traj_0/actions"].shape, np.nan, np.float32))),
    ("d/no-pictures", "demos/ok", "trajectory.h5", lambda file: file.__delitem__("traj_0/obs")),
    ("d/text", "demos/ok", "trajectory.h5", lambda file: replace(file, "actions", [b"up"])),
    ("e/list", "empty", "results.json", b"[]"),
    ("e/keys", "empty", "results.json", b'{"policies": {"zero": {}}}'),
    ("e/rows", "empty", "results.json", b'{"policies": {"zero": {"arguments": {}, "rows": 3}}}'),
    ("e/cut", "empty", "results.json", b'{"policies": {"zero": {"argum'),
    ("e/none", "empty", "results.json", b'{"policies": {}}'),
    ("e/row", "empty", "results.json", b'{"policies": {"a": {"rows": {"id": {"success": 3}}}}}'),
    ("e/other", "empty", "results.json", b'{"policies": {"zero": {"arguments": {}, "rows": {}}}}'),
    ("runs", None, "file", b"text"),
    ("pictures", "empty", "a.png", b"\x89PNG\r\n\x1a\n"),
    ("p", "empty", "syntax.py", b"def act(: pass"),
    ("p", None, "latin.py", b"act = '\xe9'"),
    ("p", None, "null.py", b"\x00"),
    ("p", None, "broken.py", b"import no_such_package"),
    ("p", None, "text.txt", b"act"),
    ("p", None, "value.py", b"act = 3"),
    ("p", None, "plain.py", b"class act:\n    pass"),
    ("p", None, "arity.py", b"def act(images):\n    return images"),
    ("p", None, "shape.py", b"def act(images, texts, rows):\n    return [0] * 7"),
    ("p", None, "nan.py", b"def act(images, texts, rows):\n    return [[1e999] * 7] * len(rows)"),
]  # fmt: skip


# --- bad input: command | words of the message, separated by ";" ---
CASES = """
ppo_vla.py --num-env 4                             | --num-env; --num-envs
ppo_vla.py 64                                      | 64
ppo_vla.py --num-envs                              | --num-envs
ppo_vla.py --num-envs many                         | --num-envs; many
ppo_vla.py --num-envs 2.5                          | --num-envs; 2.5
ppo_vla.py --num-envs 0                            | num_envs = 0; > 0; 64
ppo_vla.py --num-envs -3                           | num_envs = -3; > 0
ppo_vla.py --num-envs 1000000000000                | num_envs = 1000000000000; <= 1000000
ppo_vla.py --num-steps 99999999999999999999        | num_steps = 99999999999999999999; <=
ppo_vla.py --num-minibatches 20000                 | num_minibatches = 20000; 10240
ppo_vla.py --num-minibatches 0                     | num_minibatches = 0; > 0
ppo_vla.py --learning-rate nan                     | learning_rate = nan; <= 1000000
ppo_vla.py --learning-rate inf                     | learning_rate = inf; <= 1000000
ppo_vla.py --learning-rate -1e-4                   | learning_rate = -0.0001; >= 0
ppo_vla.py --gamma 1.5                             | gamma = 1.5; <= 1
ppo_vla.py --clip-coef -0.1                        | clip_coef = -0.1; >= 0
ppo_vla.py --temperature 0                         | temperature = 0.0; > 0
ppo_vla.py --max-grad-norm 0                       | max_grad_norm = 0.0; > 0
ppo_vla.py --target-kl -1                          | target_kl = -1.0; > 0
ppo_vla.py --micro-batch-size 0                    | micro_batch_size = 0; > 0
ppo_vla.py --anneal-lr True                        | True
ppo_vla.py --vf-coef 0.5                           | vf_coef = 0.5; does nothing
ppo_vla.py --critic h0 --value-epochs 9            | value_epochs = 9; does nothing
ppo_vla.py --critic stat                           | --critic; stat; state
ppo_vla.py --preset papre                          | --preset; papre; paper
ppo_vla.py --preset paper                          | wx250s.urdf; fetch_assets
ppo_vla.py --task cup                              | task = 'cup'; main
ppo_vla.py --scene kitchen                         | --scene; kitchen; small
ppo_vla.py --sim-device cuda                       | cuda; --sim-device cpu
ppo_vla.py --device cuda                           | device = cuda; cpu
ppo_vla.py --dtype float16                         | --dtype; float16; bfloat16
ppo_vla.py --unnorm-key bridge_orig                | unnorm_key = 'bridge_orig'; cleanvla
ppo_vla.py --lora-rank -1                          | lora_rank = -1; >= 0
ppo_vla.py --seed -1                               | seed = -1; >= 0
ppo_vla.py --seed 5000000000                       | seed = 5000000000; <= 4294967295
ppo_vla.py --eval-every -1                         | eval_every = -1; >= 0
ppo_vla.py --eval-episodes 0                       | eval_episodes = 0; >= 1; --eval-every 0
ppo_vla.py --name a/b                              | name = 'a/b'; no slashes
ppo_vla.py --name ..                               | name = '..'; no slashes
ppo_vla.py --name LONG                             | xxx; File name too long
ppo_vla.py --name done                             | runs/done; --resume
ppo_vla.py --name file                             | runs/file; --name
ppo_vla.py --resume runs/none                      | runs/none/args.json; missing; runs/done
ppo_vla.py --resume runs                           | runs/args.json; missing
ppo_vla.py --resume file                           | file/args.json; missing
ppo_vla.py --resume empty                          | empty/args.json; missing
ppo_vla.py --resume runs/new                       | runs/new/args.json; another script
grpo_vla.py --resume runs/done                     | runs/done/args.json; another script
ppo_vla.py --resume runs/done --num-envs 8         | num_envs = 8; --resume must not change 4
ppo_vla.py --resume runs/done --seed 7             | seed = 7; --resume must not change 1
ppo_vla.py --resume runs/done --preset paper       | preset = 'paper'; --resume
ppo_vla.py --resume runs/utf                       | runs/utf/args.json; utf-8
ppo_vla.py --resume runs/cut                       | runs/cut/args.json; is it whole
ppo_vla.py --resume runs/list                      | runs/list/args.json; []
ppo_vla.py --resume runs/four                      | runs/four/args.json; num_envs; four
ppo_vla.py --resume runs/null                      | runs/null/args.json; gamma; None
ppo_vla.py --resume runs/group                     | runs/group/args.json; run; 7
ppo_vla.py --resume runs/half                      | runs/half/args.json; num_steps; 4.5
ppo_vla.py --resume runs/choice                    | runs/choice/args.json; critic; both
ppo_vla.py --resume runs/older                     | runs/older/args.json; entropy
ppo_vla.py --resume runs/weights                   | runs/weights/checkpoint-000002/model
ppo_vla.py --resume runs/lfs                       | runs/lfs/checkpoint-000002/model; git-lfs
ppo_vla.py --resume runs/state                     | runs/state/checkpoint-000002/training_state
ppo_vla.py --resume runs/text                      | runs/text/checkpoint-000002/training_state
ppo_vla.py --resume runs/evil                      | runs/evil/checkpoint-000002/training_state
ppo_vla.py --resume runs/no-state                  | runs/no-state/checkpoint-000002/training_state
ppo_vla.py --resume runs/log                       | runs/log/metrics.jsonl; remove the line
ppo_vla.py --resume runs/log-type                  | runs/log-type/metrics.jsonl; remove the line
ppo_vla.py --resume runs/log-list                  | runs/log-list/metrics.jsonl; remove the line
ppo_vla.py --model checkpoints/tiny-warmpu         | tiny-warmpu; neither a directory
ppo_vla.py --model file                            | 'file'; neither a directory
ppo_vla.py --model nobody/nothing                  | nobody/nothing
ppo_vla.py --model empty                           | empty/config.json
ppo_vla.py --model pictures                        | pictures/config.json
ppo_vla.py --model demos/ok                        | demos/ok/config.json
ppo_vla.py --model runs/done                       | runs/done/config.json
ppo_vla.py --model m/cut                           | m/cut/model.safetensors; is it whole
ppo_vla.py --model m/pointer                       | m/pointer/model.safetensors; git-lfs
ppo_vla.py --model m/header                        | m/header/model.safetensors; is it whole
ppo_vla.py --model m/no-weights                    | m/no-weights; no safetensors
ppo_vla.py --model m/pickle                        | m/pickle
ppo_vla.py --model m/list                          | m/list/config.json; [1, 2]
ppo_vla.py --model m/latin                         | m/latin/config.json; utf-8
ppo_vla.py --model m/deep                          | m/deep/config.json; recursion
ppo_vla.py --model m/text-config                   | m/text-config/config.json; text_config
ppo_vla.py --model m/width                         | m/width/; projector
ppo_vla.py --model m/no-key                        | m/no-key; action
ppo_vla.py --model m/six                           | m/six; q01
ppo_vla.py --model m/nan                           | m/nan; q99
ppo_vla.py --model m/stats                         | m/stats/dataset_statistics.json; 3
ppo_vla.py --model m/tokens                        | m/tokens/tokenizer.json
ppo_vla.py --model m/adapter                       | m/adapter; adapter_model.safetensors
ppo_vla.py --model m/base                          | m/base; adapter_model.safetensors
grpo_vla.py --group-size 1                         | group_size = 1; > 1
grpo_vla.py --group-size 5                         | group_size = 5; divide num_envs
grpo_vla.py --num-steps 41                         | num_steps = 41; multiple; 40
grpo_vla.py --filter-low 0.9 --filter-high 0.1     | filter_low = 0.9; filter_high = 0.1
grpo_vla.py --filter-high 2                        | filter_high = 2.0; <= 1
dpo_vla.py --num-steps 39                          | num_steps = 39; multiple; 40
dpo_vla.py --num-trajectories 7                    | num_trajectories; pairs_per_state = 4
dpo_vla.py --pairs-per-state 90                    | pairs_per_state = 90; num_trajectories
dpo_vla.py --beta nan                              | beta = nan; > 0
sft_vla.py                                         | demos/main/trajectory.h5; demonstrations.record
sft_vla.py --demos                                 | demos is empty; --demos
sft_vla.py --demos file                            | file/trajectory.h5; demonstrations.record
sft_vla.py --demos pictures                        | pictures/trajectory.h5; demonstrations.record
sft_vla.py --demos runs/done                       | runs/done/trajectory.h5; demonstrations.record
sft_vla.py --demos d/cut                           | d/cut/trajectory.h5; is it whole
sft_vla.py --demos d/pointer                       | d/pointer/trajectory.h5; git-lfs
sft_vla.py --demos d/no-json                       | d/no-json/trajectory.h5; .json is missing
sft_vla.py --demos d/list                          | d/list/trajectory.json; demonstrations
sft_vla.py --demos d/keys                          | d/keys/trajectory.json; elapsed_steps
sft_vla.py --demos d/nothing                       | d/nothing/trajectory.json; episodes
sft_vla.py --demos d/string                        | d/string/trajectory.json; episodes; four
sft_vla.py --demos d/settings                      | d/settings; attic
sft_vla.py --demos d/other-task --val-demos 1      | d/other-task/trajectory.json; cup
sft_vla.py --demos d/published                     | d/published; published; small
sft_vla.py --demos d/six --val-demos 1             | d/six/trajectory.h5; actions; 6
sft_vla.py --demos d/nan --val-demos 1             | d/nan/trajectory.h5; actions; not finite
sft_vla.py --demos d/no-pictures --val-demos 1     | d/no-pictures/trajectory.h5/traj_0; not found
sft_vla.py --demos d/text --val-demos 1            | d/text/trajectory.h5/traj_0; (1,) of kind O
sft_vla.py --demos demos/ok --val-demos 4          | val_demos = 4; use fewer
sft_vla.py --demos demos/ok --num-demos 9          | num_demos = 9; demos/ok; 4
sft_vla.py --demos demos/ok --num-demos -1         | num_demos = -1; >= 0
sft_vla.py --demos demos/ok --val-demos 1 --merge-adapter | merge_adapter; adapter
python -m demonstrations.record --num-demos 0      | num_demos = 0; > 0; 100
python -m demonstrations.record --num-demos 999999 | num_demos = 999999; fewer
python -m demonstrations.record --num-envs 0       | num_envs = 0; > 0; 16
python -m demonstrations.record --num-envs 1000000000000 | num_envs = 1000000000000; <= 1000000
python -m demonstrations.record --max-episode-steps -1 | max_episode_steps = -1; >= 0
python -m demonstrations.record --hold-steps -9    | hold_steps = -9; >= 0
python -m demonstrations.record --action-noise nan | action_noise = nan
python -m demonstrations.record --action-noise -1  | action_noise = -1
python -m demonstrations.record --seed -1          | seed = -1
python -m demonstrations.record --noise-probability 2 | noise_probability = 2.0; <= 1
python -m demonstrations.record --blunder-probability nan | blunder_probability = nan; <= 1
python -m demonstrations.record --image-format gif | --image-format; gif; png
python -m demonstrations.record --task cup         | task = 'cup'; main
python -m demonstrations.record --output demos/ok  | demos/ok/trajectory.h5; never overwritten
python -m demonstrations.record --output file      | file; --output
python -m demonstrations.record --output /proc/x   | /proc/x; --output
eval_ood.py                                        | policy = (); --checkpoint
eval_ood.py --checkpoint nowhere                   | nowhere; neither a directory
eval_ood.py --checkpoint empty                     | empty/config.json
eval_ood.py --checkpoint ws://127.0.0.1:9          | ws://127.0.0.1:9; neither a directory
eval_ood.py --checkpoint p/plain.py:act            | p/plain.py:act; neither a directory
eval_ood.py --checkpoint m/cut                     | m/cut/model.safetensors; is it whole
eval_ood.py --checkpoint runs/done runs/done       | runs/done; once
eval_ood.py --checkpoint m/six --unnorm-key a      | m/six; q01; 7
eval_ood.py --policy runs/done                     | runs/done; FILE.py:NAME
eval_ood.py --policy checkpoints/tiny-warmup       | tiny-warmup; FILE.py:NAME
eval_ood.py --policy exprt                         | exprt; expert
eval_ood.py --policy expert expert                 | expert; rename one
eval_ood.py --policy p/none.py:act                 | p/none.py; no file
eval_ood.py --policy p/plain.py                    | p/plain.py; FILE.py:NAME
eval_ood.py --policy p/text.txt:act                | p/text.txt:act; FILE.py:NAME
eval_ood.py --policy p/syntax.py:act               | p/syntax.py; not Python
eval_ood.py --policy p/latin.py:act                | p/latin.py; not Python
eval_ood.py --policy p/null.py:act                 | p/null.py; not Python
eval_ood.py --policy p/value.py:act                | p/value.py; no such function
eval_ood.py --policy p/value.py:acts               | p/value.py; no such function
eval_ood.py --policy p/plain.py:act                | p/plain.py; __call__
eval_ood.py --policy p/broken.py:act               | no_such_package
eval_ood.py --policy p/arity.py:act                | p/arity.py; images, instructions, rows
eval_ood.py --policy ws://127.0.0.1:9              | ws://127.0.0.1:9; start the server
eval_ood.py --policy ws://                         | ws://; address
eval_ood.py --policy ws://127.0.0.1:99999          | ws://127.0.0.1:99999; address
eval_ood.py --policy http://127.0.0.1:9            | http://127.0.0.1:9; ws://HOST:PORT
eval_ood.py --policy zero --tasks cup              | tasks = cup; semantics
eval_ood.py --policy zero --tasks ''               | tasks = ; ['']; id
eval_ood.py --policy zero --num-episodes 0         | num_episodes = 0; > 0
eval_ood.py --policy zero --num-episodes -5        | num_episodes = -5; > 0
eval_ood.py --policy zero --num-episodes 99999999999 | num_episodes = 99999999999; <= 1000000
eval_ood.py --policy zero --num-envs 8             | num_envs = 8; multiple of 16
eval_ood.py --policy zero --temperature nan        | temperature = nan; >= 0; 0.6
eval_ood.py --policy zero --temperature inf        | temperature = inf; 0.6
eval_ood.py --policy zero --temperature -1         | temperature = -1.0; 0.6
eval_ood.py --policy zero --seed -1                | seed = -1; >= 0
eval_ood.py --policy zero --scene published        | wx250s.urdf; fetch_assets
eval_ood.py --checkpoint checkpoints/tiny-warmup --unnorm-key x | unnorm_key = 'x'; cleanvla
eval_ood.py --policy zero --output file            | file/results.json; can it be written
eval_ood.py --policy zero --output /proc/x         | /proc/x; can it be written
eval_ood.py --policy zero --output e/list          | e/list/results.json; []
eval_ood.py --policy zero --output e/keys          | e/keys/results.json; has no rows
eval_ood.py --policy zero --output e/rows          | e/rows/results.json; 3
eval_ood.py --policy zero --output e/cut           | e/cut/results.json; is it whole
eval_ood.py --policy zero --output e/other         | e/other/results.json; another --output
scripts/report.py                                  | DIRECTORY; report.py
scripts/report.py nowhere                          | nowhere/results.json
scripts/report.py e/list                           | e/list/results.json; []
scripts/report.py e/none                           | e/none/results.json; policies
scripts/report.py e/row                            | e/row/results.json; has no dimension
scripts/plan.py                                    | ppo_vla
scripts/plan.py pppo_vla                           | pppo_vla; ppo_vla
scripts/plan.py eval_ood                           | eval_ood; ppo_vla
scripts/plan.py ppo_vla --num-env 4                | --num-env; --num-envs
scripts/plan.py ppo_vla --model m/list             | m/list/config.json; [1, 2]
"""
LATE = """
eval_ood.py --policy p/shape.py:act --tasks id --num-episodes 2 | p/shape.py; (7,); (2, 7)
eval_ood.py --policy p/nan.py:act --tasks id --num-episodes 2   | p/nan.py; inf; finite
eval_ood.py --policy SERVER/shape --tasks id --num-episodes 2   | ws://; (2, 32); (H, 7)
eval_ood.py --policy SERVER/nan --tasks id --num-episodes 2     | ws://; nan; finite
"""  # known only when the policy acts: the simulator has started
