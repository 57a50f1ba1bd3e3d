"""Small checkpoints in the published directory layout: sharded, with the keys no output reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def reference():
    """Recorded outputs of the reference implementation: arrays, and the description in "json"."""
    with np.load(FIXTURES / "openvla_small.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("json")))


def whole_vocabulary(rows, info, arrays):
    """The recorded rows of the vocabulary, (V, D), with zeros for the others."""
    tensor = torch.zeros(info["config"]["text_config"]["vocab_size"], rows.shape[1])
    tensor[torch.tensor(arrays["rows"]).long()] = torch.as_tensor(rows)
    return tensor


def reference_tensors():
    """config.json and published tensors of the reference model, zeros where no output reads."""
    arrays, info = reference()
    config, tensors = dict(info["config"]), {}
    tiny = config.pop("tiny_timm_overrides")
    first, second = (tiny[name] for name in config["timm_model_ids"])
    config["towers"] = {}
    for name, shape, ratio in (("featurizer", first, 4.0), ("fused_featurizer", second, 3.7362)):
        width = shape["embed_dim"]
        config["towers"][name] = [width, shape["depth"], shape["num_heads"], int(width * ratio)]
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind == "deadshape":
            tensors[name] = torch.zeros(tuple(array))
        elif kind == "w" and ("embed_tokens" in name or "lm_head" in name):
            tensors[name] = whole_vocabulary(array, info, arrays)
        elif kind == "w":
            tensors[name] = torch.tensor(array)
    names = [name for name in tensors if name.startswith("value_head.")]
    critic = {name.removeprefix("value_head."): tensors.pop(name) for name in names}
    return config, tensors, critic


def write_checkpoint(directory, config, tensors):
    """The published layout: shards, their index, config.json, tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        part = {key: tensors[key].contiguous() for key in sorted(tensors)[i::3]}
        save_file(part, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / "tokenizer.json", directory)  # Llama-2's ids of the prompts' words
    return directory


def write_reference_checkpoint(directory):
    """The reference model as a published-layout directory."""
    return write_checkpoint(directory, *reference_tensors()[:2])


def write_reference_adapter(directory, base):
    """The reference LoRA as RL4VLA stores it: with lm_head's base weights and an unread layer."""
    arrays, info = reference()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k.removeprefix("lora:"): torch.tensor(arrays[k]) for k in arrays if "lora:" in k}
    head = "base_model.model.language_model.lm_head"
    key = f"{head}.lora_B.weight"
    tensors[key] = whole_vocabulary(tensors[key], info, arrays)
    tensors[f"{head}.base_layer.weight"] = reference_tensors()[1]["language_model.lm_head.weight"]
    unread = "base_model.model.vision_backbone.featurizer.blocks.2.mlp.fc1"
    tensors[f"{unread}.lora_A.weight"] = torch.ones(4, 32)
    tensors[f"{unread}.lora_B.weight"] = torch.ones(128, 4)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    adapter = dict(info["adapter"], peft_type="LORA", lora_dropout=0.0, bias="none")
    adapter["base_model_name_or_path"] = str(base)
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory
