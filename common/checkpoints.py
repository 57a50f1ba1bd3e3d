"""Model weights on disk: the published sharded layout, PEFT adapter directories, and the value head beside either.

Full model: config.json (with norm_stats), model.safetensors or shards + model.safetensors.index.json, tokenizer.json.
LoRA: adapter_config.json, adapter_model.safetensors, config.json, tokenizer.json. Both: value_head.safetensors.
Only safetensors is read: a pickle can run code.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

TINY = Path(__file__).parent / "tiny"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER, VALUE = "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every key of an adapter file
# the paper's list; "q kv" are SigLIP's pooling layers that no output reads, "convs.N" the tiny model's stem
TARGETS = {
    "all": "proj qkv fc1 fc2 fc3 q kv q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head "
           "convs.0 convs.1 convs.2 convs.3".split(),
    "llm": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split(),
}  # fmt: skip


@dataclass
class Source:
    """Where a model's parts are. weights: {key: file}, empty for random weights."""

    name: str
    config: dict
    tokenizer: Path
    weights: dict = field(default_factory=dict)
    adapter: Path | None = None
    value_file: Path | None = None
    value_settings: dict = field(default_factory=dict)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model directory holds config.json, tokenizer.json and safetensors")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _keys(path: Path) -> list[str]:
    """Names in a safetensors file; reads the header only, which also finds a truncated file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors (truncated or not safetensors): {error}") from error


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise FileNotFoundError(f"model {name!r} is neither 'tiny', nor a directory, nor a hub id like 'openvla/openvla-7b'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise FileNotFoundError(
            f"model {name!r} is not a directory here, and reading it from the Hugging Face hub failed ({error}); "
            "check the name and the connection, or pass a directory"
        ) from error


def locate(name_or_path: str, adapter: str | None = None) -> Source:
    """Find and check every file of a model before anything slow."""
    name = str(name_or_path)
    if name == "tiny":
        source = Source(name, _read_json(TINY / "config.json"), TINY / "tokenizer.json")
    else:
        folder = _directory(name)
        if (folder / ADAPTER_CONFIG).is_file():
            if adapter is not None:
                raise ValueError(f"{folder} is an adapter directory already; a second adapter {adapter} cannot go on top")
            base = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
            base = str(folder / base) if base and (folder / base).is_dir() else base
            return locate(base, str(folder))
        source = _hub_layout(name, folder)
        if (folder / VALUE).is_file():
            source.value_file = folder / VALUE
    if adapter is not None:
        folder = Path(adapter)
        _read_json(folder / ADAPTER_CONFIG)
        _keys(folder / ADAPTER)
        source.adapter = folder
        if (folder / VALUE).is_file():
            source.value_file = folder / VALUE
        for file in ("dataset_statistics.json",):
            if (folder / file).is_file():
                source.config["norm_stats"] = _read_json(folder / file)
    if source.value_file:
        _keys(source.value_file)
        with safe_open(source.value_file, framework="pt") as file:
            source.value_settings = file.metadata() or {}
    return source


def _hub_layout(name: str, folder: Path) -> Source:
    config = _read_json(folder / "config.json")
    if not config.get("norm_stats"):
        if not (folder / "dataset_statistics.json").is_file():
            raise ValueError(
                f"{folder / 'config.json'} has no norm_stats and {folder / 'dataset_statistics.json'} is missing; "
                "without the action statistics tokens cannot become actions"
            )
        config["norm_stats"] = _read_json(folder / "dataset_statistics.json")
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing; copy it from the model this one was made from")
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)["weight_map"]
        weights = {key: folder / file for key, file in index.items()}
        for file in sorted(set(weights.values())):
            absent = [k for k in set(_keys(file)) ^ {k for k, f in weights.items() if f == file}]
            if absent:
                raise ValueError(f"{folder / INDEX} and {file} disagree about {sorted(absent)[:5]}")
    elif (folder / SINGLE).is_file():
        weights = {key: folder / SINGLE for key in _keys(folder / SINGLE)}
    else:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        note = f"; {pickles} are pickles, which are not read because they can run code: convert them" if pickles else ""
        raise FileNotFoundError(f"{folder} has neither {INDEX} nor {SINGLE}{note}")
    return Source(name, config, folder / "tokenizer.json", weights)


def is_dead(key: str, depths: dict[str, int]) -> bool:
    """Published tensors that no output reads: each tower's last block and final norm, and SigLIP's pooling."""
    match = re.fullmatch(r"vision_backbone\.(featurizer|fused_featurizer)\.(?:(norm|attn_pool)\.|blocks\.(\d+)\.).*", key)
    return bool(match) and (match[2] is not None or int(match[3]) == depths[match[1]] - 1)


def _depths(backbone) -> dict[str, int]:
    """Blocks of each tower in the checkpoint, the dead last one included."""
    return {n: len(t.blocks) + 1 for n, t in backbone.vision_backbone.named_children() if hasattr(t, "blocks")}


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: `module.to(dtype)` would round the rotary frequencies too (0.3 rad at position 280 in bfloat16)."""
    for p in module.parameters():
        p.data = p.data.to(dtype)


