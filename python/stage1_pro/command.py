"""A command is a frozen record of its options: flags, Python keywords, checks and help come from one declaration."""

from __future__ import annotations

import argparse
import csv
import inspect
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from stage1_pro.errors import InputError, nearest
from stage1_pro.progress import say
from stage1_pro.record import expectation as expected

F = TypeVar("F", bound=Callable[..., Any])


def within(holds: Callable[[float], bool], expectation: str, advice: str = "") -> AfterValidator:
    """A range in the words of its error: ``<name> must be <expectation>, got <value>; <advice>``."""

    def check(value: float) -> float:
        if not holds(value):
            raise ValueError(f"must be {expectation}, got {value}{advice and '; '}{advice}")
        return value

    return AfterValidator(check)


def _commas(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """Our names and a table's from ``file=path,label=class``; a pair with a comma in it stands in double quotes."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in next(csv.reader([value], skipinitialspace=True), [])]
    found = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(found) != len(pairs) or not all(equals and ours.strip() for ours, equals, _ in pairs):
        raise ValueError(f"must be like file=path,label=class, each name once, got '{value}'")
    return found


Share = Annotated[float, within(lambda x: 0 < x < 1, "inside (0, 1)")]
Rate = Annotated[float, within(lambda x: 0 < x <= 1, "in (0, 1]")]
Part = Annotated[float, within(lambda x: 0 <= x <= 1, "from 0 to 1")]
Positive = Annotated[float, within(lambda x: 0 < x < float("inf"), "above 0")]
Seed = Annotated[int, within(lambda x: x >= 0, "0 or more")]
Count = Annotated[int, within(lambda x: x >= 1, "1 or more")]
Place = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
Words = Annotated[tuple[str, ...], BeforeValidator(_commas)]
Columns = Annotated[dict[str, str], BeforeValidator(_pairs)]


@dataclass(frozen=True)
class Flag:
    """How an option is written on the command line, where its name does not say it.

    Attributes:
        name: the flag, ``--set`` for instance; made of the field's name otherwise.
        also: a second spelling.
        metavar: what stands for the value in help.
        positional: it is no flag but a word at its place.
        repeated: the flag is given once for each value.
        one_of: exactly one of the options with this word must be given.
        group: heading in help under which it stands.
        hidden: it is no option of the command line.
        older: what the option is called today; this name goes with the next version, help leaves it out.
    """

    name: str = ""
    also: str = ""
    metavar: str | None = None
    positional: bool = False
    repeated: bool = False
    one_of: str = ""
    group: str = ""
    hidden: bool = False
    older: str = ""

    def spelled(self, field: str) -> str:
        """What a message calls the option of this field on the command line."""
        return field if self.positional else self.name or f"--{field.replace('_', '-')}"


@dataclass(frozen=True)
class Result:
    """What a command found: text for people, a record for ``--json``, and the exit code."""

    text: str
    record: Any
    exit_code: int = 0


def option(default: Any, text: str, **flag: Any) -> Any:
    """A field of a command: its default (``...``: it must be given), its help, and what ``Flag`` takes."""
    field: FieldInfo = Field(default, description=text)
    field.metadata += [Flag(**flag)] if flag else []
    return field


def table_columns(text: str = "what the table calls its columns, such as file=path,label=class") -> Any:
    """The option ``--columns`` of a command that reads a table."""
    return option(None, text, metavar="NAME=COLUMN,…")


class Command(BaseModel):
    """Base of every command; the docstring is its help, the first line its summary, ``topic`` its manual page."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    topic: ClassVar[str] = ""
    hints: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, topic: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.topic = topic or cls.topic

    @abstractmethod
    def execute(self) -> Result:
        """Do the work; heavy libraries are imported here."""

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Check options by their names in Python.

        Raises:
            InputError: the first option that is unknown, missing or out of range.
        """
        return cls._made(given, str)

    @classmethod
    def of_flags(cls, given: Mapping[str, Any]) -> Self:
        """The same for words of the command line: messages name flags; what is no option is left out."""
        fields = cls.model_fields
        for name in fields.keys() & given.keys():
            flag = _flag(fields[name])
            if flag.older:
                say(f"{flag.spelled(name)} is called {flag.older} now; the older name goes with the next version")
        return cls._made({k: v for k, v in given.items() if k in fields}, lambda k: _flag(fields[k]).spelled(k))

    @classmethod
    def _made(cls, given: dict[str, Any], spelled: Callable[[str], str]) -> Self:
        try:
            made = cls(**given)
        except ValidationError as error:
            raise InputError(refusal(error, cls, spelled)) from None
        alternatives: dict[str, list[str]] = defaultdict(list)
        for name, field in cls.model_fields.items():
            alternatives[_flag(field).one_of].append(name)
        alternatives.pop("", None)
        for names in alternatives.values():
            found = [spelled(name) for name in names if getattr(made, name) is not None]
            if len(found) != 1:
                wish = " or ".join(spelled(name) for name in names)
                raise InputError(f"exactly one of {wish} must be given, got {' and '.join(found) or 'none'}")
        return made

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Declare every option; what is not given is left out, so that defaults are written once, in the record."""
        groups: dict[str, Any] = {"": parser}
        for name, field in cls.model_fields.items():
            flag = _flag(field)
            if flag.hidden:
                continue
            where = groups.get(flag.one_of or flag.group)
            if where is None and flag.one_of:
                where = groups[flag.one_of] = parser.add_mutually_exclusive_group(required=True)
            elif where is None:
                where = groups[flag.group] = parser.add_argument_group(flag.group)
            words = filter(None, (flag.spelled(name), flag.also))
            text = argparse.SUPPRESS if flag.older else _help(field)
            where.add_argument(*words, help=text, **_how(name, field, flag))

    @classmethod
    def more_help(cls) -> str:
        """What stands below the options in help."""
        return ""


def refusal(error: ValidationError, model: type[BaseModel], spelled: Callable[[str], str] = str) -> str:
    """One line about the first thing that pydantic found wrong: name, expectation, value, nearest name."""
    found = error.errors(include_url=False)
    first = next((one for one in found if not one["type"].endswith("_type")), found[0])
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    if name not in model.model_fields:
        return f"unknown option '{name}'{nearest(name, model.model_fields)}"
    field = model.model_fields[name]
    if first["type"] == "missing":
        return f"{spelled(name)} must be given: {field.description}"
    return f"{spelled(name)} {expected(first, _choices(field.annotation))}"


def keywords(command: type[Command], without: Sequence[str] = ()) -> Callable[[F], F]:
    """Show the options of ``command`` in signature and docstring of the function that takes them as ``**options``."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        fields = {k: v for k, v in command.model_fields.items() if k not in without and not _flag(v).hidden}
        named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        rest = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else _default(field),
                annotation=field.annotation,
            )
            for name, field in fields.items()
            if name not in own.parameters
        ]
        lines = [f"    {name}: {field.description}" for name, field in fields.items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])
        function.__signature__ = own.replace(parameters=[*named, *rest])  # type: ignore[attr-defined]
        return function

    return decorate


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() or field.default_factory else field.default


def _flag(field: FieldInfo) -> Flag:
    return next((one for one in field.metadata if isinstance(one, Flag)), Flag())


def _help(field: FieldInfo) -> str:
    text, default = (field.description or "").replace("%", "%%"), _default(field)
    if default is None or isinstance(default, bool) or default in ((), [], {}, ""):
        return text
    many = default if isinstance(default, list | tuple) else [default]
    return f"{text} (default: {' '.join(f'{one:g}' if isinstance(one, float) else str(one) for one in many)})"


def _how(name: str, field: FieldInfo, flag: Flag) -> dict[str, Any]:
    """The arguments of ``add_argument`` that a field's type and flag ask for."""
    kinds = list(_kinds(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation))
    how: dict[str, Any] = {"default": argparse.SUPPRESS}
    if bool in kinds:
        return {**how, "dest": name, "action": "store_false" if field.default is True else "store_true"}
    choices = _choices(field.annotation)
    metavar = flag.metavar or ("{" + ",".join(choices) + "}" if choices else None)
    if metavar is not None:
        how["metavar"] = metavar
    if flag.repeated:
        how["action"] = "append"
    elif tuple in kinds:
        how["nargs"] = "+" if field.is_required() or not flag.positional else "*"
    elif flag.positional and not field.is_required():
        how["nargs"] = "?"
    if not flag.positional:
        how |= {"dest": name, "required": field.is_required()}
    return how


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a value may have, without what checks them; what is read from one word is ``str``."""
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _kinds(one)
    elif get_origin(annotation) is Annotated:
        if any(isinstance(one, BeforeValidator) for one in get_args(annotation)[1:]):
            yield str
        else:
            yield from _kinds(get_args(annotation)[0])
    else:
        yield get_origin(annotation) or annotation


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return next((found for one in get_args(annotation) if (found := _choices(one))), [])
