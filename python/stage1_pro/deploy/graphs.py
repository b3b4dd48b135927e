"""What a graph file asks for, read from its bytes before anything executes it. No onnx, no onnxruntime.

An ONNX file is a protobuf; the few fields that could hurt are walked here: where weights lie, how large they claim to
be, whose operators are called, and whether there are graphs within the graph, which can loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from stage1_pro.errors import ArtifactError

# Operators of anybody else need code of theirs.
OPERATOR_DOMAINS = frozenset({"", "ai.onnx"})
# Graphs of this package have thousands of parts; the walk of a hostile file must end.
_PARTS_LIMIT = 2_000_000
_ELEMENTS_LIMIT = 2**40
# Two-bit numbers are the smallest there are.
_ELEMENTS_PER_BYTE = 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1

# Wire type, start and end of a field's value.
Part = tuple[int, int, int]


class _GraphError(Exception):
    """Short facts about a graph; the door names the file."""


def check_graph(data: memoryview, name: str, files: Mapping[str, int]) -> list[str]:
    """Refuse a graph that reads outside its bundle, calls foreign operators, loops, or claims impossible sizes.

    ``name`` is the graph's in its bundle, ``files`` are the bundle's with their sizes; gives the names of those that
    hold its external weights.

    Raises:
        ArtifactError: it is no ONNX graph, or one of the above.
    """
    try:
        return _Walk(data, PurePosixPath(name).parent, files).model()
    except _GraphError as fact:
        raise ArtifactError(f"{name} must be a plain ONNX graph, {fact}; export the bundle anew") from None


class _Walk:
    def __init__(self, data: memoryview, folder: PurePosixPath, files: Mapping[str, int]) -> None:
        self.data, self.folder, self.files = data, folder, files
        self.parts = 0
        self.external: set[str] = set()

    def model(self) -> list[str]:
        graphs = 0
        for number, part in self._fields((_BYTES, 0, len(self.data))):
            if number == 7:  # graph
                graphs += 1
                self._graph(part)
            elif number == 20:  # training_info
                raise _GraphError("got one with training steps")
            elif number == 25:  # functions
                raise _GraphError("got one with functions of its own")
        if graphs != 1:
            raise _GraphError(f"got {graphs} graphs in one file")
        return sorted(self.external)

    def _graph(self, whole: Part) -> None:
        for number, part in self._fields(whole):
            if number == 1:  # node
                self._node(part)
            elif number == 5:  # initializer
                self._tensor(part)
            elif number == 15:  # sparse_initializer: dense when loaded, of any size
                raise _GraphError("got sparse weights")

    def _node(self, whole: Part) -> None:
        for number, part in self._fields(whole):
            if number == 7:  # domain
                domain = self._text(part)
                if domain not in OPERATOR_DOMAINS:
                    raise _GraphError(f"got an operator of the domain {domain[:80]!r}")
            elif number == 5:  # attribute
                self._attribute(part)

    def _attribute(self, whole: Part) -> None:
        for number, part in self._fields(whole):
            if number in (5, 10):  # t, tensors
                self._tensor(part)
            elif number in (6, 11):  # g, graphs
                raise _GraphError("got a graph within the graph (If, Loop, Scan)")
            elif number in (22, 23):  # sparse_tensor(s)
                raise _GraphError("got sparse weights")

    def _tensor(self, whole: Part) -> None:
        elements, external = 1, False
        places: dict[str, str] = {}
        for number, part in self._fields(whole):
            if number == 1:  # dims, packed or one by one
                for dim in self._integers(part):
                    elements *= dim
                    if dim < 0 or elements > _ELEMENTS_LIMIT:
                        raise _GraphError("got weights of an impossible shape")
            elif number == 13:  # external_data
                external = True
                pair = {1: "", 2: ""}
                pair |= {place: self._text(inner) for place, inner in self._fields(part) if place in pair}
                places[pair[1]] = pair[2]
            elif number == 14:  # data_location
                external = external or self._integer(part) == _EXTERNAL
        payload = self._external(places) if external else whole[2] - whole[1]
        if elements > payload * _ELEMENTS_PER_BYTE:
            raise _GraphError(f"got weights of {elements} numbers in {payload} bytes")

    def _external(self, places: Mapping[str, str]) -> int:
        """Bytes of a tensor outside the graph, once it was found to lie inside a file of the bundle."""
        location = places.get("location", "")
        parts = location.split("/")
        # "." and ".." would still name a listed file, but by a way that leads outside first.
        name = (self.folder / location).as_posix() if location and not {"", ".", ".."} & set(parts) else ""
        if name not in self.files:
            raise _GraphError(f"got weights in {location[:200]!r}, which is no listed file of the bundle")
        size = self.files[name]
        try:
            offset = int(places.get("offset") or 0)
            length = int(places["length"]) if places.get("length") else size - offset
        except ValueError:
            raise _GraphError("got weights at a place that is no number") from None
        if not (0 <= offset <= size and 0 <= length <= size - offset):
            raise _GraphError(f"got weights beyond the end of {name}")
        self.external.add(name)
        return length

    # Protobuf's wire format (protobuf.dev/programming-guides/encoding).

    def _fields(self, whole: Part) -> Iterator[tuple[int, Part]]:
        """Number and value of every field of a message; a varint is read by who wants it."""
        data, (place, end) = self.data, self._span(whole)
        while place < end:
            self.parts += 1
            if self.parts > _PARTS_LIMIT:
                raise _GraphError(f"got one of more than {_PARTS_LIMIT} parts")
            key, place = self._varint(place, end)
            number, wire = key >> 3, key & 7
            if number == 0:
                raise _GraphError("got damaged bytes")
            first = place
            if wire == _VARINT:
                _, place = self._varint(place, end)
            elif wire == _BYTES:
                length, first = self._varint(place, end)
                place = first + length
            elif wire in (_FIXED64, _FIXED32):
                place += 8 if wire == _FIXED64 else 4
            else:
                raise _GraphError("got damaged bytes")
            if place > end or place > len(data):
                raise _GraphError("got a truncated one")
            yield number, (wire, first, place)

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise _GraphError("got a truncated one")
            byte = self.data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1), place
        raise _GraphError("got damaged bytes")

    def _span(self, part: Part) -> tuple[int, int]:
        wire, start, end = part
        if wire != _BYTES:
            raise _GraphError("got damaged bytes")
        return start, end

    def _text(self, part: Part) -> str:
        start, end = self._span(part)
        return bytes(self.data[start:end]).decode("utf-8", "backslashreplace")

    def _integer(self, part: Part) -> int:
        if part[0] != _VARINT:
            raise _GraphError("got damaged bytes")
        return _signed(self._varint(part[1], len(self.data))[0])

    def _integers(self, part: Part) -> Iterator[int]:
        if part[0] == _VARINT:
            yield self._integer(part)
            return
        place, end = self._span(part)
        while place < end:
            value, place = self._varint(place, end)
            yield _signed(value)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
