"""Models go to transformers and come back bit by bit, and compute the same while they are there."""

import json

import pytest
import torch

import hf_import
from config import UserError
from hf_configs import KEY, architecture_of
from recipes import RECIPES
from sample import generate
from tests.exports import SHAPES, assert_same_weights, exported, opened, recipe_config, small
from tests.small_models import EOT, random_ids, shaken

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_comes_back_from_transformers_bit_by_bit(shape, tmp_path):
    model = small(shape)
    theirs = opened(exported(model, tmp_path / "out"))
    assert theirs.config.model_type == architecture_of(model.config) == SHAPES[shape][0]
    theirs.save_pretrained(tmp_path / "back")
    assert_same_weights(tmp_path / "out", model)
    assert_same_weights(tmp_path / "back", model)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_transformers_saved_opens_there_again(shape, tmp_path):
    model = small(shape)
    opened(exported(model, tmp_path / "out")).save_pretrained(tmp_path / "back")
    ids = random_ids(2, 16, eots=(0, 7))
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "back")(ids).logits, model(ids)[0])


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_every_recipe_has_the_same_logits_in_transformers(recipe, tmp_path):
    model = shaken(recipe_config(recipe))
    theirs = opened(exported(model, tmp_path / "out", recipe=recipe))
    ids = random_ids(3, 64, eots=(0, 20))
    logits = theirs(ids).logits
    assert logits.shape == (3, 64, model.config.vocab_size)
    torch.testing.assert_close(logits, model(ids)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_shape_has_the_same_logits_and_loss_in_transformers(shape, tmp_path):
    model = small(shape)
    theirs = opened(exported(model, tmp_path / "out"))
    ids = random_ids(3, 16, eots=(0, 7))
    output = theirs(ids, labels=ids)
    torch.testing.assert_close(output.logits, model(ids)[0], atol=1e-5, rtol=1e-5)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation_in_transformers_equals_ours(shape, tmp_path):
    model = small(shape, block_size=256)
    # Blocks with more to say, or some models would repeat one token for ever.
    scale = 0.6 if model.config.tie_embeddings else 0.2
    with torch.no_grad():
        for name, parameter in model.h.named_parameters():
            parameter += scale * torch.randn_like(parameter) * ("weight" in name)
    theirs = opened(exported(model, tmp_path / "out"))
    # Rows that have ended would be filled up otherwise.
    theirs.generation_config.eos_token_id = None
    ids = random_ids(2, 8, eots=(0,))
    ours = torch.stack(list(generate(model, ids, 200, temperature=0)), dim=1)
    mask = torch.ones_like(ids)
    output = theirs.generate(ids, attention_mask=mask, max_new_tokens=200, do_sample=False)
    assert torch.equal(output[:, 8:], ours)
    assert len(set(ours[0].tolist())) > 3


@pytest.mark.parametrize("shape", ["gpt2", "swiglu with biases", "modern untied"])
def test_prompts_filled_up_on_the_left_are_continued_as_alone(shape, tmp_path):
    model = small(shape, block_size=64)
    theirs = opened(exported(model, tmp_path / "out"))
    short, long = random_ids(1, 5, seed=4), random_ids(1, 9, seed=5)
    batch = torch.cat([torch.cat([torch.full((1, 4), EOT), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    theirs.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "do_sample": False}
    both = theirs.generate(batch, attention_mask=mask, **options)[:, 9:]
    for row, ids in enumerate((short, long)):
        alone = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(both[row], alone[0, ids.size(1) :])


@torch.no_grad()
def test_a_cache_in_pieces_gives_the_same_logits_as_one_pass(tmp_path):
    model = small("modern")
    theirs = opened(exported(model, tmp_path / "out"))
    ids = random_ids(2, 16, eots=(0,))
    cache, parts = None, []
    for piece in ids.split(5, dim=1):
        output = theirs(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_dropout_goes_with_the_model(tmp_path):
    config = opened(exported(small("gpt2 with dropout"), tmp_path / "out")).config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.0)


def test_an_export_says_whose_it_is_and_what_begins_a_document(tmp_path):
    model = small("rope")
    directory = exported(model, tmp_path / "out", recipe="gpt2-rope")
    _, saved = hf_import.load(str(directory))
    assert (saved.begins_with_eot, saved.recipe, saved.step) == (True, "gpt2-rope", 12)
    settings = json.loads((directory / "config.json").read_text())
    assert settings["bos_token_id"] == settings["eos_token_id"] == EOT
    assert settings[KEY]["model"]["pos_emb"] == "rope"


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    first, second = small("gpt2"), small("modern")
    out = exported(first, tmp_path / "out")
    (out / "evals.json").write_text("{}")
    exported(second, out)
    assert_same_weights(out, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        exported(first, out)
    assert_same_weights(out, second)


def test_a_directory_that_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path):
        with pytest.raises(UserError, match="not an earlier export"):
            exported(small("gpt2"), place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def save_file(*arguments, **options):
        raise OSError(28, "No space left on device")

    exported(small("gpt2"), tmp_path / "out")
    monkeypatch.setattr("hf_export.save_file", save_file)
    with pytest.raises(UserError, match="No space left"):
        exported(small("modern"), tmp_path / "out")
    assert_same_weights(tmp_path / "out", small("gpt2"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exporting_changes_nothing_in_the_model(tmp_path):
    model = small("rotary without biases")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
