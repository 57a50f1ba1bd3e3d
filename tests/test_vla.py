"""The model: parity with the recorded reference implementation, sampling, padding, precision, LoRA."""

import contextlib
import json

import hub_layout
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.model import checkpoints
from common.model.openvla import Backbone, load_vla

KEY = "bridge_orig"
INSTRUCTIONS = ["put carrot on plate", "Take the banana and put it on the plate", "put 7up can on cutting board"]


def images(n: int, height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def lively(model):
    """Random weights give nearly uniform logits, which hide errors: spread them to about two nats."""
    with torch.no_grad():
        model.backbone.language_model.lm_head.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tiny():
    return lively(load_vla("tiny"))


# --- parity with the reference implementation ---
ARRAYS, INFO = hub_layout.reference()
EXPECTED = INFO["expected"]
GRADIENTS = next(v for k, v in EXPECTED.items() if k.startswith("grad_norms_random"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    hub_layout.write_reference_checkpoint(folder / "model")
    hub_layout.write_reference_adapter(folder / "adapter")
    return folder


def close(name, ours, recorded, tolerance):
    gap = (ours.detach().float() - torch.as_tensor(recorded).reshape(ours.shape)).abs().max().item()
    assert gap <= tolerance, f"{name}: {gap:.2g} from the reference, tolerance {tolerance:.0e}"


def assert_parity(model, recorded: str = "out:", intermediate: bool = True):
    """Everything the reference recorded, in float32."""
    pictures, instructions = ARRAYS["images_u8"], EXPECTED["instructions"]
    ids, mask = model.tokenize(instructions)
    assert np.array_equal(ids.numpy(), ARRAYS["in:input_ids"])
    assert np.array_equal(mask.numpy(), ARRAYS["in:attention_mask"])
    if intermediate:
        features = model.backbone.vision_backbone(model.fit_images(pictures), model.backbone.recompute)
        close("vision features", features[:, ::16], ARRAYS["out:vision_features_sub"], 1e-5)
        close("projector", model.backbone.projector(features)[:, ::16], ARRAYS["out:projector_sub"], 1e-5)
    tokens, logprobs, values = model.act(pictures, instructions, temperature=0)
    assert np.array_equal(tokens.numpy(), ARRAYS[recorded + "greedy_ids"])
    close("greedy log-probs", logprobs, ARRAYS[recorded + "greedy_logprob_sum"], 2e-5)
    close("values", values, ARRAYS[recorded + "value"], 2e-5)
    given = torch.tensor(ARRAYS["in:random_ids"]).long()
    logprobs, entropies, values = model.evaluate(pictures, instructions, given)
    close("log-probs of random ids", logprobs, ARRAYS[recorded + "eval_random_logprob"], 2e-5)
    close("entropies", entropies, ARRAYS[recorded + "eval_random_entropy"], 1e-5)
    close("values of random ids", values, ARRAYS[recorded + "eval_random_value"], 2e-5)
    if intermediate:
        model.zero_grad()
        (logprobs.sum() + 0.5 * values.sum() + 0.1 * entropies.sum()).backward()
        ours = {k.removeprefix("backbone."): p.grad.norm().item() for k, p in model.named_parameters()}
        assert ours.keys() == GRADIENTS.keys()
        for key, norm in GRADIENTS.items():
            assert ours[key] == pytest.approx(norm, rel=1e-5), f"gradient norm of {key}"


def test_parity_float32(checkpoint):
    """Any difference from OpenVLA and RL4VLA: preprocessing, towers, projector, masks, positions, heads, gradients."""
    model = load_vla(checkpoint / "model")
    pixels = model.fit_images(ARRAYS["images_u8"])
    for i, tower in enumerate(model.backbone.vision_backbone.children()):
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (tower.mean, tower.std))
        recorded = ARRAYS["out:pixel_values_sub"][:, 3 * i : 3 * i + 3]
        close("pixels", ((pixels / 255 - mean) / std)[:, :, ::16, ::16], recorded, 0)
    assert_parity(model)
    forced = torch.tensor(ARRAYS["in:random_ids"]).long()
    ids, mask = model.tokenize(EXPECTED["instructions"])
    x, seen = model.backbone.embed(pixels, torch.cat([ids, forced[:, :-1]], 1), F.pad(mask, (0, 6), value=True))
    logits = model.backbone.bin_logits(model.backbone.hidden(x, seen, last=7))
    close("logits", logits, ARRAYS["out:eval_random_action_logits"], 1e-5)
    greedy = torch.tensor(ARRAYS["out:greedy_ids"]).long()
    logprobs, entropies, _ = model.evaluate(ARRAYS["images_u8"], EXPECTED["instructions"], greedy)
    close("log-probs of greedy ids", logprobs, ARRAYS["out:eval_greedy_logprob"], 2e-5)
    close("entropies of greedy ids", entropies, ARRAYS["out:eval_greedy_entropy"], 1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_parity_lora(checkpoint, merge):
    """A wrong LoRA scale, a missed layer, an lm_head adapter that is bypassed, a wrong merge."""
    model = load_vla(checkpoint / "model", adapter=checkpoint / "adapter", merge_adapter=merge)
    assert_parity(model, "lora_out:", intermediate=False)
    if not merge:
        with model.reference():
            assert_parity(model, "out:", intermediate=False)
        assert_parity(model, "lora_out:", intermediate=False)


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_stays_near_the_reference(checkpoint, trainable):
    """bfloat16 gone wrong: rounded rotary frequencies alone move log-probs ten times further. Pixels are exact."""
    model = load_vla(checkpoint / "model", dtype=torch.bfloat16, trainable=trainable)
    pixels = model.fit_images(ARRAYS["images_u8"])
    assert pixels.dtype == torch.bfloat16
    for i, tower in enumerate(model.backbone.vision_backbone.children()):
        mean, std = (torch.tensor(c, dtype=torch.bfloat16).view(3, 1, 1) for c in (tower.mean, tower.std))
        recorded = ARRAYS["out:pixel_values_bf16_sub"][:, 3 * i : 3 * i + 3]
        close("bf16 pixels", ((pixels / 255 - mean) / std)[:, :, ::16, ::16], recorded, 0)
    given = torch.tensor(ARRAYS["in:random_ids"]).long()
    logprobs, _, values = model.evaluate(ARRAYS["images_u8"], EXPECTED["instructions"], given)
    recorded = torch.tensor(ARRAYS["out:eval_random_logprob"])[:, 0]
    assert logprobs.dtype == values.dtype == torch.float32
    assert ((logprobs - recorded) / recorded).abs().max() < 4e-3  # of -65 .. -75 nats; 1.5e-3 to 2.5e-3 by processor


# --- negative controls: each trap, introduced on purpose, must fail the parity check ---
def towers(model):
    return list(model.backbone.vision_backbone.children())


def rms_eps(model, patch):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def layer_norm_eps(model, patch):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def tanh_gelu(model, patch):
    exact = F.gelu
    patch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))


def no_layer_scale(model, patch):
    for block in towers(model)[0].blocks:
        block.ls1 = block.ls2 = nn.Identity()


def swapped_channels(model, patch):
    first, second = towers(model)
    first.mean, second.mean, first.std, second.std = second.mean, first.mean, second.std, first.std


def swapped_towers(model, patch):
    eyes = model.backbone.vision_backbone
    patch.setattr(
        eyes, "forward", lambda x, recompute: torch.cat([t(x, recompute) for t in reversed(list(eyes.children()))], -1)
    )


def only_cls_dropped(model, patch):
    tower = towers(model)[0]
    whole = type(tower).forward

    def forward(images, recompute):
        tower.prefix_seen, kept = tower.prefix, whole(tower, images, recompute)
        return torch.cat([kept[:, :4] * 0, kept[:, :-4]], dim=1)  # the registers in the patches' place

    patch.setattr(tower, "forward", forward)


def last_block_too(model, patch):
    for tower in towers(model):
        tower.blocks.append(tower.blocks[-1])


def default_positions(model, patch):
    rotary = model.backbone.language_model.model.rotary_emb
    whole = type(rotary).forward

    def forward(x, position_ids):
        last = position_ids.max()  # of the widest row, which has no padding
        counted = torch.arange(position_ids.shape[1]) + last + 1 - position_ids.shape[1]
        return whole(rotary, x, counted[None].expand_as(position_ids))

    patch.setattr(rotary, "forward", forward)


def ignored_mask(model, patch):
    whole = model.backbone.hidden
    patch.setattr(model.backbone, "hidden", lambda x, mask, *a, **k: whole(x, torch.ones_like(mask), *a, **k))


def pil_clamp(model, patch):
    whole = model.fit_images
    patch.setattr(model, "fit_images", lambda x: whole(x).clamp(0, 255))


def no_antialias(model, patch):
    whole = F.interpolate
    patch.setattr(F, "interpolate", lambda *a, **k: whole(*a, **k | {"antialias": False}))


def rounded_rotary(model, patch):
    rotary = model.backbone.language_model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16)


