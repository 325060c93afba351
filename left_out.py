"""Documents that cannot be used: counted by kind, and the first of them named."""

from dataclasses import dataclass, field
from pathlib import Path

NAMES = 5

# In the order in which they are told; a count comes before the words.
KINDS = {
    "empty": ("empty document", "empty documents"),
    "not_utf8": ("not UTF-8", "not UTF-8"),
    "unreadable": ("unreadable", "unreadable"),
    "short": ("piece below the minimum length", "pieces below the minimum length"),
}


@dataclass(frozen=True)
class Unusable:
    """A place where there is no document: its kind, a key of `KINDS`, its file, and where in it."""

    kind: str
    path: str
    part: str = ""

    @property
    def name(self) -> str:
        """The place as records name it, which should not tell where on a disk the data lay."""
        return "/".join(Path(self.path).parts[-2:]) + self.part


@dataclass
class LeftOut:
    """How many documents of each kind were left out, and where the first five of them are.

    A kind without any has no entry. Documents that nothing but their emptiness or shortness is
    wrong with are not named.
    """

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str | None = None, count: int = 1) -> None:
        """Count `count` documents of a kind, a key of `KINDS`, with the name of one."""
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
        if name is not None and len(self.names.setdefault(kind, [])) < NAMES:
            self.names[kind].append(name)

    def __add__(self, later: "LeftOut") -> "LeftOut":
        """Return these and those of a later part of the source, as one."""
        together = LeftOut(dict(self.counts), {kind: list(n) for kind, n in self.names.items()})
        for kind, count in later.counts.items():
            together.add(kind, count=count)
        for kind, names in later.names.items():
            for name in names:
                together.add(kind, name, count=0)
        return together

    def in_order(self) -> "LeftOut":
        """Return the same with the kinds in a fixed order, for a record."""
        kinds = [kind for kind in KINDS if kind in self.counts]
        return LeftOut(
            {kind: self.counts[kind] for kind in kinds},
            {kind: self.names[kind] for kind in kinds if kind in self.names},
        )

    def __str__(self) -> str:
        return "; ".join(self._told(kind) for kind in KINDS if kind in self.counts)

    def _told(self, kind: str) -> str:
        count, names = self.counts[kind], self.names.get(kind, [])
        told = f"{count:,} {KINDS[kind][count > 1]}"
        if names:
            told += f": {', '.join(names)}"
        return f"{told} and {count - len(names):,} more" if 0 < len(names) < count else told
