"""``Record``: the base of every JSON file, frozen, strict and written atomically."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stage1_pro.errors import ArtifactError, InputError, Stage1Error, nearest, printable
from stage1_pro.files import sha256_bytes, sha256_file, write_text
from stage1_pro.notebook import Shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Record(Shown, BaseModel):
    """Base of every JSON artefact: unknown keys are refused, NaN is not JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: Path | str, *, mode: int = 0o666) -> None:
        """Write as indented JSON, atomically."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n", mode=mode)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read and validate; raise ArtifactError naming the file and the first wrong key."""
        path = Path(path)
        try:
            if path.exists() and (not path.is_file() or path.stat().st_size > _LARGEST_RECORD):
                raise ArtifactError(
                    f"{path} must be a plain file of at most {_LARGEST_RECORD} bytes, got something else"
                )
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(f"{path} must exist, but there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} must be readable JSON, got: {error}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """Validate JSON text; ``name`` is what error messages call it."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            # Values are not shown: a file may hold a database's password.
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise ArtifactError(
                f"{name} is not a valid {cls.__name__}: {printable(where)}: {printable(first['msg'])}"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON has them."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON form."""
        data = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())


_EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "path": "a path",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "model": "keys and values",
}


def wrong(error: ValidationError, *, skip: int = 0, whole: str = "document") -> str:
    """The first thing that pydantic found wrong: ``<dotted key> must be <expectation>, got <value>``.

    Args:
        error: of a model's validation.
        skip: parts of the key that are no words of the user's, such as the tag of a union.
        whole: what the model as a whole is called.
    """
    first = error.errors(include_url=False)[0]
    where = printable(".".join(str(part) for part in first["loc"][skip:])) or whole
    what = expectation(first)
    return f"{where}{' ' if what.startswith('must ') else ': '}{what}"


def expectation(error: ErrorDetails, choices: Sequence[str] = ()) -> str:
    """``must be <expectation>, got <value>`` of one error of pydantic; a validator's own words where it has some."""
    kind, got, text = error["type"], error["input"], error["msg"]
    if kind == "value_error":
        return text.removeprefix("Value error, ")
    if kind == "missing":
        return "must be given, got nothing"
    if kind == "extra_forbidden":
        return f"must be left out, got {_shown(got)}; nothing has this name here"
    if kind == "literal_error":
        options = choices or re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"must be one of {', '.join(options)}, got {_shown(got)}{nearest(str(got), options)}"
    word = _EXPECTED.get(kind.partition("_")[0])
    if word is not None and kind.endswith(("_parsing", "_type", "_from_float")):
        return f"must be {word}, got {_shown(got)}"
    if text.startswith("Input should "):
        return f"must {text.removeprefix('Input should ')}, got {_shown(got)}"
    return f"must be valid, got {_shown(got)}; {text}"


def _shown(value: object) -> str:
    return printable(repr(value))


# Rows of all splits of some million photos.
_LARGEST_RECORD = 1 << 30


def parse_json(data: bytes, name: str, kind: type[Stage1Error], *, values: int, depth: int) -> Any:
    """The value of JSON from elsewhere, in which every key stands once and no number is NaN.

    It is parsed whole into many small objects: what it asks of memory is its count of values.

    Args:
        data: UTF-8, with or without its byte order mark.
        name: what messages call it.
        kind: of the error.
        values: the most that it may hold.
        depth: the most that they may be nested.

    Raises:
        Stage1Error: of that kind, where it is none, or larger or deeper.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("the same key twice")
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text}, which is no JSON")

    # Every value but the first stands behind one of these; strings only make it count too many.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > values:
        raise kind(f"{name} must have at most {values} values, got more")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise kind(f"{name} must be readable UTF-8, got: {error}") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{name} must be JSON, got: {printable(str(error))}") from None
    if any(level > depth for _, level in parts_of(found)):
        raise kind(f"{name} must be nested at most {depth} deep, got more")
    return found


def parts_of(value: Any) -> Iterator[tuple[Any, int]]:
    """A value of JSON, and with their levels all keys and values within it; it itself is on level 1."""
    pending = [(value, 1)]
    while pending:
        part, level = pending.pop()
        yield part, level
        if isinstance(part, dict):
            pending += [(inner, level + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list):
            pending += [(inner, level + 1) for inner in part]


# The reader of YAML is slow: this much takes some seconds.
_LARGEST_YAML = 1 << 17
_DEEPEST_YAML = 40
_LONGEST_NUMBER = 100


def parse_yaml(text: str) -> Any:
    """The value of YAML, in which every key stands once, nothing refers to another place, and 1:30 is text.

    Raises:
        ValueError: it is none, longer than 128 KiB, nested more than 40 deep, or has a number of over 100 digits.
    """
    import yaml

    if len(text) > _LARGEST_YAML:
        raise ValueError(f"{len(text)} characters, more than {_LARGEST_YAML}")
    try:
        return yaml.load(text, _yaml_loader())  # noqa: S506  a kind of the safe one
    except Exception as error:  # noqa: BLE001 - its constructors let a dozen kinds out where a tag fits no value
        raise ValueError(printable(" ".join(str(error).split())) or type(error).__name__) from None


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # A few references to references make gigabytes of a few hundred bytes.
            if self.check_event(yaml.AliasEvent):
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.YAMLError(f"a reference to another place, *{event.anchor}{event.start_mark}; write it out")
            self.depth += 1
            if self.depth > _DEEPEST_YAML:
                raise yaml.YAMLError(f"more than {_DEEPEST_YAML} levels{parent.start_mark if parent else ''}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                [(twice, _)] = Counter(str(key.value) for key, _ in node.value).most_common(1)
                raise yaml.YAMLError(f"the key {twice} more than once{node.start_mark}; remove one of them")
            return found

        def construct_yaml_int(self, node: Any) -> Any:
            # Longer ones cannot be shown, and those of thousands of digits not even be told.
            if len(str(node.value)) > _LONGEST_NUMBER:
                raise yaml.YAMLError(f"a number of {len(str(node.value))} digits{node.start_mark}")
            return super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)

    # YAML 1.1 reads 1:30 as ninety and 1_000 as a thousand; who writes so means a time or a name.
    numbers = {
        "int": r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)",
        "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    }
    ours = {f"tag:yaml.org,2002:{kind}" for kind in numbers}
    known = yaml.SafeLoader.yaml_implicit_resolvers.items()
    Loader.yaml_implicit_resolvers = {first: [one for one in found if one[0] not in ours] for first, found in known}
    for kind, pattern in numbers.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list("-+0123456789."))
    return Loader


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file; an empty one has none.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} must exist, but there is no such file")
        if not path.is_file() or path.stat().st_size > _LARGEST_YAML:
            raise ValueError(f"no plain file of at most {_LARGEST_YAML} bytes")
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a readable YAML file, got: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold keys and values, got {type(found).__name__}")
    return found


class FileEntry(Record):
    """Size in bytes and sha256 of one file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below a folder with its hash and size, as a manifest lists them."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