def load_backbone(backbone, source: Source, device, dtype) -> None:
    """Fill a backbone built on the meta device, one tensor at a time."""
    depths = _depths(backbone)
    wanted = {k: tuple(v.shape) for k, v in backbone.state_dict().items()}
    files = {re.sub(r"\.ls(\d)\.gamma$", r".ls\1.scale_factor", k): (k, f) for k, f in source.weights.items()}
    missing = sorted(wanted.keys() - files.keys())
    unknown = sorted(k for k in files.keys() - wanted.keys() if not is_dead(k, depths))
    if missing or unknown:
        raise ValueError(f"checkpoint {source.name}: missing keys {missing[:5]} ({len(missing)}), unknown keys {unknown[:5]} ({len(unknown)})")
    for path in sorted({f for _, f in files.values()}):
        with safe_open(path, framework="pt") as file:
            for key in wanted.keys() & files.keys():
                if files[key][1] != path:
                    continue
                tensor = file.get_tensor(files[key][0])
                if tuple(tensor.shape) != wanted[key]:
                    raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, the config asks for {wanted[key]}")
                owner, _, leaf = key.rpartition(".")
                parameter = torch.nn.Parameter(tensor.to(device, dtype))
                setattr(backbone.get_submodule(owner), leaf, parameter)
    llama = backbone.language_model.model
    llama.rotary_emb = LlamaRotaryEmbedding(config=llama.config).to(device)  # buffers are in no checkpoint, stay float32


def apply_lora(backbone, source: Source, rank: int, targets: str, merge: bool) -> None:
    """Read the source's adapter (and merge it if asked), or add a new one of `rank`; adapters are float32, the base frozen."""
    if source.adapter is not None:
        config = LoraConfig.from_pretrained(str(source.adapter))
        if rank not in (0, config.r) and not merge:
            raise ValueError(f"lora_rank = {rank}, but {source.adapter} has rank {config.r}; use {config.r} or 0, or merge it")
        _inject(backbone, config)
        _load_adapter(backbone, source.adapter / ADAPTER)
        if not merge:
            return
        for name, layer in [(n, m) for n, m in backbone.named_modules() if hasattr(m, "merge") and hasattr(m, "base_layer")]:
            layer.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, layer.base_layer)
        del backbone.peft_config
        backbone.requires_grad_(True)
    if rank > 0:
        if targets not in TARGETS:
            raise ValueError(f"lora_targets is {targets!r}; use one of {sorted(TARGETS)}")
        modules = TARGETS[targets]
        if targets == "llm":
            modules = rf"language_model\..*({'|'.join(modules)})"
        _inject(backbone, LoraConfig(r=rank, lora_alpha=min(rank, 16), target_modules=modules, init_lora_weights="gaussian"))


def _inject(backbone, config: LoraConfig) -> None:
    inject_adapter_in_model(config, backbone)
    for name, p in backbone.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.float()  # in bfloat16 an RL-sized update, and Adam's second moment, would round away


