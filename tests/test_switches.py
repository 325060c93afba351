"""The switches of model.py: each against a plain formula, all together, and none of them on."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from config import ModelConfig, UserError
from corpus.tokenizer import gpt2_tokenizer
from model import GPT, MLP, apply_rope, build_norm, rope_cos_sin, same_document
from tests.small_models import (
    CONTEXT,
    EOT,
    VOCAB,
    assert_sound,
    changed,
    config_of,
    largest_difference,
    random_ids,
    shaken,
)
from tests.tiny import CHARACTERS

LLAMA = {"pos_emb": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}


@pytest.mark.parametrize(
    ("pos_emb", "norm", "activation", "bias", "document_mask"),
    list(
        itertools.product(
            ("learned", "rope"),
            ("layernorm", "rmsnorm"),
            ("gelu", "swiglu", "relu2"),
            (True, False),
            (False, True),
        )
    ),
)
def test_all_combinations_are_sound(pos_emb, norm, activation, bias, document_mask):
    parts = {"norm": norm, "activation": activation, "bias": bias, "document_mask": document_mask}
    model = shaken(config_of(pos_emb=pos_emb, **parts))
    assert_sound(model)
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("bias") for name in names) == bias
    assert any(name.startswith("wpe") for name in names) == (pos_emb == "learned")
    assert ("ln_f.bias" in names) == (bias and norm == "layernorm")
    assert ("h.0.mlp.c_gate.weight" in names) == (activation == "swiglu")


def plain_gpt2(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """GPT-2 in a straight line; returns the logits."""
    config, w = model.config, dict(model.named_parameters())
    width = config.n_embd

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    for i in range(config.n_layer):
        q, k, v = (
            part.unflatten(-1, (config.n_head, -1)).transpose(1, 2)
            for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(width, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), w["wte.weight"])[..., : config.vocab_size]


@torch.no_grad()
def test_without_switches_it_is_gpt2_bit_for_bit():
    model, idx = shaken(config_of()), random_ids(3, CONTEXT, eots=(5,))
    assert torch.equal(model(idx)[0], plain_gpt2(model, idx))
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [f"h.{layer}.{part}" for layer in range(2) for part in parts] + ["ln_f"]
    expected = {f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")}
    names = {name for name, _ in model.named_parameters()}
    assert names == expected | {"wte.weight", "wpe.weight"}


def test_rotation_is_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    q, k, positions = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.arange(9)
    angles = positions[:, None] * 10_000 ** -(torch.arange(0, 8, 2) / 8)
    twice = torch.cat([angles, angles], -1)[None]
    theirs = llama.apply_rotary_pos_emb(q, k, twice.cos(), twice.sin())
    rope = rope_cos_sin(positions, 8)
    torch.testing.assert_close((apply_rope(q, rope), apply_rope(k, rope)), theirs)
    half = apply_rope(q.bfloat16(), rope)
    assert half.dtype == torch.bfloat16 and largest_difference(half.float(), theirs[0]) < 0.03
    # Rows may have positions of their own.
    rows = apply_rope(q, rope_cos_sin(torch.stack([positions, positions + 5]), 8))
    assert torch.equal(rows[0], apply_rope(q, rope)[0])
    assert torch.equal(rows[1], apply_rope(q, rope_cos_sin(positions + 5, 8))[1])


@torch.no_grad()
def test_only_distances_count_with_rope():
    idx, positions = random_ids(2, CONTEXT), torch.arange(CONTEXT).expand(2, -1)
    mask = torch.full((1, 1, CONTEXT, CONTEXT), -torch.inf).triu(1)
    model = shaken(config_of(pos_emb="rope"))
    here = model.hidden(idx, positions=positions, mask=mask)
    assert largest_difference(here, model.hidden(idx, positions=positions + 5, mask=mask)) < 1e-5
    assert largest_difference(here, model.hidden(idx, positions=2 * positions, mask=mask)) > 1e-2


@torch.no_grad()
def test_rms_norm_is_its_formula():
    norm = build_norm(config_of(norm="rmsnorm"))
    torch.manual_seed(0)
    x = 3 + 0.01 * torch.randn(5, 16)
    norm.weight.copy_(torch.randn(16))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert largest_difference(norm(x), expected) < 1e-6
    bare = build_norm(config_of(norm="rmsnorm"), gain=False)
    assert list(bare.parameters()) == []
    assert largest_difference(bare(x), expected / norm.weight) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu2"])
def test_mlp_is_its_formula(activation, bias):
    torch.manual_seed(0)
    mlp, x = MLP(config_of(activation=activation, bias=bias)), torch.randn(3, 5, 16)

    def linear(x, layer):
        return x @ layer.weight.T + (layer.bias if bias else 0)

    hidden = linear(x, mlp.c_fc)
    if activation == "gelu":
        cubic = hidden + 0.044715 * hidden**3
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
    elif activation == "swiglu":
        gate = linear(x, mlp.c_gate)
        hidden = hidden * gate / (1 + torch.exp(-gate))
    else:
        hidden = torch.where(hidden > 0, hidden**2, 0)
    assert largest_difference(mlp(x), linear(hidden, mlp.c_proj)) < 1e-6


@pytest.mark.parametrize(
    ("n_embd", "hidden"), [(128, 344), (768, 2048), (1024, 2728), (1280, 3416), (1600, 4264)]
)
def test_swiglu_has_as_many_parameters(n_embd, hidden):
    plain, gated = (
        ModelConfig(n_embd=n_embd, n_head=4, activation=activation)
        for activation in ("gelu", "swiglu")
    )
    assert (plain.mlp_width, gated.mlp_width) == (4 * n_embd, hidden)
    assert abs(gated.num_params / plain.num_params - 1) < 0.01


@torch.no_grad()
def test_llama_is_four_switches():
    transformers = pytest.importorskip("transformers")
    ours = shaken(config_of(**LLAMA, n_embd=24))
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=ours.config.mlp_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        hidden_act="silu",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.model.embed_tokens.weight.copy_(ours.wte.weight[:VOCAB])
    theirs.model.norm.weight.copy_(ours.ln_f.weight)
    for block, layer in zip(ours.h, theirs.model.layers, strict=True):
        layer.input_layernorm.weight.copy_(block.ln_1.weight)
        layer.post_attention_layernorm.weight.copy_(block.ln_2.weight)
        q, k, v = block.attn.c_attn.weight.chunk(3)
        attention, mlp = layer.self_attn, layer.mlp
        for projection, weight in (
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
            (attention.o_proj, block.attn.c_proj.weight),
            (mlp.gate_proj, block.mlp.c_gate.weight),
            (mlp.up_proj, block.mlp.c_fc.weight),
            (mlp.down_proj, block.mlp.c_proj.weight),
        ):
            projection.weight.copy_(weight)
    idx = random_ids(3, CONTEXT)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gpt_neox_is_rope_alone():
    transformers = pytest.importorskip("transformers")
    ours = shaken(config_of(pos_emb="rope"))
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rotary_pct=1.0,
        use_parallel_residual=False,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
    )
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    theirs.gpt_neox.embed_in.weight.copy_(ours.wte.weight[:VOCAB])
    pairs = [(theirs.gpt_neox.final_layer_norm, ours.ln_f)]
    for block, layer in zip(ours.h, theirs.gpt_neox.layers, strict=True):
        pairs += [
            (layer.input_layernorm, block.ln_1),
            (layer.post_attention_layernorm, block.ln_2),
            (layer.attention.dense, block.attn.c_proj),
            (layer.mlp.dense_h_to_4h, block.mlp.c_fc),
            (layer.mlp.dense_4h_to_h, block.mlp.c_proj),
        ]
        # Theirs holds queries, keys and values head by head.
        qkv = layer.attention.query_key_value
        for target, source in ((qkv.weight, "weight"), (qkv.bias, "bias")):
            rows = getattr(block.attn.c_attn, source).unflatten(0, (3, 2, 8))
            target.copy_(rows.transpose(0, 1).reshape(target.shape))
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    idx = random_ids(3, CONTEXT)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_documents_begin_with_the_last_id_of_a_vocabulary():
    for tokenizer in (gpt2_tokenizer(), CHARACTERS):
        assert tokenizer.eot == tokenizer.vocab_size - 1


def test_mask_of_two_documents():
    sees = same_document(torch.tensor([[1, EOT, 2, EOT]]), EOT)
    assert sees.shape == (1, 1, 4, 4)
    assert sees[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("pos_emb", ["learned", "rope"])
def test_a_masked_document_knows_nothing_of_those_before_it(pos_emb, architecture):
    parts = {"pos_emb": pos_emb, "architecture": architecture, "bias": architecture == "gpt2"}
    masked = shaken(config_of(**parts, document_mask=True))
    plain = shaken(config_of(**parts))
    idx = random_ids(3, CONTEXT, eots=(4, 9))
    for model, knows in ((masked, False), (plain, True)):
        before = model(idx)[0]
        for seen, document in ((slice(0, 4), slice(4, 16)), (slice(5, 9), slice(9, 16))):
            after = model(changed(idx, seen))[0]
            assert (largest_difference(after[:, document], before[:, document]) > 1e-3) == knows
    # Only distances count with RoPE: it is as if the document stood alone.
    alone = plain(idx[:, 9:])[0]
    difference = largest_difference(masked(idx)[0][:, 9:], alone)
    assert difference < 1e-5 if pos_emb == "rope" else difference > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_documents_begin_with_the_id_that_the_config_names(architecture):
    parts = {"architecture": architecture, "bias": architecture == "gpt2", "document_mask": True}
    last, other = shaken(config_of(**parts)), shaken(config_of(**parts, eot=5))
    idx = random_ids(2, CONTEXT) % 50 + 6
    for eot, own, foreign in ((EOT, last, other), (5, other, last)):
        idx[:, 9] = eot
        after = changed(idx, slice(9))
        for model, knows in ((own, False), (foreign, True)):
            difference = largest_difference(model(idx)[0][:, 9:], model(after)[0][:, 9:])
            assert (difference > 1e-3) == knows


@torch.no_grad()
def test_a_document_mask_without_documents_changes_nothing():
    masked, plain = shaken(config_of(document_mask=True)), shaken(config_of())
    for eots in ((), (0,)):
        idx = random_ids(3, CONTEXT, eots)
        assert largest_difference(masked(idx)[0], plain(idx)[0]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "naming"),
    [
        ({"qk_norm": True}, "model.qk_norm"),
        ({"zero_init_proj": True}, "model.zero_init_proj"),
        ({"x0_residual": True}, "model.x0_residual"),
        ({"value_residual": True}, "model.value_residual"),
        ({"logit_softcap": 15.0}, "model.logit_softcap"),
        ({"logit_softcap": -1.0}, "model.logit_softcap"),
        ({"logit_softcap": math.nan}, "model.logit_softcap"),
        ({"tie_embeddings": False}, "--model.architecture modern"),
        ({"architecture": "modern"}, "--model.no-bias"),
        ({"n_embd": 12, "n_head": 4, "pos_emb": "rope"}, "model.pos_emb rope"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_in_a_sentence(changes, naming):
    with pytest.raises(UserError) as error:
        ModelConfig(**changes)
    text = str(error.value)
    assert naming in text and "\n" not in text and text.endswith(".")
