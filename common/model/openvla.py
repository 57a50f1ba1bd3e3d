"""OpenVLA at every size: images and instructions in, seven action tokens out.
    image  -> DINOv2 + SigLIP (small model: ConvStem) -> projector -+
    prompt -> token embedding ---------------------- [BOS | patches | PAD.. text | a0..a5]
                                                                    |
                                                     LlamaForCausalLM, causal everywhere
                                                                    |
    hidden state h0 at the last prompt token predicts a0, h1 at a0 predicts a1, ..., h6 at a5
    h0..h6 -> 256 columns of lm_head -> action tokens
`act` samples (one prefill, six cached steps), `evaluate_actions` scores given tokens at once: with
softmax(logits / temperature) over the 256 action bins, in float32. Kim et al. 2024. Module names
are the published checkpoint's keys. Differences from its code: docs/model.md."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from common.model.checkpoints import check, choose_key
from common.model.vision import MLP, ConvStem, TwinTowers

PROMPT = "In: What action should the robot take to {}?\nOut: "  # the last space is a token
ACTION_DIM = 7


class OpenVLAConfig(PreTrainedConfig):
    """config.json of the published model, or of the small one, which has more keys."""

    model_type = "openvla"
    sub_configs_defaults = {"text_config": LlamaConfig}

    text_config: dict | PreTrainedConfig | None = None
    norm_stats: dict | None = None  # action statistics by data set
    towers: dict | None = None  # name -> width, depth, heads, MLP width; None: as published
    stem: list | None = None  # in the towers' place: channels, kernel, stride of convolutions
    attention: str | None = None  # of the language model, where it must not be "sdpa"
    value_head: list | tuple = (512, 128)  # inner widths of a critic on hidden states


class OpenVLA(PreTrainedModel):
    """Vision, projector and language model, and the policy that they are; `load_vla` makes it."""

    config: OpenVLAConfig
    _no_split_modules = ["Block", "LlamaDecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        llama = config.text_config
        if config.attention:
            llama._attn_implementation = config.attention
        self.vision_backbone = eyes = ConvStem(config) if config.stem else TwinTowers(config)
        self.projector = MLP(eyes.width, eyes.inner, llama.hidden_size, llama.hidden_size)
        self.language_model = LlamaForCausalLM(llama)
        last = llama.vocab_size - config.pad_to_multiple_of
        self.bins = slice(last - config.n_action_bins, last)  # ids of the action tokens
        self.tokenizer = None  # tokenizers.Tokenizer
        self.unnorm_key = ""  # which action statistics hold
        self.compute_dtype = self.dtype  # of matmuls
        self.keeps_image_tokens = False  # in `preprocess`: they are smaller and will not change
        self.activation_checkpointing = False
        self._keys_to_ignore_on_load_unexpected = eyes.unread
        self.post_init()

    def _init_weights(self, module):
        """The constructors have drawn the weights of the parts that are not the library's."""

    # --- inputs ---
    def tokenize(self, instructions):
        """list of N strings -> input_ids (N, T) int64, mask (N, T) bool; rows: BOS, PAD.., text."""
        bos, pad = self.config.text_config.bos_token_id, self.config.text_config.pad_token_id
        texts = [PROMPT.format(instruction.lower()) for instruction in instructions]
        rows = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[bos, *[pad] * (longest - len(row)), *row] for row in rows])
        return ids.to(self.device), (ids != pad).to(self.device)

    def fit_images(self, images):
        """(N, H, W, 3) uint8 -> what the eyes take; what came out of this comes out as it is."""
        images = torch.as_tensor(images).to(self.device)
        return images if images.ndim == 3 else self.vision_backbone.fit(images, self.compute_dtype)

    @torch.no_grad()
    def preprocess(self, images):
        """(N, H, W, 3) uint8 -> what a rollout keeps: fitted images, or a frozen stem's tokens."""
        images = self.fit_images(images)
        with self.autocast():
            return self.look(images) if self.keeps_image_tokens else images

    def look(self, images):
        """Fitted images -> image tokens (N, P, D); image tokens stay as they are."""
        if images.ndim == 4:
            images = self.projector(self.vision_backbone(images, self.recompute))
        return images

    # --- the forward pass ---
    def autocast(self):
        """Matmuls in the compute dtype, also of float32 weights that are trained."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    def recompute(self, block, x, **given):
        """Activation checkpointing: less memory, more time."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **given)
        return block(x, **given)

    def embed(self, images, input_ids, mask):
        """Embeddings (N, S, D) and mask (N, S) of [BOS | patches | rest of input_ids]."""
        text = self.language_model.model.embed_tokens(input_ids)
        patches = self.look(images).to(text.dtype)
        x = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        return x, F.pad(mask, (patches.shape[1], 0), value=True)  # BOS is seen as well

    def hidden_states(self, x, mask, cache=None, last=1):
        """Final normed hidden states (N, last, D) of the last positions.
        x: (N, Q, D), embeddings of the newest Q positions. mask: (N, S) bool, real tokens among all
        S positions so far, of which S - Q are in `cache`. Padding gets no position number."""
        llama, queries, keys = self.language_model.model, x.shape[1], mask.shape[1]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        unseen = ~(mask[:, None, None] & causal)
        bias = unseen.to(x.dtype) * torch.finfo(x.dtype).min
        rotary = llama.rotary_emb(x, (mask.cumsum(1) - 1)[:, -queries:])
        given = dict(attention_mask=bias, past_key_values=cache, position_embeddings=rotary)
        *lower, top = llama.layers
        for layer in lower:
            x = self.recompute(layer, x, **given)
        # The top layer's output is read at the last positions only: the earlier ones give it keys
        # and values, no more. (The layers below must not fill a new cache twice when recomputed.)
        cache = DynamicCache() if cache is None else cache
        if queries > last:
            attn, early = top.self_attn, top.input_layernorm(x[:, :-last])
            shape = (*early.shape[:2], -1, attn.head_dim)
            k = attn.k_proj(early).view(shape).transpose(1, 2)
            v = attn.v_proj(early).view(shape).transpose(1, 2)
            k, _ = apply_rotary_pos_emb(k, k, *[part[:, :-last] for part in rotary])
            cache.update(k, v, attn.layer_idx)
        bias, rotary = bias[:, :, -last:], [part[:, -last:] for part in rotary]
        given = dict(attention_mask=bias, past_key_values=cache, position_embeddings=rotary)
        return llama.norm(top(x[:, -last:], **given))

    def bin_logits(self, hidden):
        """(N, A, D) -> float32 logits (N, A, 256) of the bins, an adapter of lm_head included."""
        head = self.language_model.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            logits = F.linear(hidden, head.weight[self.bins].float())
            # Reading head.weight bypasses an adapter that is not merged: add its slice.
            if hasattr(head, "lora_A") and not (head.disable_adapters or head.merged):
                for name in head.active_adapters:
                    low = F.linear(hidden, head.lora_A[name].weight)
                    rows = head.lora_B[name].weight[self.bins]
                    logits = logits + head.scaling[name] * F.linear(low, rows)
        return logits

    # --- the policy ---
    @torch.no_grad()
    def act(self, obs, instructions, temperature=1.0, generators=None):
        """Sample an action per row of obs: (N, H, W, 3) uint8 images or what `preprocess` returned.
        temperature: 0 is greedy, with log-probs at temperature 1. generators: None, or N of the
        CPU, with which a row's draw does not depend on the other rows. Returns: tokens (N, 7)
        int64; logprobs (N,) float32, nats, summed over tokens; hidden states h0..h6 (N, 7, D)."""
        ids, mask = self.tokenize(instructions)
        draws = torch.empty(len(ids), ACTION_DIM, dtype=torch.float64)
        for row, generator in zip(draws, generators or [None] * len(ids), strict=True):
            row.uniform_(generator=generator)
        draws = draws.to(self.device)
        cache, tokens, logprobs, hidden = DynamicCache(), [], 0.0, []
        with self.autocast():
            x, seen = self.embed(self.fit_images(obs), ids, mask)
            for i in range(ACTION_DIM):
                hidden.append(self.hidden_states(x, seen, cache))
                logits = self.bin_logits(hidden[i])[:, 0]
                logp = F.log_softmax(logits / (temperature or 1.0), dim=-1)
                if temperature == 0:
                    bins = logp.argmax(-1, keepdim=True)
                else:
                    # inverse CDF: the first bin whose cumulative probability exceeds the draw
                    cdf = logp.double().exp().cumsum(-1)
                    bins = (cdf <= draws[:, i, None] * cdf[:, -1:]).sum(-1, keepdim=True)
                tokens.append(bins + self.bins.start)
                logprobs = logprobs + logp.gather(-1, bins)[:, 0]
                x = self.language_model.model.embed_tokens(tokens[i])
                seen = F.pad(seen, (0, 1), value=True)
        return torch.cat(tokens, dim=1), logprobs, torch.cat(hidden, dim=1)

    def bin_logprobs(self, obs, instructions, tokens, temperature=1.0):
        """As `evaluate_actions` -> log-probs (N, 7, 256) float32 of all bins; hidden (N, 7, D)."""
        ids, mask = self.tokenize(instructions)
        right = tokens.shape == (len(ids), ACTION_DIM) and tokens.dtype == torch.int64
        check(right, f"tokens are {tuple(tokens.shape)} {tokens.dtype}; pass ({len(ids)}, 7) int64")
        with self.autocast():
            forced = torch.cat([ids, tokens.to(self.device)[:, :-1]], dim=1)
            mask = F.pad(mask, (0, ACTION_DIM - 1), value=True)
            x, mask = self.embed(self.fit_images(obs), forced, mask)
            hidden = self.hidden_states(x, mask, last=ACTION_DIM)
        return F.log_softmax(self.bin_logits(hidden) / (temperature or 1.0), dim=-1), hidden

    def evaluate_actions(self, obs, instructions, tokens, temperature=1.0):
        """Score tokens (N, 7) int64, with gradients; the rest as in `act`.
        Returns, in nats: token_logprobs (N, 7) float32; entropies (N,) float32, the mean over the
        tokens; and hidden states h0..h6 (N, 7, D)."""
        logp, hidden = self.bin_logprobs(obs, instructions, tokens, temperature)
        index = tokens.to(self.device) - self.bins.start
        token_logprobs = logp.gather(-1, index[..., None])[..., 0]
        entropies = -(logp.exp() * logp).sum(-1).mean(-1)
        return token_logprobs, entropies, hidden

    def prompt_hidden(self, obs, instructions):
        """Hidden state h0 (N, 1, D), which no action token has gone into."""
        ids, mask = self.tokenize(instructions)
        with self.autocast():
            return self.hidden_states(*self.embed(self.fit_images(obs), ids, mask))

    # --- actions ---
    def set_statistics(self, unnorm_key, statistics):
        """Replace all action statistics, for a model that is fine-tuned on other data."""
        self.config.norm_stats = {unnorm_key: statistics}
        self.unnorm_key = unnorm_key

    def action_range(self):
        """q01, q99 (7,) float64, mask (7,) bool: the statistics that `unnorm_key` names."""
        key = choose_key(self.config.norm_stats, self.unnorm_key)
        stats = self.config.norm_stats[key]["action"]
        low, high = torch.tensor([stats["q01"], stats["q99"]], dtype=torch.float64)
        return low, high, torch.tensor(stats.get("mask", [True] * len(low)))

    def decode_actions(self, tokens):
        """(N, 7) int64 -> (N, 7) float32 on the CPU: bin centres, un-normalised where masked."""
        low, high, mask = self.action_range()
        index = (self.bins.stop - 1 - torch.as_tensor(tokens).cpu()).clamp(0, 254)  # 255 centres
        centre = (2 * index.double() + 1) / 255 - 1
        return torch.where(mask, 0.5 * (centre + 1) * (high - low) + low, centre).float()

    def encode_actions(self, actions):
        """(N, 7) environment units -> (N, 7) int64 on the CPU; beyond [q01, q99]: the last bin."""
        low, high, mask = self.action_range()
        actions = torch.as_tensor(actions).cpu().double()
        scaled = 2 * (actions - low) / (high - low).clamp(min=1e-8) - 1
        scaled = torch.where(mask, scaled, actions).clamp(-1, 1)
        edges = torch.linspace(-1, 1, 256).double()
        return self.bins.stop - torch.bucketize(scaled, edges, right=True)
