"""What training windows are: stretches of all tokens back to back, or one document in each.

Packed (train.rows), window i is tokens [i*T, i*T + T + 1), and most windows hold ends of documents
that have nothing to do with each other. Padded, as in many trainers of Hugging Face's kind, a
window begins with a document and holds nothing after it; a longer document goes on in windows of
its own. What is predicted from a document's last token is the <|endoftext|> of the next. Nothing
need be read into the padding, since no token sees what comes after it, but computing it costs as
much as text.
"""

import numpy as np

from config import Config
from documents import open_index
from manifests import find_data, read_manifest
from shards import TokenStream


class PaddedRows:
    """The windows of a split with one document in each, or the next T tokens of a longer one.

    Where each lies is computed from the document index, which is held in memory: 24 bytes a
    document.
    """

    def __init__(self, stream: TokenStream, block_size: int, quiet: bool = True):
        """Open the stream's document index, or make it; raises UserError when it is damaged."""
        self.stream, self.block_size = stream, block_size
        places = open_index(stream, quiet)[:]
        self._starts, self._pairs = places[:-1], np.diff(places)
        # Nothing follows the last token of all.
        self._pairs[-1] -= 1
        self._ends = np.cumsum(-(-self._pairs // block_size))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def filled(self) -> float:
        """The share of all places for tokens that hold text."""
        return int(self._pairs.sum()) / (len(self) * self.block_size)

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where windows begin, and how many tokens are predicted in each, int64 each."""
        document = np.searchsorted(self._ends, indices, side="right")
        before = self.block_size * (indices - np.where(document > 0, self._ends[document - 1], 0))
        left = self._pairs[document] - before
        return self._starts[document] + before, np.minimum(left, self.block_size)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return windows, int64 (n, T + 1) with zeros as padding, and which places hold a token."""
        starts, counts = self.places(np.asarray(indices, dtype=np.int64))
        held = np.arange(self.block_size + 1) <= counts[:, None]
        tokens = np.zeros(held.shape, dtype=np.int64)
        tokens[held] = self.stream.read_pieces(starts, counts + 1)
        return tokens, held


def training_windows(config: Config) -> int:
    """Return the number of windows in an epoch of a config's data, which must be there."""
    directory = find_data(config.data)
    if config.train.rows == "padded":
        return len(PaddedRows(TokenStream(directory, "train"), config.model.block_size))
    return (read_manifest(directory).tokens("train") - 1) // config.model.block_size