def other_rope_theta(model, patch):
    rotary = model.backbone.language_model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.999


def prompt_without_final_space(model, patch):
    patch.setattr("common.model.openvla.PROMPT", "In: What action should the robot take to {}?\nOut:")


def case_kept(model, patch):
    ids = model.tokenizer
    patch.setattr(
        model, "prompt_ids", lambda i: [1, *ids.encode(f"In: What action should the robot take to {i}?\nOut: ").ids]
    )


def bins_off_by_one(model, patch):
    bins = model.backbone.bins
    model.backbone.bins = slice(bins.start - 1, bins.stop - 1)


def patches_before_bos(model, patch):
    whole = model.backbone.embed

    def embed(*args):
        x, mask = whole(*args)
        return torch.cat([x[:, 1:257], x[:, :1], x[:, 257:]], dim=1), mask

    patch.setattr(model.backbone, "embed", embed)


def value_from_last_token(model, patch):
    model.value_input = "hn"


TRAPS = [
    rms_eps, layer_norm_eps, tanh_gelu, no_layer_scale, swapped_channels, swapped_towers, only_cls_dropped,
    last_block_too, default_positions, ignored_mask, pil_clamp, no_antialias, rounded_rotary, other_rope_theta,
    prompt_without_final_space, case_kept, bins_off_by_one, patches_before_bos, value_from_last_token,
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_parity_check_sees(trap, checkpoint, monkeypatch):
    """A parity check so loose that a known mistake of other ports would pass it."""
    model = load_vla(checkpoint / "model")
    trap(model, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        assert_parity(model)


def test_parity_check_sees_bypassed_lm_head_adapter(checkpoint):
    """Reading lm_head.weight of an adapted layer silently gives the base weights: 2.9 nats off here."""
    model = load_vla(checkpoint / "model", adapter=checkpoint / "adapter")
    model.backbone.language_model.lm_head = model.backbone.language_model.lm_head.base_layer
    with pytest.raises(AssertionError):
        assert_parity(model, "lora_out:", intermediate=False)


def test_upstream_actions(checkpoint):
    """Un-normalised actions of the official batch-1 model; its ids are not confined to the bins and are clipped."""
    model = load_vla(checkpoint / "model")
    for official in EXPECTED["upstream_single"]:
        ours = model.actions_from_tokens([official["unconstrained_greedy_ids"]], KEY)[0].tolist()
        assert ours == pytest.approx(official["unnormalised_action"], abs=1e-6)


def test_key_map_of_the_published_model():
    """A layer more or less, a renamed key, a wrong width at full size; nothing is allocated (meta device)."""
    published = json.loads((hub_layout.FIXTURES / "openvla_7b_keymap.json").read_text())
    config = {"image_sizes": [224, 224], "n_action_bins": 256, "pad_to_multiple_of": 64}
    config["text_config"] = {"vocab_size": 32064, "pad_token_id": 32000}  # as published: the rest are LlamaConfig's
    with torch.device("meta"):
        backbone = Backbone(config)
    ours = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    dead = {k for k in published if checkpoints.is_dead(backbone, k)}
    assert ours == {k: v for k, v in published.items() if k not in dead}
    assert (len(published), len(ours), len(dead)) == (982, 939, 43)
    assert sum(np.prod(published[k]) for k in dead) == 43_080_480
    assert backbone.bins == slice(31744, 32000)


# --- images ---
def test_fit_images_is_idempotent_and_small(tiny, checkpoint):
    """A rollout buffer that stores something else than what the model saw, or 17 times more bytes than needed."""
    full = load_vla(checkpoint / "model")
    for model, shape, dtype in ((tiny, (80, 112, 3), torch.uint8), (full, (3, 224, 224), torch.float32)):
        pictures = images(2)
        fitted = model.fit_images(pictures)
        assert fitted.shape == (2, *shape) and fitted.dtype == dtype
        assert torch.equal(model.fit_images(fitted), fitted)
        instructions = EXPECTED["instructions"][:2]
        tokens, logprobs, _ = model.act(pictures, instructions, temperature=0)
        assert torch.equal(model.act(fitted, instructions, temperature=0)[1], logprobs)
        stored, direct = (model.evaluate(x, instructions, tokens) for x in (fitted, pictures))
        assert all(torch.equal(a, b) for a, b in zip(stored, direct, strict=True))


def test_frozen_eyes_look_once(tiny):
    """Stops image tokens in a rollout that are not what the update sees, or are kept while the eyes still learn."""
    model, pictures, texts = lively(load_vla("tiny", freeze_vision=True)), images(3), INSTRUCTIONS[:3]
    kept = model.rollout_inputs(pictures)
    assert kept.shape == (3, 35, 128) and not kept.requires_grad
    tokens, logprobs, values = model.act(pictures, texts, temperature=0)
    again = model.act(kept, texts, temperature=0)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs) and torch.equal(again[2], values)
    grads = []
    for inputs in (pictures, kept):
        model.zero_grad()
        model.evaluate(inputs, texts, tokens)[0].sum().backward()
        grads.append([p.grad.clone() for p in model.trainable_parameters()["policy"]])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    warm_up = load_vla(
        "tiny", value_input="h0", separate_critic=True
    )  # the policy is frozen, its critic's eyes are not
    warm_up.backbone.requires_grad_(False)
    for learns in (tiny, load_vla("tiny", lora_rank=2), warm_up):
        assert torch.equal(learns.rollout_inputs(pictures), learns.fit_images(pictures))


def test_tiny_sees_the_same_region_at_other_sizes(tiny):
    """A crop that is not scaled with the camera: 640x480 frames of the same scene must give nearly the same input."""
    smooth = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 255
    small, large = (
        F.interpolate(smooth, s, mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1) for s in ((120, 160), (480, 640))
    )
    small, large = (tiny.fit_images(x.to(torch.uint8)).float() for x in (small, large))
    assert (small - large).abs().max() < 8


@pytest.mark.parametrize("size", ["tiny", "reference"])
def test_black_and_white_images_differ(tiny, checkpoint, size):
    """Ports on newer transformers that silently ignore the image."""
    model = tiny if size == "tiny" else load_vla(checkpoint / "model")
    black, white = np.zeros((1, 120, 160, 3), np.uint8), np.full((1, 120, 160, 3), 255, np.uint8)
    tokens, logprobs, values = model.act(black, ["put carrot on plate"], temperature=0)
    other = model.evaluate(white, ["put carrot on plate"], tokens)
    assert (other[0] - logprobs).abs() > 1e-2 and (other[2] - values).abs() > 1e-5


# --- text ---
def test_padding_changes_nothing(tiny, checkpoint):
    """Prompts of different lengths in one batch: a PAD that is attended to or counted moves log-probs by 0.9."""
    for model in (tiny, load_vla(checkpoint / "model")):
        instructions = INSTRUCTIONS if model is tiny else EXPECTED["instructions"]
        assert len({len(model.prompt_ids(i)) for i in instructions}) > 1
        pictures = images(3)
        tokens, logprobs, values = model.act(pictures, instructions, temperature=0)
        for i in range(3):
            alone = model.act(pictures[i : i + 1], instructions[i : i + 1], temperature=0)
            assert torch.equal(alone[0][0], tokens[i])
            assert alone[1].item() == pytest.approx(logprobs[i].item(), abs=2e-5)
            assert alone[2].item() == pytest.approx(values[i].item(), abs=2e-5)
        together = model.evaluate(pictures, instructions, tokens)[0]
        alone = [model.evaluate(pictures[i : i + 1], instructions[i : i + 1], tokens[i : i + 1])[0] for i in range(3)]
        assert torch.allclose(torch.cat(alone), together, atol=2e-5)


def test_tiny_vocabulary_knows_the_benchmark(tiny):
    """Two objects with the same <unk> name, which no policy could tell apart."""
    from common.simulation import assets, tasks

    pack = assets.load_pack("primitive")
    for template in range(21):
        for names in ([b.name for b in pack.objects], [b.name for b in pack.plates]):
            for name in names:
                ids = tiny.prompt_ids(tasks.instruction(template, name, name))
                assert tiny.tokenizer.token_to_id("<unk>") not in ids, (template, name)
    assert tiny.tokenizer.token_to_id("<unk>") in tiny.prompt_ids("defenestrate the plate")
    assert tiny.tokenizer.get_vocab_size() <= tiny.backbone.bins.start


# --- acting ---
def test_act_and_evaluate_agree(tiny):
    """A ratio other than 1 before any update: cached decoding and one forward must score the same distribution."""
    for temperature in (1.0, 0.6):
        tokens, logprobs, values = tiny.act(images(8), INSTRUCTIONS * 2 + INSTRUCTIONS[:2], temperature)
        again = tiny.evaluate(images(8), INSTRUCTIONS * 2 + INSTRUCTIONS[:2], tokens, temperature)
        assert (again[0] - logprobs).abs().max() < 1e-4 and (again[2] - values).abs().max() < 1e-5
        assert tokens.dtype == torch.int64 and tokens.shape == (8, 7)
        assert all(x.dtype == torch.float32 and x.shape == (8,) for x in (logprobs, values, *again))
        assert not logprobs.requires_grad and again[0].requires_grad and again[2].requires_grad
        by_token = tiny.evaluate(images(8), INSTRUCTIONS * 2 + INSTRUCTIONS[:2], tokens, temperature, True)[0]
        assert by_token.shape == (8, 7) and torch.allclose(by_token.sum(1), again[0], atol=1e-5)
    assert logprobs.std() > 0.1, "the policy is too flat for this test to see an error"


def test_samples_follow_the_scored_distribution(tiny):
    """top_k = 50 or another temperature in the sampler: the behaviour policy is then not the one that is scored."""
    n = 4000
    picture = images(1).repeat(n, 0)
    tokens = tiny.act(picture, INSTRUCTIONS[:1] * n, 2.0, torch.Generator().manual_seed(0))[0][:, 0]
    counts = torch.bincount(tokens - tiny.backbone.bins.start, minlength=256).double()
    every_bin = torch.arange(256)[:, None] + torch.zeros(1, 7, dtype=torch.int64) + tiny.backbone.bins.start
    logp = tiny.evaluate(picture[:256], INSTRUCTIONS[:1] * 256, every_bin, 2.0, True)[0][:, 0].detach()
    assert logp.exp().sum() == pytest.approx(1, abs=1e-4)

    def chi2(p):  # over bins with enough expected counts; mean = degrees of freedom
        p = p.double()
        seen = p * n > 5
        return (((counts - p * n) ** 2 / (p * n))[seen].sum() / seen.sum()).item()

    assert chi2(logp.exp()) < 1.4
    assert chi2(torch.softmax(logp * 2, 0)) > 1.6  # negative control: the same scores at temperature 1
    assert (counts > 0).sum() > 60


def test_row_generators_make_a_row_independent_of_its_batch(tiny):
    """Evaluation results that depend on how many environments ran beside an episode."""
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    batch = tiny.act(images(4), INSTRUCTIONS[:1] * 4, 1.0, generators)[0]
    alone = tiny.act(images(4)[2:3], INSTRUCTIONS[:1], 1.0, [torch.Generator().manual_seed(2)])[0]
    assert torch.equal(batch[2], alone[0])
    assert not torch.equal(
        batch[2], tiny.act(images(4)[2:3], INSTRUCTIONS[:1], 1.0, [torch.Generator().manual_seed(3)])[0][0]
    )
    with pytest.raises(ValueError, match="2 generators for 4 rows"):
        tiny.act(images(4), INSTRUCTIONS[:1] * 4, 1.0, generators[:2])


def test_greedy_scores_at_temperature_one(tiny):
    """Division by zero, or log-probs of another temperature, at temperature 0."""
    tokens, logprobs, _ = tiny.act(images(2), INSTRUCTIONS[:2], temperature=0)
    assert torch.allclose(tiny.evaluate(images(2), INSTRUCTIONS[:2], tokens)[0], logprobs, atol=1e-4)


def test_actions_and_tokens(tiny):
    """Off-by-one bins, a wrong sign, a gripper that is un-normalised, the two lowest ids."""
    ids = torch.arange(256)[:, None].expand(-1, 7) + tiny.backbone.bins.start
    actions = tiny.actions_from_tokens(ids, KEY)
    low, high, _ = tiny.action_range(KEY)
    assert actions.shape == (256, 7) and actions.dtype == torch.float32
    assert (actions[1:] <= actions[:-1]).all() and torch.equal(actions[0], actions[1])
    assert torch.allclose(actions[-1, 0].double(), low[0] + (high[0] - low[0]) / 510, atol=1e-8)
    back = tiny.tokens_from_actions(actions, KEY)
    assert torch.equal(back[1:], ids[1:]) and torch.equal(back[0], ids[1])
    assert (actions[:65, 6] > 0.5).all() and (actions[65:, 6] <= 0.5).all()  # 65 bins open the gripper
    extreme = tiny.tokens_from_actions(np.array([[9.0] * 7, [-9.0] * 7]), KEY)
    assert (
        extreme[0].unique().item() == tiny.backbone.bins.start + 0
        and extreme[1].unique().item() == tiny.backbone.bins.stop - 1
    )
    with pytest.raises(ValueError, match="unknown unnorm_key 'nope'.*bridge_orig"):
        tiny.actions_from_tokens(ids, "nope")


def test_wrong_action_tokens_are_refused(tiny):
    """A number instead of an error for (N, 1), transposed or half-precision tokens."""
    tokens = tiny.act(images(2), INSTRUCTIONS[:2])[0]
    for wrong in (tokens[:, :1], tokens.T, tokens.float(), tokens[:1]):
        with pytest.raises(ValueError, match="action_tokens are"):
            tiny.evaluate(images(2), INSTRUCTIONS[:2], wrong)


# --- training ---
def loss_of(model, rows=2):
    tokens = torch.full((rows, 7), model.backbone.bins.start + 100)
    logprobs, entropies, values = model.evaluate(images(rows), INSTRUCTIONS[:rows], tokens)
    return -logprobs.mean() + values.square().mean() - 0.01 * entropies.mean()


@pytest.mark.parametrize("targets", ["all", "llm"])
def test_lora_trains_adapters_and_leaves_the_base_bit_identical(targets):
    """A base weight that drifts, an adapter that gets no gradient, LoRA on the wrong layers."""
    model = load_vla("tiny", lora_rank=4, lora_targets=targets)
    groups = model.trainable_parameters()
    named = {id(p): n for n, p in model.named_parameters()}
    policy = [named[id(p)] for p in groups["policy"]]
    assert all("lora_" in n for n in policy) and all(named[id(p)].startswith("value_head.") for p in groups["value"])
    assert any("vision_backbone" in n for n in policy) == (targets == "all")
    assert any("lm_head" in n for n in policy)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups["policy"] + groups["value"], lr=1e-2)
    for _ in range(3):  # B starts at zero, so A moves from the second step on
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    trained = set(policy) | {named[id(p)] for p in groups["value"]}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_reference_leaves_frozen_eyes_frozen():
    """Stops PEFT's switch from letting the adapters of frozen eyes learn again: they would only look frozen."""
    model = load_vla("tiny", lora_rank=2, freeze_vision=True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.reference():
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(wanted for name, wanted in before.items() if "vision" in name) and any(before.values())


def test_reference_switches_adapters_off():
    """A KL to the wrong policy: inside reference() the base must answer, outside the adapter."""
    model, base = load_vla("tiny", lora_rank=4), load_vla("tiny")
    assert load_vla("tiny", lora_rank=32).backbone.peft_config["default"].lora_alpha == 16, "the paper's scale, 0.5"
    tokens = model.act(images(2), INSTRUCTIONS[:2])[0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        adapted, plain = (m.evaluate(images(2), INSTRUCTIONS[:2], tokens)[0] for m in (model, base))
        with model.reference():
            assert torch.allclose(model.evaluate(images(2), INSTRUCTIONS[:2], tokens)[0], plain, atol=1e-5)
        assert torch.equal(model.evaluate(images(2), INSTRUCTIONS[:2], tokens)[0], adapted)
    assert (adapted - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match="needs LoRA"), base.reference():
        pass


@pytest.mark.parametrize("rank", [0, 4])
def test_precision_of_parameters(rank):
    """Rotary frequencies or trained weights rounded to bfloat16: phase errors, and RL-sized updates that vanish."""
    model = load_vla("tiny", dtype=torch.bfloat16, lora_rank=rank)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad or name.startswith("value_head") else torch.bfloat16), name
    exact = load_vla("tiny").backbone.language_model.model.rotary_emb.inv_freq
    for frozen in (model, load_vla("tiny", dtype=torch.bfloat16, trainable=False)):
        inv_freq = frozen.backbone.language_model.model.rotary_emb.inv_freq
        assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, exact)
    computed = []
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    loss_of(model).backward()
    assert set(computed) == ({torch.bfloat16} if rank else set()), "float32 matmuls cost a quarter of the speed"
    assert all(torch.isfinite(p.grad).all() for group in model.trainable_parameters().values() for p in group)