def _load_adapter(backbone, path: Path) -> None:
    wanted = {re.sub(r"\.default\.", ".", k): p for k, p in backbone.named_parameters() if "lora_" in k}
    seen = set()
    with safe_open(path, framework="pt") as file:
        for stored in file.keys():
            key = stored.removeprefix(PREFIX)
            if "lora_" not in key or is_dead(key, _depths(backbone)):
                continue  # PEFT also stores lm_head's base weights when lm_head is adapted
            if key not in wanted:
                raise ValueError(f"{path}: {stored} fits no adapted layer of this model")
            tensor = file.get_tensor(stored)
            if tensor.shape != wanted[key].shape:
                raise ValueError(f"{path}: {stored} has shape {tuple(tensor.shape)}, not {tuple(wanted[key].shape)}")
            wanted[key].data.copy_(tensor)
            seen.add(key)
    if seen != wanted.keys():
        raise ValueError(f"{path} lacks {sorted(wanted.keys() - seen)[:5]}")


def _value_state(model) -> dict:
    """The value's own tensors: the head, and what training can change in a separate critic."""
    lora = hasattr(model.backbone, "peft_config")
    return {k: v for k, v in model.state_dict().items()
            if k.startswith("value_head.") or k.startswith("critic.") and (not lora or "lora_" in k)}  # fmt: skip


def load_value(model, path: Path) -> None:
    """Copy value_head.safetensors into the model."""
    wanted = _value_state(model)
    with safe_open(path, framework="pt") as file:
        stored = {k: file.get_tensor(k) for k in file.keys()}
    for key in sorted(stored.keys() | wanted.keys()):
        shapes = [tuple(d[key].shape) if key in d else "absent" for d in (stored, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path}: {key} is {shapes[0]} there and {shapes[1]} in this model (value_input, separate_critic?)")
        wanted[key].copy_(stored[key])


def save_vla(model, directory: str | Path, shard_bytes: int = 5 << 30) -> None:
    """Write a directory that `load_vla` reads, whole or not at all: temporary name, then rename over an older one."""
    final = Path(directory)
    folder = final.with_name(f"{final.name}.tmp{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    backbone = model.backbone
    if hasattr(backbone, "peft_config"):
        base = model.source.name
        if not model.source.weights:  # the tiny model's random base has no file yet
            base = "base"
            state = {k.replace(".base_layer.", "."): v for k, v in backbone.state_dict().items() if "lora_" not in k}
            _save_hub(folder / base, state, model, shard_bytes)
        adapter = {PREFIX + k: v.contiguous() for k, v in
                   get_peft_model_state_dict(backbone, save_embedding_layers=False).items()}  # fmt: skip
        save_file(adapter, folder / ADAPTER, {"format": "pt"})
        config = backbone.peft_config["default"]
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(folder))
        (folder / "dataset_statistics.json").write_text(json.dumps(model.norm_stats, indent=1))
        (folder / "tokenizer.json").write_text(model.tokenizer.to_str())
    else:
        _save_hub(folder, backbone.state_dict(), model, shard_bytes)
    if model.value_head is not None:
        settings = {"value_input": model.value_input, "separate_critic": str(model.critic is not None)}
        save_file({k: v.contiguous() for k, v in _value_state(model).items()}, folder / VALUE, settings)
    old = final.with_name(f"{final.name}.old{os.getpid()}")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _save_hub(folder: Path, state: dict, model, shard_bytes: int) -> None:
    """config.json, tokenizer.json and the weights, in shards of at most `shard_bytes`."""
    folder.mkdir(exist_ok=True)
    shards, size = [{}], 0
    for key, tensor in state.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous()
        size += bytes_
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    if len(shards) > 1:
        index = {k: n for n, s in zip(names, shards, strict=True) for k in s}
        total = sum(t.numel() * t.element_size() for t in state.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))
    (folder / "config.json").write_text(json.dumps(model.config | {"norm_stats": model.norm_stats}, indent=1))
    (folder / "tokenizer.json").write_text(model.tokenizer.to_str())
