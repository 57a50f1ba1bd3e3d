"""Publish a checkpoint or demonstrations on the Hugging Face Hub, with a card (docs/hub.md).

    python scripts/publish.py runs/ppo USER/NAME --results runs/ppo/eval --dry-run runs/ppo-hub
    python scripts/publish.py runs/ppo USER/NAME --results runs/ppo/eval
    python scripts/publish.py demos/main USER/NAME

The first line writes what the second one uploads. A run stands for its best, else its latest
checkpoint. Optimizer states and logs never go up. The text is in model_card.md, dataset_card.md.
"""

import importlib
import json
import os
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub as hub
import torch
import tyro

from common.model.checkpoints import locate
from common.run.args import flat, saved_args
from common.run.evaluate import wilson
from common.run.files import check, read_json, write_atomic
from demonstrations import record
from demonstrations.reader import read_header
from scripts.pictures import draw_curves
from scripts.provenance import find_model, fingerprint, training_flags
from scripts.report import make, outcomes

SUFFIXES = (".safetensors", ".json", ".h5", ".md", ".png", ".mp4")  # nothing else goes up
SCRIPTS = ("ppo_vla", "grpo_vla", "dpo_vla", "sft_vla")
TAGS = ["cleanvla", "robotics", "vision-language-action", "maniskill"]


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # a run, a checkpoint, or a directory of demonstrations
    repo_id: tyro.conf.Positional[str]  # USER/NAME on the hub
    results: str = ""  # directory of eval_ood.py in which this checkpoint was evaluated
    note: str = ""  # for the card, about the training of a model that is no run's
    dry_run: str = ""  # a new directory, which gets what would be uploaded


# --- what was recorded ---
def find(source):
    """Kind of repository, and the directory to publish."""
    if Path(source, "trajectory.json").is_file():
        return "dataset", read_header(source)["path"].parent.resolve()
    model = Path(find_model(source)).resolve()
    fits = any(model.glob("*config.json"))
    rule = "a run with a checkpoint, a model (config.json) or demonstrations (trajectory.json)"
    check(fits, f"source = {source!r} must be {rule}; give such a directory")
    locate(str(model))
    return "model", model


def evaluated(path, model):
    """Name and entry of the policy in results.json that has this model's weights."""
    policies, weights = read_json(path)["policies"], fingerprint(str(model))
    for name, entry in policies.items():
        if entry.get("arguments", {}).get("weights") == weights:
            return name, entry
    fix = f"evaluate them: python eval_ood.py --checkpoint {model}"
    raise ValueError(f"{path} has {[*policies]}, none with the weights of {model}; {fix}")


def command(words, given, usual):
    """Command line with the flags whose values are not the usual ones."""
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and value != usual[name]:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != usual.get(name, value):
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def training_command(path):
    """Command with the flags of args.json."""
    for script in SCRIPTS:
        module = importlib.import_module(script)
        try:
            given = flat(saved_args(module.Args, path))
        except ValueError:  # another script's
            continue
        usual = dict(flat(module.PRESETS[given["preset"]]), preset="default")
        return command(["python", f"{script}.py"], given, usual)
    return "of another version of CleanVLA; its flags are in args.json"


def training(model):
    """dict of what the run recorded of this checkpoint."""
    rows, path, log = {}, model / "args.json", model.parent / "metrics.jsonl"
    starts, script = model.parent / "machines.jsonl", ""
    if starts.is_file():
        for line in starts.read_text(encoding="utf-8").splitlines():
            start = json.loads(line)
            name = f"machine, commit, from iteration {start['iteration']}"
            rows[name] = f"{start['hardware']}, {start['commit']}"
            script = start.get("script", "")
    if path.is_file():
        flags = read_json(path)
        rows.update(command=f"`{training_command(path)}`", start=flags["model"]["model"])
        if script.removesuffix(".py") not in ("", *SCRIPTS):  # a fork's
            why = "which is not CleanVLA's own; its flags are in args.json"
            rows["command"] = f"`{script}`, {why}"
        rows["task, scene"] = f"{flags['scene']['task']}, {flags['scene']['scene']}"
        rows["data"] = ", ".join(flags.get("demos", ["the policy's own episodes"]))
    if (model / "training_state.pt").is_file() and log.is_file():
        state = torch.load(model / "training_state.pt", "cpu", weights_only=True)
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        logged = {line["iteration"]: line for line in lines}[state["iteration"]]
        rows["checkpoint"] = f"{model.name}, after {logged['step']:,} steps"
        rows["hours"] = f"{state['seconds'] / 3600:.2f}"
        if "eval/episodes" in logged:
            n, low, high = (logged[f"eval/{key}"] for key in ("episodes", "low", "high"))
            own = f"{logged['eval/success_at_end'] * n:.0f}/{n:.0f} [{low:.2f}, {high:.2f}]"
            rows["the run's own evaluation"] = f"{own}; the best checkpoint is chosen by it"
    return rows


