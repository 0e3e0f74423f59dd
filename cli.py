"""Command lines: every flag documented with its default, a wrong one answered with the nearest."""
import argparse
import dataclasses
import difflib
import os
import sys
from pathlib import Path


def flag(default, help: str, **metadata):
    """A dataclass field that is also a flag. `help` says what it means and why it has its value."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, suggestions in errors, exit code 2."""

    def __init__(self, description: str, example: str):
        super().__init__(description=description, epilog=f"example: {example}", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

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
                options = {"type": choice(choices) if choices else kind,
                           "metavar": kind.__name__.upper()}
            name = field.name.replace("_", "-")
            if "alone" in field.metadata:            # a number that may be left out, and 0
                options |= {"nargs": "?", "const": field.metadata["alone"]}
                self.add_argument(f"--no-{name}", dest=field.name, action="store_const", const=0,
                                  default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            text = field.metadata["help"]
            if "(default" not in text:
                text += f" ({default_text(field)})"
            self.add_argument(f"--{name}", default=argparse.SUPPRESS,
                              help=text.replace("%", "%%"), **options)


def run(main) -> None:
    """A script: what a user got wrong, an error of main(), is one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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


def positive_ints(text: str) -> list[int]:
    """An argparse type: '1,2,4' -> [1, 2, 4], all at least 1."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1 up with commas, "
                                         f"such as 1,2,4")
    return values
