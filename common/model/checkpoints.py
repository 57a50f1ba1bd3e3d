"""Weights on disk: the published sharded layout, PEFT adapter directories, the value head beside either.

Full model: config.json (norm_stats inside), tokenizer.json, and model.safetensors or shards with their index.
LoRA: adapter_config.json, adapter_model.safetensors, tokenizer.json, dataset_statistics.json; and base/, where the base
exists nowhere else (tiny). Both: value_head.safetensors. Only safetensors is read: a pickle can run code.
"""

import functools
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

TINY = Path(__file__).parents[2] / "tiny"
INDEX, SINGLE, VALUE = "model.safetensors.index.json", "model.safetensors", "value_head.safetensors"
ADAPTER_CONFIG, ADAPTER, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."  # PEFT's
LLM_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"
LORA_TARGETS = {
    "all": f"proj qkv fc1 fc2 fc3 convs.0 convs.1 convs.2 {LLM_TARGETS}".split(),  # the paper's; convs: tiny
    "llm": rf"language_model\..*({LLM_TARGETS.replace(' ', '|')})",
}


@dataclass
class Source:
    """Where a model's parts are; made by `locate`, which checks them."""

    name: str  # what an adapter saved later names as its base
    config: dict
    tokenizer: Path
    weights: dict[str, Path] = field(default_factory=dict)  # key -> file; empty: random weights
    private: bool = False  # the base exists nowhere else, so that a saved adapter must bring it along
    adapter: Path | None = None
    value_file: Path | None = None
    value_settings: dict = field(default_factory=dict)


# --- find and check ---
def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def open_safetensors(path: Path):
    """Opening compares the header with the file's length: a truncated file is found before anything is read."""
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*.*") if p.suffix in (".bin", ".pt", ".pth"))
        note = f"; {pickles} are pickles, which can run code and are not read: convert them" if pickles else ""
        raise FileNotFoundError(f"{path} is missing{note}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not safetensors: {error}") from error


def keys_of(path: Path) -> list[str]:
    with open_safetensors(path) as file:
        return list(file.keys())


