"""OpenVLA at every size: images and instructions in, seven action tokens and a value out.

    image  -> DINOv2 + SigLIP (tiny: a convolutional stem) -> projector --+
    prompt -> token embedding -------------------------------------- [BOS | patches | PAD.. text | a0..a5]
                                                                          |
                                                       LlamaForCausalLM, causal everywhere
                                                                          |
    hidden state h0 at the last prompt token predicts a0, h1 at a0 predicts a1, ..., h6 at a5 predicts a6
    h0..h6 -> 256 columns of lm_head -> action tokens;     h0 -> float32 MLP -> value

`act` samples (one prefill, six cached decode steps); `evaluate` scores given tokens in one differentiable forward. Both
use softmax(logits / temperature) over the 256 action bins, in float32. Kim et al. 2024 (OpenVLA), Liu et al. 2025 (value
read from h0). Module names are the published checkpoint's keys. docs/model.md: what differs from the official code, why.
"""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from common import checkpoints
from common.checkpoints import save_vla

__all__ = ["VLA", "Backbone", "load_vla", "save_vla"]

PROMPT = "In: What action should the robot take to {}?\nOut: "  # the final space is a token of its own
ACTION_DIM = 7
TOWERS = {
    "featurizer": dict(width=1024, depth=24, heads=16, mlp_ratio=4.0, registers=4, layer_scale=True,
                       mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),  # DINOv2 ViT-L/14
    "fused_featurizer": dict(width=1152, depth=27, heads=16, mlp_ratio=3.7362, registers=None, layer_scale=False,
                             mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),  # SigLIP SO400M/14
}  # fmt: skip


# --- vision ---
class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.scale_factor


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, S, head dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact (erf) GELU between them: the towers', and the projector's with a last GELU."""

    def __init__(self, *widths: int):
        super().__init__()
        for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            setattr(self, f"fc{i}", nn.Linear(d_in, d_out))

    def forward(self, x):
        first, *rest = self.children()
        x = first(x)
        for layer in rest:
            x = layer(F.gelu(x))
        return x


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim, dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Tower(nn.Module):
    """A ViT up to the input of its last block, which is what OpenVLA reads: no final norm, prefix tokens dropped."""

    def __init__(self, image_size, width, depth, heads, mlp_ratio, registers, layer_scale, mean, std):
        super().__init__()
        self.mean, self.std = mean, std
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, stride=14)})
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // 14) ** 2, width) * 0.02)  # patches only
        self.prefix = 0
        if registers is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
            self.prefix = 1 + registers
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * mlp_ratio), layer_scale) for _ in range(depth - 1)
        )

    def forward(self, images, checkpointing: bool):
        mean, std = (torch.tensor(c, dtype=images.dtype, device=images.device).view(3, 1, 1) for c in (self.mean, self.std))
        x = self.patch_embed["proj"]((images / 255 - mean) / std).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x[:, self.prefix :]


class TwinTowers(nn.Module):
    """(N, 3, 224, 224) pixels 0..255 -> (N, 256, 2176): DINOv2 first, then SigLIP."""

    def __init__(self, config: dict):
        super().__init__()
        self.size = config["image_sizes"][0]
        shapes = {k: TOWERS[k] | config.get("tower_overrides", {}).get(k, {}) for k in TOWERS}
        self.width = sum(s["width"] for s in shapes.values())
        self.inner = 4 * self.width
        for name, shape in shapes.items():
            setattr(self, name, Tower(self.size, **shape))

    def forward(self, images, checkpointing=False):
        return torch.cat([tower(images, checkpointing) for tower in self.children()], dim=-1)

    def fit(self, images, dtype):
        """RL4VLA's preprocessing: plain bicubic resize in float32, overshoot kept, then the model's dtype."""
        if images.shape[1:] == (3, self.size, self.size) and images.is_floating_point():
            return images
        images = images.permute(0, 3, 1, 2).float()
        size = (self.size, self.size)
        return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).to(dtype)


class ConvStem(nn.Module):
    """Tiny's eyes: (N, H, W, 3) uint8 crop -> one token per cell of 2**convolutions pixels."""

    def __init__(self, config: dict):
        super().__init__()
        self.camera, self.crop = config["camera_size"], config["crop"]
        left, top, right, bottom = self.crop
        self.size = (bottom - top, right - left)
        channels = config["stem_channels"]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip([3, *channels], channels, strict=False)
        )
        cells = (self.size[0] >> len(channels)) * (self.size[1] >> len(channels))
        self.width = self.inner = channels[-1]
        self.pos_embed = nn.Parameter(torch.randn(1, cells, self.width) * 0.02)

    def forward(self, images, checkpointing=False):
        x = images.permute(0, 3, 1, 2).to(self.pos_embed.dtype) / 127.5 - 1  # channels last in memory
        for conv in self.convs:
            x = F.gelu(conv(x))
        return x.flatten(2).transpose(1, 2) + self.pos_embed

    def fit(self, images, dtype):
        """Resize to the camera size unless it is that size already, then crop; stays uint8."""
        if images.shape[1:] == (*self.size, 3):
            return images
        width, height = self.camera
        if images.shape[1:3] != (height, width):
            pixels = images.permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
            images = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        left, top, right, bottom = self.crop
        return images[:, top:bottom, left:right].contiguous()


