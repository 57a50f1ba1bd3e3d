"""Models on disk: `load_vla` and `save_vla`, around transformers' and PEFT's own functions.
A model directory holds config.json, tokenizer.json and safetensors; a LoRA directory PEFT's files,
the action statistics, and base/ unless its base is on the hub."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from common.run.files import check, check_types, naming, read_json

TINY = Path(__file__).parents[2] / "tiny"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATISTICS = "dataset_statistics.json"
EMPTY = 29871  # Llama's token of one space, which ends OpenVLA's prompt
EYES = r"(vision_backbone|projector)\..*"
LORA_TARGETS = """proj qkv fc1 fc2 fc3 convs.0 convs.1 convs.2 q_proj k_proj v_proj o_proj
    gate_proj up_proj down_proj lm_head""".split()  # the paper's; convs: the small model's


class Source(NamedTuple):  # where the parts of a model are
    name: str  # hub id or directory of the base; "": these weights are stored nowhere else
    config: dict
    norm_stats: dict
    folder: Path  # of config.json, tokenizer.json and the weights
    adapter: Path | None = None


# --- find and check ---
def locate(start, named_by=""):
    """Find and check the files of "tiny", a model or LoRA directory, or a hub id: no weights."""
    folder = TINY if start == "tiny" else Path(start).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else str(start)
    if not folder.is_dir():
        # A misspelt directory must not become a download.
        local = folder.parent.is_dir() or name.split("/")[0] in ("runs", "checkpoints", "results")
        if local or not re.fullmatch(r"[\w-]+/[\w.-]+", name):
            where = f"neither a directory in {Path.cwd()} nor like the hub id openvla/openvla-7b"
            raise FileNotFoundError(f"{named_by}model {name!r} is {where}; random weights: tiny")
        patterns = ["*.safetensors", "*.json"]
        with naming(Path(name), "is the hub id right, and the hub within reach?"):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    weights = {path.name: keys_of(path) for path in sorted(folder.glob("*.safetensors"))}
    files = [path for path in (folder / STATISTICS, folder / "config.json") if path.is_file()]
    norm_stats = read_statistics(files[0]) if files else None
    if (folder / ADAPTER_CONFIG).is_file():
        right = ADAPTER in weights and not any(name.startswith("model") for name in weights)
        check(right, f"{folder} has {list(weights)}; beside an adapter must be {ADAPTER}, no model")
        like = {"base_model_name_or_path": str}
        base = read_json(folder / ADAPTER_CONFIG, like=like)["base_model_name_or_path"] or "(none)"
        named_by = f"{folder / ADAPTER_CONFIG} must name its base in base_model_name_or_path: "
        source = locate(folder / base if base == "base" else base, named_by)
        check(source.adapter is None, f"{folder} is an adapter on an adapter; merge {base} first")
        return source._replace(norm_stats=norm_stats or source.norm_stats, adapter=folder)
    config = read_json(folder / "config.json", like={"text_config": dict})
    check(norm_stats, f"{folder / 'config.json'} has no norm_stats; add it, or {STATISTICS}")
    read_json(folder / "tokenizer.json")
    name = "" if start == "tiny" else name
    check(weights or not name, f"{folder} has no safetensors; pickles can run code, none is read")
    return Source(name, config, norm_stats, folder)


def read_statistics(path):
    """Data set -> statistics of actions, of one of the two files that have them. OpenVLA's
    fine-tuning leaves its base's in config.json and writes the other file, which wins."""
    content = read_json(path)
    norm_stats = content if path.name == STATISTICS else content.get("norm_stats") or {}
    with naming(path, "copy the model again"):
        check_types(norm_stats, {str: {"action": {"q01": [float], "q99": [float]}}}, "norm_stats")
    return norm_stats


def keys_of(path):
    """Keys of a safetensors file. Opening it compares its header with its length."""
    with naming(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


def choose_key(norm_stats, unnorm_key, assets="", start="the model"):
    """unnorm_key, or the only key of norm_stats when it is empty; of data with these assets."""
    known = sorted(norm_stats)
    key = known[0] if not unnorm_key and len(known) == 1 else unnorm_key
    check(key in known, f"unnorm_key = {unnorm_key!r} is not of {start}; use one of {known}")
    numbers = norm_stats[key]["action"]["q01"] + norm_stats[key]["action"]["q99"]
    right = len(numbers) == 14 and all(map(math.isfinite, numbers))
    check(right, f"{start}: q01, q99 of {key} are {numbers}, not 7 finite numbers; copy it again")
    seen = norm_stats[key].get("assets", assets)
    check(assets in ("", seen), f"the model knows assets {seen!r}, not {assets!r}; change --model")
    return key


# --- load ---
def load_vla(
    start, *, unnorm_key="", dtype="float32", lora_rank=0, freeze_vision=False,
    activation_checkpointing=False, merge_adapter=False, trainable=True, seed=0, device="cpu",
):  # fmt: skip
    """Read or make a model: an OpenVLA or, with LoRA, a PeftModel around it; in eval mode.
    start: as in `locate`; "tiny" has random weights. dtype: of matmuls and frozen weights; trained
    ones are float32; "nf4" is bfloat16 with frozen matrices in 4 bits (QLoRA, Dettmers et al. 2023,
    by bitsandbytes). lora_rank: 0 trains the adapter that is there, or else all weights.
    merge_adapter: add that adapter to the weights. seed: of new weights. Raises ValueError,
    FileNotFoundError: a file, key or shape that is not right."""
    from peft import LoraConfig, get_peft_model

    source = locate(start)
    check(source.adapter or not merge_adapter, f"merge_adapter = True, but {start} has no adapter")
    if source.adapter is not None and not merge_adapter:
        rank = read_json(source.adapter / ADAPTER_CONFIG).get("r")
        check(lora_rank in (0, rank), f"lora_rank = {lora_rank}; {start} has {rank}: use it or 0")
    full = trainable and not lora_rank and (merge_adapter or source.adapter is None)
    stay = source.folder != TINY and not (full or merge_adapter)
    check(dtype != "nf4" or stay, f"dtype = nf4: weights of {start} are not frozen; use LoRA")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, base = read_model(source, "float32" if full else dtype, device)
        if merge_adapter:
            model = base = model.merge_and_unload()
            base.name_or_path = ""
        if model is base:
            base.requires_grad_(full)
        if model is base and lora_rank:
            config = LoraConfig(
                r=lora_rank, lora_alpha=min(lora_rank, 16), target_modules=LORA_TARGETS,
                exclude_modules=EYES if freeze_vision else None, init_lora_weights="gaussian",
            )  # fmt: skip
            model = get_peft_model(base, config)
    base.compute_dtype = torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)
    if unnorm_key or len(source.norm_stats) == 1:
        base.unnorm_key = choose_key(source.norm_stats, unnorm_key)
    base.activation_checkpointing = activation_checkpointing
    for parameter in model.parameters():
        # A copy: kernels may round differently in a file's memory map, which is not aligned.
        # model.to(dtype) would round the rotary frequencies too.
        wanted = torch.float32 if parameter.requires_grad else base.compute_dtype
        if parameter.is_floating_point():  # not 4 bits
            parameter.data = parameter.data.to(wanted, copy=True)
    if freeze_vision:
        base.vision_backbone.requires_grad_(False)
        base.projector.requires_grad_(False)
        base.keeps_image_tokens = bool(base.config.stem)
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


