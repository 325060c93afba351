"""The model is GPT-2: transformers' logits, OpenAI's parameter counts, plain cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from config import ModelConfig
from loss import IGNORE_INDEX
from model import GPT
from modern import build_model
from tests.small_models import changed, largest_difference

TINY = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=61)
SIZES = {
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


def tiny_model(**changes) -> GPT:
    """Return a small GPT whose biases and norms are not at their neutral initial values."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**vars(TINY), **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_batch(rows: int, length: int, vocab_size: int = 61, seed: int = 0):
    """Return random (idx, targets), each int64 (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return sequences[:, :-1].clone(), sequences[:, 1:].clone()


def transformers_pair(config: ModelConfig):
    """Return (a random GPT-2 of transformers without dropout, our GPT with its weights)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, n_positions=config.block_size, **no_dropout)
    )
    for parameter in theirs.parameters():
        # Larger than at initialisation, so that a wrong activation or mask shows.
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours, weights = GPT(config), dict(theirs.transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            weight = weights[name]
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weight = weight.T  # theirs are (in, out)
            parameter[: len(weight)] = weight
    return theirs, ours


def plain_loss(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss from all logits of the real vocabulary at once, in float32."""
    logits = F.linear(model.hidden(idx), model.wte.weight[: model.config.vocab_size])
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


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


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_four_sizes(size):
    n_layer, n_head, n_embd = size
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        model = GPT(config)
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    padding = (config.padded_vocab_size - config.vocab_size) * n_embd
    assert in_memory - padding == config.num_params == SIZES[size]
    assert model.wte.weight.shape == (50304, n_embd)


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 1, 7, 15])
def test_no_position_sees_a_later_token(t):
    model = tiny_model().eval()
    idx, _ = random_batch(2, 16)
    before, after = model(idx)[0], model(changed(idx, slice(t, t + 1)))[0]
    assert t == 0 or largest_difference(before[:, :t], after[:, :t]) < 1e-6
    assert (before[:, t:] - after[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_more_tokens_than_the_context_is_a_programming_error():
    with pytest.raises(ValueError, match="context of 16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.long))


def test_loss_and_gradients_equal_plain_cross_entropy():
    """700 rows are neither whole chunks of the loss nor whole blocks of these."""
    model = tiny_model()
    idx, targets = random_batch(50, 14)
    expected = plain_loss(model, idx, targets)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    logits, loss = model(idx, targets)
    assert logits is None and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    for (name, parameter), grad in zip(model.named_parameters(), expected_grads, strict=True):
        difference = (parameter.grad - grad).abs().max()
        assert difference <= 1e-6 + 1e-5 * grad.abs().max(), name
    with torch.no_grad():
        assert model(idx, targets)[1].item() == loss.item()


def test_ignored_targets_do_not_change_the_mean():
    model = tiny_model()
    idx, targets = random_batch(4, 16)
    filled = torch.cat([idx, idx]), torch.cat([targets, torch.full_like(targets, IGNORE_INDEX)])
    torch.testing.assert_close(model(*filled)[1], model(idx, targets)[1], atol=1e-6, rtol=1e-6)


def test_bfloat16_autocast_is_close_to_float32():
    model = tiny_model()
    idx, targets = random_batch(50, 14)
    _, exact = model(idx, targets)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    assert loss.dtype == torch.float32 and loss.item() != exact.item()
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
    model.wte.weight.data[61:] = 1e3
    _, planted = model(idx, targets)
    planted.backward()
    assert planted.item() == loss.item()
    assert torch.equal(model(idx)[0], logits) and logits.shape[-1] == 61
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
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize(
    ("changes", "noisy", "of_attention"),
    [
        ({"dropout": 0.2}, True, 0.2),
        ({"dropout": 0.2, "attention_dropout": 0.0}, True, 0.0),
        ({"attention_dropout": 0.5}, True, 0.5),
        ({}, False, 0.0),
    ],
)
def test_dropout_acts_in_training_only(changes, noisy, of_attention):
    model, idx = tiny_model(**changes), random_batch(2, 16)[0]
    assert model.h[0].attn.dropout == of_attention
    losses = [model(idx, idx)[1] for _ in range(2)]
    assert torch.equal(*losses) != noisy
    losses[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(idx, idx)[1].item() == tiny_model().eval()(idx, idx)[1].item()


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_gradient_checkpointing_computes_blocks_twice_and_changes_nothing(architecture):
    config = ModelConfig(
        2, 2, 32, 16, 61, architecture=architecture, bias=architecture == "gpt2", dropout=0.1
    )
    idx, found, calls = random_batch(2, 16)[0], [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(config)
        model.gradient_checkpointing = checkpointing
        model.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
        model(idx, idx)[1].backward()
        found.append([parameter.grad for parameter in model.parameters()])
        with torch.no_grad():
            model(idx, idx)
    assert all(map(torch.equal, *found)) and len(calls) == 2 + 3
