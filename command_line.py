"""What all scripts share: parsing the command line through tyro, and mistakes as one sentence."""

import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import TypeVar

import tyro

from config import UserError

T = TypeVar("T")

# What the surroundings of a program can do to it anywhere: full or read-only disks, missing rights.
SURROUNDINGS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO")
    if hasattr(errno, name)
}


def parse(schema: type[T], args: Sequence[str] | None = None, default: T | None = None) -> T:
    """Return `schema`, a dataclass, filled from the command line over `default`.

    Raises UserError, with the nearest name for an unknown option. `--help` prints and exits.
    """
    args = sys.argv[1:] if args is None else args
    _check_options(schema, args)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            options = {} if default is None else {"default": default}
            return tyro.cli(schema, args=args, **options)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(_sentence(complaint.getvalue())) from None


def _check_options(schema: type, args: Sequence[str]) -> None:
    """Raise UserError for an option that `schema` does not have."""
    known = [*_options(schema), "--help"]
    for arg in args:
        option = arg.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help."
            raise UserError(f"There is no option {arg.partition('=')[0]}; {hint}")


def _options(schema: type, prefix: str = "") -> list[str]:
    """Return every option of a dataclass as it is typed, groups with a dot."""
    options = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            options += _options(hints[field.name], f"{name}.")
        else:
            options.append(f"--{name}")
            if hints[field.name] is bool:
                options.append(f"--{prefix}no-{field.name.replace('_', '-')}")
    return options


def _sentence(box: str) -> str:
    """Return the first paragraph of the box in which tyro draws a complaint, as one line."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip(" │|")
        if lines and (not text or text[0] in "─╰"):
            break
        if text and text[0] not in "─╭╰":
            lines.append(text)
    return " ".join(lines).rstrip(".") + "; see --help."


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main; a UserError becomes one sentence on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        # Under torchrun every process meets the same mistake; the first of a node says it, and the
        # launcher ends the others while they wait.
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) > 0:
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough; a flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        place = error.filename or "A file or the standard output"
        print(f"error: {place} cannot be used ({error.strerror}).", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        raise SystemExit(130) from None
