"""Models on disk: what is saved comes back, and damaged directories are refused with a reason."""

import json
import shutil
import sys
from pathlib import Path

import hub_layout
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from common.model.checkpoints import choose_key, keys_of, load_vla, save_vla, trainable_parameters
from common.model.openvla import OpenVLA

INSTRUCTIONS = ["put carrot on plate", "put banana on cloth"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"


def disturb(model):
    """Every trained weight moves, so that one that is not saved shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def outputs(model):
    tokens = torch.arange(14).reshape(2, 7) + model.bins.start
    return model.evaluate_actions(PICTURES, INSTRUCTIONS, tokens)[0].numpy()


def same(ours, theirs, atol=2e-5):
    """Equal up to the last bits; what `disturb` does is a thousand times larger."""
    return np.allclose(ours, theirs, rtol=0, atol=atol)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def refused(named, function, *arguments, **options):
    """The text of the error, which names this."""
    with pytest.raises((ValueError, OSError), match=named) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return hub_layout.write_reference_checkpoint(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def copied(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "model"))


@pytest.mark.parametrize("rank", [0, 4])
def test_saved_model_is_the_same_elsewhere(rank, tmp_path):
    """A tensor, the statistics or a random base that is not saved; a path that must not move."""
    model = disturb(load_vla("tiny", seed=3, lora_rank=rank))
    model.set_statistics("mine", model.config.norm_stats["bridge_orig"])
    save_vla(model, tmp_path / "run" / "checkpoint")
    loaded = load_vla((tmp_path / "run" / "checkpoint").rename(tmp_path / "elsewhere"), seed=4)
    assert same(outputs(loaded), outputs(model))
    assert len(trainable_parameters(loaded)) == len(trainable_parameters(model))
    assert loaded.unnorm_key == "mine" and list(loaded.config.norm_stats) == ["mine"]
    # A memory-mapped file's alignment changes how kernels round: resuming would not be exact
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())


def test_lora_that_is_continued(tmp_path):
    """A base that is lost, copied for each checkpoint, read in float32; dropout, another rank."""
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    save_vla(disturb(load_vla("tiny", seed=3)), base)
    save_vla(disturb(load_vla(base, lora_rank=4)), first)
    assert (first / "base/model.safetensors").samefile(base / "model.safetensors")
    shutil.rmtree(base)
    edit_json(first / "adapter_config.json", lora_dropout=0.5)
    resumed = disturb(load_vla(first, lora_rank=4))
    for _ in range(2):  # the second time a directory is replaced, whose base is the model's
        save_vla(resumed, second)
        shutil.rmtree(first, ignore_errors=True)
    assert same(outputs(load_vla(second)), outputs(resumed))
    assert {path.name for path in tmp_path.iterdir()} == {"second"}
    assert {path.stat().st_mode & 0o77 for path in second.glob("*.*")} == {0o44}
    refused("8.*4", load_vla, tmp_path / "second", lora_rank=8)


def test_four_bits_are_close_and_learn(tmp_path):
    """Stops matrices that are not quantised, and weights that acting rearranges for scoring."""
    pytest.importorskip("bitsandbytes")
    start = "checkpoints/tiny-warmup"
    exact = load_vla(start, dtype="bfloat16", lora_rank=4, freeze_vision=True)
    model = load_vla(start, dtype="nf4", lora_rank=4, freeze_vision=True)
    assert 0.01 < np.abs(outputs(model) - outputs(exact)).mean() < 0.4  # nats per token
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) >= 7 * 3
    tokens, logprobs, _ = model.act(PICTURES, INSTRUCTIONS)
    scored = model.evaluate_actions(PICTURES, INSTRUCTIONS, tokens)[0].sum(1)
    assert torch.allclose(scored, logprobs, atol=1e-3)
    scored.sum().backward()
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}
    save_vla(disturb(model), tmp_path / "saved")
    assert same(outputs(load_vla(tmp_path / "saved", dtype="nf4")), outputs(model))
    refused("use LoRA", load_vla, start, dtype="nf4")


def plain_model(directory):
    """As somebody reads it who knows transformers only."""
    model = OpenVLA.from_pretrained(str(directory), dtype=torch.float32)
    model.tokenizer = load_vla(directory).tokenizer
    return model


def test_plain_peft_and_transformers_read_what_we_save(reference, tmp_path):
    """Directories that only this code can read; shards whose names are not the published ones."""
    model, sharded = disturb(load_vla(reference, lora_rank=4)), tmp_path / "sharded"
    save_vla(model, tmp_path / "adapter")
    assert not any("base_layer" in key for key in keys_of(tmp_path / "adapter" / ADAPTER))
    plain = plain_model(reference)
    plain.save_pretrained(sharded, max_shard_size="3MB")
    plain.tokenizer.save(str(sharded / "tokenizer.json"))
    assert same(outputs(load_vla(sharded)), outputs(plain))
    saved, published = (json.loads((d / INDEX).read_text()) for d in (sharded, reference))
    assert saved["weight_map"].keys() < published["weight_map"].keys()
    assert not same(outputs(plain), outputs(model), 1e-2)
    assert same(outputs(PeftModel.from_pretrained(plain, tmp_path / "adapter")), outputs(model))


def test_merged_adapter_is_the_new_start(reference, tmp_path):
    """A warm-up adapter that is lost when it is merged and a new one is trained on top."""
    warm = disturb(load_vla(reference, lora_rank=4))
    save_vla(warm, tmp_path / "warm")
    merged = load_vla(tmp_path / "warm", merge_adapter=True, lora_rank=2)
    assert same(outputs(merged), outputs(warm), 2e-4)
    assert merged.peft_config["default"].r == 2
    save_vla(merged, tmp_path / "saved")  # with its base, which is in no other file
    assert same(outputs(load_vla(tmp_path / "saved")), outputs(merged), 1e-6)
    full = load_vla(tmp_path / "warm", merge_adapter=True)
    assert all(p.requires_grad for p in full.parameters())
    refused("merge_adapter", load_vla, reference, merge_adapter=True)


FOREIGN = [
    dict(modules_to_save=["projector", "norm"]), dict(modules_to_save=["lm_head"]),
    dict(bias="all"), dict(trainable_token_indices=[5, 9]), dict(use_rslora=True),
]  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN, ids=str)
def test_all_parts_of_a_foreign_adapter_are_read(kind, reference, tmp_path):
    """Trained weights beside LoRA's that are dropped silently: another policy goes on."""
    config = LoraConfig(r=2, target_modules=["qkv", "q_proj"], **kind)
    model = disturb(get_peft_model(plain_model(reference), config))
    model.save_pretrained(tmp_path)
    assert same(outputs(load_vla(tmp_path)), outputs(model))
    assert same(outputs(load_vla(tmp_path, merge_adapter=True)), outputs(model), 1e-4)


def test_which_statistics_and_config_hold(copied, tmp_path):
    """Statistics of another robot or other bodies, remote code, a page or config.json that lies."""
    path, code = copied / "config.json", "configuration_prismatic.OpenVLAConfig"
    edit_json(path, auto_map={"A": code}, pad_token_id=32000, output_projector_states=False)
    save_vla(load_vla(copied), tmp_path / "saved")
    before, after = (json.loads(p.read_text()) for p in (path, tmp_path / "saved/config.json"))
    page = (Path(__file__).parents[1] / "docs/model.md").read_text()
    code = page.split("```py")[1].split("```")[0].replace("openvla/openvla-7b", str(copied))
    exec(code.replace("cuda", "cpu"), shared := {})
    assert shared["actions"].shape == (1, 7) and "transformers_modules" not in sys.modules
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed <= {"torch_dtype", "transformers_version", "text_config", "architectures"}
    mine = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}
    (copied / "dataset_statistics.json").write_text(json.dumps({"my_robot": mine}))
    model = load_vla(copied)
    assert model.unnorm_key == "my_robot" and list(model.config.norm_stats) == ["my_robot"]
    refused("'bridge_orig'.*my_robot", load_vla, copied, unnorm_key="bridge_orig")
    stats = {"a": mine | {"assets": "primitive"}, "b": mine}
    assert choose_key(stats, "a", "primitive") == choose_key(stats, "a") == "a"
    assert choose_key(stats, "b", "bridge") == "b"
    for key, assets, named in (("", "", "'a', 'b'"), ("c", "", "'c'"), ("a", "bridge", "primi")):
        refused(named, choose_key, stats, key, assets)


