"""Text to token ids and back: GPT-2's byte-pair encoding, characters, or any `tokenizer.json`.

gpt2_tokenizer()                OpenAI's ranks, which lie in assets/ (modified MIT licence)
train_bpe(texts, vocab_size)    a byte-level BPE, trained by the tokenizers library
find_tokenizer("DIRECTORY")     that of a data directory, a run, or a model of the hub
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from config import UserError

RANK_FILE = Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"
RANK_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # what other tokenizers call it
MOST_IDS = 65_536  # shards are uint16
RESERVED = 16  # the last ids of a trained vocabulary, <|endoftext|> the last of all
PROBE = "A  naïve\n\n\t«東京» said: 😀 it's 3.14! ﬁ½\r\n    x = [1]  "

# How GPT-2 cuts text before merging bytes: contractions, words, numbers and punctuation, each with
# the space before it, and runs of whitespace without the last one before a word (Radford et al.
# 2019). The look-ahead takes a backtracking matcher, which is up to 1.4 times slower on prose and
# gives up on a run of a million spaces. FAST_PATTERN has none, and cuts alike where no run has
# three characters and no text ends in two.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
SPLIT_PATTERN = rf"{WORDS}|\s+(?!\S)|\s+"
FAST_PATTERN = rf"^\s+$|{WORDS}|\s"
# Unicode's White_Space, which is the patterns' `\s`; Python's own has four characters more.
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
IS_SPACE = np.zeros(65536, dtype=bool)
IS_SPACE[[ord(character) for character in WHITESPACE]] = True
LONG_RUN = re.compile(rf"([{WHITESPACE}]{{2,}}(?:\Z|(?=[{WHITESPACE}])))")
# A byte-level tokenizer.json writes a byte as its character, or past the 256 where that is hidden.
BYTE_OF = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*BYTE_OF.values()}))}


class Tokenizer:
    """A vocabulary of `vocab_size` ids; `eot` is that of <|endoftext|>, which begins a document.

    In a text, "<|endoftext|>" is ordinary characters.
    """

    json: str | None = None  # the text of its `tokenizer.json`; GPT-2's is always at hand

    def __init__(self, name: str, pieces: list[bytes], eot: int, special: Iterable[int] = ()):
        """Take the bytes of each id; those of special ids are not text."""
        self.name, self.eot, self.vocab_size = name, eot, len(pieces)
        self._pieces, self._special = pieces, [eot, *special]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint16 (n,)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint16; threads may do so at the same time."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`, whose end may cut a character in two."""
        return b"".join(self._pieces[int(i)] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of text that each id stands for, int64 (vocab_size,)."""
        lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        lengths[self._special] = 0
        return lengths

    @functools.cached_property
    def sha256(self) -> str | None:
        """The sha256 of its file."""
        return self.json and hashlib.sha256(self.json.encode()).hexdigest()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE with 50,257 ids, through tiktoken."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        """Read the bundled rank table; raises UserError when it is missing or altered."""
        import tiktoken

        ranks, end = read_ranks(RANK_FILE), {END_OF_TEXT: 50256}
        named = {"name": "gpt2", "mergeable_ranks": ranks, "special_tokens": end}
        self._exact = tiktoken.Encoding(pat_str=SPLIT_PATTERN, **named)
        self._fast = tiktoken.Encoding(pat_str=FAST_PATTERN, **named)
        super().__init__("gpt2", [*sorted(ranks, key=ranks.get), END_OF_TEXT.encode()], 50256)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint16."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        text = mended(text)
        space = IS_SPACE[np.frombuffer(text.encode("utf-16-le"), dtype="<u2")]
        pair = space[1:] & space[:-1]
        runs = bool((pair[1:] & pair[:-1]).any() or pair[-1:].any())
        encoding = self._exact if runs else self._fast
        try:
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # a run of whitespace too long for the matcher: encoded apart
            parts = [self._fast.encode_to_numpy(p) for p in LONG_RUN.split(text) if p]
            return np.concatenate(parts).astype(np.uint16)


class CharTokenizer(Tokenizer):
    """One id for each character of an alphabet, and the last one for <|endoftext|>."""

    def __init__(self, alphabet: str):
        """Take an alphabet of distinct characters; raises UserError when it cannot be one."""
        if not alphabet or len(set(alphabet)) != len(alphabet) or len(alphabet) >= MOST_IDS:
            few = f"1 to {MOST_IDS - 1:,} distinct characters, not {len(alphabet):,}"
            raise UserError(f"A character tokenizer has {few}; use --tokenizer bpe.")
        self.alphabet = alphabet
        self._ids = {character: i for i, character in enumerate(alphabet)}
        super().__init__("char", [c.encode() for c in [*alphabet, END_OF_TEXT]], len(alphabet))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; raises UserError naming a character it does not have."""
        try:
            return [np.array([self._ids[c] for c in mended(t)], dtype=np.uint16) for t in texts]
        except KeyError as error:
            found = f"The character {error.args[0]!r} is not in this model's alphabet."
            raise UserError(found) from None

    @functools.cached_property
    def json(self) -> str:
        """The text of its `tokenizer.json`, as the tokenizers library reads it."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        # A token for the unknown has to be named; without one of that name it is an error.
        library = Library(models.WordLevel({**self._ids, END_OF_TEXT: self.eot}, "unknown"))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Fuse()
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return library.to_str(pretty=True)


class JSONTokenizer(Tokenizer):
    """Any tokenizer of the tokenizers library that gives texts back as they were."""

    def __init__(self, name: str, content: str):
        """Take the text of a `tokenizer.json`; raises UserError for one that is of no use here."""
        from tokenizers import Tokenizer as Library

        self.json, record = content, json.loads(content)
        self._library = Library.from_str(content)
        self._library.encode_special_tokens = True  # in a text they are ordinary characters
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab()
        count = max(ids.values(), default=-1) + 1
        if count > MOST_IDS:
            raise UserError(f"{name} has {count:,} ids, and shards have room for {MOST_IDS:,}.")
        eot = next((ids[end] for end in ENDS if end in ids), None)
        if eot is None:
            raise UserError(f"{name} has no token for the end of a text ({', '.join(ENDS)}).")
        added = {token["id"]: token["special"] for token in record["added_tokens"]}
        by_bytes = '"ByteLevel"' in json.dumps(record["decoder"])
        pieces = [b""] * count
        for token, i in ids.items():
            pieces[i] = token.encode() if i in added else _piece(token, by_bytes)
        super().__init__(name, pieces, eot, [i for i in added if added[i]])
        # Some put a space before a text; what they lose would be missing from bits per byte.
        if self.decode(self.encode(PROBE)).removeprefix(" ") != PROBE:
            raise UserError(f"{name} does not give a text back as it was; choose another.")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint16."""
        texts = [mended(text) for text in texts]
        found = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint16) for encoding in found]


