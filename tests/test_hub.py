"""Publishing on the Hugging Face Hub, offline."""

import re
from unittest.mock import Mock

import huggingface_hub as hub
from recorded_demos import recorded_demos
from test_checkpoints import refused
from test_eval_ood import WARMUP, evaluate  # noqa: F401
from test_run import parse

from common.model.checkpoints import load_vla
from demonstrations.reader import load_demos
from scripts.publish import SUFFIXES, Args, Path, main, saved_args


def test_what_goes_up_and_what_is_refused(train, evaluate, tmp_path, monkeypatch):  # noqa: F811
    """Stops lost weights, optimizer states, numbers and commands of others, late errors."""
    monkeypatch.setattr("sys.argv", ["a/ppo_vla.py"])
    run, out = str(train("ppo", "--name mine --lora-rank 2 --no-anneal-lr")), f"{tmp_path}/hub"
    rows = evaluate("eval", steps=1, checkpoint=(run,), tasks="id,main")["mine"]["rows"]
    main(Args(run, "me/mine", results := f"{tmp_path}/eval", dry_run=out))
    card = hub.ModelCard.load(f"{out}/README.md")
    found = {each.dataset_config: each.metric_args for each in card.data.eval_results}
    assert rows.keys() == found.keys() and load_vla(out) and "from iteration 0" in card.text
    assert all(rows[name][key] == counts[key] for name, counts in found.items() for key in "kn")
    again = parse(re.search("`python ppo_vla.py (.*)`", card.text)[1])
    assert again == saved_args(type(again), Path(run, "args.json"))
    machines = Path(run, "machines.jsonl")
    machines.write_text(machines.read_text().replace("ppo_vla.py", "my_vla.py"))
    main(Args(run, "me/mine", results, dry_run=f"{tmp_path}/fork"))
    assert "`my_vla.py`, which is not" in hub.ModelCard.load(f"{tmp_path}/fork/README.md").text
    refused("none with", main, Args(str(WARMUP), "me/mine", results, dry_run="new"))
    refused("HF_TOKEN", main, Args(run, "me/mine"))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub, "HfApi", api := Mock())
    names = lambda path: sorted(file.name for file in Path(path).rglob("*.*"))  # noqa: E731
    api().upload_folder = lambda folder_path, **_: api.went(names(folder_path))
    main(Args(run, "me/mine", results))
    api.went.assert_called_once_with(names(out))
    assert {Path(name).suffix for name in names(out)} == {*SUFFIXES} - {".h5"}
    demos, copy = str(recorded_demos()), f"{tmp_path}/demos"
    main(Args(demos, "me/demos", dry_run=copy))
    assert hub.DatasetCard.load(f"{copy}/README.md").data.license == "mit"
    assert load_demos(copy).episode_ids == load_demos(demos).episode_ids
    for repo_id, named in {"mine": "mine", "me/mine.git": "git", "me/x": "for a model"}.items():
        refused(named, main, Args(demos, repo_id, results, dry_run="new"))
    refused(out, main, Args(demos, "me/demos", dry_run=out))
    refused("trajectory.json", main, Args(str(tmp_path), "me/demos", dry_run="new"))
