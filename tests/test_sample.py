"""Sampling: the cache is exact, draws are reproducible and stay inside what was asked for."""

import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sample
from command_line import run_script
from config import Config, ModelConfig, TrainConfig, UserError
from config_file import to_json
from generate import choose, distribution, generate, next_logits, row_generator
from model import GPT, KVCache
from sample import Options, continuations
from tokenizer import CharTokenizer, gpt2_tokenizer

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=50)
ALPHABET = "".join(chr(ord("!") + i) for i in range(48)) + "ß"


def tiny_model(**changes) -> GPT:
    """Return a small GPT whose weights are large enough for its text to vary."""
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    # Padding that would win every draw if it took part in one: whatever the state, one of the two
    # signs gives a logit far above all real ones.
    padding = model.wte.weight.data[model.config.vocab_size :]
    padding[0::2] = 100 * model.wte.weight.data[7]
    padding[1::2] = -100 * model.wte.weight.data[7]
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def prompt(rows: int, length: int = 5) -> torch.Tensor:
    """Return `rows` times the same random ids, int64 (rows, length)."""
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(3))
    return ids.expand(rows, -1)


def rows(steps) -> list[list[int]]:
    """Return the ids of every row."""
    return torch.stack(list(steps), dim=1).tolist()


def without_cache(model: GPT, tokens: torch.Tensor, max_tokens: int) -> list[list[int]]:
    """Greedy generation that reads the whole context for every token; the plain reference."""
    block_size = model.config.block_size
    context, drawn = tokens[:, -block_size:], []
    for _ in range(max_tokens):
        if context.size(1) > block_size:
            context = context[:, -(block_size // 2) :]
        with torch.no_grad():
            drawn.append(model(context)[0][:, -1].argmax(dim=-1))
        context = torch.cat([context, drawn[-1][:, None]], dim=1)
    return rows(drawn)


def test_cached_logits_equal_those_of_a_full_forward(model):
    tokens = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]
    cache = KVCache(model.config, 3, torch.device("cpu"), torch.float32)
    for length in range(4, 17):
        unread = tokens[:, cache.length : length]
        logits = next_logits(model, unread, cache)
        assert cache.length == length
        torch.testing.assert_close(logits, expected[:, length - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 40])
def test_greedy_equals_a_loop_without_cache_and_goes_on_past_the_context(model, length):
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    expected = without_cache(model, tokens, 45)
    assert rows(generate(model, tokens, 45, temperature=0)) == expected
    assert len(set(expected[0])) > 3


def test_a_context_of_one_token_works():
    texts = rows(generate(tiny_model(block_size=1), prompt(1), 5, temperature=0))
    assert len(texts[0]) == 5


def test_a_row_ends_with_eot_and_all_rows_end_the_iteration(model):
    free = rows(generate(model, prompt(4), 40, seed=5))
    eot = next(token for token in range(50) if all(token in row for row in free))
    ends = [row.index(eot) for row in free]
    assert len(set(ends)) > 1
    stopped = rows(generate(model, prompt(4), 40, seed=5, eot=eot))
    assert len(stopped[0]) == max(ends) + 1
    for row, unstopped, end in zip(stopped, free, ends, strict=True):
        assert row[: end + 1] == unstopped[: end + 1]
        assert set(row[end:]) == {eot}


def test_no_row_depends_on_how_many_there_are(model):
    four = rows(generate(model, prompt(4), 30, seed=2))
    assert len({tuple(row) for row in four}) == 4
    for n in (1, 2, 3):
        assert rows(generate(model, prompt(n), 30, seed=2)) == four[:n]


def test_seeds_reproduce_whatever_the_global_generator_did(model):
    first = rows(generate(model, prompt(2), 30, seed=2))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert rows(generate(model, prompt(2), 30, seed=2)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert rows(generate(model, prompt(2), 30, seed=3)) != first


def test_neighbouring_seeds_share_no_row(model):
    # Seed 2's second row must not be seed 3's first.
    texts = [tuple(r) for seed in range(4) for r in rows(generate(model, prompt(3), 12, seed=seed))]
    assert len(set(texts)) == len(texts)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().clamp(min=-1e30)
    many = 4000
    generators = [row_generator(0, row) for row in range(many)]
    ids = choose(logits.expand(many, -1), generators, 1.0, None, None)
    counts = torch.bincount(ids, minlength=4) / many
    assert counts[2] == 0
    torch.testing.assert_close(counts, logits.exp(), atol=0.03, rtol=0)


def test_the_smallest_and_the_largest_draw_stay_inside_the_support(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5, 0.0]])
    for value, expected in ((0.0, 1), (1 - 2**-53, 3)):
        uniform = torch.tensor([value], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: uniform)
        # The three likeliest are 1, 2 and 3.
        assert choose(logits, [None], 1.0, 3, None).tolist() == [expected]