def mended(text: str) -> str:
    """Return a text with replacement characters for lone surrogates, which UTF-8 cannot hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _piece(token: str, by_bytes: bool) -> bytes:
    """Return the bytes of a token as tokenizer.json writes it: byte-level, or SentencePiece's."""
    if by_bytes:
        return bytes(BYTE_OF[character] for character in token)
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def train_bpe(texts: Iterable[str], vocab_size: int) -> JSONTokenizer:
    """Return a byte-level BPE of `vocab_size` ids trained on texts, cut by GPT-2's pattern.

    The same texts give the same ids. Raises UserError when they have too few pairs to merge.
    (Sennrich et al. 2016; Radford et al. 2019, section 2.2.)
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - RESERVED, initial_alphabet=every_byte, show_progress=False
    )
    library.train_from_iterator(map(mended, texts), trainer)
    if (most := library.get_vocab_size() + RESERVED) < vocab_size:
        raise UserError(f"The training text has pairs for {most:,} ids; lower --vocab-size.")
    names = [*(f"<|reserved_{i}|>" for i in range(RESERVED - 1)), END_OF_TEXT]
    library.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return JSONTokenizer("bpe", library.to_str(pretty=True))


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """Return the process's one GPT-2 tokenizer (building it takes half a second)."""
    return GPT2Tokenizer()


def read_tokenizer(name: str, directory: Path, sha256: str | None = None) -> Tokenizer:
    """Return a tokenizer by its name and the directory of its file; UserError if that is damaged.

    With `sha256`, the file must have it.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    path = directory / TOKENIZER_FILE
    try:
        content = path.read_bytes().decode()
        if sha256 not in (None, hashlib.sha256(content.encode()).hexdigest()):
            raise ValueError("its sha256 is another")
        model = json.loads(content)["model"]
        if model["type"] == "WordLevel":
            ids = {i: token for token, i in model["vocab"].items() if token != END_OF_TEXT}
            return CharTokenizer("".join(ids[i] for i in range(len(ids))))
        return JSONTokenizer(name, content)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path} is no tokenizer that can be used ({error}).") from error


def find_tokenizer(model: str) -> Tokenizer:
    """Return that of a data directory, a run, a checkpoint or a model; raises UserError."""
    if model == "gpt2":
        return gpt2_tokenizer()
    for place in (Path(model), Path("data", model), Path("runs", model)):
        run = place.parent.parent if (place / "state.json").is_file() else place
        if (run / TOKENIZER_FILE).is_file():
            name = run.resolve().name
            return read_tokenizer("gpt2's" if name == "gpt2" else name, run)
        if (run / "manifest.json").is_file() or (run / "metrics.jsonl").is_file():
            return gpt2_tokenizer()
    from tokenizers import Tokenizer as Library

    from corpus.sources import reach_hub

    try:
        reach_hub()
        return JSONTokenizer(model, Library.from_pretrained(model).to_str())
    except UserError:
        raise
    except Exception as error:  # of the hub's client, or of its network library
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        names = "gpt2, char, bpe, a directory with a tokenizer.json, or a model of the hub"
        raise UserError(f"There is no tokenizer '{model}' ({reason}); give {names}.") from error


def can_encode(tokenizer: Tokenizer, text: str) -> bool:
    """Say whether every character of `text` has an id."""
    return not isinstance(tokenizer, CharTokenizer) or set(text) <= set(tokenizer.alphabet)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a rank table: on each line a token's bytes in base64 and its rank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The rank file {path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(content).hexdigest() != RANK_SHA256:
        reason = "is not OpenAI's rank table (its checksum differs); restore it with git."
        raise UserError(f"{path} {reason}")
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
