"""Weights on disk: what is saved comes back in a fresh process, and damaged directories are refused with a reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub_layout
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model import checkpoints
from common.model.openvla import load_vla, save_vla

INSTRUCTIONS = ["put carrot on plate", "put banana on cloth"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
TOKENS = torch.arange(14).reshape(2, 7)

FRESH = """
import json, sys, numpy as np, torch
from common.model.openvla import load_vla
torch.set_num_threads(1)
model = load_vla(sys.argv[1])
pictures = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
tokens = torch.arange(14).reshape(2, 7) + model.backbone.bins.start
out = model.evaluate(pictures, ["put carrot on plate", "put banana on cloth"], tokens)
trained = {k: len(v) for k, v in model.trainable_parameters().items()}
print(json.dumps([[x.tolist() for x in out], trained, model.value_input, sorted(model.norm_stats)]))
"""


def disturb(model, std=0.05):
    """Every trained weight moves, so that one that is not saved shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [p for group in model.trainable_parameters().values() for p in group]:
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def outputs(model):
    return [x.tolist() for x in model.evaluate(PICTURES, INSTRUCTIONS, TOKENS + model.backbone.bins.start)]


def same(ours, theirs, atol=2e-5):
    """Equal up to the last bits, which memory alignment decides; what `disturb` does is a thousand times larger."""
    return np.allclose(np.array(ours), np.array(theirs), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return hub_layout.write_reference_checkpoint(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def copied(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "model"))


# --- round trips ---
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 4},
        {"lora_rank": 4, "separate_critic": True},
        {"separate_critic": True},
        {"value_input": "concat"},
        {"value_input": "state"},
    ],
    ids=["full", "lora", "lora+critic", "critic", "concat", "state"],
)
def test_saved_model_is_the_same_in_a_fresh_process(options, tmp_path):
    """A tensor, a setting or the statistics that is not saved; a random base that is not the same elsewhere."""
    model = disturb(load_vla("tiny", seed=3, **options))
    model.norm_stats["mine"] = model.norm_stats["bridge_orig"]
    save_vla(model, tmp_path / "run" / "checkpoint")
    moved = (tmp_path / "run" / "checkpoint").rename(tmp_path / "elsewhere")  # nothing in it may depend on where it was
    run = subprocess.run([sys.executable, "-c", FRESH, str(moved)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    numbers, trained, value_input, keys = json.loads(run.stdout)
    assert same(numbers, outputs(model))
    assert trained == {k: len(v) for k, v in model.trainable_parameters().items()}
    assert value_input == model.value_input and keys == ["bridge_orig", "mine"]


def test_lora_saved_twice_keeps_its_base(tmp_path):
    """A resumed run whose checkpoint points at the directory it was resumed from, which is deleted later."""
    save_vla(disturb(load_vla("tiny", seed=3, lora_rank=4)), tmp_path / "first")
    resumed = disturb(load_vla(tmp_path / "first", lora_rank=4))
    save_vla(resumed, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert same(outputs(load_vla(tmp_path / "second")), outputs(resumed))
    with pytest.raises(ValueError, match="lora_rank = 8, but .* has rank 4"):
        load_vla(tmp_path / "second", lora_rank=8)


def test_frozen_base_of_an_adapter_directory_stays_in_the_low_dtype(tmp_path):
    """Stops a 7B base from being loaded in float32 when a run with an adapter is resumed or continued."""
    save_vla(load_vla("tiny", lora_rank=2, value_head=False), tmp_path / "adapter")
    model = load_vla(tmp_path / "adapter", dtype=torch.bfloat16, value_head=False)
    dtypes = {p.dtype: p.requires_grad for p in model.parameters()}
    assert dtypes == {torch.bfloat16: False, torch.float32: True}


def test_dropout_of_a_foreign_adapter_is_off(tmp_path):
    """Stops sampling and scoring of an adapter trained with dropout from being two different random policies."""
    save_vla(disturb(load_vla("tiny", lora_rank=2)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / checkpoints.ADAPTER_CONFIG).read_text()) | {"lora_dropout": 0.5}
    (tmp_path / "a" / checkpoints.ADAPTER_CONFIG).write_text(json.dumps(config))
    model = load_vla(tmp_path / "a")
    assert same(outputs(model), outputs(model))


def test_a_value_head_of_other_inputs_is_refused(tmp_path):
    """Stops a head trained on h0 from being fed the last hidden state, which has the same shape."""
    save_vla(load_vla("tiny", value_input="h0"), tmp_path / "a")
    for other in ("hn", "state"):
        with pytest.raises(ValueError, match=f"reads value_input = 'h0', not '{other}'; use that, or for a new"):
            load_vla(tmp_path / "a", value_input=other)
    load_vla(tmp_path / "a", value_input="hn", value_head=False)


def test_plain_peft_reads_our_adapter(reference, tmp_path):
    """An adapter directory that only this code can read: PeftModel on the bare model must give the same numbers."""
    from peft import PeftModel

    model = disturb(load_vla(reference, lora_rank=4))
    save_vla(model, tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "value_head.safetensors",
    } <= files and "base" not in files
    keys = checkpoints.keys_of(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.language_model.lm_head.lora_A.weight" in keys and not any("base_layer" in k for k in keys)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_B.weight"
    ].shape == (32, 4, 1, 1)
    plain = load_vla(reference)
    PeftModel.from_pretrained(plain.backbone, tmp_path / "adapter")  # changes the backbone in place
    assert same(outputs(plain)[:2], outputs(model)[:2])  # the value head is not PEFT's
    assert not same(outputs(load_vla(reference))[:2], outputs(model)[:2], 1e-2)


def test_full_model_saves_in_shards(reference, tmp_path):
    """Shards or an index that the loader, or the published names, do not match."""
    model = load_vla(reference)
    save_vla(model, tmp_path / "saved", max_shard_size="3MB")
    saved = tmp_path / "saved"
    assert (saved / checkpoints.INDEX).is_file() and len(list(saved.glob("model-*.safetensors"))) > 1
    assert same(outputs(load_vla(saved)), outputs(model))
    live = set(json.loads((saved / checkpoints.INDEX).read_text())["weight_map"])
    assert live == set(model.backbone.state_dict())


def test_saving_replaces_whole_directories(tmp_path, monkeypatch):
    """A crash while saving that leaves half a checkpoint in the place of a good one."""
    model = load_vla("tiny")
    save_vla(model, tmp_path / "c")
    before = outputs(load_vla(tmp_path / "c"))
    disturb(model)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fails)  # after the weights, before the value head
        with pytest.raises(OSError, match="disk full"):
            save_vla(model, tmp_path / "c")
    assert same(outputs(load_vla(tmp_path / "c")), before)
    save_vla(model, tmp_path / "c")
    assert same(outputs(load_vla(tmp_path / "c")), outputs(model)) and not same(outputs(model), before)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_merged_adapter_is_a_full_model(reference, tmp_path, recwarn):
    """A warm-up adapter merged before a new one is trained: base + old adapter must be the new start."""
    warm = disturb(load_vla(reference, lora_rank=4))
    save_vla(warm, tmp_path / "warm")
    merged = load_vla(reference, adapter=tmp_path / "warm", merge_adapter=True, lora_rank=2)
    assert same(outputs(merged)[0], outputs(warm)[0], 2e-4)
    assert merged.backbone.peft_config["default"].r == 2
    save_vla(merged, tmp_path / "saved")  # what it was merged into is in no other file
    assert same(outputs(load_vla(tmp_path / "saved"))[0], outputs(merged)[0], 1e-6)
    assert not [w for w in recwarn if "was trained on" in str(w.message)], "it was trained on this model"
    other = shutil.copytree(reference, tmp_path / "other-warmup")
    with pytest.warns(UserWarning, match="warm was trained on .*, not on .*other-warmup"):
        load_vla(other, adapter=tmp_path / "warm")
    with pytest.raises(ValueError, match="is itself an adapter directory"):
        load_vla(tmp_path / "warm", adapter=tmp_path / "warm")


def test_gamma_names_and_statistics_beside_the_config(copied):
    """Older exports: LayerScale called gamma, statistics in dataset_statistics.json."""
    expected = outputs(load_vla(copied))
    index = json.loads((copied / checkpoints.INDEX).read_text())
    old = {k: k.replace("scale_factor", "gamma") for k in index["weight_map"]}
    for name in set(index["weight_map"].values()):
        save_file({old[k]: v for k, v in load_file(copied / name).items()}, copied / name)
    index["weight_map"] = {old[k]: v for k, v in index["weight_map"].items()}
    (copied / checkpoints.INDEX).write_text(json.dumps(index))
    config = json.loads((copied / "config.json").read_text())
    (copied / "dataset_statistics.json").write_text(json.dumps(config.pop("norm_stats")))
    (copied / "config.json").write_text(json.dumps(config))
    model = load_vla(copied)
    assert same(outputs(model), expected) and list(model.norm_stats) == ["bridge_orig"]


# --- damage ---
def shard_of(folder, key):
    return folder / json.loads((folder / checkpoints.INDEX).read_text())["weight_map"][key]


def truncated_shard(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ValueError, r"model-00002-of-00003\.safetensors is truncated"


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return FileNotFoundError, r"model-00002-of-00003\.safetensors is missing"


def missing_index_entry(folder):
    index = json.loads((folder / checkpoints.INDEX).read_text())
    del index["weight_map"]["projector.fc1.bias"]
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    return ValueError, r"index\.json and model-.*projector\.fc1\.bias"


def edit(folder, key, change):
    path = shard_of(folder, key)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = json.loads((folder / checkpoints.INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != path.name} | dict.fromkeys(
        tensors, path.name
    )
    (folder / checkpoints.INDEX).write_text(json.dumps(index))


def missing_key(folder):
    edit(folder, "projector.fc2.bias", lambda tensors: tensors.pop("projector.fc2.bias"))
    return ValueError, r"1 keys missing \['projector\.fc2\.bias'\]"


def unknown_key(folder):
    edit(folder, "projector.fc2.bias", lambda tensors: tensors.update(extra=torch.zeros(1)))
    return ValueError, r"1 unknown \['extra'\]"


def wrong_shape(folder):
    edit(folder, "projector.fc2.bias", lambda tensors: tensors.update({"projector.fc2.bias": torch.zeros(31)}))
    return ValueError, r"safetensors: projector\.fc2\.bias has shape \(31,\), the model's is \(32,\)"


def pickle_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return FileNotFoundError, r"model\.safetensors is missing; \['pytorch_model\.bin'\] are pickles"


def not_safetensors(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(b"something else" * 100)
    return ValueError, r"model-00001-of-00003\.safetensors is truncated or not safetensors"


def no_norm_stats(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["norm_stats"]
    (folder / "config.json").write_text(json.dumps(config))
    return ValueError, r"config\.json has no norm_stats and there is no dataset_statistics\.json"


def no_config(folder):
    (folder / "config.json").unlink()
    return FileNotFoundError, r"config\.json is missing"


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return ValueError, r"config\.json is not JSON"


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return FileNotFoundError, r"tokenizer\.json is missing"


def other_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("29871", "29870"))
    return ValueError, r"tokenizer\.json: a prompt must end in token 29871"


def other_value_head(folder):
    save_file({"value_head.head_l1.weight": torch.zeros(2, 2)}, folder / "value_head.safetensors")
    return ValueError, r"value_head\.safetensors: 4 keys missing"


DAMAGE = [
    truncated_shard, missing_shard, missing_index_entry, missing_key, unknown_key, wrong_shape, pickle_only,
    not_safetensors, no_norm_stats, no_config, broken_config, no_tokenizer, other_tokenizer,
    other_value_head,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_directory(damage, copied):
    """A traceback from deep inside, or random weights, where the file and the key should be named."""
    error, message = damage(copied)
    with pytest.raises(error, match=message):
        load_vla(copied)


def test_unknown_names(tmp_path, monkeypatch):
    """A misspelt directory that turns into a download or an endless wait."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in (str(tmp_path / "nowhere"), "./nowhere", "tinny", "runs/nowhere", "here/nowhere"):
        with pytest.raises(FileNotFoundError, match="is neither a directory in .* nor like the hub id"):
            load_vla(name)

    def offline(name, allow_patterns):
        assert all(p.endswith((".safetensors", ".json")) for p in allow_patterns)
        raise OSError("no connection")

    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="hub did not give it .*no connection.*pass a directory"):
        load_vla("openvla/openvla-7b")
    with pytest.raises(ValueError, match="lora_targets is 'some'"):
        load_vla("tiny", lora_rank=4, lora_targets="some")
    with pytest.raises(ValueError, match="value_input is 'h1'"):
        load_vla("tiny", value_input="h1")


def test_damaged_adapter(reference, tmp_path):
    """An adapter of another model, or without its base, that loads in part."""
    adapter = hub_layout.write_reference_adapter(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json names the base '\(none\)'.*as its adapter"):
        load_vla(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.projector.fc1.lora_A.weight"
    for change, message in (
        ({key: torch.zeros(4, 81)}, r"projector\.fc1\.lora_A\.weight has shape \(4, 81\)"),
        ({key.replace("fc1", "fc9"): torch.zeros(4, 80)}, r"unknown \['projector\.fc9"),
    ):
        save_file(tensors | change, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_vla(reference, adapter=adapter)
    save_file({k: v for k, v in tensors.items() if k != key}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: 1 keys missing \['projector\.fc1"):
        load_vla(reference, adapter=adapter)


def test_small_hub_checkpoint_works(tmp_path):
    """The helper that other tests load real-layout models with."""
    model = load_vla(hub_layout.write_small_hub_checkpoint(tmp_path / "small"), dtype=torch.bfloat16, lora_rank=4)
    tokens, logprobs, values = model.act(PICTURES, INSTRUCTIONS)
    assert tokens.shape == (2, 7) and torch.isfinite(logprobs).all() and torch.isfinite(values).all()
