"""Every rung of the ladder: what it sees, where it begins, what it learns and what it makes."""

import dataclasses
import itertools
import math

import pytest
import torch

from loss import IGNORE_INDEX
from makemore.bigram import Bigram
from makemore.data import Data, batch_at, examples, load
from makemore.diagnostics import probe
from makemore.rungs import RUNGS, Settings, build, parameter_count, settings_for
from makemore.sampling import marked_words, sample
from makemore.train import train
from model import GPT

SEES = {"bigram": 1, "nn_bigram": 1, "mlp": 3, "wavenet": 8, "transformer": 16, "gpt2": 16}


def write_words(path) -> str:
    """Write 216 words of three syllables each, and return the path as it is typed."""
    syllables = ("ba", "ko", "lin", "ra", "su", "tem")
    path.write_text("\n".join(map("".join, itertools.product(syllables, repeat=3))))
    return str(path)


def some_words(directory) -> Data:
    return load(write_words(directory / "some.txt"), seed=1)


def some_text(directory) -> Data:
    (directory / "text.txt").write_text("The cat sat on a mat, and\nthe dog ran home again.\n" * 40)
    return load(str(directory / "text.txt"), seed=1)


@pytest.fixture
def words(tmp_path) -> Data:
    return some_words(tmp_path)


@pytest.fixture
def text(tmp_path) -> Data:
    return some_text(tmp_path)


def small(rung: str, data: Data, **changes) -> Settings:
    """Return settings of a rung that is narrow and trained for little."""
    settings = settings_for(rung, data, seed=1, steps=30)
    sizes = {"width": 16, "hidden": 24} if rung in ("mlp", "wavenet") else {}
    if rung in ("transformer", "gpt2"):
        sizes = {"width": 16, "n_layer": 2, "n_head": 2}
    return dataclasses.replace(settings, batch=32, **sizes, **changes)


def built(rung: str, data: Data) -> torch.nn.Module:
    model = build(settings_for(rung, data, seed=1), data.vocab_size)
    if rung == "bigram":
        model.fit(examples(data, data.train, 64, 1, 10_000))
    return model.eval()


@pytest.mark.parametrize("rung", RUNGS)
@torch.no_grad()
def test_a_place_sees_its_context_and_nothing_to_come(rung, words):
    model, place = built(rung, words), 11
    assert model.block_size == SEES[rung]
    idx = torch.randint(words.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    before = model(idx)[0]
    assert before.shape == (4, 16, words.vocab_size)

    def moved(changed: int) -> bool:
        other = idx.clone()
        other[:, changed] = (other[:, changed] + 1) % words.vocab_size
        return not torch.allclose(model(other)[0][:, place], before[:, place], atol=1e-6)

    seen = [changed for changed in range(16) if moved(changed)]
    assert seen == list(range(max(place - SEES[rung] + 1, 0), place + 1))


@pytest.mark.parametrize("rung", RUNGS)
@torch.no_grad()
def test_a_short_beginning_has_the_logits_of_a_longer_row(rung, words):
    model = built(rung, words)
    idx = batch_at(words, 8, 16, seed=1, step=1)[0]
    whole = model(idx)[0]
    for length in (1, 2, 5):
        torch.testing.assert_close(model(idx[:, :length])[0], whole[:, :length])


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kind", ["words", "text"])
@torch.no_grad()
def test_the_first_loss_is_that_of_a_uniform_guess(rung, kind, words, text):
    data = words if kind == "words" else text
    settings = settings_for(rung, data, seed=1)
    model = build(settings, data.vocab_size)
    _, loss = model(*batch_at(data, 64, settings.context, seed=1, step=1))
    assert float(loss) == pytest.approx(math.log(data.vocab_size), rel=0.02)


@pytest.mark.parametrize("rung", ["mlp", "wavenet", "transformer", "gpt2"])
def test_naive_weights_begin_by_being_sure_of_what_is_wrong(rung, words):
    settings = settings_for(rung, words, seed=1, init="naive")
    model = build(settings, words.vocab_size)
    with torch.no_grad():
        _, loss = model(*batch_at(words, 64, 16, seed=1, step=1))
    assert float(loss) > 2 * math.log(words.vocab_size)


@torch.no_grad()
def test_the_loss_is_the_mean_over_what_is_not_ignored(words):
    idx, targets = batch_at(words, 16, 16, seed=1, step=1)
    assert (targets == IGNORE_INDEX).any()
    for rung in RUNGS:
        logits, loss = built(rung, words)(idx, targets)
        losses = -logits.log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        assert float(loss) == pytest.approx(float(losses[targets != IGNORE_INDEX].mean()), rel=1e-5)


def test_counting_and_following_the_gradient_find_the_same_table(words, tmp_path):
    counted = train(words, small("bigram", words), tmp_path / "a", quiet=True)
    settings = dataclasses.replace(small("nn_bigram", words), steps=300, batch=200)
    learnt = train(words, settings, tmp_path / "b", quiet=True)
    assert counted.parameters == learnt.parameters == words.vocab_size**2
    assert learnt.losses[0] == pytest.approx(counted.losses[0], abs=0.005)
    frequent = counted.model.counts.sum(1) > 50
    table = learnt.model.table.detach().softmax(1)
    torch.testing.assert_close(
        table[frequent], counted.model.probabilities[frequent], atol=0.02, rtol=0
    )


def test_the_bigram_counts_each_pair_of_a_word_once():
    model = Bigram(3)
    model.fit([(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1, 1, 0, IGNORE_INDEX]]))])
    assert model.counts.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    torch.testing.assert_close(model.probabilities.sum(1), torch.ones(3))