def locate(name: str, adapter: str | Path | None = None) -> Source:
    """Find every file of a model, reading no weights. ValueError, FileNotFoundError: which file, which rule."""
    if name == "tiny":
        source = Source(name, read_json(TINY / "config.json"), TINY / "tokenizer.json", private=True)
    else:
        folder = Path(name).expanduser()
        name, folder = (str(folder.resolve()), folder) if folder.is_dir() else (name, download(name))
        if (folder / ADAPTER_CONFIG).is_file():
            if adapter is not None:
                raise ValueError(f"{folder} is itself an adapter directory; {adapter} cannot go on top of it")
            return locate_adapter(folder)
        source = locate_full(name, folder)
    if adapter is not None:
        source.adapter = Path(adapter)
        base = read_json(source.adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or name
        if Path(base).name not in (Path(name).name, "base"):
            warnings.warn(f"{adapter} was trained on {base}, not on {name}: right only for equal weights", stacklevel=2)
        keys_of(source.adapter / ADAPTER)
        if (source.adapter / "dataset_statistics.json").is_file():
            source.config["norm_stats"] = read_json(source.adapter / "dataset_statistics.json")
        if (source.adapter / VALUE).is_file():
            source.value_file = source.adapter / VALUE
    if source.value_file is not None:
        with open_safetensors(source.value_file) as file:
            source.value_settings = file.metadata() or {}
    return source


def locate_adapter(folder: Path) -> Source:
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "(none)"
    private = (folder / base).is_dir() and not Path(base).is_absolute()
    try:
        source = locate(str(folder / base) if private else base, folder)
    except FileNotFoundError as error:
        fix = "pass the base model's directory, and this directory as its adapter"
        raise FileNotFoundError(f"{folder / ADAPTER_CONFIG} names the base {base!r}: {error}; {fix}") from error
    source.private = source.private or private
    return source


def locate_full(name: str, folder: Path) -> Source:
    config = read_json(folder / "config.json")
    if not config.get("norm_stats"):
        if not (folder / "dataset_statistics.json").is_file():
            raise ValueError(f"{folder}/config.json has no norm_stats and there is no dataset_statistics.json with it")
        config["norm_stats"] = read_json(folder / "dataset_statistics.json")
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing; copy it from openvla/openvla-7b")
    if (folder / INDEX).is_file():
        weights = {key: folder / file for key, file in read_json(folder / INDEX)["weight_map"].items()}
        for file in sorted(set(weights.values())):
            differ = sorted(set(keys_of(file)) ^ {k for k, f in weights.items() if f == file})
            if differ:
                raise ValueError(f"{folder / INDEX} and {file.name} disagree about {differ[:3]} ({len(differ)} keys)")
    else:
        weights = dict.fromkeys(keys_of(folder / SINGLE), folder / SINGLE)
    value_file = folder / VALUE if (folder / VALUE).is_file() else None
    return Source(name, config, folder / "tokenizer.json", weights, value_file=value_file)


def check_hub_id(name: str) -> None:
    """FileNotFoundError for a directory that does not exist: it must neither be downloaded nor planned as OpenVLA."""
    here = Path(name).parent.is_dir() or name.split("/")[0] in ("runs", "checkpoints", "results")
    if here or not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        fix = "checkpoints/ is in the repository's root; random weights: tiny"
        fix += f"; a hub id only where there is no folder {Path(name).parent}/" if here else ""
        raise FileNotFoundError(
            f"model {name!r} is neither a directory in {Path.cwd()} nor like the hub id openvla/openvla-7b; {fix}"
        )


def download(name: str) -> Path:
    check_hub_id(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        reason = f"the Hugging Face hub did not give it ({type(error).__name__}: {error})"
        raise FileNotFoundError(f"{name!r} is no directory here, and {reason}; pass a directory instead") from error


# --- read ---
def fill(module, wanted: dict, files: dict[str, Path], dtype, device, rename=str, dead=lambda key: False) -> None:
    """Put the tensors of files {stored key: file} in the place of `wanted` {name: parameter} of a module, one by one.

    rename(stored key) -> parameter name; dead(parameter name): in the file, but no output reads it.
    ValueError names a missing, unknown or misshapen key and its file.
    """
    stored = {rename(key): (key, path) for key, path in files.items()}
    missing = sorted(wanted.keys() - stored.keys())
    unknown = sorted(k for k in stored.keys() - wanted.keys() if not dead(k))
    if missing or unknown:
        where = ", ".join(sorted({str(p) for p in files.values()}))
        raise ValueError(f"{where}: {len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}")
    for path in sorted(set(files.values())):
        with open_safetensors(path) as file:
            for name in (n for n in wanted if stored[n][1] == path):
                tensor = file.get_tensor(stored[name][0])
                if tensor.shape != wanted[name].shape:
                    shapes = f"shape {tuple(tensor.shape)}, the model's is {tuple(wanted[name].shape)}"
                    raise ValueError(f"{path}: {stored[name][0]} has {shapes}")
                owner, _, leaf = name.rpartition(".")
                # A copy: the file's memory map is unaligned, where kernels may round differently
                copy = tensor.to(device, dtype, copy=True)
                parameter = torch.nn.Parameter(copy, wanted[name].requires_grad)
                setattr(module.get_submodule(owner), leaf, parameter)


def is_dead(backbone, key: str) -> bool:
    """Published tensors that no output reads: each tower's last block and final norm, and SigLIP's pooling."""
    match = re.match(r"vision_backbone\.(\w+)\.(?:norm|attn_pool|blocks\.(\d+))\.", key)
    return match is not None and (
        match[2] is None or int(match[2]) == len(backbone.get_submodule(key[: match.end(1)]).blocks)
    )


def fill_backbone(backbone, source: Source, device, dtype) -> None:
    """Weights from the source's files into a backbone built on the meta device; or cast the random ones."""
    if source.weights:
        rename = functools.partial(re.sub, r"\.ls(\d)\.gamma$", r".ls\1.scale_factor")
        dead = functools.partial(is_dead, backbone)
        fill(backbone, dict(backbone.named_parameters()), source.weights, dtype, device, rename, dead)
        restore_rotary(backbone, device)
    else:
        cast_parameters(backbone.to(device), dtype)


def restore_rotary(backbone, device) -> None:
    """Rotary frequencies are buffers that no checkpoint holds: after a start on the meta device they must be made."""
    llama = backbone.language_model.model
    llama.rotary_emb = LlamaRotaryEmbedding(config=llama.config).to(device)


def cast_parameters(module, dtype) -> None:
    """`module.to(dtype)` would round the rotary frequencies too: 0.3 rad of phase at position 280 in bfloat16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def check_lora(source: Source, rank: int, targets: str, merge: bool) -> None:
    """ValueError before any weight is read."""
    if targets not in LORA_TARGETS:
        raise ValueError(f"lora_targets is {targets!r}; use one of {sorted(LORA_TARGETS)}")
    if source.adapter is not None and not merge:
        saved = read_json(source.adapter / ADAPTER_CONFIG)["r"]
        if rank not in (0, saved):
            raise ValueError(f"lora_rank = {rank}, but {source.adapter} has rank {saved}: use {saved}, or merge it")


def apply_lora(backbone, source: Source, rank: int, targets: str, merge: bool) -> None:
    """The source's adapter (merge: added to the base weights), or a new one of `rank` with PEFT's gaussian start."""
    if source.adapter is not None:
        inject(backbone, LoraConfig.from_pretrained(str(source.adapter)))
        # PEFT also stores the base weights of an adapted lm_head, and RL4VLA's adapters cover dead layers too
        path, rename = source.adapter / ADAPTER, functools.partial(re.sub, r"\.(lora_[AB])\.", r".\1.default.")
        files = {k: path for k in keys_of(path) if "lora_" in k and not is_dead(backbone, k.removeprefix(PREFIX))}
        adapters = {n: p for n, p in backbone.named_parameters() if "lora_" in n}
        fill(backbone, adapters, files, torch.float32, backbone.projector.fc1.weight.device,
             lambda key: rename(key.removeprefix(PREFIX)))  # fmt: skip
        if merge:
            for name, layer in [(n, m) for n, m in backbone.named_modules() if hasattr(m, "base_layer")]:
                layer.merge()
                owner, _, leaf = name.rpartition(".")
                setattr(backbone.get_submodule(owner), leaf, layer.base_layer)
            del backbone.peft_config
            backbone.requires_grad_(True)
            source.private = True  # these weights are in no file: an adapter on top of them is saved with them
    if rank > 0 and (merge or source.adapter is None):
        inject(backbone, LoraConfig(r=rank, lora_alpha=min(rank, 16), target_modules=LORA_TARGETS[targets],
                                    init_lora_weights="gaussian"))  # fmt: skip


def inject(backbone, config: LoraConfig) -> None:
    """Adapters in float32 (RL-sized updates round away in bfloat16), everything else frozen."""
    inject_adapter_in_model(config, backbone)
    for layer in backbone.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # PEFT would compute in float32; `VLA.autocast` decides
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def value_parameters(model) -> dict:
    """The value's own: its head, and what training can change in a separate critic."""
    lora = hasattr(model.backbone, "peft_config")
    named = model.named_parameters()
    return {
        n: p for n, p in named if n.startswith("value_head.") or n.startswith("critic.") and ("lora_" in n or not lora)
    }


def fill_value(model) -> None:
    path = model.source.value_file
    fill(model, value_parameters(model), dict.fromkeys(keys_of(path), path), torch.float32, model.device)


# --- write ---
def save_vla(model, directory: str | Path, max_shard_size: str = "5GB") -> None:
    """Write what `load_vla(directory)` restores, whole or not at all: temporary name, then rename."""
    final, backbone = Path(directory), model.backbone
    folder, old = (final.with_name(f".{final.name}.{what}{os.getpid()}") for what in ("new", "old"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if hasattr(backbone, "peft_config"):
        config = backbone.peft_config["default"]
        config.base_model_name_or_path = "base" if model.source.private else model.source.name
        if model.source.private:
            plain = {k.replace(".base_layer.", "."): v for k, v in backbone.state_dict().items() if "lora_" not in k}
            save_full(model, plain, folder / "base", max_shard_size)
        config.save_pretrained(str(folder))
        adapter = get_peft_model_state_dict(backbone, save_embedding_layers=False)
        save_file({PREFIX + k: v.contiguous() for k, v in adapter.items()}, folder / ADAPTER, {"format": "pt"})
        (folder / "dataset_statistics.json").write_text(json.dumps(model.norm_stats, indent=1))
        (folder / "tokenizer.json").write_text(model.tokenizer.to_str())
    else:
        save_full(model, backbone.state_dict(), folder, max_shard_size)
    if model.value_head is not None:
        settings = {"value_input": model.value_input, "separate_critic": str(model.critic is not None)}
        save_file({n: p.detach().contiguous() for n, p in value_parameters(model).items()}, folder / VALUE, settings)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def save_full(model, state: dict, folder: Path, max_shard_size: str) -> None:
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(model.config | {"norm_stats": model.norm_stats}, indent=1))
    (folder / "tokenizer.json").write_text(model.tokenizer.to_str())
