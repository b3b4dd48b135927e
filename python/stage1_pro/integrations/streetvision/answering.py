"""One photo in, one float out: P(roadwork) in [0, 1], or -1, whatever comes in and whatever happens."""

from __future__ import annotations

import base64
import binascii
import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, ValidationError

from stage1_pro.classes import need_positive
from stage1_pro.command import refusal
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.serving.live import LiveCascade
from stage1_pro.continual.serving.served import Served
from stage1_pro.data.images import ImageError, read_image, read_opened
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.cascade import Answering, Cascade, Prepared
from stage1_pro.deploy.runtime import RUNTIMES
from stage1_pro.errors import InputError, Stage1Error
from stage1_pro.integrations.streetvision.reward import prior_shift, shifted
from stage1_pro.record import Record, read_yaml

NO_ANSWER = -1.0
# A request is one JPEG; what is longer is not looked at.
MAX_BYTES = 64 << 20
_LOG = logging.getLogger("stage1_pro.streetvision")


class Settings(Record):
    """What the YAML of a miner may hold, and nothing else.

    None of the names is one that the subnet's detectors use for themselves (device, config, model_name, load_model).
    """

    bundle: str | None = Field(None, min_length=1, description="bundle folder; with runtime torch a run folder")
    loop: str | None = Field(
        None, min_length=1, description="instead of bundle: a loop's folder, whose champion answers, the new one, too"
    )
    log: str | None = Field(None, min_length=1, description="folder where every decision becomes an event")
    runtime: str = Field("auto", description="as `stage1 predict` takes it, or torch")
    timeout_s: float = Field(8.0, gt=0, le=3600, description="seconds for one photo; then the answer is -1")
    on_abstain: Literal["answer", "minus_one"] = Field(
        "answer", description="what is said where the policy or answer_above would not answer"
    )
    train_prior: float | None = Field(None, gt=0, lt=1, description="share of positives in training; the bundle's own")
    serve_prior: float | None = Field(None, gt=0, lt=1, description="share of positives asked; none: no correction")
    threshold: float = Field(0.5, gt=0, lt=1, description="P(positive), corrected, that is to land on .5")
    answer_above: float = Field(0.5, ge=0.5, lt=1, description="least confidence of an answer, with minus_one")
    max_pixels: int = Field(32_000_000, gt=0, description="larger photos are not decoded")
    threads: int = Field(0, ge=0, description="threads of an operator; 0: all cores")

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str = "settings", folder: Path | None = None) -> Settings:
        """Check values; relative ``bundle``, ``loop`` and ``log`` are of ``folder``.

        Raises:
            InputError: a key that does not exist, or a value out of range; ``name`` is where it stands.
        """
        try:
            found = cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{name}: {refusal(error, cls)}") from None
        RUNTIMES.check(found.runtime, also=("auto",))
        if found.train_prior is not None and found.serve_prior is None:
            raise InputError(
                f"serve_prior of {name} must be set beside train_prior, got nothing; StreetVision's is 0.5"
            )
        if found.bundle is None and found.loop is None:
            raise InputError(f"bundle of {name} must be valid, got nothing; name a bundle folder, or a loop's as loop")
        if found.bundle is not None and found.loop is not None:
            raise InputError(f"bundle of {name} must be left out beside loop, whose champion answers, got both")
        if found.runtime == "torch" and (found.loop or found.log):
            raise InputError(
                f"runtime of {name} must not be torch beside {'loop' if found.loop else 'log'}: events name a bundle"
            )
        if found.loop and found.serve_prior is not None and found.train_prior is None:
            raise InputError(
                f"train_prior of {name} must be set beside serve_prior and loop, got nothing; its champions may differ"
            )
        paths = {
            key: str((folder or Path()) / Path(value).expanduser())
            for key, value in (("bundle", found.bundle), ("loop", found.loop), ("log", found.log))
            if value is not None
        }
        return found.model_copy(update=paths)

    @classmethod
    def read(cls, path: Path | str) -> Settings:
        """Read a YAML file; relative folders are relative to the file."""
        path = Path(path)
        return cls.of(read_yaml(path), str(path), path.resolve().parent)


