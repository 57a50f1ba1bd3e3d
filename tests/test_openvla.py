"""The model: parity with the recorded reference implementation, sampling, LoRA, critics."""

import json
import re

import hub_layout
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.model.checkpoints import load_vla, trainable_parameters
from common.model.critic import HiddenCritic, make_critic
from common.model.openvla import OpenVLA, OpenVLAConfig
from common.simulation import assets, tasks
from common.simulation.env import STATE_SIZE

INSTRUCTIONS = ["put carrot on plate", "Take the banana and put it on the plate", "put 7up can"]
ARRAYS, INFO = hub_layout.reference()
EXPECTED = INFO["expected"]
PICTURES, PROMPTS = ARRAYS["images_u8"], EXPECTED["instructions"]
GIVEN = torch.tensor(ARRAYS["in:random_ids"]).long()


def images(n, height=60, width=80):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def lively(model):
    """Random weights give nearly uniform logits, which hide errors: spread them to two nats."""
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tiny():
    return lively(load_vla("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    hub_layout.write_reference_checkpoint(folder / "model")
    hub_layout.write_reference_adapter(folder / "adapter", base=folder / "model")
    return folder


def close(name, ours, recorded, tolerance=1e-5):
    gap = ours.detach().float() - torch.as_tensor(recorded).reshape(ours.shape)
    assert gap.abs().max() <= tolerance, f"{name} differs by {gap.abs().max():.2g}"


def assert_parity(model, recorded="out:", gradients=True, reads="h0"):
    """Everything the reference recorded, in float32."""
    critic = HiddenCritic(32, reads, INFO["config"].get("value_head", (512, 128)))
    critic.load_state_dict(hub_layout.reference_tensors()[2])
    ids, mask = model.tokenize(PROMPTS)
    assert np.array_equal(ids, ARRAYS["in:input_ids"])
    assert np.array_equal(mask, ARRAYS["in:attention_mask"])
    tokens, logprobs, hidden = model.act(PICTURES, PROMPTS, temperature=0)
    assert np.array_equal(tokens, ARRAYS[recorded + "greedy_ids"])
    close("greedy log-probs", logprobs, ARRAYS[recorded + "greedy_logprob_sum"], 2e-5)
    close("values", critic(None, None, hidden, None), ARRAYS[recorded + "value"], 2e-5)
    token_logprobs, entropies, hidden = model.evaluate_actions(PICTURES, PROMPTS, GIVEN)
    logprobs, values = token_logprobs.sum(1), critic(None, None, hidden, None)
    close("log-probs", logprobs, ARRAYS[recorded + "eval_random_logprob"], 2e-5)
    close("entropies", entropies, ARRAYS[recorded + "eval_random_entropy"])
    close("values of random ids", values, ARRAYS[recorded + "eval_random_value"], 2e-5)
    if not gradients:
        return
    close("projector", model.look(model.fit_images(PICTURES))[:, ::16], ARRAYS["out:projector_sub"])
    model.zero_grad()
    (logprobs.sum() + 0.5 * values.sum() + 0.1 * entropies.sum()).backward()
    expected = next(v for k, v in EXPECTED.items() if k.startswith("grad_norms_random"))
    ours = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    ours.update({f"value_head.{key}": p.grad.norm().item() for key, p in critic.named_parameters()})
    assert ours == {key: pytest.approx(norm, rel=1e-5) for key, norm in expected.items()}


def assert_pixels(model, recorded, dtype):
    pixels = model.fit_images(PICTURES)
    assert pixels.dtype == dtype
    for i, tower in enumerate(model.vision_backbone.children()):
        mean = torch.tensor(tower.mean).to(pixels).view(3, 1, 1)
        std = torch.tensor(tower.std).to(pixels).view(3, 1, 1)
        seen = ((pixels / 255 - mean) / std)[:, :, ::16, ::16]
        close("pixels", seen, ARRAYS[recorded][:, 3 * i : 3 * i + 3], 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parity_float32(folder, checkpointing):
    """Any difference from OpenVLA and RL4VLA, also where activation checkpointing recomputes."""
    model = load_vla(folder / "model", activation_checkpointing=checkpointing)
    assert_pixels(model, "out:pixel_values_sub", torch.float32)
    assert_parity(model)
    _, hidden = model.bin_logprobs(PICTURES, PROMPTS, GIVEN)
    close("logits", model.bin_logits(hidden), ARRAYS["out:eval_random_action_logits"])
    greedy = torch.tensor(ARRAYS["out:greedy_ids"]).long()
    token_logprobs, entropies, _ = model.evaluate_actions(PICTURES, PROMPTS, greedy)
    close("log-probs of greedy ids", token_logprobs.sum(1), ARRAYS["out:eval_greedy_logprob"], 2e-5)
    close("entropies of greedy ids", entropies, ARRAYS["out:eval_greedy_entropy"])
    with pytest.raises(AssertionError, match="values"):
        assert_parity(model, reads="hn")  # a critic of another token


@pytest.mark.parametrize("merge", [False, True])
def test_parity_lora(folder, merge):
    """A wrong LoRA scale, a missed layer, an lm_head adapter that is bypassed, a wrong merge."""
    model = load_vla(folder / "adapter", merge_adapter=merge)
    assert_parity(model, "lora_out:", gradients=False)
    if not merge:
        with model.disable_adapter():
            assert_parity(model, "out:", gradients=False)
        model.merge_adapter()  # PEFT's, in place
        assert_parity(model, "lora_out:", gradients=False)
        model.unmerge_adapter()
        model.language_model.lm_head = model.language_model.lm_head.base_layer
        with pytest.raises(AssertionError):  # the base's lm_head.weight alone
            assert_parity(model, "lora_out:", gradients=False)


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_stays_near_the_reference(folder, trainable):
    """Rounded rotary frequencies: they move log-probs ten times further. Pixels are exact."""
    model = load_vla(folder / "model", dtype="bfloat16", trainable=trainable)
    assert_pixels(model, "out:pixel_values_bf16_sub", torch.bfloat16)
    logprobs = model.evaluate_actions(PICTURES, PROMPTS, GIVEN)[0].sum(1)
    recorded = torch.tensor(ARRAYS["out:eval_random_logprob"])[:, 0]
    assert logprobs.dtype == torch.float32
    assert ((logprobs - recorded) / recorded).abs().max() < 4e-3  # of -65 to -75 nats


@pytest.mark.parametrize("attribute, wrong", [
    ("variance_epsilon", 1e-5), ("eps", 1e-5), ("ls1", nn.Identity()), ("mean", (0.5, 0.5, 0.5)),
])  # fmt: skip
def test_parity_check_sees(attribute, wrong, folder, monkeypatch):
    """A parity check so loose that the smallest known mistakes of other ports would pass it."""
    model = load_vla(folder / "model")
    for module in [module for module in model.modules() if hasattr(module, attribute)]:
        monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        assert_parity(model)


def test_key_map_of_the_published_model():
    """A layer more or less, a renamed key, a wrong width at full size, on the meta device."""
    published = json.loads((hub_layout.FIXTURES / "openvla_7b_keymap.json").read_text())
    text_config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    text_config.update(vocab_size=32064, pad_token_id=32000)
    config = dict(image_sizes=[224, 224], n_action_bins=256, pad_to_multiple_of=64)
    with torch.device("meta"):
        model = OpenVLA(OpenVLAConfig(text_config=text_config, **config))
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    unread = published.keys() - ours.keys()
    assert all(published[key] == shape for key, shape in ours.items())
    assert (len(published), len(ours), len(unread)) == (982, 939, 43)
    pattern = re.compile("|".join(model.vision_backbone.unread))
    assert {key for key in published if pattern.search(key)} == unread
    assert sum(np.prod(published[key]) for key in unread) == 43_080_480
    assert model.bins == slice(31744, 32000)
    assert model.config.text_config.rms_norm_eps == 1e-6, "Llama-2's, which config.json leaves out"


@pytest.mark.parametrize("kind", ["frozen eyes", "tiny", "published"])
def test_what_a_rollout_keeps(kind, folder):
    """A rollout that keeps something else than the model saw, or 17 times the bytes needed."""
    frozen = kind == "frozen eyes"
    model = load_vla(folder / "model" if kind == "published" else "tiny", freeze_vision=frozen)
    kept = model.preprocess(images(3))
    shapes = {"frozen eyes": (20, 128), "tiny": (60, 80, 3), "published": (3, 224, 224)}
    assert kept.shape == (3, *shapes[kind])
    tokens, logprobs, _ = model.act(images(3), PROMPTS, temperature=0)
    assert torch.equal(model.act(kept, PROMPTS, temperature=0)[1], logprobs)
    gradients = []
    for obs in (images(3), kept):
        model.zero_grad()
        model.evaluate_actions(obs, PROMPTS, tokens)[0].sum().backward()
        gradients.append([p.grad.clone() for p in trainable_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.requires_grad_(False)  # while a critic warms up: eyes that learn later keep pixels
    assert model.preprocess(images(3)).shape == kept.shape


def test_tiny_vocabulary_knows_the_benchmark(tiny):
    """Two objects with the same <unk> name, which no policy could tell apart."""
    pack, unknown = assets.load_pack("primitive"), tiny.tokenizer.token_to_id("<unk>")
    for name in [body.name for body in [*pack.objects, *pack.plates]]:
        texts = [tasks.instruction(template, name, name) for template in range(21)]
        assert unknown not in tiny.tokenize(texts)[0], name
    assert unknown in tiny.tokenize(["defenestrate the plate"])[0]
    assert tiny.tokenizer.get_vocab_size() <= tiny.bins.start


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_act_and_evaluate_actions_agree(tiny, temperature):
    """A ratio other than 1 before any update, a division by zero, tokens of a wrong shape."""
    tokens, logprobs, hidden = tiny.act(images(3), INSTRUCTIONS, temperature)
    scored, entropies, forced = tiny.evaluate_actions(images(3), INSTRUCTIONS, tokens, temperature)
    assert tokens.dtype == torch.int64 and tokens.shape == scored.shape == (3, 7)
    assert logprobs.shape == entropies.shape == (3,) and hidden.shape == forced.shape == (3, 7, 128)
    assert (scored.sum(1) - logprobs).abs().max() < 1e-4
    assert (forced - hidden).abs().max() < 1e-4
    assert torch.allclose(tiny.prompt_hidden(images(3), INSTRUCTIONS), forced[:, :1], atol=1e-5)
    assert scored.requires_grad and not logprobs.requires_grad
    for wrong in (tokens[:, :1], tokens.T, tokens.float(), tokens[:1]):
        with pytest.raises(ValueError, match=str(tuple(wrong.shape))[1:-1]):
            tiny.evaluate_actions(images(3), INSTRUCTIONS, wrong)
    with pytest.raises(ValueError):
        tiny.act(images(3), INSTRUCTIONS, temperature, [torch.Generator()])
    assert logprobs.std() > 0.1, "the policy is too flat for this test to see an error"


def test_samples_follow_the_scored_distribution(tiny):
    """Another policy acts than is scored (top_k, temperature); draws that depend on other rows."""
    n, start = 2000, tiny.bins.start
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    picture = tiny.look(tiny.fit_images(images(1))).detach().expand(n, -1, -1)
    tokens = tiny.act(picture, INSTRUCTIONS[:1] * n, 3.0, generators)[0][:, 0]
    counts = torch.bincount(tokens - start, minlength=256).double()
    given = torch.full((1, 7), start)
    logp = tiny.bin_logprobs(picture[:1], INSTRUCTIONS[:1], given, 3.0)[0][0, 0].detach().double()

    def chi2(p):
        """Over its degrees of freedom, of bins with enough expected counts."""
        seen = p * n > 5
        return ((counts - p * n) ** 2 / (p * n))[seen].sum() / seen.sum()

    assert chi2(logp.exp()) < 1.4
    assert chi2(torch.softmax(logp * 3, 0)) > 1.6  # negative control: temperature 1
    assert (counts > 0).sum() > 60
    again = [torch.Generator().manual_seed(i) for i in (1998, 1999)]
    alone = tiny.act(picture[:2], INSTRUCTIONS[:1] * 2, 3.0, again)[0][:, 0]
    assert torch.equal(alone, tokens[-2:]), "a row's draw depends on the rows beside it"


def test_actions_and_tokens(tiny, folder):
    """Off-by-one bins, a wrong sign, a gripper that is un-normalised, ids beyond the bins."""
    model = load_vla(folder / "model")
    for official in EXPECTED["upstream_single"]:
        ours = model.decode_actions([official["unconstrained_greedy_ids"]])[0].tolist()
        assert ours == pytest.approx(official["unnormalised_action"], abs=1e-6)
    ids = torch.arange(256)[:, None].expand(-1, 7) + tiny.bins.start
    actions, (low, high, _) = tiny.decode_actions(ids), tiny.action_range()
    assert actions.shape == (256, 7) and actions.dtype == torch.float32
    assert (actions[1:] <= actions[:-1]).all() and torch.equal(actions[0], actions[1])
    assert torch.allclose(actions[-1, 0].double(), low[0] + (high[0] - low[0]) / 510, atol=1e-8)
    back = tiny.encode_actions(actions)
    assert torch.equal(back[1:], ids[1:]) and torch.equal(back[0], ids[1])
    assert (actions[:65, 6] > 0.5).all() and (actions[65:, 6] <= 0.5).all()  # 65 bins open it
    extreme = tiny.encode_actions(np.array([[9.0] * 7, [-9.0] * 7]))
    assert extreme.tolist() == [[tiny.bins.start] * 7, [tiny.bins.stop - 1] * 7]


def loss_of(model):
    tokens = torch.full((2, 7), model.bins.start + 100)
    token_logprobs, entropies, _ = model.evaluate_actions(images(2), INSTRUCTIONS[:2], tokens)
    return -token_logprobs.mean() - 0.01 * entropies.mean()


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_lora_trains_adapters_only(freeze_vision):
    """A base weight that drifts, an adapter without gradient, eyes that only look frozen."""
    model = load_vla("tiny", lora_rank=4, freeze_vision=freeze_vision)
    with model.disable_adapter():  # PEFT sets which adapters learn when it leaves this
        pass
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for _ in range(3):  # B starts at zero, so A moves from the second step on
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert any("lm_head" in name for name in moved)
    assert any("vision_backbone" in name for name in moved) != freeze_vision
    assert load_vla("tiny", lora_rank=32).peft_config["default"].lora_alpha == 16, "the paper's"


@pytest.mark.parametrize("rank", [0, 4])
def test_precision_of_parameters(rank):
    """Trained weights rounded to bfloat16, in which RL-sized updates vanish, or slow matmuls."""
    model = load_vla("tiny", dtype="bfloat16", lora_rank=rank)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    computed = set()
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda _, inputs, output: computed.add(output.dtype))
    loss_of(model).backward()
    assert computed == ({torch.bfloat16} if rank else set()), "LoRA's matmuls"


@pytest.mark.parametrize("kind", ["state", "h0", "hn", "concat", "separate"])
def test_a_critic_reads_and_trains_what_its_name_says(kind):
    """An ablation of another input than its name, or a critic that trains the policy by itself."""
    model = load_vla("tiny")
    critic = make_critic(kind, model, seed=1)
    tokens = torch.arange(21).reshape(3, 7) + 256
    _, _, hidden = model.evaluate_actions(images(3), INSTRUCTIONS, tokens)
    state = torch.randn(3, STATE_SIZE)
    values = critic(images(3), INSTRUCTIONS, hidden, state)
    assert values.shape == (3,) and values.dtype == torch.float32
    values.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(critic)[-2:])
    assert (model.projector.fc1.weight.grad is not None) == (kind in ("h0", "hn", "concat"))
    changed = {"state": (images(3), hidden, state + 1)}
    changed["obs"] = (images(3)[::-1].copy(), hidden, state)
    for i in range(7):
        changed[i] = (images(3), hidden + F.one_hot(torch.tensor(i), 7)[:, None], state)
    reads = set()
    for name, (obs, other, numbers) in changed.items():
        if not torch.equal(critic(obs, INSTRUCTIONS, other, numbers), values):
            reads.add(name)
    expected = {"h0": {0}, "hn": {6}, "concat": set(range(7)), "separate": {"obs"}}
    assert reads == expected.get(kind, {kind})


@pytest.mark.parametrize("rank", [0, 2])
def test_a_separate_critic_has_its_own_trained_weights(rank):
    """A critic that shares weights with the policy, or that copies 15 GB of frozen ones."""
    model = load_vla("checkpoints/tiny-warmup", lora_rank=rank, freeze_vision=True)
    critic = make_critic("separate", model, seed=1)
    policy = {id(p): p.requires_grad for p in model.parameters()}
    shared = [policy[id(p)] for p in critic.model.parameters() if id(p) in policy]
    assert shared and not any(shared)
    assert len(trainable_parameters(critic.model)) == len(trainable_parameters(model))
    obs = model.preprocess(images(3))  # image tokens of the eyes that both have
    hidden = model.prompt_hidden(obs, INSTRUCTIONS)
    assert torch.equal(critic(obs, INSTRUCTIONS, None, None), critic.head(None, None, hidden, None))
