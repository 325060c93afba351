"""WikiText: how well a model predicts articles of Wikipedia it has not seen (Merity et al. 2016).

    wikitext.task(tokenizer) -> Task     one request an article, summed up as `word_perplexity`

Where an article begins, how its text is cleaned, and how words and bytes are counted is all as in
lm-evaluation-harness, so the perplexities are those it reports. The model reads clean text, but the
divisors are the words and bytes of the text as published.

The validation and test texts of WikiText-103 are those of WikiText-2: only their training texts
differ. A file of the one therefore serves the other.
"""

import hashlib
import itertools
import math
import re
from pathlib import Path
from typing import Any

from benchmark import (
    Task,
    WebFile,
    find,
    is_published,
    read_bytes,
    require_examples,
    require_gpt2_vocabulary,
    search,
    store,
)
from config import UserError
from corpus.tokenizer import Tokenizer
from likelihood import Scores, perplexity, ratio_with_error, text_request

HUB = (
    "https://huggingface.co/datasets/Salesforce/wikitext/resolve/"
    "b08601e04326c79dfdd32d625aee71d232d685c3"
)
ROWS = {"test": 4358, "valid": 3760}
# Of the text; the hub has the same lines as a Parquet file.
SHA256 = {"test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"}

# A title stands between single equals signs, the headings below it between more of them.
TITLE = re.compile(r"= (?!=).*(?<!=) =")
BRACKETS = ("()", "[]", "{}", '""', "''")


def task(
    tokenizer: Tokenizer,
    split: str = "test",
    large: bool = False,
    limit: int | None = None,
    fetch: bool = True,
    attempts: int | None = None,
    path: Path | None = None,
) -> Task:
    """Return the articles of a split ("test" or "valid") as a task, the first `limit` if given.

    `large` names WikiText-103 instead of WikiText-2; `path` is a file to read instead of the one
    that is found or fetched. Raises UserError when it cannot be had or is not WikiText, and for a
    tokenizer that is not GPT-2's.
    """
    name = "wikitext" + ("-103" if large else "") + ("-valid" if split == "valid" else "")
    require_gpt2_vocabulary(tokenizer, name)
    file = web_file(split, large)
    path = path or _find(file, fetch, attempts)
    text = _read(path)
    pages = articles(text)
    if not pages:
        raise UserError(f"{path} has no title such as ' = Robert Boulter = '; is it WikiText?")
    published = is_published(file, path, text.count("\n"))
    pages = pages[:limit]
    require_examples(pages, path)
    return Task(
        name=name,
        protocol=(
            f"WikiText-{'103' if large else '2'} {'validation' if split == 'valid' else split}, "
            "articles one by one, cleaned as in lm-eval; per word, byte and token"
        ),
        path=path,
        published=published,
        examples=pages,
        requests=[text_request(tokenizer, clean(page)) for page in pages],
        judge=_judge,
        summarize=_summarize,
        headline="word_perplexity",
    )


def web_file(split: str, large: bool = False) -> WebFile:
    """Return the file of a split: the place of its text, and the address of its Parquet form."""
    folder, other = ("wikitext-103", "wikitext") if large else ("wikitext", "wikitext-103")
    subset = "wikitext-103-raw-v1" if large else "wikitext-2-raw-v1"
    on_hub = "validation" if split == "valid" else split
    return WebFile(
        path=f"{folder}/wiki.{split}.raw",
        address=f"{HUB}/{subset}/{on_hub}-00000-of-00001.parquet",
        sha256=SHA256.get(split),
        rows=ROWS[split],
        also=(f"{other}/wiki.{split}.raw",),
    )


def articles(text: str) -> list[str]:
    """Cut WikiText at its titles, as EleutherAI/wikitext_document_level does, into 62 for the test.

    Each begins with the line of its title and ends before the newline that precedes the next one.
    Two of the 62 are none: an article on electronics has lines that look like titles. Returns
    nothing for a text without any title.
    """
    lines = text.split("\n")
    titles = [i for i, line in enumerate(lines) if TITLE.fullmatch(line.strip())]
    if not titles:
        return []
    bounds = [0, *titles, len(lines)]
    pages = ["\n".join(lines[a:b]) for a, b in itertools.pairwise(bounds)]
    return [page for page in pages if page.strip()]


def clean(page: str) -> str:
    """Return an article with WikiText's spaces around punctuation taken back.

    The rules and their order are lm-evaluation-harness's, oddities included: a space is lost in
    "as 'they' did", and " N " becomes " 1 ". One rule of theirs is left out, which only applies to
    a quote between slashes.
    """
    page = page.replace("s '", "s'")
    for sign in "-,.":
        page = page.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":
        page = page.replace(f" {sign} ", f"{sign} ")
    for opening, closing in BRACKETS:
        start, end = re.escape(opening), re.escape(closing)
        page = re.sub(rf"{start}\s*([^{end}]*?)\s*{end}", rf"{opening}\1{closing}", page)
    for count in (4, 3, 2):
        page = page.replace(" ".join("=" * count), "=" * count)
    page = page.replace(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")
    page = page.replace(" \n", "\n").replace("\n ", "\n")
    return page.replace(" N ", " 1 ").replace(" 's", "'s")


def _judge(page: str, scores: Scores) -> dict[str, Any]:
    return {
        "nats": -float(scores.logprobs[0]),
        # As lm-evaluation-harness counts them, of the text as published: a blank at either end of
        # an article makes an empty word, which counts.
        "words": len(re.split(r"\s+", page)),
        "bytes": len(page.encode()),
        "tokens": int(scores.tokens[0]),
    }


def _summarize(facts: list[dict[str, Any]]) -> dict[str, float]:
    nats, words, sizes, tokens = (
        [fact[key] for fact in facts] for key in ("nats", "words", "bytes", "tokens")
    )
    bits, error = ratio_with_error([value / math.log(2) for value in nats], sizes)
    return {
        **perplexity("word_perplexity", nats, words),
        **perplexity("byte_perplexity", nats, sizes),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": error,
        **perplexity("token_perplexity", nats, tokens),
    }


def _read(path: Path) -> str:
    try:
        text = read_bytes(path).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); fetch the file again.") from None
    if not text.strip():
        raise UserError(f"{path} is empty; delete it, and give the command again to fetch it.")
    return text


def _find(file: WebFile, fetch: bool, attempts: int | None) -> Path:
    """Return the path of a split's text, made from the hub's Parquet file if it is nowhere yet."""
    if path := search(file):
        return path
    parquet = WebFile(str(Path(file.path).with_suffix(".parquet")), file.address)
    source = find(parquet, fetch, attempts)
    path = store(file, _text_of(source, file))
    # What was fetched has served; a copy elsewhere is not ours to remove.
    if source.parent == path.parent:
        source.unlink()
    return path


def _text_of(path: Path, file: WebFile) -> bytes:
    """Return the text in a Parquet file of lines; raises UserError unless it is the whole of it."""
    import pyarrow
    from pyarrow import parquet

    advice = "delete it, and give the command again to fetch it"
    try:
        rows = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} is not WikiText as a Parquet file ({error}); {advice}.") from error
    if len(rows) != file.rows:
        raise UserError(f"{path} has {len(rows):,} rows, not {file.rows:,}; {advice}.")
    # The hub's copy has nothing where the text has a line with one space.
    content = "".join(row or " \n" for row in rows).encode()
    if file.sha256 is not None and hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{path} has another text than WikiText (its sha256 differs); {advice}.")
    return content