def test_distribution_without_cuts_is_the_softmax():
    logits = torch.randn(3, 50)
    expected = (logits.double() / 0.7).softmax(dim=-1)
    torch.testing.assert_close(distribution(logits, 0.7), expected)
    torch.testing.assert_close(distribution(logits, 0.7, 1000, 1.0), expected)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_likeliest(k):
    logits = torch.randn(4, 50)
    probs = distribution(logits, 1.0, top_k=k)
    assert ((probs > 0).sum(dim=-1) == k).all()
    kept = probs.gather(-1, logits.topk(k).indices)
    torch.testing.assert_close(kept, logits.topk(k).values.double().softmax(dim=-1))


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [0, 0.5, 0, 0]),
        (0.49, [0, 0.5, 0, 0]),
        (0.51, [0, 0.5, 0.3, 0]),
        (0.79, [0, 0.5, 0.3, 0]),
        (0.81, [0.15, 0.5, 0.3, 0]),
        (0.96, [0.15, 0.5, 0.3, 0.05]),
        (1.0, [0.15, 0.5, 0.3, 0.05]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]]).log()
    expected = torch.tensor([expected], dtype=torch.float64)
    actual = distribution(logits, 1.0, top_p=top_p)
    torch.testing.assert_close(actual, expected / expected.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3)])
def test_top_p_stops_where_p_is_exactly_reached(top_p, count):
    probs = distribution(torch.zeros(1, 4), 1.0, top_p=top_p)
    assert (probs > 0).sum() == count


def test_top_p_counts_the_mass_that_top_k_left():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    actual = distribution(probs.log(), 1.0, top_k=2, top_p=0.55)
    torch.testing.assert_close(actual, torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform():
    logits = torch.randn(3, 50)
    assert torch.equal(distribution(logits, 1e-300).argmax(-1), logits.argmax(-1))
    assert (distribution(logits, 1e-300).amax(-1) == 1).all()
    torch.testing.assert_close(
        distribution(logits, 1e300), torch.full((3, 50), 0.02, dtype=torch.float64)
    )


@pytest.mark.parametrize("temperature", [0, 1.0, 100.0])
def test_padding_is_never_sampled(model, temperature):
    drawn = np.array(rows(generate(model, prompt(8), 60, temperature=temperature)))
    assert drawn.max() < 50
    with torch.no_grad():
        assert (model.hidden(prompt(1)) @ model.wte.weight.T).argmax(dim=-1).min() >= 50


def test_logits_that_are_not_finite_are_one_sentence():
    broken = tiny_model()
    broken.ln_f.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        next(generate(broken, prompt(1), 1))


def test_the_model_is_in_eval_mode_meanwhile_and_as_before_afterwards():
    model = tiny_model(dropout=0.5).train()
    expected = rows(generate(tiny_model(), prompt(1), 8))
    steps = generate(model, prompt(1), 8)
    first = next(steps)
    assert not model.training
    # The caller's own code runs outside inference mode, and the ids are ordinary tensors.
    assert not torch.is_inference_mode_enabled()
    assert not first.is_inference()
    assert [[first.item(), *rows(steps)[0]]] == expected
    assert model.training
    assert model.h[0].attn.training
    abandoned = generate(model, prompt(1), 8)
    next(abandoned)
    abandoned.close()
    assert model.training


def test_autocast_keeps_keys_in_its_dtype(model, monkeypatch):
    dtypes = []
    append = KVCache.append

    def spy(cache, layer, k, v):
        dtypes.append((cache.store.dtype, k.dtype))
        return append(cache, layer, k, v)

    monkeypatch.setattr(KVCache, "append", spy)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = rows(generate(model, prompt(2), 20))
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    assert len(drawn[0]) == 20
    dtypes.clear()
    rows(generate(model, prompt(2), 3))
    assert set(dtypes) == {(torch.float32, torch.float32)}


def test_a_continuation_does_not_depend_on_the_other_prompts(model):
    tokenizer = CharTokenizer(ALPHABET)
    texts = continuations(model, tokenizer, ["A", "BCD", ""], 20, 1)
    assert continuations(model, tokenizer, ["BCD"], 20, 1) == texts[1:2]
    assert continuations(model, tokenizer, ["BCD"], 20, 2) != texts[1:2]
    assert all(texts)


def test_documents_begin_with_eot_where_training_did():
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("Hi there").tolist()
    assert sample.prompt_ids(tokenizer, "Hi there", True).tolist() == [50256, *ids]
    assert sample.prompt_ids(tokenizer, "Hi there", False).tolist() == ids
    for begins_with_eot in (True, False):
        assert sample.prompt_ids(tokenizer, "", begins_with_eot).tolist() == [50256]


def test_the_stream_never_cuts_a_character(monkeypatch):
    tokenizer = gpt2_tokenizer()
    text = "naïve 漢字 🙂!"
    ids = [*tokenizer.encode(text).tolist(), tokenizer.eot]
    # Some token ends inside a character, or this test could not fail.
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
    written = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "write", written.append)
    sample.stream((torch.tensor([i]) for i in ids), tokenizer, "→ ")
    assert "".join(written) == f"→ {text}\n"
    assert len(written) > 5