def read_model(source, dtype, device):
    """The model, in a PeftModel where there is an adapter, and itself; new weights are float32."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import BitsAndBytesConfig

    from common.model.openvla import OpenVLA, OpenVLAConfig

    with naming(source.folder / "config.json", kinds=Exception):
        config = OpenVLAConfig(**{**source.config, "norm_stats": source.norm_stats})
    if source.folder == TINY:
        model = OpenVLA(config).to(device)
    else:
        bf16 = "bfloat16"
        four_bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=bf16)
        four_bits = BitsAndBytesConfig(**four_bits, llm_int8_skip_modules=["lm_head"])
        model, info = OpenVLA.from_pretrained(
            source.folder, config=config, dtype=bf16 if dtype == "nf4" else dtype,
            quantization_config=four_bits if dtype == "nf4" else None, use_safetensors=True,
            device_map=torch.device(device), ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        for module in model.modules():  # else acting on a CPU repacks what an update then misreads
            module.support_avx512bf16_for_cpu = False
        wrong = {kind: sorted(keys)[:3] for kind, keys in info.items() if keys}
        check(not wrong, f"{source.folder}/model*.safetensors: {wrong}")
    model.name_or_path = source.name
    path = source.folder / "tokenizer.json"
    with naming(path):
        model.tokenizer = Tokenizer.from_buffer(path.read_bytes())
    right = config.stem or model.tokenize([""])[0][0, -1] == EMPTY
    check(right, f"{path}: prompts must end in {EMPTY}; copy OpenVLA's")
    if source.adapter is None:
        return model, model
    base, path = model, source.adapter / ADAPTER
    with naming(path, "it does not fit its base", Exception):
        model = PeftModel.from_pretrained(base, source.adapter, is_trainable=True)
    # PEFT stores the weights of an adapted lm_head too, and RL4VLA's adapters cover unread layers.
    unread = "|".join([r"\.base_layer\.", *base.vision_backbone.unread])
    differ = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ keys_of(path)
    differ = sorted(key for key in differ if not re.search(unread, key))
    check(not differ, f"{path}: keys that are missing or unknown: {differ[:3]}")
    head = base.language_model.lm_head  # `OpenVLA.bin_logits` multiplies by a slice of its LoRA
    other = getattr(head, "lora_variant", {}) or any(getattr(head, "lora_bias", {}).values())
    check(not other, f"{path}: lm_head's LoRA is of another kind; merge it with PEFT")
    return model, base


# --- save ---
def save_vla(model, directory, add=None):
    """Write what `load_vla(directory)` restores, whole or not at all.
    add: function(folder) that writes more files into it, before it appears."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per checkpoint would break the status line
    final = Path(directory)
    folder, old = (final.with_name(f".{final.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(folder, ignore_errors=True)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, target = ("", folder) if base is model else (base.name_or_path, folder / "base")
    on_hub = name and not os.path.isabs(name)
    if not on_hub and not os.path.isdir(name):  # stored nowhere, or not any more
        weights = base.state_dict().items()
        weights = {k.replace(".base_layer", ""): w for k, w in weights if "lora_" not in k}
        base.save_pretrained(target, state_dict=weights)
        base.tokenizer.save(str(target / "tokenizer.json"))
    if base is not model:
        model.peft_config["default"].base_model_name_or_path = name if on_hub else "base"
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / STATISTICS).write_text(json.dumps(base.config.norm_stats), encoding="utf-8")
    if add:
        add(folder)
    for path in filter(Path.is_file, folder.rglob("*")):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors: the owner's alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if base is not model and not on_hub:
        if os.path.isdir(name):
            link_files(Path(name), target)
        base.name_or_path = str(final.absolute() / "base")  # the next save finds it there
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def link_files(start, target):  # which may outlive the start
    target.mkdir()
    for path in (*start.glob("*.safetensors"), *start.glob("*.json")):
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another disk, or another user's file
            shutil.copy(path, target)


def trainable_parameters(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
