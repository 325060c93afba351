"""Models saved by transformers load here with the same numbers, and nothing else loads at all."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_import
from config import ModelConfig, UserError
from corpus.tokenizer import gpt2_tokenizer
from hf_layouts import from_transformers
from sample import generate_text

transformers = pytest.importorskip("transformers")

PROMPTS = ["Once upon a time", "Die Straße heißt", "\n\n1, 2, 3,"]


def build(**changes) -> transformers.GPT2LMHeadModel:
    """Return a small GPT-2 of transformers, with weights large enough for varied text."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, **changes}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> transformers.GPT2LMHeadModel:
    return build()


@pytest.fixture
def saved(theirs, tmp_path) -> Path:
    """The directory of `theirs`, which a test may damage."""
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_logits(source: str | Path, model: transformers.GPT2LMHeadModel) -> None:
    idx = torch.randint(model.config.vocab_size, (2, 48))
    with torch.no_grad():
        logits, _ = hf_import.load(str(source))[0].eval()(idx)
        torch.testing.assert_close(logits, model(idx).logits, atol=1e-5, rtol=1e-5)


def test_a_saved_model_gives_the_same_logits(saved, theirs):
    assert_same_logits(saved, theirs)


def test_a_model_saved_in_several_files_gives_the_same_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(tmp_path, theirs)


def test_a_model_saved_without_its_head_gives_the_same_logits(theirs, tmp_path):
    # So are OpenAI's own weights on the hub: no "transformer." before the names, no lm_head.
    theirs.transformer.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, theirs)


def test_a_bfloat16_model_loads_as_float32(theirs, tmp_path):
    build().bfloat16().save_pretrained(tmp_path)
    model, _ = hf_import.load(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight.bfloat16().float())


def test_padding_rows_are_zero_and_the_mapping_is_pure(theirs):
    state = theirs.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=64)
    ours = from_transformers(state, config, "here")
    assert ours["wte.weight"].shape == (50304, 16)
    assert (ours["wte.weight"][50257:] == 0).all()
    assert ours["h.1.mlp.c_fc.weight"].shape == (64, 16)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_greedy_text_equals_transformers_generate(saved, theirs):
    texts = generate_text(str(saved), PROMPTS, max_tokens=24, temperature=0)
    tokenizer = gpt2_tokenizer()
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=50256,
        )
        drawn = output[0, ids.size(1) :].tolist()
        assert text == tokenizer.decode(drawn)
        assert len(set(drawn)) > 3


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "mistral"},
        {"activation_function": "relu"},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 48},
        {"layer_norm_epsilon": 1e-6},
        {"n_head": 3},
        {"n_layer": "two"},
    ],
    ids=str,
)
def test_other_architectures_are_refused(saved, changes):
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=str(next(iter(changes.values())))) as caught:
        hf_import.load(str(saved))
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_explicit_inner_width_of_four_times_the_width_is_gpt2(saved, theirs):
    edit_config(saved, n_inner=64)
    assert_same_logits(saved, theirs)


def test_a_pickle_is_never_loaded_unless_asked(saved, theirs):
    (saved / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as a pickle \(pytorch_model.bin\).*--read-pickle"):
        hf_import.load(str(saved))
    model, _ = hf_import.load(str(saved), read_pickle=True)
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_a_pickle_given_by_its_path_is_refused_by_name(saved, theirs, suffix):
    path = saved / f"weights{suffix}"
    torch.save(theirs.state_dict(), path)
    for load in (hf_import.load, generate_text):
        with pytest.raises(UserError, match=f"weights{suffix} is a pickle"):
            load(str(path), *([["a"]] if load is generate_text else []))
    model, _ = hf_import.load(str(path), read_pickle=True)
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)


class Harmful:
    """What a pickle must not get to do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_more_than_tensors_is_refused_by_name_and_runs_nothing(saved, theirs):
    (saved / "model.safetensors").unlink()
    path = saved / "pytorch_model.bin"
    for extra in ({"epoch": 3}, {"code": Harmful(saved / "ran")}, {3: torch.ones(1)}):
        torch.save({**theirs.state_dict(), **extra}, path)
        with pytest.raises(
            UserError, match=r"pytorch_model\.bin holds more than tensors"
        ) as caught:
            hf_import.load(str(saved), read_pickle=True)
        assert "\n" not in str(caught.value)
    torch.save(torch.ones(3), path)
    with pytest.raises(UserError, match="holds a Tensor"):
        hf_import.load(str(saved), read_pickle=True)
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        hf_import.load(str(saved), read_pickle=True)
    assert not (saved / "ran").exists()


def test_a_directory_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no model: there is no config\.json"):
        hf_import.load(str(tmp_path))


def test_missing_weights_are_one_sentence(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        hf_import.load(str(saved))


def test_truncated_weights_are_one_sentence(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        hf_import.load(str(saved))


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"n_layer": 3}, "holds no tensor transformer.h.2.ln_1.weight"),
        ({"n_layer": 1}, "holds a tensor transformer.h.1."),
        ({"n_embd": 32}, r"wte.weight has shape \(50257, 16\) where that makes it \(50257, 32\)"),
        ({"vocab_size": 50256}, r"wte.weight has shape \(50257, 16\)"),
        ({"n_positions": 32}, r"wpe.weight has shape \(64, 16\) where that makes it \(32, 16\)"),
    ],
)
def test_weights_of_other_sizes_are_one_sentence_with_the_tensor(saved, changes, tensor):
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=tensor) as caught:
        hf_import.load(str(saved))
    assert "\n" not in str(caught.value)


def test_weights_in_integers_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].char()
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"wpe\.weight as int8"):
        hf_import.load(str(saved))


def test_a_missing_file_of_several_is_one_sentence(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=first.name):
        hf_import.load(str(tmp_path))


def test_an_index_that_names_files_elsewhere_is_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="damaged"):
        hf_import.load(str(tmp_path))


def test_a_damaged_config_is_one_sentence(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        hf_import.load(str(saved))


def test_an_unknown_name_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no model"):
        hf_import.load(str(tmp_path / "absent"))


def test_without_a_network_a_hub_name_fails_fast(tmp_path, monkeypatch):
    from huggingface_hub import constants

    # An empty cache and a port that nobody listens on; some calls of the client retry for long.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(UserError, match="could not be downloaded"):
        hf_import.load("gpt2")
    assert time.perf_counter() - started < 5


def test_a_hub_name_in_the_cache_needs_no_network(saved, theirs, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_same_logits("gpt2", theirs)


def test_another_vocabulary_is_refused_for_text(tmp_path):
    build(vocab_size=97).save_pretrained(tmp_path)
    assert hf_import.load(str(tmp_path))[0].config.vocab_size == 97
    with pytest.raises(UserError, match="97 token ids"):
        generate_text(str(tmp_path), ["a"])
