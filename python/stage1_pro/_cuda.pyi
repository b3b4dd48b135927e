"""
The CUDA router of stage1_pro; call it through stage1_pro.native
"""

from __future__ import annotations
import collections.abc
import typing

__all__: list[str] = ["BucketSwitch", "Router", "built", "devices"]

class Router:
    """
    Decides rows on a device, in buffers of its own
    """
    def __init__(
        self,
        max_rows: typing.SupportsInt | typing.SupportsIndex,
        use_gate: bool,
        scale: typing.SupportsFloat | typing.SupportsIndex,
        offset: typing.SupportsFloat | typing.SupportsIndex,
        threshold: typing.SupportsFloat | typing.SupportsIndex,
        device: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def count(self) -> int:
        """
        How many rows are deferred, after waiting for mark()
        """
    def gather(
        self,
        source: typing.SupportsInt | typing.SupportsIndex,
        row_bytes: typing.SupportsInt | typing.SupportsIndex,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        out: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        One launch: the deferred rows of source to the front of out
        """
    def mark(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        What count() waits for: all on stream so far
        """
    def merge(
        self,
        logits: typing.SupportsInt | typing.SupportsIndex,
        n_classes: typing.SupportsInt | typing.SupportsIndex,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        One launch: Stage B's logits become the answers of the deferred rows
        """
    def route(
        self,
        logits: typing.SupportsInt | typing.SupportsIndex,
        n: typing.SupportsInt | typing.SupportsIndex,
        n_classes: typing.SupportsInt | typing.SupportsIndex,
        gate: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        One launch: decides rows at address logits [n, n_classes]
        """
    @property
    def count_address(self) -> int: ...
    @property
    def deferred(self) -> int: ...
    @property
    def exited(self) -> int: ...
    @property
    def label(self) -> int: ...
    @property
    def probability(self) -> int: ...
    @property
    def score(self) -> int: ...

class BucketSwitch:
    """
    Runs the graph of the smallest bucket that holds the count
    """
    def __init__(
        self,
        buckets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        graphs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        count: typing.SupportsInt | typing.SupportsIndex,
        device: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def launch(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Enqueues the whole on a stream
        """

def built() -> tuple[str, int]:
    """
    The architectures it was built for, and with which CUDA (13000 is 13.0)
    """

def devices() -> tuple[int, str]:
    """
    Number of CUDA devices, and what is missing where it is 0; never raises
    """

__version__: str = "0.1.0"
