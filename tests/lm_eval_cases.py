"""What the tests of the adapter ask of a small model through lm-evaluation-harness."""

from typing import Any

import torch
from lm_eval.api.instance import Instance

from config import ModelConfig
from corpus.tokenizer import END_OF_TEXT, gpt2_tokenizer
from lm_eval_adapter import as_language_model
from model import GPT
from scoring import Scorer
from training.distributed import DistInfo

# Contexts and continuations as tasks make them, and as they hardly ever do.
CASES = [
    ("The cat", " sat"),
    ("The cat ", "sat on the mat"),
    ("The cat \n\n", "sat"),
    ("", "The cat"),
    ("", f"{END_OF_TEXT}The cat"),
    (f"{END_OF_TEXT}The cat", " sat"),
    ("Die Straße", " heißt 日本語 🙂"),
    ("The ca", "t sat on it"),
    (" ".join(["many words"] * 200), " and more"),
    ("The end", " again" * 100),
]

ALONE = DistInfo(0, 0, 1, torch.device("cpu"))
CONTEXT = 128


def small_model() -> GPT:
    """Return a model whose predictions vary, always the same one."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=CONTEXT)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def asked_by_harness(model: GPT, info: DistInfo = ALONE) -> Any:
    """Return the model as the harness meets it."""
    scorer = Scorer(model, info, torch.float32)
    return as_language_model(scorer, gpt2_tokenizer(), CONTEXT, batch_tokens=1024)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    """Return the harness's requests of a kind, one for each tuple of arguments."""
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]
