"""Command lines: numbers, recipes, and mistakes that end a command with one line."""

import argparse
import difflib
import functools
import itertools
import math
import os
import shlex
import sys
from pathlib import Path

import torch


def one_line(error):
    """The message of an error, without the traceback that a loader process puts before it."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8; save it as UTF-8"
    text = str(error).rpartition("util.files.DataError: ")[2]
    return " ".join(text.split()) or repr(error)


def number(kind, zero=False, most=2**32, words=()):
    """An argparse type: a number greater than 0, or 0 too, and at most `most`; or a word."""
    what = "a whole number" if kind is int else "a number"
    least = "of at least 0" if zero else "of at least 1" if kind is int else "greater than 0"

    def parse(text):
        if text in words:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= most or zero and value == 0):
            bound = f" and at most {most}" if value > most or most < 2**32 else ""
            expected = " or ".join([f"{what} {least}{bound}", *words])
            raise argparse.ArgumentTypeError(f"expected is {expected}, not {text!r}")
        return value

    return parse


def split_recipe_line(line):
    """The words of a line of flags: quotes hold spaces; # at the start of a word is a comment.
    Raises ValueError."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    found = list(itertools.takewhile(lambda word: not word.startswith("#"), lexer))
    if found[-1:] == ["\\"]:
        raise ValueError(r"leave out \ at the end of a line; a table's row is one line")
    return found


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves the description as it is and shows defaults, where there are any."""

    def _get_help_string(self, action):
        none = action.default in (None, False, [])
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Mistakes get one line; @FILE stands for the flags in a file, which may have comments."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args = self.expanded(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(self.filled(args), namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self.nearest(unknown[0])}")
        return parsed

    def expanded(self, args):
        """The words of a command line with those of a file in the place of @FILE."""
        found = []
        for word in args:
            if not word.startswith("@"):
                found.append(word)
                continue
            try:
                lines = Path(word[1:]).read_text(encoding="utf-8-sig").splitlines()
                found += self.expanded([flag for line in lines for flag in split_recipe_line(line)])
            except (OSError, ValueError, RecursionError) as error:
                self.error(f"{word}: cannot be read as a file of flags ({one_line(error)})")
        return found

    def filled(self, args):
        """The words of a command line if none of them is empty, as "$NAME" may turn out."""
        for before, word in zip(["", *args], args):
            if word == "" or word.startswith("--") and word.endswith("="):
                where = before if before.startswith("-") else word.rstrip("=") or "an argument"
                self.error(f"{where} is empty; was it meant to be a variable that is not set?")
        return args

    def nearest(self, word):
        """What an unknown word may have been meant to be, as the end of a message."""
        if word.endswith(".txt") and Path(word).is_file():
            return f"; did you mean @{word}?"
        meant, parsers = {}, [self]
        for action in self._actions:
            parsers += action.choices.values() if isinstance(action.choices, dict) else []
        for action in (action for parser in parsers for action in parser._actions):
            for option in action.option_strings:
                meant[option.lstrip("-")] = meant[str(action.help).split(",")[0]] = option
        tidy = word.split("=")[0].lstrip("-")
        for form in (tidy, tidy.replace("_", " ")):  # as a flag, as in a help text
            for near in difflib.get_close_matches(form, meant, n=1):
                return f"; did you mean {meant[near]}?"
        return ""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


class InitAction(argparse.Action):
    """`--init A --init_parts x --init B` as [[A, [x]], [B, None]]: what to take of each."""

    def __call__(self, parser, namespace, value, option=None):
        sources = [*namespace.init] if isinstance(namespace.init, list) else []
        if self.nargs and not sources:
            parser.error(f"{option} stands after the --init that it belongs to")
        if self.nargs and sources[-1][1]:
            parser.error(f"{option} is there twice for {sources[-1][0]}; name all parts in one")
        path, parts = (sources.pop()[0], value) if self.nargs else (value, None)
        namespace.init = [*sources, [path, parts]]


def command(main):
    """Decorates the main of a script: wrong input ends it with one line, Ctrl-C with status 130."""

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names that a terminal cannot show cost nothing
                stream.reconfigure(errors="replace")
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # as in `… | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as SIGPIPE would end it
        except (ValueError, OSError, FloatingPointError) as error:
            text = one_line(error)
            if getattr(error, "filename", None):
                text = f"{error.filename}: {error.strerror}; name another file or folder"
            sys.exit(f"error: {text}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def default_amp(device):
    """bf16 on a CPU that multiplies in it (AVX-512 BF16, AMX) and does not only emulate it."""
    units = "_is_avx512_bf16_supported", "_is_amx_tile_supported"  # not in every version of torch
    fast = any(getattr(torch.cpu, unit, bool)() for unit in units)
    return "bf16" if device == "cpu" and fast else "no"


def usable_device(name):
    """An argparse type: a device that exists here. "cuda" is the GPU of this process, "auto" that
    or, without one, the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({why})") from None
    return name
