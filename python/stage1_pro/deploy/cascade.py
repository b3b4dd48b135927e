"""The cascade: Stage A answers what it is sure of, Stage B takes the rest. No torch, no transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.classes import index_of
from stage1_pro.data.images import ImageError, PreprocessSpec, preprocess, read_image, read_opened
from stage1_pro.data.photos import ImageFile, Photo
from stage1_pro.deploy.bundle import Bundle, load_bundle
from stage1_pro.deploy.runtime import Arrays, How, Runtime
from stage1_pro.deploy.start import Step, start
from stage1_pro.errors import ArtifactError, InputError, need
from stage1_pro.files import sha256_bytes
from stage1_pro.policies.sets import close
from stage1_pro.policies.softmax import confidence, softmax

if TYPE_CHECKING:
    from stage1_pro.deploy.trained import Trained

ImageLike = ImageFile | bytes | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Decisions:
    """What the cascade says about N images.

    ``label`` [N] class names; ``prob`` [N] P(positive), ``confidence`` [N] the largest probability and ``probs`` [N, K]
    that of every class, all of the stage that answered, float64; ``prob`` is NaN where no class is the positive one;
    ``stage`` [N] "A" or "B"; ``exited`` [N] whether Stage A answered.
    ``sets`` bool [N, K]: the classes in each image's set, the label alone unless the policy is scrc; ``accepted`` bool
    [N]. Where it is False nobody answers: ``label`` and the set are empty. Under scrc the other fields then say who
    looked last and how sure it was; where the stage gave NaN ``stage`` is empty, and ``prob``, ``confidence`` and
    ``probs`` are NaN.
    """

    label: NDArray[np.str_]
    prob: NDArray[np.float64]
    confidence: NDArray[np.float64]
    stage: NDArray[np.str_]
    exited: NDArray[np.bool_]
    sets: NDArray[np.bool_]
    accepted: NDArray[np.bool_]
    probs: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.label)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """A mapping of plain Python values per image."""
        columns = self.to_dict()
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns as plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}


@dataclass(frozen=True)
class Trace:
    """What N decisions were made from, for who watches ``Cascade.decide``.

    ``probs_a`` [N, K] of Stage A and ``probs`` [N, K] of the stage that looked last; ``gate_logit`` [N] or None;
    ``hidden`` [N, T, D] or [N, D] that Stage B goes on from; ``exited`` [N], rows that Stage B was not asked about.
    """

    probs_a: NDArray[np.float64]
    probs: NDArray[np.float64]
    gate_logit: NDArray[np.float32] | None
    hidden: NDArray[np.float32]
    exited: NDArray[np.bool_]


class Prepared:
    """One image on its way to a decision; its pixels are prepared once for each specification that asks.

    Where it has been decoded already, ``opened`` is the same as an 8-bit RGB image.
    """

    def __init__(self, image: ImageLike, opened: Image.Image | None = None) -> None:
        self.image = image
        self._opened = opened
        self._prepared: list[tuple[PreprocessSpec, NDArray[np.float32]]] = []

    def pixels(self, spec: PreprocessSpec) -> NDArray[np.float32]:
        """The image as a model's input [3, H, W].

        Raises:
            ImageError: it cannot be read as an image.
            InputError: it is no kind of image.
        """
        for known, pixels in self._prepared:
            if known == spec:
                return pixels
        pixels = preprocess(open_image(self.image) if self._opened is None else self._opened, spec)
        self._prepared.append((spec, pixels))
        return pixels


class Answering(ABC):
    """What answers for images: a cascade, one whose decisions are logged, one that follows a loop."""

    bundle: Bundle | Trained

    def read(self, image: ImageLike) -> Prepared:
        """An image ready for ``answer``; raises as ``Prepared.pixels`` does."""
        prepared = Prepared(image)
        prepared.pixels(self.bundle.preprocessing)
        return prepared

    @abstractmethod
    def answer(self, photos: Sequence[Prepared], *, now: float | None = None) -> Decisions:
        """Decide for photos of ``read``, or none, as one batch; what is logged is of the time ``now``."""

    def predict(self, images: Iterable[ImageLike], batch_size: int = 32, *, now: float | None = None) -> Decisions:
        """Decide for images in order, ``batch_size`` at a time; any batch size gives the same decisions.

        Args:
            images: paths, encoded bytes, PIL images, or arrays [H, W, 3] (or [H, W] grey) of uint8.
            batch_size: images per batch, and events per append where decisions are logged.
            now: as ``answer`` takes it.

        Raises:
            ImageError: one of them cannot be read as an image; earlier batches are logged.
            InputError: ``batch_size`` is below 1, or ``images`` is a single one instead of several.
            OSError: the log cannot be written; no batch is answered whose events could not be.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        if isinstance(images, str | Path | Photo | bytes | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim != 4
        ):
            raise InputError("images must be a list or another iterable of images, got a single one; put it in a list")
        iterator = iter(images)
        parts = []
        while photos := [self.read(image) for image in islice(iterator, batch_size)]:
            parts.append(self.answer(photos, now=now))
        return concatenate(parts) if parts else self.answer([], now=now)