def edit_shard(folder, change):
    """Change the tensors of the shard that holds projector.fc2.bias; its index stays."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][BIAS]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit(path, old=b"", new=b"", end=None):
    path.write_bytes(path.read_bytes().replace(old, new)[:end])


SHARD = "model-00002-of-00003.safetensors"
BIAS = "projector.fc2.bias"
DAMAGE = {
    "truncated shard": (lambda d: edit(d / SHARD, end=-1000), SHARD),
    "missing shard": (lambda d: (d / SHARD).unlink(), SHARD),
    "missing key": (lambda d: edit_shard(d, lambda t: t.pop(BIAS)), BIAS),
    "unknown key": (lambda d: edit_shard(d, lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "wrong shape": (lambda d: edit_shard(d, lambda t: t.update({BIAS: torch.zeros(31)})), BIAS),
    "pickle only": (lambda d: [p.rename(f"{p}.bin") for p in d.glob("*.safetensors*")], "model"),
    "no statistics": (lambda d: edit_json(d / "config.json", norm_stats={}), "norm_stats"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "empty tokenizer": (lambda d: (d / "tokenizer.json").write_text(""), "tokenizer.json"),
    "another tokenizer": (lambda d: edit(d / "tokenizer.json", b"29871", b"29870"), "29871"),
    "adapter beside": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directory(name, copied):
    """Random weights or a traceback from deep inside, where file and key should be named."""
    damage, named = DAMAGE[name]
    damage(copied)
    assert str(copied) in refused(named, load_vla, copied)


def test_adapters_that_would_act_otherwise_are_refused(reference, tmp_path):
    """An adapter that loads in part or on a base that is gone or itself one; a sliced DoRA."""
    adapter = hub_layout.write_reference_adapter(tmp_path / "adapter", base=reference)
    second = shutil.copytree(adapter, tmp_path / "second")
    for base, named in (("/gone", "adapter_config.json.*/gone"), (str(adapter), "merge")):
        edit_json(second / "adapter_config.json", base_model_name_or_path=base)
        refused(named, load_vla, second)
    key, whole = "base_model.model.projector.fc1.lora_A.weight", load_file(adapter / ADAPTER)
    less = {name: tensor for name, tensor in whole.items() if name != key}
    more = {**whole, key.replace("fc1", "fc9"): torch.zeros(4, 80)}
    for tensors in (less, more, {**whole, key: torch.zeros(4, 81)}):
        save_file(tensors, adapter / ADAPTER)
        refused(rf"{ADAPTER}[\s\S]*projector\.fc", load_vla, adapter)
    edit(adapter / ADAPTER, end=-1000)
    refused(ADAPTER, load_vla, adapter)
    config = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    get_peft_model(plain_model(reference), config).save_pretrained(tmp_path / "dora")
    refused("dora.*lm_head", load_vla, tmp_path / "dora")


def test_unknown_names(tmp_path, monkeypatch):
    """A misspelt directory that turns into a download or an endless wait."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in (str(tmp_path / "nowhere"), "tinny", "runs/nowhere", "here/nowhere"):
        refused(name, load_vla, name)

    def offline(name, allow_patterns):
        assert all(pattern.endswith((".safetensors", ".json")) for pattern in allow_patterns)
        raise OSError(f"no connection for {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("no connection for openvla/openvla-7b", load_vla, "openvla/openvla-7b")