# --- backbone ---
class Backbone(nn.Module):
    """Vision, projector and language model; `state_dict` has the published checkpoint's names and shapes."""

    def __init__(self, config: dict):
        super().__init__()
        text = dict(bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-6, vocab_size=32064, pad_token_id=32000,
                    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}) | config["text_config"]  # fmt: skip
        text = LlamaConfig(**text, attn_implementation=config.get("attn_implementation", "sdpa"))
        self.vision_backbone = (ConvStem if "stem_channels" in config else TwinTowers)(config)
        vision = self.vision_backbone
        self.projector = MLP(vision.width, vision.inner, text.hidden_size, text.hidden_size)
        self.language_model = LlamaForCausalLM(text)
        base = text.vocab_size - config["pad_to_multiple_of"]  # action ids: base - 256 .. base - 1, higher = lower action
        self.bins = slice(base - config["n_action_bins"], base)
        self.activation_checkpointing = False

    def embed(self, images, input_ids, mask):
        """-> embeddings (N, S, D) and mask (N, S) of [BOS | patches | rest of input_ids]."""
        patches = self.projector(self.vision_backbone(images, self.activation_checkpointing and torch.is_grad_enabled()))
        text = self.language_model.model.embed_tokens(input_ids)
        x = torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)
        return x, torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], dim=1)

    def hidden(self, x, mask, cache=None, last=1):
        """Normed final hidden states (N, last, D) of the last positions.

        x (N, Q, D): embeddings of the newest Q positions; mask (N, S): True where a real token stands, over all S
        positions so far, S - Q of them in `cache`. Padding is masked and takes no position number, so it changes nothing.
        """
        llama = self.language_model.model
        queries, keys = x.shape[1], mask.shape[1]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        bias = torch.zeros(len(x), 1, queries, keys, dtype=x.dtype, device=x.device)
        bias.masked_fill_(~(mask[:, None, None] & causal), torch.finfo(x.dtype).min)
        positions = (mask.cumsum(1) - 1)[:, -queries:]
        rotary = llama.rotary_emb(x, positions)
        for layer in llama.layers:
            args = dict(attention_mask=bias, past_key_values=cache, position_embeddings=rotary)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(functools.partial(layer, **args), x, use_reentrant=False)
            else:
                x = layer(x, **args)
        return llama.norm(x[:, -last:])

    def bin_logits(self, hidden):
        """float32 logits (N, A, 256) of the action bins; a lm_head adapter that is not merged takes part."""
        head = self.language_model.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            logits = F.linear(hidden, getattr(head, "base_layer", head).weight[self.bins].float())
            if hasattr(head, "lora_A") and not head.disable_adapters and not head.merged:
                for name in head.active_adapters:
                    low_rank = F.linear(hidden, head.lora_A[name].weight.float())
                    logits = logits + head.scaling[name] * F.linear(low_rank, head.lora_B[name].weight[self.bins].float())
        return logits