class StreetVision:
    """A bundle that answers as the subnet asks: above .5 is roadwork, -1 is no answer, nothing is ever raised.

    The bundle's logit of P(positive) is moved by the correction for the prior (when ``serve_prior`` is set) and so that
    ``threshold`` lands on .5. One photo at a time; others wait, within their own time limit. With ``log`` a decision is
    logged once it is made; one that cannot be is warned about, and answered.

    >>> StreetVision("run/bundle").answer(Path("a.jpg").read_bytes())  # doctest: +SKIP
    0.93

    Args:
        bundle: bundle folder, or settings that name it.
        options: any key of ``Settings``.

    Raises:
        InputError: a setting that does not exist or is out of range, a runtime that is not there, or a bundle of more
            than two classes of which none is the positive one.
        ArtifactError: the bundle is damaged.
    """

    def __init__(self, bundle: Path | str | Settings, **options: Any) -> None:
        if isinstance(bundle, Settings):
            if options:
                raise InputError(f"settings must hold every option, got {', '.join(options)} beside them")
            self.settings = bundle
        else:
            self.settings = Settings.of({"bundle": str(bundle), **options})
        log = None if self.settings.log is None else _open_log(self.settings.log)
        self._answering: Answering
        if self.settings.loop is None:
            cascade = _load(self.settings)
            self._shift = _shift(self.settings, cascade)
            self._answering = cascade if log is None else _logging(cascade, log)
        else:
            self._shift = _shift(self.settings)
            self._answering = LiveCascade(
                self.settings.loop, self.settings.runtime, threads=self.settings.threads, log=log,
                on_failure=_not_logged,
            )  # fmt: skip
        need_positive(self._answering.bundle.positive, "a bundle for StreetVision")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="streetvision")

    def answer(self, image: bytes | bytearray | memoryview | str | Image.Image) -> float:
        """P(positive) in [0, 1] with .5 at the threshold, or -1.

        Args:
            image: encoded bytes, their base64 text, or a PIL image.
        """
        future = self._worker.submit(self._surely, image)
        try:
            return future.result(self.settings.timeout_s)
        except TimeoutError:
            future.cancel()
            _LOG.warning("no answer within %g s", self.settings.timeout_s)
        return NO_ANSWER

    def _surely(self, image: Any) -> float:
        # Caught here: what a future hands on holds the frames it came from, with the decoded photo, until a collection.
        try:
            return self._answer(image)
        # Whatever a photo sets off, the miner goes on: that is what -1 is for.
        except Exception as error:  # noqa: BLE001
            _LOG.warning("no answer: %s: %s", type(error).__name__, error)
            return NO_ANSWER

    def _answer(self, image: Any) -> float:
        settings = self.settings
        if isinstance(image, Image.Image):
            image = opened = read_opened(image, max_pixels=settings.max_pixels)
        else:
            image = _decode(image)
            opened = read_image(image, max_pixels=settings.max_pixels)
        decided = self._answering.answer([Prepared(image, opened)])
        r = float(shifted(decided.prob, settings.threshold, self._shift)[0])
        unsure = not decided.accepted[0] or max(r, 1 - r) < settings.answer_above
        return NO_ANSWER if unsure and settings.on_abstain == "minus_one" else guard(r)


def guard(value: object) -> float:
    """The value if it is a number in [0, 1], else -1; one above 1 would spoil a miner's next 100 rounds."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return NO_ANSWER
    return number if math.isfinite(number) and 0 <= number <= 1 else NO_ANSWER


def _open_log(folder: str) -> EventLog | None:
    """The log; none, with a warning, where it cannot be opened: a miner that restarts on a full disk has to answer."""
    try:
        return EventLog(folder)
    except (OSError, Stage1Error) as error:
        _not_logged(error)
        return None


def _not_logged(error: Exception) -> None:
    _LOG.warning("not logged: %s: %s", type(error).__name__, error)


def _logging(cascade: Cascade, log: EventLog) -> Answering:
    """The cascade with its decisions logged; without, and a warning, where the log cannot take them."""
    try:
        return Served(cascade, log, on_failure=_not_logged)
    except OSError as error:
        _not_logged(error)
        return cascade


def _load(settings: Settings) -> Cascade:
    assert settings.bundle is not None
    if settings.runtime == "torch":
        return Cascade.from_run(settings.bundle, threads=settings.threads)
    cascade = Cascade.load(settings.bundle, settings.runtime, threads=settings.threads)
    for step in cascade.steps:
        _LOG.info("%s", step)
    return cascade


def _shift(settings: Settings, cascade: Cascade | None = None) -> float:
    if settings.serve_prior is None:
        return 0.0
    train = settings.train_prior
    if train is None:
        assert cascade is not None
        if not isinstance(cascade.bundle, Bundle):
            raise InputError(
                "train_prior must be set beside serve_prior for a run, got nothing; a bundle knows its own"
            )
        counts = cascade.bundle.splits.counts["train"]
        train = counts[need_positive(cascade.bundle.positive, "a bundle for StreetVision")] / sum(counts.values())
    return prior_shift(train, settings.serve_prior)


def _decode(image: Any) -> bytes:
    if isinstance(image, str):
        text = image.partition(",")[2] if image.startswith("data:") else image
        if len(text) > MAX_BYTES * 4 // 3 + 4:
            raise ImageError("image", "oversized", f"{len(text)} characters")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError("image", "damaged", f"no base64: {error}") from None
    if not isinstance(image, bytes | bytearray | memoryview):
        raise InputError(f"image must be bytes, base64 text or a PIL image, got {type(image).__name__}")
    if len(image) > MAX_BYTES:
        raise ImageError("image", "oversized", f"{len(image)} bytes")
    return bytes(image)