def test_activation_checkpointing_changes_no_gradient(checkpoint):
    """Recomputation that drops the mask or the positions, or that breaks the cached decoding of act."""
    model = load_vla(checkpoint / "model")
    gradients, tokens = [], torch.tensor(ARRAYS["in:random_ids"]).long()
    for on in (False, True):
        model.checkpoint_activations(on)
        model.zero_grad()
        model.evaluate(ARRAYS["images_u8"], EXPECTED["instructions"], tokens)[0].sum().backward()
        gradients.append([p.grad.clone() for p in model.trainable_parameters()["policy"]])
        assert np.array_equal(model.act(ARRAYS["images_u8"], EXPECTED["instructions"], 0)[0], ARRAYS["out:greedy_ids"])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*gradients, strict=True))
    both = load_vla("tiny", separate_critic=True)
    both.checkpoint_activations(True)
    assert both.backbone.activation_checkpointing and both.critic.activation_checkpointing


@pytest.mark.parametrize("value_input", ["h0", "hn", "concat"])
@pytest.mark.parametrize("separate_critic", [False, True])
def test_value_inputs(value_input, separate_critic):
    """Ablations where act, evaluate and value read different hidden states, or a critic that trains the policy."""
    if separate_critic and value_input != "h0":
        with pytest.raises(ValueError, match="separate_critic"):
            load_vla("tiny", value_input=value_input, separate_critic=True)
        return
    model = lively(load_vla("tiny", value_input=value_input, separate_critic=separate_critic))
    tokens, _, values = model.act(images(3), INSTRUCTIONS, temperature=0)
    assert torch.allclose(model.evaluate(images(3), INSTRUCTIONS, tokens)[2], values, atol=1e-5)
    assert torch.allclose(model.value(images(3), INSTRUCTIONS), values, atol=1e-5)
    model.evaluate(images(3), INSTRUCTIONS, tokens)[2].sum().backward()
    groups = model.trainable_parameters()
    assert any(p.grad is not None for p in groups["policy"]) != separate_critic
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in groups["value"])


def test_same_seed_same_model_and_no_side_effect():
    """Random weights that depend on, or disturb, the caller's random state."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_vla("tiny", seed=1)
    assert torch.equal(torch.rand(3), expected)
    with contextlib.suppress(StopIteration):
        torch.rand(7)
    second, third = load_vla("tiny", seed=1), load_vla("tiny", seed=2)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.backbone.projector.fc1.weight, third.backbone.projector.fc1.weight)