def test_the_stream_shows_a_character_that_never_ends(capsys):
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("🙂").tolist()[:1]
    sample.stream((torch.tensor([i]) for i in ids), tokenizer, "a")
    assert capsys.readouterr().out == "a\ufffd\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory of the character model, with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("runs") / "little"
    directory.mkdir()
    config = Config(name="little", model=CONFIG, train=TrainConfig(tokens_per_update=64))
    (directory / "config.json").write_text(to_json(config))
    state = {"tokenizer": {"name": "char", "alphabet": ALPHABET}}
    older = tiny_model()
    older.wpe.weight.data *= -1
    checkpoint.save(directory, 1, older, [], state)
    checkpoint.save(directory, 2, tiny_model(), [], state)
    return directory


def command_line(monkeypatch, *arguments: str) -> None:
    """Run `python sample.py ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    run_script(sample.main)


def test_load_finds_runs_and_checkpoints(run, model, monkeypatch):
    older, newer = checkpoint.all_checkpoints(run)
    by_name, tokenizer, begins_with_eot = sample.load("little", str(run.parent))
    assert begins_with_eot
    assert tokenizer.alphabet == ALPHABET
    for loaded in (by_name, sample.load(str(run))[0], sample.load(str(newer))[0]):
        assert torch.equal(loaded.wpe.weight, model.wpe.weight)
        assert torch.equal(loaded.wte.weight[:50], model.wte.weight[:50])
    assert torch.equal(sample.load(str(older))[0].wpe.weight, -model.wpe.weight)
    monkeypatch.chdir(older)
    assert torch.equal(sample.load(".")[0].wpe.weight, -model.wpe.weight)


def test_a_run_comes_before_a_hub_model_of_its_name(run, tmp_path):
    (tmp_path / "gpt2").symlink_to(run)
    assert sample.load("gpt2", str(tmp_path))[0].config == CONFIG


def test_what_is_no_model_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"no run 'absent'.*gpt2-xl"):
        sample.load("absent", str(run.parent))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="no complete checkpoint"):
        sample.load(str(empty))


def test_command_streams_one_sample(run, model, monkeypatch, capsys):
    command_line(monkeypatch, str(run), "--prompt", "ABC", "--max-tokens", "12", "--seed", "8")
    expected = continuations(model, CharTokenizer(ALPHABET), ["ABC"], 12, 8)[0]
    assert capsys.readouterr().out == f"ABC{expected}\n"
    assert len(expected) > 2


def test_command_prints_several_samples_the_first_being_the_only_one(run, monkeypatch, capsys):
    arguments = ["little", "--runs-dir", str(run.parent), "--prompt", "ABC", "--max-tokens", "12"]
    command_line(monkeypatch, *arguments)
    alone = capsys.readouterr().out
    command_line(monkeypatch, *arguments, "--n", "3")
    together = capsys.readouterr().out
    assert together.startswith(f"--- sample 1 of 3 ---\n{alone}\n--- sample 2 of 3 ---\nABC")
    assert together.count("--- sample") == 3


def test_command_reads_standard_input(run, monkeypatch, capsys):
    arguments = [str(run), "--temperature", "0", "--max-tokens", "5", "--prompt"]
    command_line(monkeypatch, *arguments, "ABß")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ABß\n".encode())))
    command_line(monkeypatch, *arguments, "-")
    assert capsys.readouterr().out == expected


def test_command_says_when_it_cuts_a_long_prompt(run, monkeypatch, capsys):
    command_line(monkeypatch, str(run), "--prompt", "A" * 30, "--max-tokens", "5")
    captured = capsys.readouterr()
    # Thirty characters and the end-of-text before them.
    assert captured.err == "The prompt has 31 tokens; its last 16 are kept.\n"
    assert captured.out.startswith("A" * 30)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "A\udcff"], "--prompt is not UTF-8"),
        (["--prompt", "A", "--n", "0"], "--n must"),
        (["--prompt", "A", "--max-tokens", "0"], "--max-tokens must"),
        (["--prompt", "A", "--temperature", "-1"], "--temperature must"),
        (["--prompt", "A", "--temperature", "nan"], "--temperature must"),
        (["--prompt", "A", "--temperature", "inf"], "--temperature must"),
        (["--prompt", "A", "--top-k", "0"], "--top-k must"),
        (["--prompt", "A", "--top-p", "0"], "--top-p must"),
        (["--prompt", "A", "--top-p", "1.5"], "--top-p must"),
        (["--prompt", "A", "--topk", "3"], "did you mean --top-k?"),
        (["--prompt", "é"], "'é' is not in this model's alphabet"),
    ],
)
def test_command_refuses_in_one_sentence(run, monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, str(run), *arguments)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(UserError, match="not UTF-8"):
        sample.read_prompt("-")


def test_option_defaults_are_valid():
    sample.check_options(Options(source="gpt2", prompt="A"))
