"""Command line: a parser made from the list of commands. A command's module is imported when it is named."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stage1_pro.commands import COMMANDS, FAMILIES, load, outside
from stage1_pro.errors import NotReachableError, Stage1Error, explain, legible, nearest
from stage1_pro.progress import give_up, say
from stage1_pro.stopping import Terminated, terminable

if TYPE_CHECKING:
    from stage1_pro.command import Result

_EPILOG = """\
the usual way: split, train, calibrate, evaluate, export, predict.
See: stage1 help tutorial, or stage1 help for all pages; stage1 help exit-codes
"""


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest word, takes no abbreviations, and loads its command when it parses."""

    def __init__(self, *, home: str = "", **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self.home = home
        self.hints: dict[str, str] = {}
        self.more_help: Callable[[], str] = str

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Declare the command's options, parse, and refuse what is left over with the nearest flag."""
        if self.home:
            command = load(self.home)
            self.description = (command.__doc__ or "").replace("\n    ", "\n")
            self.epilog = command.topic and f"See: stage1 help {command.topic}"
            self.hints, self.more_help = dict(command.hints), command.more_help
            _add_json(self)
            command.add_to(self)
            self.set_defaults(command=command)
        found, left = super().parse_known_args(args, namespace)
        if left:
            flag = left[0].partition("=")[0]
            hint = self.hints.get(flag) and f"; {self.hints[flag]}"
            self.error(f"unknown option {flag}{hint or nearest(flag, self._option_string_actions)}")
        return found, left

    def format_help(self) -> str:
        """Help, and what the command adds below."""
        more = self.more_help()
        return super().format_help() + (more and f"\n{more}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(None, f"unknown command '{value}'{nearest(str(value), action.choices)}")


def _add_json(parser: argparse.ArgumentParser) -> None:
    # Left out, it must not undo one that stands before the command's second word.
    parser.add_argument(
        "--json", action="store_true", dest="as_json", default=argparse.SUPPRESS,
        help="print the result as JSON on stdout",
    )  # fmt: skip


def build_parser(named: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; commands of other packages are looked for where ``named`` is none of ours."""
    parser = _Parser(
        prog="stage1", description="Selective image classification that keeps its promises.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(command=None, as_json=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    families: dict[str, Any] = {}
    for name, (home, summary) in COMMANDS.items():
        family, _, word = name.rpartition(" ")
        if family and family not in families:
            text, topic = FAMILIES[family]
            parent = commands.add_parser(
                family, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"See: stage1 help {topic}"
            )
            _add_json(parent)
            families[family] = parent.add_subparsers(metavar="WHAT", required=True)
        families.get(family, commands).add_parser(word, help=summary, home=home)
    if named is not None and named not in commands.choices:
        for name, home in outside().items():
            commands.add_parser(name, home=home)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(named)
    options = parser.parse_args(arguments)
    _ready_streams()
    if options.version:
        from stage1_pro import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        with terminable():
            found = options.command.of_flags(vars(options)).execute()
        _show(found, as_json=options.as_json)
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        fields = options.command.model_fields
        # Where --resume goes on with a file, there must be one.
        resumes = "resume" in fields and ("out" not in fields or hasattr(options, "out"))
        again = "; --resume goes on" if resumes else ""
        say(f"{word}; what was finished is kept{again}")
        return code
    except Exception as error:  # noqa: BLE001  whatever it is, it is one line and a code
        if os.environ.get("STAGE1_TRACEBACK"):
            import traceback

            traceback.print_exc()
        return _fail(explain(error), as_json=options.as_json)
    return int(found.exit_code)


def _ready_streams() -> None:
    """Let output take every file name, and no file that is opened later take the place of a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _show(found: Result, *, as_json: bool) -> None:
    """Print what a command found; who closed stdout (``| head``) has read enough, and its code stays what it is."""
    try:
        if as_json:
            import json

            print(json.dumps(_strict(found.record), default=str, allow_nan=False))
        elif found.text:
            print(legible(found.text))
        sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)


def _fail(error: Stage1Error, *, as_json: bool) -> int:
    try:
        if as_json:
            import json

            print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
        sys.stdout.flush()
    except OSError:  # standard output may be what failed
        give_up(sys.stdout)
    kind = "not reachable" if isinstance(error, NotReachableError) else "error"
    say(f"stage1: {kind}: {error}")
    return error.exit_code


def _strict(data: Any) -> Any:
    """The same with null for NaN and infinities, which are no JSON."""
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return [_strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


if __name__ == "__main__":
    sys.exit(main())
