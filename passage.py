"""What a model makes of a passage, token by token: the loss of each, and what it expected instead.

Tokens of GPT-2 are bytes, and some hold only a part of a character. Such are put together to
pieces that can be shown.
"""

import codecs
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import UserError
from corpus.shards import TokenShards
from corpus.tokenizer import Tokenizer, can_encode
from curves import significant
from likelihood import windows
from model import GPT
from sample import find, load

# Tokens of the validation split that are shown where no passage is given, and of any passage.
DEFAULT_TOKENS, MOST_TOKENS = 400, 1000
LIKELIEST = 5

# Read where there is neither a passage nor data; written for this purpose.
DEFAULT_PASSAGE = (
    "The lighthouse at the end of the harbour was built in 1868, and for ninety years somebody "
    "climbed its 142 steps every evening to light the lamp. The last keeper, a quiet woman from "
    "the village, kept a notebook of the weather. On most days she wrote no more than three words: "
    "wind, sea, sky. On the day the lamp was made electric she wrote a whole page, and after that "
    "nothing. The notebook lies in the museum now, open at the empty pages."
)


def read_passage(given: str) -> str:
    """Return a passage that is given as a file or as text; raises UserError if it is no text."""
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):
        # A text may well be no possible name of a file.
        is_file = False
    try:
        text = Path(given).read_text(encoding="utf-8") if is_file else given
        text.encode("utf-8")
    except UnicodeError:
        raise UserError(
            "--passage is not UTF-8 text; convert it first, or name another file."
        ) from None
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise UserError("--passage is empty; give a text or a file of text.")
    return text


def read_by_model(run: Path, text: str, shards: TokenShards | None) -> dict[str, Any]:
    """Return what the run's newest checkpoint makes of `text`, or of how `shards` begins.

    `shards` is the validation split, if it is here; without it and without text there is a
    paragraph of our own. Raises UserError where there is no checkpoint or the text has characters
    that the model does not know.
    """
    path = find(str(run))
    model, tokenizer, _ = load(str(path))
    source = "the text given with --passage"
    if not text and shards is not None:
        count = min(DEFAULT_TOKENS + 1, len(shards))
        tokens = shards.read(np.zeros(1, np.int64), count)[0].astype(np.int64)
        source = "the beginning of the validation split"
    else:
        if not text:
            text, source = DEFAULT_PASSAGE, "a paragraph that stands for any text"
        if not can_encode(tokenizer, text):
            raise UserError("The passage has characters that are not in this model's alphabet.")
        tokens = np.concatenate([[tokenizer.eot], tokenizer.encode(text)]).astype(np.int64)
    left_out = max(len(tokens) - 1 - MOST_TOKENS, 0)
    tokens = tokens[: MOST_TOKENS + 1]
    losses, likeliest = score(model, tokens)
    nbytes = int(tokenizer.token_bytes()[tokens[1:]].sum())
    return {
        "source": source,
        "checkpoint": Path(path).name,
        "tokens": len(losses),
        "left_out": left_out,
        "loss": significant(losses.mean()),
        "bits_per_byte": significant(losses.sum() / np.log(2) / nbytes) if nbytes else None,
        "pieces": pieces(tokenizer, tokens, losses, likeliest),
    }


@torch.inference_mode()
def score(model: GPT, tokens: np.ndarray) -> tuple[np.ndarray, list[list[tuple[int, float]]]]:
    """Return the loss of every token but the first, in nats, float64, and what was likeliest there.

    The likeliest are (id, probability), the likeliest first. All is computed in float32 on the CPU.
    """
    model.eval()
    losses, likeliest = [], []
    for start, first, stop in windows(len(tokens), 1, model.config.block_size):
        logits, _ = model(torch.from_numpy(tokens[None, start : stop - 1]))
        logprobs = logits[0, first - 1 - start :].float().log_softmax(-1)
        targets = torch.from_numpy(tokens[first:stop, None])
        losses.append(-logprobs.gather(1, targets)[:, 0].double().numpy())
        values, ids = logprobs.topk(min(LIKELIEST, logprobs.size(1)))
        for row, of in zip(values.exp().tolist(), ids.tolist(), strict=True):
            likeliest.append(list(zip(of, row, strict=True)))
    return np.concatenate(losses), likeliest


def pieces(
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    losses: np.ndarray,
    likeliest: list[list[tuple[int, float]]],
) -> list[dict[str, Any]]:
    """Return the passage after its first token in pieces of whole characters.

    Each has its text and its tokens: what each is, its loss, and the likeliest with probabilities.
    """
    found, parts = [], []
    # Bytes that can never become a character do not hold back the rest.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for token, loss, expected in zip(tokens[1:].tolist(), losses, likeliest, strict=True):
        text += decoder.decode(tokenizer.decode_bytes([token]))
        choices = [[shown(tokenizer, i), significant(p, 4)] for i, p in expected]
        parts.append([shown(tokenizer, token), significant(loss, 5), choices])
        # Nothing is held back: the characters so far are whole.
        if not decoder.getstate()[0]:
            found.append({"text": text, "tokens": parts})
            text, parts = "", []
    text += decoder.decode(b"", final=True)
    if parts:
        found.append({"text": text, "tokens": parts})
    return found


def shown(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token by itself: its text, or its bytes as \xe2\x80 where they are no text."""
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
