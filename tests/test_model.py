"""The model is GPT-2: the same numbers as transformers, the same loss as a plain cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from config import ModelConfig
from counts import parameter_count
from cross_entropy import IGNORED
from hf_layouts import from_transformers
from model import GPT

TINY = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=61)

SIZES = {
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


def tiny_model(seed: int = 0, **changes) -> GPT:
    """Return a small GPT whose biases and norms are not at their neutral initial values."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**vars(TINY), **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_batch(rows: int, length: int, vocab_size: int = 61, seed: int = 0):
    """Return random (idx, targets), each int64 (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return windows[:, :-1].clone(), windows[:, 1:].clone()


def transformers_pair(config: ModelConfig):
    """Return (a random GPT-2 of transformers without dropout, our GPT with its weights)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    for parameter in theirs.parameters():
        # Larger than at initialisation, so that a wrong activation or mask shows.
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = GPT(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config, "theirs"))
    return theirs, ours


def plain_loss(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss from all logits of the real vocabulary at once, in float32."""
    logits = F.linear(model.hidden(idx), model.wte.weight[: model.config.vocab_size])
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize(
    "config", [TINY, ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32)]
)
def test_logits_equal_transformers(config):
    theirs, ours = transformers_pair(config)
    idx, _ = random_batch(3, config.block_size, config.vocab_size)
    with torch.no_grad():
        expected = theirs.eval()(idx).logits
        actual, loss = ours.eval()(idx)
    assert loss is None
    assert actual.shape == expected.shape == (3, config.block_size, config.vocab_size)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_four_sizes(size):
    n_layer, n_head, n_embd = size
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        model = GPT(config)
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    padding = (config.padded_vocab_size - config.vocab_size) * n_embd
    assert in_memory - padding == parameter_count(config) == SIZES[size]
    assert model.wte.weight.shape == (50304, n_embd)


@pytest.mark.parametrize("t", [0, 1, 7, 15])
def test_no_position_sees_a_later_token(t):
    model = tiny_model().eval()
    idx, _ = random_batch(2, 16)
    changed = idx.clone()
    changed[:, t] = (idx[:, t] + 1) % 61
    with torch.no_grad():
        before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :t], after[:, :t], atol=1e-6, rtol=0)
    assert (before[:, t:] - after[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_more_tokens_than_the_context_is_a_programming_error():
    with pytest.raises(ValueError, match="context of 16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.long))


# 700 rows are neither whole chunks of 512 nor whole pieces of 128; 65 rows are less than one.
@pytest.mark.parametrize(("rows", "length"), [(5, 13), (50, 14), (64, 16)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_and_gradients_equal_plain_cross_entropy(rows, length, ignored):
    model = tiny_model()
    idx, targets = random_batch(rows, length)
    skipped = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < ignored
    targets[skipped] = IGNORED
    expected = plain_loss(model, idx, targets)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    logits, loss = model(idx, targets)
    assert logits is None
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    # Scaled as an accumulated loss is, to see that the incoming gradient counts.
    (3 * loss).backward()
    for (name, parameter), grad in zip(model.named_parameters(), expected_grads, strict=True):
        difference = (parameter.grad / 3 - grad).abs().max()
        assert difference <= 1e-6 + 1e-5 * grad.abs().max(), name


def test_loss_without_gradients_is_the_same():
    model = tiny_model()
    idx, targets = random_batch(50, 14)
    _, loss = model(idx, targets)
    with torch.no_grad():
        _, evaluated = model(idx, targets)
    assert loss.requires_grad
    assert not evaluated.requires_grad
    assert evaluated.item() == loss.item()


def test_loss_of_only_ignored_targets_is_zero():
    model = tiny_model()
    idx, targets = random_batch(3, 16)
    _, loss = model(idx, torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_ignored_targets_do_not_change_the_mean():
    model = tiny_model()
    idx, targets = random_batch(4, 16)
    filled = torch.cat([idx, idx]), torch.cat([targets, torch.full_like(targets, IGNORED)])
    torch.testing.assert_close(model(*filled)[1], model(idx, targets)[1], atol=1e-6, rtol=1e-6)


def test_bfloat16_autocast_is_close_to_float32():
    model = tiny_model()
    idx, targets = random_batch(50, 14)
    _, exact = model(idx, targets)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    loss.backward()
    for parameter, grad in zip(model.parameters(), exact_grads, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - grad).norm() < 0.05 * grad.norm() + 1e-3


def test_padding_takes_no_part():
    model = tiny_model()
    idx, targets = random_batch(4, 16)
    _, loss = model(idx, targets)
    logits, _ = model(idx)
    assert logits.shape[-1] == 61
    model.wte.weight.data[61:] = 1e3
    _, planted = model(idx, targets)
    planted.backward()
    assert planted.item() == loss.item()
    assert torch.equal(model(idx)[0], logits)
    assert (model.wte.weight.grad[61:] == 0).all()
    assert (model.wte.weight.grad[:61] != 0).any(dim=1).all()


def test_initial_weights_have_gpt2s_scales():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=6, n_head=4, n_embd=128, block_size=128, vocab_size=300))
    for name, parameter in model.named_parameters():
        if name == "wte.weight":
            assert (parameter[300:] == 0).all()
            parameter = parameter[:300]
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        else:
            neutral = 0 if name.endswith("bias") else 1
            assert (parameter == neutral).all(), name


def test_dropout_acts_in_training_only():
    model = tiny_model(dropout=0.2)
    idx, targets = random_batch(4, 16)
    losses = {model(idx, targets)[1].item() for _ in range(3)}
    assert len(losses) == 3
    model(idx, targets)[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    assert model(idx, targets)[1].item() == tiny_model().eval()(idx, targets)[1].item()


def test_attention_dropout_is_that_of_the_rest_unless_it_is_given():
    idx = torch.randint(0, 50, (2, 16))
    for dropout, attention, noisy in ((0.2, 0.0, True), (0.0, 0.5, True), (0.0, 0.0, False)):
        model = tiny_model(dropout=dropout, attention_dropout=attention)
        assert model.h[0].attn.dropout == attention
        first, second = model(idx, idx)[1], model(idx, idx)[1]
        assert torch.equal(first, second) != noisy
    assert tiny_model(dropout=0.3).h[0].attn.dropout == 0.3


def test_training_follows_a_plain_transformers_loop():
    theirs, ours = transformers_pair(TINY)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    their_optimizer = torch.optim.AdamW(theirs.train().parameters(), **settings)
    our_optimizer = torch.optim.AdamW(ours.train().parameters(), **settings)
    differences, losses = [], []
    for step in range(20):
        idx, targets = random_batch(8, 16, seed=step % 4)
        their_loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
        _, our_loss = ours(idx, targets)
        for loss, optimizer in ((their_loss, their_optimizer), (our_loss, our_optimizer)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        differences.append(abs(their_loss.item() - our_loss.item()))
        losses.append(our_loss.item())
    assert max(differences) < 1e-4
    assert losses[-1] < losses[0] - 0.1
    assert (ours.wte.weight[TINY.vocab_size :] == 0).all()