class Cascade(Answering):
    """A bundle, or the model of a run before any export, ready to answer.

    ``runtime.name`` is what answers; ``steps`` is what was tried for it, in order, and why it stepped down;
    ``asked`` is how it was loaded.

    >>> decisions = Cascade.load("run/bundle").predict(["a.jpg", "b.jpg"])  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle | Trained,
        runtime: Runtime,
        steps: Sequence[Step] = (),
        *,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.bundle, self.runtime, self.steps, self.asked = bundle, runtime, tuple(steps), asked

    def __reduce__(self) -> tuple[Any, ...]:
        """Where it came from and how it was asked for: another process loads it anew, and it must be the same one."""
        if self.asked is None:
            raise InputError("a cascade must come from Cascade.load or Cascade.from_run to be pickled")
        make = type(self).load if isinstance(self.bundle, Bundle) else type(self).from_run
        return _again, (make, self.bundle.path.resolve(), dict(self.asked), identity(self.bundle))

    @classmethod
    def load(
        cls, bundle: Bundle | Path | str, runtime: str = "onnxruntime", *, threads: int = 0, trust_engines: bool = False
    ) -> Cascade:
        """Verify a bundle and start a runtime on it that gives the bundle's reference outputs.

        Args:
            bundle: bundle folder.
            runtime: ``onnxruntime`` (CPU), ``tensorrt_rtx`` or ``tensorrt`` (the bundle's engines), or ``auto``: its
                engines, stepping down to onnxruntime. A named one never becomes another.
            threads: onnxruntime's threads inside an operator; 0 = as many as there are cores.
            trust_engines: run engines that were neither built here nor signed by a trusted key.

        Raises:
            ArtifactError: the bundle is damaged, changed or incomplete, or nothing gives its reference outputs.
            InputError: no such runtime, or none that this bundle has.
            DependencyError: the named runtime lacks a library, a driver or a GPU.
        """
        loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        asked = {"runtime": runtime, "threads": threads, "trust_engines": trust_engines}
        return cls(loaded, *start(loaded, runtime, threads=threads, trust_engines=trust_engines), asked=asked)

    @classmethod
    def from_run(cls, run: Path | str, *, threads: int = 0, device: str = "cpu") -> Cascade:
        """The best model of a trained and calibrated run, in torch; decides as its bundle will.

        Args:
            run: run folder.
            threads: torch's threads in this process; 0 leaves them as they are.
            device: ``cpu``, or ``cuda`` for CUDA graphs on an NVIDIA GPU.

        Raises:
            InputError: no such folder, no exit policy in it, or a device torch does not have.
            ArtifactError: an incomplete run, or a policy of another model.
            DependencyError: torch or transformers are missing.
        """
        try:
            from stage1_pro.deploy.trained import TorchRuntime, load_trained
        except ImportError as error:
            raise need("train", error.name or "torch") from error
        trained = load_trained(run)
        return cls(
            trained, TorchRuntime.open(trained, How(threads, device)), asked={"threads": threads, "device": device}
        )

    def pixels(self, image: ImageLike) -> NDArray[np.float32]:
        """One image as the model's input [3, H, W]; raises as ``Prepared.pixels`` does."""
        return Prepared(image).pixels(self.bundle.preprocessing)

    def answer(self, photos: Sequence[Prepared], *, now: float | None = None) -> Decisions:
        """Decide for photos as one batch; nothing is logged."""
        del now
        return self.decide(self.stack(photos))

    def stack(self, photos: Sequence[Prepared]) -> NDArray[np.float32]:
        """Photos as one batch of pixels [N, 3, H, W]."""
        spec = self.bundle.preprocessing
        if not photos:
            return np.empty((0, 3, spec.height, spec.width), dtype=np.float32)
        return np.stack([photo.pixels(spec) for photo in photos])

    def decide(
        self,
        pixels: NDArray[np.float32],
        *,
        exited: NDArray[np.bool_] | None = None,
        watch: Callable[[Trace], None] | None = None,
    ) -> Decisions:
        """Decide for preprocessed images as one batch.

        Args:
            pixels: [N, 3, H, W]; N may be 0.
            exited: [N], which rows exit instead of those the policy names, to measure costs; the policy is asked
                all the same, so that a forced batch costs what any other does.
            watch: is told what the decisions are made from, unless N is 0.
        """
        classes, spec = self.bundle.classes, self.bundle.preprocessing
        pixels = np.asarray(pixels, dtype=np.float32)
        if pixels.shape[1:] != (3, spec.height, spec.width):
            raise InputError(
                f"pixels must have shape [N, 3, {spec.height}, {spec.width}], got {list(pixels.shape)}; "
                "Cascade.pixels makes them"
            )
        if exited is not None:
            exited = np.asarray(exited, dtype=bool)
            if exited.shape != pixels.shape[:1]:
                raise InputError(f"exited must have shape [{len(pixels)}] as pixels has rows, got {list(exited.shape)}")
        if len(pixels) == 0:
            first: Arrays = {"logits": np.empty((0, len(classes)), np.float32), "gate_logit": np.empty(0, np.float32)}
        else:
            first = self._stage_a(pixels)
        probs, gate = softmax(first["logits"]), first.get("gate_logit")
        asked = self.bundle.policy.exits(probs, gate)
        exited = asked if exited is None else exited
        deferred = np.flatnonzero(~exited)
        probs_a = probs if watch is None else probs.copy()
        if len(deferred):
            probs[deferred] = self._stage_b(pixels, first, deferred)
        if watch is not None and len(pixels):
            watch(Trace(probs_a, probs, gate, first["hidden"], exited))
        answered = np.asarray(np.isfinite(probs).all(axis=1))
        sets, accepted = self.bundle.policy.answer(probs, exited, gate)
        # argmax takes the lowest index on ties; rows of NaN are blanked below.
        best, sure = np.argmax(probs, axis=1), confidence(probs)
        probs = np.where(answered[:, None], probs, np.nan)
        positive = index_of(classes, self.bundle.positive)
        return Decisions(
            label=np.where(accepted, np.asarray(classes, dtype=np.str_)[best], ""),
            prob=np.full(len(probs), np.nan) if positive is None else probs[:, positive],
            confidence=np.where(answered, sure, np.nan),
            stage=np.where(answered, np.where(exited, "A", "B"), ""),
            exited=exited & answered,
            sets=sets,
            accepted=accepted,
            probs=probs,
        )

    # Kernels differ by the number of rows, and results by 1e-7 (in torch 1e-6), which would decide differently for the
    # very image that a threshold was put on. There it is run as two rows, in every stage, whatever its batch.

    def _stage_a(self, pixels: NDArray[np.float32]) -> Arrays:
        outputs, policy = self.runtime.run("stage_a", {"pixels": pixels}), self.bundle.policy
        probs, gate = softmax(outputs["logits"]), outputs.get("gate_logit")
        at = close(policy.scores(probs, gate), policy.exit_threshold)
        for row in np.flatnonzero(at | policy.near(probs, np.ones(len(probs), dtype=bool), gate)):
            for name, value in self._twice(pixels, row).items():
                outputs[name][row] = value[0]
        return outputs

    def _stage_b(self, pixels: NDArray[np.float32], first: Arrays, deferred: NDArray[np.intp]) -> NDArray[np.float64]:
        """Stage B's probabilities [M, K] of the deferred rows, from what Stage A gave for all."""
        hidden = np.ascontiguousarray(first["hidden"][deferred])
        probs = softmax(self.runtime.run("stage_b", {"hidden": hidden})["logits"])
        gate = first["gate_logit"][deferred] if "gate_logit" in first else None
        for place in np.flatnonzero(self.bundle.policy.near(probs, np.zeros(len(probs), dtype=bool), gate)):
            hidden = self._twice(pixels, deferred[place])["hidden"]
            probs[place] = softmax(self.runtime.run("stage_b", {"hidden": hidden})["logits"])[0]
        return probs

    def _twice(self, pixels: NDArray[np.float32], row: np.intp) -> Arrays:
        return self.runtime.run("stage_a", {"pixels": np.repeat(pixels[row : row + 1], 2, axis=0)})


def concatenate(parts: Sequence[Decisions]) -> Decisions:
    """Decisions of one or more batches as one."""
    return Decisions(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Decisions)})


def open_image(image: ImageLike) -> Image.Image:
    """Any kind of image as 8-bit RGB the right way up; a PIL image just as its file would be read."""
    if isinstance(image, str | Path | Photo | bytes | bytearray | memoryview):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(f"an image array must be uint8 [H, W, 3] or [H, W], got {image.dtype} {list(image.shape)}")
        if image.size == 0:
            raise ImageError("image array", "damaged", "no pixels")
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        return read_opened(image)
    raise InputError(f"an image must be a path, bytes, a PIL image or a uint8 array, got {type(image).__name__}")


def identity(source: Bundle | Trained) -> str:
    """What tells a bundle, or what of a run decides, from any other."""
    return sha256_bytes(source.raw) if isinstance(source, Bundle) else source.policy.fingerprint()


def _again(make: Callable[..., Cascade], path: Path, asked: dict[str, Any], known: str) -> Cascade:
    found = make(path, **asked)
    if identity(found.bundle) != known:
        raise ArtifactError(f"{path} must be as it was when the cascade was pickled, but it has changed; load it anew")
    return found
