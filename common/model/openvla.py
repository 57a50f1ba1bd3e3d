"""OpenVLA at every size: images and instructions in, seven action tokens and a value out.

    image  -> DINOv2 + SigLIP (tiny: a convolutional stem) -> projector -+
    prompt -> token embedding ------------------------------------ [BOS | patches | PAD.. text | a0..a5]
                                                                         |
                                                      LlamaForCausalLM, causal everywhere
                                                                         |
    hidden state h0 at the last prompt token predicts a0, h1 at a0 predicts a1, ..., h6 at a5 predicts a6
    h0..h6 -> 256 columns of lm_head -> action tokens;    h0 -> float32 MLP -> value

`act` samples (one prefill, six cached decode steps), `evaluate` scores given tokens in one differentiable forward;
both with softmax(logits / temperature) over the 256 action bins, in float32. Kim et al. 2024 (OpenVLA), Liu et al. 2025
(value from h0). Module names are the published checkpoint's keys. Differences from the official code: docs/model.md.
"""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from common.model import checkpoints
from common.model.checkpoints import save_vla
from common.model.critic import StateCritic
from common.model.vision import MLP, ConvStem, TwinTowers

__all__ = ["VLA", "Backbone", "load_vla", "save_vla"]

PROMPT = "In: What action should the robot take to {}?\nOut: "  # the final space is a token of its own
EMPTY = 29871  # which Llama's tokenizer makes of it
ACTION_DIM = 7


# --- backbone ---
class Backbone(nn.Module):
    """Vision, projector and language model; `state_dict` has the published checkpoint's names and shapes."""

    def __init__(self, config: dict):
        super().__init__()
        llama = dict(vocab_size=32064, pad_token_id=32000, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-6)
        llama["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
        llama = LlamaConfig(**llama | config["text_config"], attn_implementation=config.get("attention", "sdpa"))
        self.vision_backbone = (ConvStem if "stem" in config else TwinTowers)(config)
        vision = self.vision_backbone
        self.projector = MLP(vision.width, vision.inner, llama.hidden_size, llama.hidden_size)
        self.language_model = LlamaForCausalLM(llama)
        end = llama.vocab_size - config["pad_to_multiple_of"]
        self.bins = slice(end - config["n_action_bins"], end)  # ids of the action tokens; a higher id is a lower action
        self.activation_checkpointing = False  # True: each block is computed again in backward, for memory

    def recompute(self, block, x):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def embed(self, images, input_ids, mask):
        """-> embeddings (N, S, D) and mask (N, S) of [BOS | patches | rest of input_ids]; images: pixels or patches."""
        patches = images if images.ndim == 3 else self.projector(self.vision_backbone(images, self.recompute))
        text = self.language_model.model.embed_tokens(input_ids)
        x = torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)
        return x, torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], dim=1)

    def hidden(self, x, mask, cache=None, last=1):
        """Final normed hidden states (N, last, D) of the last positions.

        x (N, Q, D): embeddings of the newest Q positions. mask (N, S): True at real tokens, over all S positions so
        far, of which S - Q are in `cache`. Padding is masked and gets no position number, so it changes nothing.
        """
        llama, queries, keys = self.language_model.model, x.shape[1], mask.shape[1]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        unseen = ~(mask[:, None, None] & causal)
        bias = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device).masked_fill(unseen, torch.finfo(x.dtype).min)
        rotary = llama.rotary_emb(x, (mask.cumsum(1) - 1)[:, -queries:])
        *lower, top = llama.layers
        for layer in lower:
            args = dict(attention_mask=bias, past_key_values=cache, position_embeddings=rotary)
            x = self.recompute(functools.partial(layer, **args), x)
        # The top layer's output is read at the last positions only; the earlier ones give it keys and values, no more.
        cache = DynamicCache() if cache is None else cache
        if queries > last:
            attn, early = top.self_attn, top.input_layernorm(x[:, :-last])
            k, v = (w(early).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for w in (attn.k_proj, attn.v_proj))
            k, _ = apply_rotary_pos_emb(k, k, *(r[:, :-last] for r in rotary))
            cache.update(k, v, attn.layer_idx)
        rotary = [r[:, -last:] for r in rotary]
        x = top(x[:, -last:], attention_mask=bias[:, :, -last:], past_key_values=cache, position_embeddings=rotary)
        return llama.norm(x)

    def bin_logits(self, hidden):
        """(N, A, D) -> float32 logits (N, A, 256) of the action bins; an unmerged lm_head adapter takes part."""
        head = self.language_model.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            logits = F.linear(hidden, head.weight[self.bins].float())
            if hasattr(head, "lora_A") and not head.disable_adapters:
                for name in head.active_adapters:
                    low = F.linear(hidden, head.lora_A[name].weight)
                    logits = logits + head.scaling[name] * F.linear(low, head.lora_B[name].weight[self.bins])
        return logits


