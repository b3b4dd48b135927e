"""Command line: a parser made from the list of commands. A command's module is imported when it is named."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from stage1_pro.commands import COMMANDS, FAMILIES, load, outside
from stage1_pro.errors import DependencyError, InputError, NotReachableError, Stage1Error, nearest, need

_EXTRAS = {
    "train": ("torch", "transformers", "peft", "accelerate", "safetensors", "onnx", "onnxscript", "sklearn"),
    "continual": ("sqlalchemy", "psycopg", "pyarrow", "river", "prometheus_client", "alembic"),
}
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
    if options.version:
        from stage1_pro import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        found = options.command.of_flags(vars(options)).execute()
        if options.as_json:
            print(json.dumps(_strict(found.record), default=str, allow_nan=False))
        elif found.text:
            print(found.text)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (Stage1Error, ImportError, OSError) as error:
        return _fail(_known(error), as_json=options.as_json)
    return int(found.exit_code)


def _known(error: Exception) -> Stage1Error:
    """The error of ours that says what an import or the operating system refused."""
    if isinstance(error, Stage1Error):
        return error
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        if extra is None:
            raise error
        return need(extra, package)
    if isinstance(error, ImportError):
        return DependencyError(f"a library cannot be loaded: {error}; see `stage1 doctor`")
    assert isinstance(error, OSError)
    where = f"{error.filename} " if error.filename else ""
    return InputError(f"{where}cannot be used: {error.strerror or error}")


def _fail(error: Stage1Error, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
    kind = "not reachable" if isinstance(error, NotReachableError) else "error"
    print(f"stage1: {kind}: {error}", file=sys.stderr)
    return error.exit_code


def _strict(data: Any) -> Any:
    """The same with null for NaN and infinities, which are no JSON."""
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


if __name__ == "__main__":
    sys.exit(main())
