"""config.json is believed where all of it agrees, and describes a model of ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_import
from config import UserError
from hf_configs import KEY, architecture_of
from recipes import RECIPES, build
from tests.exports import LLAMA, MODERN, assert_same_weights, exported, small
from tests.small_models import config_of, random_ids

transformers = pytest.importorskip("transformers")

NEOX_SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "vocab_size": 61,
    "use_parallel_residual": False,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_new",
    "rotary_pct": 1.0,
}
LLAMA_SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "vocab_size": 61,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
SCALED = {"rope_type": "linear", "factor": 2.0}


def foreign(kind: str, directory: Path, **changes) -> transformers.PreTrainedModel:
    """Save a model that somebody else trained, and return it."""
    torch.manual_seed(0)
    if kind == "gpt_neox":
        config = transformers.GPTNeoXConfig(**{**NEOX_SIZES, **changes})
    else:
        config = transformers.LlamaConfig(**{**LLAMA_SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


def edit(directory: Path, drop: str = "", **changes) -> None:
    path = directory / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    settings.pop(drop, None)
    path.write_text(json.dumps(settings))


def edit_key(directory: Path, **changes) -> None:
    edit(
        directory, **{KEY: {**json.loads((directory / "config.json").read_text())[KEY], **changes}}
    )


def refusal(directory: Path) -> str:
    """Return the sentence with which a model is refused."""
    with pytest.raises(UserError) as caught:
        hf_import.load(str(directory))
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_each_recipe_has_the_architecture_that_transformers_knows_it_by():
    found = {recipe: architecture_of(build(recipe, "124m").model) for recipe in RECIPES}
    neox = {"gpt2-rope", "gpt3-settings"}
    own = {"gpt2-swiglu", "modern", "modern-untied"}
    assert {recipe for recipe, kind in found.items() if kind == "gpt_neox"} == neox
    assert {recipe for recipe, kind in found.items() if kind == "gpt2_reproduction"} == own
    assert {kind for recipe, kind in found.items() if recipe not in neox | own} == {"gpt2"}


def test_a_part_more_or_less_is_another_architecture():
    assert architecture_of(config_of(**LLAMA)) == "llama"
    for change in (
        {"bias": True},
        {"norm": "layernorm"},
        {"document_mask": True},
        {"pos_emb": "learned"},
        {"activation": "gelu"},
    ):
        assert architecture_of(config_of(**{**LLAMA, **change})) == "gpt2_reproduction"
    assert architecture_of(config_of(**MODERN)) == "gpt2_reproduction"


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
@torch.no_grad()
def test_somebody_elses_model_of_our_shape_gives_the_same_logits(kind, tmp_path):
    theirs = foreign(kind, tmp_path)
    ours, saved = hf_import.load(str(tmp_path))
    assert not saved.begins_with_eot and saved.tokenizer is None
    ids = random_ids(2, 32)
    torch.testing.assert_close(ours.eval()(ids)[0], theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_saved_without_its_head_is_the_same(tmp_path):
    theirs = foreign("llama", tmp_path / "whole")
    theirs.model.save_pretrained(tmp_path / "bare")
    edit(tmp_path / "bare", tie_word_embeddings=True)
    bare, _ = hf_import.load(str(tmp_path / "bare"))
    assert torch.equal(bare.wte.weight[:61], theirs.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("gpt_neox", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gpt_neox", {"rotary_pct": 0.25}, "partial_rotary_factor is 0.25"),
        ("gpt_neox", {"rotary_emb_base": 500}, "rope_theta is 500"),
        ("gpt_neox", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gpt_neox", {"intermediate_size": 32}, "intermediate_size is 32"),
        ("gpt_neox", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ("llama", {"rope_theta": 500_000.0}, "rope_theta is 500000.0"),
        ("llama", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ("llama", {"head_dim": 16}, "head_dim is 16"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"intermediate_size": 64}, "intermediate_size is 64"),
        ("llama", {"num_attention_heads": 16, "head_dim": 2}, "hidden_size is 16"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is 'linear'",
        ),
    ],
    ids=str,
)
def test_another_shape_is_refused_by_its_key(kind, changes, key, tmp_path):
    foreign(kind, tmp_path, **changes)
    assert key in refusal(tmp_path)


def test_settings_of_older_versions_of_transformers_mean_the_same(tmp_path):
    theirs = foreign("llama", tmp_path)
    edit(tmp_path, drop="rope_parameters", rope_theta=10000.0, rope_scaling=None)
    ours, _ = hf_import.load(str(tmp_path))
    assert torch.equal(ours.wte.weight[:61], theirs.model.embed_tokens.weight)
    edit(tmp_path, rope_theta=20000.0)
    assert "rope_theta is 20000.0" in refusal(tmp_path)
    foreign("gpt_neox", tmp_path / "neox")
    edit(tmp_path / "neox", drop="rope_parameters")
    # What is not said is a quarter of the channels.
    assert "partial_rotary_factor is 0.25" in refusal(tmp_path / "neox")


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_of_another_architecture_is_named_as_there(tensor, tmp_path):
    directory = exported(small("llama"), tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, directory / "model.safetensors")
    assert f"holds no tensor {tensor}" in refusal(directory)


def test_biases_that_came_later_are_not_dropped(tmp_path):
    directory = exported(small("rotary without biases"), tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
    tensors[name][3] = 0.5
    save_file(tensors, directory / "model.safetensors")
    assert name in refusal(directory)
    edit(directory, drop=KEY)
    model, _ = hf_import.load(str(directory))
    assert model.h[1].mlp.c_fc.bias[3] == 0.5


@pytest.mark.parametrize("shape", ["gpt2", "rope", "llama", "modern"])
def test_a_file_that_contradicts_itself_is_refused(shape, tmp_path):
    model = small(shape)
    directory = exported(model, tmp_path / "out")
    described = vars(model.config)
    for changes, name in (
        ({"n_head": 1}, "n_head"),
        ({"block_size": 8}, "block_size"),
        ({"document_mask": True, "dropout": 0.5, "norm": "rmsnorm"}, ""),
    ):
        edit_key(directory, model={**described, **changes})
        if {**described, **changes} != described:
            assert f"contradicts itself: {name}" in refusal(directory)
    edit_key(directory, model=described)
    assert_same_weights(directory, model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"begins_with_eot": 1}, "begins_with_eot cannot be 1"),
        ({"step": "12"}, "step cannot be '12'"),
        ({"recipe": ["gpt2"]}, "recipe cannot be ['gpt2']"),
        ({"tokenizer": "gpt2"}, "tokenizer cannot be gpt2"),
        ({"tokenizer": {"name": 3, "sha256": None}}, "tokenizer cannot be"),
        ({"more": 1}, "should be an object of"),
        ({"model": {"n_layer": "two"}}, "Expected `int`, got `str` - at `$.n_layer`"),
        ({"model": {"n_layres": 2}}, "model has a field this version does not know: n_layres"),
        ({"model": {"n_layer": -1}}, "Expected `int` >= 1 - at `$.n_layer`"),
        ({"model": {"block_size": 0}}, "Expected `int` >= 1 - at `$.block_size`"),
        ({"model": {"n_embd": 15, "n_head": 2}}, "must be a multiple of"),
        ({"model": []}, "Expected `object`, got `array`"),
    ],
    ids=str,
)
def test_what_our_own_key_says_is_checked(changes, sentence, tmp_path):
    directory = exported(small("gpt2"), tmp_path / "out")
    edit_key(directory, **changes)
    with pytest.raises(UserError) as caught:
        hf_import.load(str(directory))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_our_type_without_our_key_is_refused(tmp_path):
    directory = exported(small("modern"), tmp_path / "out")
    edit(directory, drop=KEY)
    assert "of type gpt2_reproduction" in refusal(directory)
    edit(directory, **{KEY: 3})
    assert "should be an object" in refusal(directory)


def test_a_config_may_hold_no_surprises(tmp_path):
    directory = exported(small("gpt2"), tmp_path / "out")
    edit(directory, drop=KEY, n_layer=10**12)
    assert "too few for the 1000000000000 blocks" in refusal(directory)
    for text in ("[]", "3", '{"model_type": []}', '{"model_type": {}}', "[" * 100_000, ""):
        (directory / "config.json").write_text(text)
        refusal(directory)
