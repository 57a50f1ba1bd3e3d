"""Print what a run will be, loading nothing: `python scripts/plan.py ppo_vla --preset paper`."""

import importlib
import sys

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model

from common.model.checkpoints import LORA_TARGETS, locate
from common.model.openvla import OpenVLA, OpenVLAConfig
from common.run.args import flat, parse_args
from common.run.files import check
from common.simulation.env import SCENES

SCRIPTS = ("ppo_vla", "grpo_vla", "dpo_vla", "sft_vla")
LLAMA = {"model_type": "llama", "vocab_size": 32064}
OPENVLA_7B = dict(text_config=LLAMA, image_sizes=[224], n_action_bins=256, pad_to_multiple_of=64)


def build(start, lora_rank, freeze_vision):
    """The model on the meta device, where weights have shapes and need no memory."""
    constants.HF_HUB_OFFLINE = True
    try:
        source = locate(start)
        config = source.config
        if source.adapter and not lora_rank:
            lora_rank = LoraConfig.from_pretrained(source.adapter).r
    except FileNotFoundError as error:  # a hub id that is not on this machine
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        config = OPENVLA_7B
    with torch.device("meta"):
        model = base = OpenVLA(OpenVLAConfig(**config))
        if lora_rank:
            model = get_peft_model(base, LoraConfig(r=lora_rank, target_modules=LORA_TARGETS))
    if freeze_vision:
        base.vision_backbone.requires_grad_(False)
        base.projector.requires_grad_(False)
    return model


def plan(script, argv):
    """dict of a run's flags that are not the default, steps, weights, memory of one rank."""
    script = script.removesuffix(".py")
    check(script in SCRIPTS, f"script = {script!r} must be one of {', '.join(SCRIPTS)}")
    module = importlib.import_module(script)
    s, usual = flat(parse_args(module.Args, module.PRESETS, argv)), flat(module.Args())
    plan = {f"{key} (default {usual[key]})": s[key] for key in usual if s[key] != usual[key]}
    samples = s["num_envs"] * s.get("num_steps", 0)
    minibatch = s.get("batch_size") or samples // s.get("num_minibatches", 1)
    if "pairs_per_batch" in s:  # the most updates: every trajectory is in a pair
        minibatch = 2 * s["pairs_per_batch"] * SCENES[s["scene"]]["max_episode_steps"]
    updates = s.get("num_updates") or s["update_epochs"] * max(1, samples // minibatch)
    plan["environment steps"] = f"{s['num_iterations'] * samples:,}, {samples:,} per iteration"
    plan["optimizer steps"] = f"{s['num_iterations'] * updates:,}, each of {minibatch} samples"

    model = build(s["model"], s["lora_rank"], s["freeze_vision"])
    eyes, text = model.vision_backbone, model.config.text_config
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 4 if s["dtype"] == "float32" else 2
    matrices = (m.weight for m in model.modules() if isinstance(m, torch.nn.Linear))
    small = sum(w.numel() for w in matrices if not w.requires_grad) * (s["dtype"] == "nf4")
    layers = text.num_hidden_layers * text.hidden_size
    norms = sum(part.weight.numel() for name, part in eyes.named_modules() if "norm1" in name)
    patches = max(p.shape[1] for name, p in eyes.named_parameters() if "pos_embed" in name)
    # Korthikanti et al. 2022, eq. 2: 17 numbers per token, channel and layer; 40 tokens of text
    saved = layers * (patches + 40) + (0 if s["freeze_vision"] else norms * patches)
    saved *= (1 if s["activation_checkpointing"] else 17) * min(s["micro_batch_size"], minibatch)
    plan["million weights"] = f"{total / 1e6:,.1f}, trains {trained / 1e6:,.1f}"
    four_bits = 4.5 / 8 * small  # with one float32 scale per 64 weights
    plan["GB of weights"] = ((total - trained - small) * width + 4 * trained + four_bits) / 1e9
    plan["GB of gradients and Adam"] = 12 * trained / 1e9
    plan["GB of activations in an update"] = saved * width / 1e9
    plan["GB of cache in acting"] = 2 * s["num_envs"] * layers * (patches + 47) * width / 1e9
    return plan


if __name__ == "__main__":
    for name, value in plan("".join(sys.argv[1:2]), sys.argv[2:]).items():
        print(f"{name:<45} {value:.4g}" if isinstance(value, float) else f"{name:<45} {value}")