def eval_result(name, success):
    """Of a dimension or row: k of n successes with Wilson's interval."""
    k, n = int(success.sum()), len(success)
    low, high = wilson(k, n)
    return hub.EvalResult(
        task_type="robotics", dataset_type="cleanvla", dataset_name="CleanVLA benchmark",
        dataset_config=name, metric_type="success_at_end", metric_value=k / n,
        metric_args={"k": k, "n": n, "low": low, "high": high},
    )  # fmt: skip


# --- cards: their data, and values for their templates ---
def model_card(model, title, entry):
    """entry: this model's of results.json, or None."""
    source = locate(str(model))
    small, groups = bool(source.config.get("stem")), outcomes(entry["rows"]) if entry else {}
    results = [eval_result(*group) for group in groups.items()]
    data = hub.ModelCardData(
        license="mit" if small else "llama2", tags=TAGS, pipeline_tag="robotics",
        base_model=None if os.path.isabs(source.name) else source.name,
        model_name=title, eval_results=results or None,
    )  # fmt: skip
    key = shlex.quote(training_flags(str(model))["unnorm_key"])
    return data, dict(small=small, results=results, entry=entry, key=key, training=training(model))


def dataset_card(source, title, _):
    header, settings = read_json(source / "trajectory.json"), read_header(source)["settings"]
    small = settings["scene"] == "small"
    data = hub.DatasetCardData(license="mit" if small else "other", tags=TAGS)
    words = ["python", "-m", "demonstrations.record", "--output", f"demos/{title}"]
    again = command(words, settings, asdict(record.Args()))
    return data, dict(small=small, header=header, settings=settings, command=again)


# --- write and upload ---
def write(args, kind, source, folder):
    """All that goes up, in a new folder."""

    def left_out(_, names):
        right = [name for name in names if Path(name).suffix in SUFFIXES and name != "README.md"]
        return set(names) - {*right, "base"}

    title, entry = args.repo_id.split("/")[1], None
    if args.results:
        name, entry = evaluated(Path(args.results, "results.json"), source)
    make_card = model_card if kind == "model" else dataset_card
    data, values = make_card(source, title, entry)
    values.update(title=title, repo_id=args.repo_id, note=args.note)
    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
    template = Path(__file__).with_name(f"{kind}_card.md")
    hub.RepoCard.from_template(data, str(template), **values).save(folder / "README.md")
    if "checkpoint" in values.get("training", ()):
        log = shutil.copy(source.parent / "metrics.jsonl", folder)
        draw_curves(folder, "train/success_at_end", "eval/success_at_end")
        os.remove(log)
    if entry:
        if (videos := Path(args.results, "videos", name)).is_dir():  # committed results have none
            shutil.copytree(videos, folder / "evaluation/videos")
        own = json.dumps({"policies": {name: entry}}, indent=1)
        write_atomic(folder / "evaluation/results.json", own)
        make(folder / "evaluation")


def main(args):
    check(args.repo_id.count("/") == 1, f"repo_id = {args.repo_id!r} must be USER/NAME")
    hub.utils.validate_repo_id(args.repo_id)
    free = not (args.dry_run and Path(args.dry_run).exists())
    check(free, f"dry_run = {args.dry_run} exists; remove it, or name another folder")
    check(args.dry_run or hub.get_token(), "no token: `hf auth login`, HF_TOKEN or --dry-run DIR")
    kind, source = find(args.source)
    check(kind == "model" or not args.results, f"results = {args.results} is for a model; drop it")
    if args.dry_run:
        return write(args, kind, source, Path(args.dry_run))
    api, patterns = hub.HfApi(), [f"*{suffix}" for suffix in SUFFIXES]
    api.whoami()  # a token that is not valid shows now
    with TemporaryDirectory(dir=source.parent, prefix=".hub-") as folder:
        write(args, kind, source, Path(folder))
        repo = dict(repo_id=args.repo_id, repo_type=kind)
        print(api.create_repo(**repo, exist_ok=True))
        files = dict(allow_patterns=patterns, delete_patterns=patterns)  # of an earlier version
        api.upload_folder(**repo, folder_path=folder, **files)


if __name__ == "__main__":
    main(tyro.cli(Args))