class ValueHead(nn.Module):
    """D-512-128-1 in float32; N(0, 0.02) weights, zero biases, none in the last layer: RL4VLA's, as it is in effect."""

    def __init__(self, width: int, inner=(512, 128)):
        super().__init__()
        self.head_l1, self.head_l2 = nn.Linear(width, inner[0]), nn.Linear(*inner)
        self.head_l3 = nn.Linear(inner[1], 1, bias=False)
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head_l3(F.gelu(self.head_l2(F.gelu(self.head_l1(hidden.float())))))[..., 0]


# --- actor and critic ---
class VLA(nn.Module):
    """Policy and value over one `Backbone`; `load_vla` makes it. N rows, 7 action tokens.

    value_input: "h0" (the prompt only), "hn" (last action position) or "concat" (h0..h6): the study's ablation; or
    "state": `value_head` takes features of the simulator's state, and the values of `act` and `evaluate` are 0.
    separate_critic: the value reads its own copy of the backbone.
    """

    def __init__(self, backbone, tokenizer, config, dtype, value_input="h0", separate_critic=False, value_head=True):
        super().__init__()
        self.backbone, self.tokenizer, self.config, self.dtype = backbone, tokenizer, config, dtype
        self.norm_stats, self.value_input = config["norm_stats"], value_input
        self.critic = copy.deepcopy(backbone) if separate_critic else None
        width = self.llama.config.hidden_size * (ACTION_DIM if value_input == "concat" else 1)
        make_head = StateCritic if value_input == "state" else ValueHead
        self.value_head = make_head(width, config.get("value_head", (512, 128))) if value_head else None
        self.prompt_ids = functools.cache(self.prompt_ids)

    @property
    def device(self):
        return self.llama.norm.weight.device

    @property
    def llama(self):
        return self.backbone.language_model.model

    def autocast(self):
        """Matmuls in the compute dtype, also where float32 weights that are trained take part."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prompt_ids(self, instruction: str) -> list[int]:
        ids = self.tokenizer.encode(PROMPT.format(instruction.lower()), add_special_tokens=False).ids
        return [self.llama.config.bos_token_id, *ids]

    def tokenize(self, instructions: list[str]):
        """-> input_ids (N, T) int64 and mask (N, T) bool; rows are [BOS, PAD.., text]."""
        rows, pad = [self.prompt_ids(i) for i in instructions], self.llama.config.pad_token_id
        longest = max(map(len, rows))
        ids = torch.tensor([[row[0], *[pad] * (longest - len(row)), *row[1:]] for row in rows])
        return ids.to(self.device), (ids != pad).to(self.device)

    def checkpoint_activations(self, on):
        for part in (self.backbone, self.critic or self.backbone):
            part.activation_checkpointing = on

    def fit_images(self, images):
        """(N, H, W, 3) uint8 of any size -> what the model sees. Idempotent: a rollout buffer stores the result."""
        images = torch.as_tensor(images).to(self.device)
        return images if images.ndim == 3 else self.backbone.vision_backbone.fit(images, self.dtype)

    @torch.no_grad()
    def rollout_inputs(self, images):
        """(N, H, W, 3) uint8 -> what a rollout keeps for the update: `fit_images` of them or, where the small model's
        eyes are frozen, the image tokens (N, P, D): they will not change, and are smaller than the pixels."""
        images, owners = self.fit_images(images), (self.backbone, self.critic or self.backbone)
        eyes = [part for owner in owners for part in (owner.vision_backbone, owner.projector)]
        if not isinstance(eyes[0], ConvStem) or any(p.requires_grad for part in eyes for p in part.parameters()):
            return images
        with self.autocast():
            return eyes[1](eyes[0](images, self.backbone.recompute))

    def values_of(self, hidden, images, ids, mask):
        if self.value_head is None or self.value_input == "state":
            return torch.zeros(len(ids), device=self.device)
        if self.critic is not None:
            with self.autocast():
                hidden = self.critic.hidden(*self.critic.embed(images, ids, mask))
        inputs = {"h0": hidden[:, 0], "hn": hidden[:, -1], "concat": hidden.flatten(1)}
        return self.value_head(inputs[self.value_input])

    @torch.no_grad()
    def act(self, images, instructions, temperature=1.0, generator=None):
        """Sample an action per row.

        images (N, H, W, 3) uint8, or `fit_images` of them; instructions: N strings; temperature 0: greedy, log-probs
        then at temperature 1; generator: None, one torch.Generator, or N: then a row's draw ignores the other rows.
        -> action_tokens (N, 7) int64, logprobs (N,) float32 nats summed over the 7 tokens, values (N,) float32
        """
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if len(generators) not in (1, len(ids)):
            raise ValueError(f"{len(generators)} generators for {len(ids)} rows; pass one, or one per row")
        shape = (len(ids) // len(generators), ACTION_DIM)
        draws = [torch.rand(shape, generator=g, device=g and g.device, dtype=torch.float64) for g in generators]
        draws = torch.cat(draws).to(self.device)  # (N, 7) in [0, 1)
        cache, tokens, logprobs, hidden = DynamicCache(), [], 0.0, []
        with self.autocast():
            x, seen = self.backbone.embed(images, ids, mask)
            for i in range(ACTION_DIM):
                hidden.append(self.backbone.hidden(x, seen, cache))
                logp = F.log_softmax(self.backbone.bin_logits(hidden[i])[:, 0] / (temperature or 1.0), dim=-1)
                if temperature == 0:
                    bins = logp.argmax(-1, keepdim=True)
                else:  # inverse CDF: the first bin whose cumulative probability exceeds the draw
                    cdf = logp.double().exp().cumsum(-1)
                    bins = (cdf <= draws[:, i, None] * cdf[:, -1:]).sum(-1, keepdim=True)
                tokens.append(bins + self.backbone.bins.start)
                logprobs = logprobs + logp.gather(-1, bins)[:, 0]
                x, seen = self.llama.embed_tokens(tokens[i]), F.pad(seen, (0, 1), value=True)
        return torch.cat(tokens, 1), logprobs, self.values_of(torch.cat(hidden, 1), images, ids, mask)

    def bin_logprobs(self, images, instructions, action_tokens, temperature=1.0):
        """Arguments as in `evaluate` -> log-probs (N, 7, 256) float32 of all bins for token i after the given tokens
        before it, and the inputs of `values_of`."""
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        if action_tokens.shape != (len(ids), ACTION_DIM) or action_tokens.dtype != torch.int64:
            found = f"{tuple(action_tokens.shape)} {action_tokens.dtype}"
            raise ValueError(f"action_tokens are {found}, not ({len(ids)}, {ACTION_DIM}) torch.int64")
        with self.autocast():
            forced = torch.cat([ids, action_tokens.to(self.device)[:, :-1]], dim=1)
            x, seen = self.backbone.embed(images, forced, F.pad(mask, (0, ACTION_DIM - 1), value=True))
            hidden = self.backbone.hidden(x, seen, last=ACTION_DIM)
        logp = F.log_softmax(self.backbone.bin_logits(hidden) / (temperature or 1.0), dim=-1)
        return logp, (hidden, images, ids, mask)

    def evaluate(self, images, instructions, action_tokens, temperature=1.0, return_token_logprobs=False):
        """Score given actions, with gradients.

        action_tokens (N, 7) int64, the rest as in `act`. -> logprobs (N,), or token_logprobs (N, 7); entropies (N,),
        the mean over the 7 tokens; values (N,). All float32, nats.
        """
        logp, inputs = self.bin_logprobs(images, instructions, action_tokens, temperature)
        index = action_tokens.to(self.device) - self.backbone.bins.start
        token_logprobs = logp.gather(-1, index[..., None])[..., 0]
        entropies = -(logp.exp() * logp).sum(-1).mean(-1)
        values = self.values_of(*inputs)
        return token_logprobs if return_token_logprobs else token_logprobs.sum(-1), entropies, values

    def value(self, images, instructions):
        """-> values (N,) float32. "hn" and "concat" read action positions too: there, of the greedy action."""
        if self.value_input != "h0":
            return self.act(images, instructions, temperature=0)[2]
        images, (ids, mask) = self.fit_images(images), self.tokenize(instructions)
        hidden = None  # a separate critic makes its own
        if self.critic is None:
            with self.autocast():
                hidden = self.backbone.hidden(*self.backbone.embed(images, ids, mask))
        return self.values_of(hidden, images, ids, mask)

    def action_range(self, unnorm_key: str):
        """q01, q99 (7,) float64 and mask (7,) bool of one data set."""
        if unnorm_key not in self.norm_stats:
            raise ValueError(f"unknown unnorm_key {unnorm_key!r}; this model has {sorted(self.norm_stats)}")
        stats = self.norm_stats[unnorm_key]["action"]
        low, high = (torch.tensor(stats[k], dtype=torch.float64) for k in ("q01", "q99"))
        return low, high, torch.tensor(stats.get("mask", [True] * len(low)))

    def actions_from_tokens(self, action_tokens, unnorm_key: str):
        """(N, 7) int64 -> (N, 7) float32 on the CPU, environment units: bin centres, un-normalised where masked."""
        low, high, mask = self.action_range(unnorm_key)
        index = self.backbone.bins.stop - 1 - torch.as_tensor(action_tokens).cpu()
        index = index.clamp(0, 254)  # 256 ids, 255 centres
        centre = (2 * index.double() + 1) / 255 - 1
        return torch.where(mask, 0.5 * (centre + 1) * (high - low) + low, centre).float()

    def tokens_from_actions(self, actions, unnorm_key: str):
        """(N, 7) environment units -> (N, 7) int64 on the CPU: the nearest bins, outside [q01, q99] the outermost."""
        low, high, mask = self.action_range(unnorm_key)
        actions = torch.as_tensor(actions).cpu().double()
        actions = torch.where(mask, 2 * (actions - low) / (high - low).clamp(min=1e-8) - 1, actions).clamp(-1, 1)
        return self.backbone.bins.stop - torch.bucketize(actions, torch.linspace(-1, 1, 256).double(), right=True)

    def trainable_parameters(self) -> dict[str, list]:
        """Trained tensors: the "policy", and what only the "value" uses (head, separate critic)."""
        groups = {"policy": [self.backbone], "value": [m for m in (self.value_head, self.critic) if m is not None]}
        return {g: [p for m in ms for p in m.parameters() if p.requires_grad] for g, ms in groups.items()}

    @contextlib.contextmanager
    def reference(self, weights=None):
        """Adapters off inside: the policy before LoRA training. Or weights: {name: tensor}, which take the places of
        the trained ones one by one, while those wait on the host: the device never holds two models."""
        layers = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        if not layers and weights is None:
            raise ValueError("reference() needs LoRA; without it, pass the reference's weights")
        trained = {} if weights is None else {n: p for n, p in self.backbone.named_parameters() if p.requires_grad}
        kept, learns = {}, {p: p.requires_grad for p in self.backbone.parameters()}
        try:
            for layer in layers if weights is None else ():
                layer.enable_adapters(False)
            for name, p in trained.items():
                kept[name], p.data = p.data.cpu(), weights[name].to(p.device, p.dtype)
            yield self
        finally:
            for layer in layers if weights is None else ():
                layer.enable_adapters(True)
            for p, requires_grad in learns.items():  # PEFT lets all adapters learn, those of frozen eyes too
                p.requires_grad_(requires_grad)
            for name, tensor in kept.items():
                trained[name].data = tensor.to(trained[name].device)


def load_vla(
    name_or_path="tiny", device="cpu", dtype=torch.float32, lora_rank=0, lora_targets="all", adapter=None,
    value_input=None, separate_critic=None, value_head=True, seed=0, trainable=True, merge_adapter=False,
    freeze_vision=False,
) -> VLA:  # fmt: skip
    """Read or make a model.

    name_or_path: "tiny" (random weights from `seed`), a directory or hub id in the layout of openvla/openvla-7b, or a
    PEFT adapter directory. adapter: one to put on top, to train on, or with merge_adapter to add to the base weights.
    dtype: what matmuls run in and a frozen base is kept in; adapters and trained weights are float32. lora_rank 0
    without an adapter: full fine-tuning. trainable=False: all frozen; freeze_vision: vision and projector are.
    value_input, separate_critic: None = as saved, else "h0", False. Every file is checked before anything slow; errors
    name the file, the key and the rule.
    """
    source = checkpoints.locate(str(name_or_path), adapter)
    settings = {"value_input": value_input or source.value_settings.get("value_input", "h0")}
    saved = value_head and source.value_settings.get("separate_critic") == "True"
    settings["separate_critic"] = saved if separate_critic is None else separate_critic
    if settings["value_input"] not in ("h0", "hn", "concat", "state"):
        raise ValueError(f"value_input is {value_input!r}; use 'h0', 'hn', 'concat' or 'state'")
    if value_head and source.value_settings.get("value_input", settings["value_input"]) != settings["value_input"]:
        saved, fix = source.value_settings["value_input"], "use that, or for a new value head remove the file"
        raise ValueError(f"{source.value_file} reads value_input = {saved!r}, not {settings['value_input']!r}; {fix}")
    if settings["separate_critic"] and settings["value_input"] != "h0":
        raise ValueError(f"separate_critic reads h0 of the prompt, not value_input = {value_input!r}; drop one of them")
    checkpoints.check_lora(source, lora_rank, lora_targets, merge_adapter)
    masters = trainable and not lora_rank and (source.adapter is None or merge_adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta" if source.weights else "cpu"):
            backbone = Backbone(source.config)
        checkpoints.fill_backbone(backbone, source, device, torch.float32 if masters else dtype)
        checkpoints.apply_lora(backbone, source, lora_rank, lora_targets, merge_adapter)
        tokenizer = Tokenizer.from_file(str(source.tokenizer))
        tokenizer.no_padding(), tokenizer.no_truncation()  # a file may bring either
        model = VLA(backbone, tokenizer, source.config, dtype, value_head=value_head, **settings).to(device)
    for part in (model.backbone, model.critic or model.backbone) if freeze_vision else ():
        part.vision_backbone.requires_grad_(False), part.projector.requires_grad_(False)
    if "stem" not in source.config and model.prompt_ids("x")[-1] != EMPTY:
        raise ValueError(f"{source.tokenizer}: a prompt must end in token {EMPTY}, as OpenVLA's does; copy its file")
    model.source = source
    if source.value_file and value_head:
        checkpoints.fill_value(model)
    return (model if trainable else model.requires_grad_(False)).eval()  # no dropout, of a foreign adapter either