# --- actor-critic ---
class ValueHead(nn.Module):
    """hidden-512-128-1 in float32, N(0, 0.02) weights and no last bias: what RL4VLA's head is in effect."""

    def __init__(self, dim: int, widths=(512, 128)):
        super().__init__()
        self.head_l1 = nn.Linear(dim, widths[0])
        self.head_l2 = nn.Linear(widths[0], widths[1])
        self.head_l3 = nn.Linear(widths[1], 1, bias=False)
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head_l3(F.gelu(self.head_l2(F.gelu(self.head_l1(hidden.float()))))).squeeze(-1)


class VLA(nn.Module):
    """Policy and value over a `Backbone`. Use `load_vla` to make one.

    value_input: "h0" (state only), "hn" (last action token's state) or "concat" (h0..h6): the study's ablation.
    separate_critic: the value reads h0 of its own copy of the backbone.
    """

    def __init__(self, backbone, tokenizer, config, dtype, value_input="h0", separate_critic=False, value_head=True):
        super().__init__()
        self.backbone, self.tokenizer, self.config, self.dtype = backbone, tokenizer, config, dtype
        self.norm_stats = config["norm_stats"]
        self.value_input = value_input
        self.critic = copy.deepcopy(backbone) if separate_critic else None
        width = backbone.language_model.config.hidden_size * (ACTION_DIM if value_input == "concat" else 1)
        self.value_head = ValueHead(width, config.get("value_head_widths", (512, 128))) if value_head else None
        self.prompt_ids = functools.lru_cache(maxsize=65536)(self.prompt_ids)

    @property
    def device(self):
        return self.backbone.projector.fc1.weight.device

    def autocast(self):
        """Trainable weights are float32 masters: matmuls of a full fine-tuning in bfloat16 go through autocast."""
        master = self.backbone.language_model.model.norm.weight.dtype
        return torch.autocast(self.device.type, self.dtype, enabled=master != self.dtype)

    def prompt_ids(self, instruction: str) -> list[int]:
        ids = self.tokenizer.encode(PROMPT.format(instruction.lower()), add_special_tokens=False).ids
        return [self.backbone.language_model.config.bos_token_id, *ids]

    def tokenize(self, instructions: list[str]):
        """-> input_ids (N, T) int64 and mask (N, T) bool, rows [BOS, PAD.., text]."""
        rows = [self.prompt_ids(i) for i in instructions]
        longest, pad = max(map(len, rows)), self.backbone.language_model.config.pad_token_id
        ids = torch.tensor([[r[0], *[pad] * (longest - len(r)), *r[1:]] for r in rows])
        return ids.to(self.device), (ids != pad).to(self.device)

    def fit_images(self, images):
        """(N, H, W, 3) uint8, any size, array or tensor -> what the model sees; idempotent: store this in a rollout buffer."""
        return self.backbone.vision_backbone.fit(torch.as_tensor(images).to(self.device, non_blocking=True), self.dtype)

    def values_of(self, hidden, images, ids, mask):
        if self.value_head is None:
            return hidden.new_zeros(len(hidden), dtype=torch.float32)
        if self.critic is not None:
            with self.autocast():
                hidden = self.critic.hidden(*self.critic.embed(images, ids, mask))
        return self.value_head({"h0": hidden[:, 0], "hn": hidden[:, -1], "concat": hidden.flatten(1)}[self.value_input])

    @torch.no_grad()
    def act(self, images, instructions, temperature=1.0, generator=None):
        """Sample one action per row.

        images (N, H, W, 3) uint8 or `fit_images`' result; instructions: N strings; temperature 0 = greedy, with log-probs
        at temperature 1; generator: None, one torch.Generator, or N of them (then a row's draw ignores the other rows).
        -> action_tokens (N, 7) int64, logprobs (N,) float32 nats summed over the 7 tokens, values (N,) float32.
        """
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        rows = generator if isinstance(generator, (list, tuple)) else [generator]
        draws = [torch.rand(len(ids) // len(rows), ACTION_DIM, generator=g, device=g.device if g else None, dtype=torch.float64)
                 for g in rows]  # fmt: skip
        draws = torch.cat(draws).to(self.device)  # (N, 7) in [0, 1)
        cache, tokens, logprobs, hidden = DynamicCache(), [], 0.0, []
        with self.autocast():
            x, mask_so_far = self.backbone.embed(images, ids, mask)
            for i in range(ACTION_DIM):
                hidden.append(self.backbone.hidden(x, mask_so_far, cache))
                logp = F.log_softmax(self.backbone.bin_logits(hidden[-1])[:, 0] / (temperature or 1.0), dim=-1)
                if temperature == 0:
                    bins = logp.argmax(-1, keepdim=True)
                else:  # inverse CDF: the first bin whose cumulative probability exceeds the draw
                    cdf = logp.double().exp().cumsum(-1)
                    bins = (cdf <= draws[:, i : i + 1] * cdf[:, -1:]).sum(-1, keepdim=True)
                tokens.append(bins + self.backbone.bins.start)
                logprobs = logprobs + logp.gather(-1, bins)[:, 0]
                x = self.backbone.language_model.model.embed_tokens(tokens[-1])
                mask_so_far = torch.cat([mask_so_far, mask_so_far.new_ones(len(x), 1)], dim=1)
        return torch.cat(tokens, 1), logprobs, self.values_of(torch.cat(hidden, 1), images, ids, mask)

    def evaluate(self, images, instructions, action_tokens, temperature=1.0, return_token_logprobs=False):
        """Score given actions with gradients, in one forward.

        action_tokens (N, 7) int64; the rest as in `act`. -> logprobs (N,) (or token_logprobs (N, 7)), entropies (N,) mean
        over the 7 tokens, values (N,); all float32, nats.
        """
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        if action_tokens.shape != (len(ids), ACTION_DIM) or action_tokens.dtype != torch.int64:
            raise ValueError(f"action_tokens are {tuple(action_tokens.shape)} {action_tokens.dtype}, not ({len(ids)}, 7) int64")
        action_tokens = action_tokens.to(self.device)
        with self.autocast():
            forced = torch.cat([ids, action_tokens[:, :-1]], dim=1)
            x, full_mask = self.backbone.embed(images, forced, F.pad(mask, (0, ACTION_DIM - 1), value=True))
            hidden = self.backbone.hidden(x, full_mask, last=ACTION_DIM)
        logp = F.log_softmax(self.backbone.bin_logits(hidden) / (temperature or 1.0), dim=-1)  # (N, 7, 256)
        token_logprobs = logp.gather(-1, (action_tokens - self.backbone.bins.start)[..., None])[..., 0]
        entropies = -(logp.exp() * logp).sum(-1).mean(-1)
        values = self.values_of(hidden, images, ids, mask)
        return token_logprobs if return_token_logprobs else token_logprobs.sum(-1), entropies, values

    def value(self, images, instructions):
        """-> values (N,) float32. "hn" and "concat" read action tokens too: there the greedy action's."""
        if self.value_input != "h0":
            return self.act(images, instructions, temperature=0)[2]
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        with self.autocast():
            hidden = None if self.critic else self.backbone.hidden(*self.backbone.embed(images, ids, mask))
        return self.values_of(hidden, images, ids, mask)

    def _stats(self, unnorm_key):
        if unnorm_key not in self.norm_stats:
            raise ValueError(f"unknown unnorm_key {unnorm_key!r}; this model has statistics for {sorted(self.norm_stats)}")
        stats = self.norm_stats[unnorm_key]["action"]
        low, high = (torch.tensor(stats[k], dtype=torch.float64) for k in ("q01", "q99"))
        return low, high, torch.tensor(stats.get("mask", [True] * len(low)))

    def actions_from_tokens(self, action_tokens, unnorm_key: str):
        """(N, 7) int64 -> (N, 7) float32 CPU tensor in environment units: bin centres, un-normalised where the mask says so."""
        low, high, mask = self._stats(unnorm_key)
        index = (self.backbone.bins.stop - 1 - torch.as_tensor(action_tokens).cpu()).clamp(0, 254)  # 255 centres, 256 ids
        centre = (2 * index.double() + 1) / 255 - 1
        return torch.where(mask, 0.5 * (centre + 1) * (high - low) + low, centre).float()

    def tokens_from_actions(self, actions, unnorm_key: str):
        """(N, 7) environment units -> (N, 7) int64; inverse of `actions_from_tokens` up to half a bin, clipped to its range."""
        low, high, mask = self._stats(unnorm_key)
        actions = torch.as_tensor(actions).double().cpu()
        actions = torch.where(mask, 2 * (actions - low) / (high - low).clamp(min=1e-8) - 1, actions).clamp(-1, 1)
        edges = torch.linspace(-1, 1, 256, dtype=torch.float64)
        return self.backbone.bins.stop - torch.bucketize(actions, edges, right=True)

    def trainable_parameters(self) -> dict[str, list]:
        """Trained tensors in two groups: the policy, and everything only the value uses (head, separate critic)."""
        policy = [p for p in self.backbone.parameters() if p.requires_grad]
        value = [m for m in (self.value_head, self.critic) if m is not None]
        return {"policy": policy, "value": [p for m in value for p in m.parameters() if p.requires_grad]}

    @contextlib.contextmanager
    def reference(self):
        """Adapters off inside: the policy before LoRA training."""
        layers = [m for m in self.modules() if hasattr(m, "enable_adapters")]
        if not layers:
            raise ValueError("reference() needs a LoRA model; with lora_rank=0 keep a second load_vla(...) as the reference")
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield self
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def load_vla(
    name_or_path="tiny", device="cpu", dtype=torch.float32, lora_rank=0, lora_targets="all", adapter=None,
    value_input=None, separate_critic=None, value_head=True, seed=0, trainable=True, merge_adapter=False,
) -> VLA:  # fmt: skip
    """Read or make a model.

    name_or_path: "tiny" (random weights from `seed`), a directory or hub id in the Hugging Face layout of
    openvla/openvla-7b, or a PEFT adapter directory. adapter: a PEFT adapter directory to put on top; it goes on training,
    or with merge_adapter is added to the base weights first. dtype: what matmuls run in and frozen weights are kept in;
    trained weights are float32. lora_rank 0 without an adapter: full fine-tuning. trainable=False: all frozen, in dtype.
    value_input, separate_critic: None = as saved, else "h0" and False. Errors name the file, the key and the rule.
    """
    if value_input not in (None, "h0", "hn", "concat"):
        raise ValueError(f"value_input is {value_input!r}; use 'h0', 'hn' or 'concat'")
    source = checkpoints.locate(name_or_path, adapter)  # cheap checks of every directory come before anything slow
    lora = source.adapter is not None and not merge_adapter or lora_rank > 0
    storage = dtype if lora or not trainable else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta" if source.weights else "cpu"):
            backbone = Backbone(source.config)
        if source.weights:
            checkpoints.load_backbone(backbone, source, device, storage)
        else:
            checkpoints.cast_parameters(backbone.to(device), storage)
        checkpoints.apply_lora(backbone, source, lora_rank, lora_targets, merge_adapter)
        saved = source.value_settings
        value_input = value_input or saved.get("value_input", "h0")
        separate_critic = saved.get("separate_critic") == "True" if separate_critic is None else separate_critic
        tokenizer = Tokenizer.from_file(str(source.tokenizer))
        model = VLA(backbone, tokenizer, source.config, dtype, value_input, separate_critic, value_head).to(device)
    model.source = source
    if source.value_file and value_head:
        checkpoints.load_value(model, source.value_file)
    return model.requires_grad_(False) if not trainable else model
