"""Command lines: every flag documented with its default, a wrong one answered with the nearest."""
import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path


def flag(default, help: str, **metadata):
    """A dataclass field that is also a flag. `help` says what it means and why it has its value."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, suggestions in errors, which are one line
    and exit code 2."""

    def __init__(self, description: str, example: str):
        super().__init__(description=description, epilog=f"example: {example}", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names, least=None, **options):
        """A number is finite, of a size that makes sense, and at least `least`; where that is not
        given, a whole one from 0 up, another above 0."""
        if options.get("type") in (int, float):
            options["type"] = number(options["type"], least)
        return super().add_argument(*names, **options)

    def error(self, message: str):
        """argparse's own messages lose their first word, and the usage before them."""
        plain = re.sub(r"^argument (\S+): ", r"\1 ", message)
        hint = " (--help lists the flags)" if plain != message else ""
        self.exit(2, f"{self.prog}: error: {one_line(plain)}{hint}\n")

    def parse(self, argv=None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(argv)
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        for word in unknown:
            if word.startswith("-"):
                self.error(f"unknown flag {word}{nearest(word.split('=')[0], flags)}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return known

    def add_config(self, config, default_text=lambda field: f"default {field.default}"):
        """A flag for each field of a dataclass. Those not given are not in the namespace."""
        for field in dataclasses.fields(config):
            kind, choices = type(field.default), field.metadata.get("choices")
            options = {"action": argparse.BooleanOptionalAction}
            if kind is not bool:
                options = {"type": choice(choices) if choices else kind, "least": -LARGEST,
                           "metavar": f"{{{','.join(choices)}}}" if choices else
                           kind.__name__.upper()}                 # config.check has the bounds
            name = field.name.replace("_", "-")
            if "alone" in field.metadata:            # a number that may be left out, and 0
                options |= {"nargs": "?", "const": field.metadata["alone"]}
                self.add_argument(f"--no-{name}", dest=field.name, action="store_const", const=0,
                                  default=argparse.SUPPRESS, help=f"--{name} 0 (default off)")
            text = field.metadata["help"]
            if "(default" not in text:
                text += f" ({default_text(field)})"
            self.add_argument(f"--{name}", default=argparse.SUPPRESS,
                              help=text.replace("%", "%%"), **options)


TOO_LITTLE = re.compile("out of memory|not enough memory|allocate memory|ALLOC_FAILED", re.I)

# What a path can be that is not what it should be; any other OSError is the machine's.
WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
              PermissionError)


def run(main) -> None:
    """A script: an error of main() is one line. Exit code 2 for what a user got wrong, a ValueError
    or a path; 1 for what the machine could not do, such as a full disk; 130 for Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        end("stopped by Ctrl-C", 130)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        machine = isinstance(error, OSError) and not isinstance(error, WRONG_PATH)
        end(f"error: {one_line(str(error))}", 1 if machine else 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TOO_LITTLE.search(str(error)):
            raise
        end(f"error: too little memory: {one_line(str(error), 200)}; ask for less at once: frames, "
            "pixels, clips; in sampling --tiling, --bf16; in training --micro-batch 1, "
            "--checkpointing, --lora-rank", 1)


def end(text: str, code: int):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(code)


def one_line(text: str, most: int = 600) -> str:
    """Without line ends; of a long text the first and the last words."""
    text = " ".join(text.split())
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} [...] {text[-half:]}"


def read_text(path: Path) -> str:
    """Raises ValueError that names a file which is not text in UTF-8."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None


def read_json(path: Path, kind=dict):
    """What a file holds, a `kind`. Raises ValueError that names the file otherwise."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: cannot be read as JSON ({reason})") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a {kind.__name__}")
    return found


def flush(file: Path) -> None:
    """To the disk. Raises OSError where that is full: a network disk may say so only here."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def written_aside(path: Path, aside: Path | None = None):
    """Another name, to write `path` under, which appears whole or not at all: what fails or is
    stopped leaves nothing, and the file that was there before. aside: that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside or path.with_stem(f"{path.stem}.partial")
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def check_folder(path: Path, flag: str) -> None:
    """Raises ValueError unless the folder `path` is there, or can be made, and can be written."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{flag} {path}: {there} is not a folder that can be written; "
                         f"give another one")


def nearest(word: str, words) -> str:
    """'; did you mean ...?' for an error message, or what is valid when nothing is near."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(words)}"


def choice(words):
    """An argparse type that accepts one of `words` and names the nearest one otherwise."""
    def parse(word: str) -> str:
        if word not in words:
            raise argparse.ArgumentTypeError(f"{word!r} is not known{nearest(word, list(words))}")
        return word
    return parse


LARGEST = 10**9              # of any number that is given


def number(kind, least=None):
    """An argparse type, see Parser.add_argument."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {whole}number") from None
        if not abs(value) <= LARGEST:                # nan, too
            raise argparse.ArgumentTypeError(f"{text}: must be a number of at most {LARGEST}")
        if least is None and kind is float and value <= 0:
            raise argparse.ArgumentTypeError(f"{text}: must be above 0")
        if value < (least or 0):
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least or 0}")
        return value
    return parse


def positive_ints(text: str) -> list[int]:
    """An argparse type: '1,2,4' -> [1, 2, 4], all at least 1."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if not 1 <= min(values) <= max(values) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1 up with commas, "
                                         f"such as 1,2,4")
    return values
