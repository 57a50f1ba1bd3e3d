"""Small checkpoints in the published directory layout, for tests: sharded, with dead keys, tokenizer and statistics."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

FIXTURES = Path(__file__).parent / "fixtures"
# Llama-2's pieces and ids for the reference prompts
PIECES = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "\n": 13, "▁the": 278, "▁to": 304, "▁on": 373, "▁In": 512, "▁sp": 805,
    "▁should": 881, "▁pe": 1236, "▁car": 1559, "▁What": 1724, "▁put": 1925, "▁take": 2125, "pper": 2496,
    "▁action": 3158, "▁light": 3578, "Out": 3744, "rot": 5450, "oon": 6150, "▁blue": 7254, "▁yellow": 13328,
    "▁plate": 15284, "▁robot": 19964, "wel": 20466, "▁bell": 22623, "▁": 29871, ":": 29901, "?": 29973, "<PAD>": 32000,
}  # fmt: skip


def reference() -> tuple[dict, dict]:
    """The recorded outputs of the reference implementation: arrays, and the description in "json"."""
    with np.load(FIXTURES / "openvla_small.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("json")))


def tokenizer() -> Tokenizer:
    """Llama-2's ids for the words of the reference prompts, <unk> for others."""
    words = Tokenizer(models.WordLevel(PIECES, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = sorted((p for p in PIECES if not p.startswith("<")), key=len, reverse=True)
    words.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(p.replace("?", r"\?") for p in pieces)), "isolated")
    return words


def reference_tensors() -> tuple[dict, dict]:
    """config.json and the tensors of the reference model under their published names, dead ones as zeros."""
    arrays, info = reference()
    config = dict(info["config"])
    tiny = config.pop("tiny_timm_overrides")
    names = dict(zip(["featurizer", "fused_featurizer"], config["timm_model_ids"], strict=True))
    ratios = {"featurizer": 4.0, "fused_featurizer": 3.7362}
    config["towers"] = {
        name: [t["embed_dim"], t["depth"], t["num_heads"], int(t["embed_dim"] * ratios[name])]
        for name, t in ((name, tiny[timm_id]) for name, timm_id in names.items())
    }
    tensors = {}
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind == "w":
            tensors[name] = torch.tensor(array)
            if (
                "embed_tokens" in name or "lm_head" in name
            ):  # only the rows that the prompts and actions use are recorded
                tensors[name] = torch.zeros(config["text_config"]["vocab_size"], array.shape[1])
                tensors[name][torch.tensor(arrays["rows"]).long()] = torch.tensor(array)
        elif kind == "deadshape":
            tensors[name] = torch.zeros(tuple(array))
    return config, tensors


def write_checkpoint(directory, config: dict, tensors: dict, shards: int = 3) -> Path:
    """The published layout: shards, index, config.json, tokenizer.json; value_head.* in a file of its own."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head = {k: v for k, v in tensors.items() if k.startswith("value_head.")}
    keys = sorted(tensors.keys() - head.keys())
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {k: tensors[k].contiguous() for k in keys[i::shards]}
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if head:
        save_file(head, directory / "value_head.safetensors", {"value_input": "h0", "separate_critic": "False"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_reference_checkpoint(directory, shards: int = 3) -> Path:
    """The reference model as a published-layout directory."""
    return write_checkpoint(directory, *reference_tensors(), shards)


def write_reference_adapter(directory) -> Path:
    """The reference LoRA adapter as PEFT stores it, lm_head's base weights and a dead layer included."""
    arrays, info = reference()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k.removeprefix("lora:"): torch.tensor(v) for k, v in arrays.items() if k.startswith("lora:")}
    vocabulary = info["config"]["text_config"]["vocab_size"]
    name = "base_model.model.language_model.lm_head"
    rows = torch.zeros(vocabulary, tensors[f"{name}.lora_B.weight"].shape[1])
    rows[torch.tensor(arrays["rows"]).long()] = tensors[f"{name}.lora_B.weight"]
    tensors[f"{name}.lora_B.weight"] = rows
    tensors[f"{name}.base_layer.weight"] = torch.ones(vocabulary, 32)
    dead = "base_model.model.vision_backbone.featurizer.blocks.2.mlp.fc1"
    tensors |= {f"{dead}.lora_A.weight": torch.ones(4, 32), f"{dead}.lora_B.weight": torch.ones(128, 4)}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    adapter = info["adapter"] | {"peft_type": "LORA", "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": None}))
    return directory


def write_small_hub_checkpoint(directory, image_size: int = 224, seed: int = 0) -> Path:
    """A small random model in the published layout, 2.2 M parameters, most of them rows of the vocabulary."""
    from common.model.openvla import Backbone

    config, _ = reference_tensors()
    config["image_sizes"] = [image_size, image_size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = Backbone(config).state_dict()
    return write_checkpoint(directory, config, tensors, shards=2)