def test_the_last_rung_is_the_projects_own(words):
    model = built("gpt2", words)
    assert type(model.gpt) is GPT
    padding = 64 * (model.gpt.config.padded_vocab_size - words.vocab_size)
    assert parameter_count(model) == sum(p.numel() for p in model.parameters()) - padding


@pytest.mark.parametrize("rung", RUNGS)
def test_samples_stay_inside_the_alphabet_and_repeat(rung, words, text):
    for data in (words, text):
        model = built(rung, data)
        made = sample(model, data, 6, seed=3)
        assert len(made) == 6 and made[:2] == sample(model, data, 2, seed=3)
        assert set("".join(made)) <= set(data.alphabet)
        assert max(map(len, made)) <= data.longest


def test_words_are_marked_by_whether_training_had_them(words):
    model = built("bigram", words)
    made = sample(model, words, 3, seed=5)
    known = dataclasses.replace(words, seen=frozenset(made[:1]))
    marked = marked_words(model, known, 3, seed=5)
    assert marked[0] == f"{made[0]} (seen)"
    assert marked[1:] == [f"{w} ({'seen' if w == made[0] else 'new'})" for w in made[1:]]


def test_a_probe_finds_what_naive_weights_do(words):
    batch = batch_at(words, 64, 16, seed=1, step=1)
    found = {}
    for init in ("scaled", "naive"):
        settings = settings_for("wavenet", words, seed=1, init=init, norm="none")
        found[init] = probe(build(settings, words.vocab_size), *batch)
    assert list(found["naive"]) == ["fusion of 2", "fusion of 4", "fusion of 8"]
    for name, layer in found["naive"].items():
        assert layer.saturated > 0.5 > 0.2 > found["scaled"][name].saturated
        assert layer.activations.shape == layer.gradients.shape


def test_a_probe_finds_a_dead_unit_and_leaves_the_model_alone(words):
    model = build(settings_for("mlp", words, seed=1, norm="batch"), words.vocab_size)
    batch = batch_at(words, 64, 16, seed=1, step=1)
    assert probe(model, *batch)["hidden"].dead == 0
    with torch.no_grad():
        # The normalised unit is shifted to where tanh is flat.
        model.layer[1].bias[7] = 50.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert probe(model, *batch)["hidden"].dead == pytest.approx(1 / 256)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rung", ["mlp", "wavenet", "transformer", "gpt2"])
def test_every_rung_has_hidden_layers_to_look_into(rung, words):
    settings = settings_for(rung, words, seed=1)
    probes = probe(build(settings, words.vocab_size), *batch_at(words, 32, 16, seed=1, step=1))
    assert probes and all(0 <= p.dead <= p.saturated < 0.2 for p in probes.values())
