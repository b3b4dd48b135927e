"""Stage1Model: backbone, tap and three heads behind one forward, and its two deployable halves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_pro.config import ModelConfig
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.models.backbone import Backbone, backbone_from_config, hash_tensors, load_backbone, stated_pixels
from stage1_pro.record import Record


class Architecture(Record):
    """All that is needed to rebuild a model around its weights, without the backbone's source."""

    backbone: BackboneInfo
    hf_config: dict[str, Any]
    image_size: int
    tap: int
    classes: list[str]
    positive: str | None
    auxiliary_hidden: int
    dropout: float
    preprocessing: PreprocessSpec


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives.

    ``logits_a, logits_b`` [N, K]; ``gate_logit`` [N]; ``features_a, features_b`` [N, 2D] (CLS and mean patch token),
    each with its stage's own width D.
    """

    logits_a: Tensor
    gate_logit: Tensor
    logits_b: Tensor
    features_a: Tensor
    features_b: Tensor


class Gate(nn.Module):
    """Logit of P(Stage A is correct | x) from features [N, F] and the margin of its logits [N, K]: [N].

    Its own weights learn; no gradient flows back into the logits, and into the features only when ``stop_features``
    is False. Starts at zero: one half for every image.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.stop_features = True
        self.linear = nn.Linear(features + 1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Gate logits [N]."""
        top = logits.detach().topk(2, dim=1).values
        margin = (top[:, :1] - top[:, 1:]).to(features.dtype)
        read = features.detach() if self.stop_features else features
        out: Tensor = self.linear(torch.cat((read, margin), dim=1))
        return out.squeeze(1)


class Heads(nn.Module):
    """The three heads on given features; what linear mode trains.

    ``classifier`` is Stage A's and linear, ``auxiliary`` Stage B's and stronger, through one hidden layer: both from
    features [N, F] of their stage to logits [N, K].
    """

    def __init__(
        self, features_a: int, classes: int, auxiliary_hidden: int, dropout: float, features_b: int | None = None
    ) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features_a, classes))
        self.gate = Gate(features_a)
        self.auxiliary = nn.Sequential(
            nn.Linear(features_b or features_a, auxiliary_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(auxiliary_hidden, classes),
        )

    def forward(self, features_a: Tensor, features_b: Tensor) -> Outputs:
        """Outputs from both stages' features [N, 2D]."""
        logits = self.classifier(features_a)
        return Outputs(logits, self.gate(features_a, logits), self.auxiliary(features_b), features_a, features_b)


class Stage1Model(nn.Module):
    """Stage A = blocks 1..tap, classifier and gate; Stage B = the other blocks and the auxiliary head."""

    def __init__(self, architecture: Architecture, backbone: Backbone, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = backbone
        self.tap = architecture.tap
        width = backbone.width(self.tap)
        self.norm_a = nn.LayerNorm(width, eps=1e-6) if self.tap < backbone.n_blocks else nn.Identity()
        # Heads have a stream of their own: arms with other backbones or adapters start from the same ones.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = Heads(
                2 * width, len(architecture.classes), architecture.auxiliary_hidden, architecture.dropout,
                2 * backbone.hidden_size,
            )  # fmt: skip

    def to_tap(self, pixels: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Features at the tap [N, 2D], what Stage B goes on from, and the blocks' shared context."""
        tokens, context = self.backbone.embed(pixels)
        tokens = self.backbone.run_blocks(tokens, context, 0, self.tap)
        if self.tap == self.backbone.n_blocks:
            features = self.backbone.pool(self.backbone.norm(tokens))
            return features, features, context
        return self.backbone.pool(self.norm_a(tokens)), tokens, context

    def from_tap(self, hidden: Tensor, context: Any) -> Tensor:
        """Stage B's features [N, 2D] from what ``to_tap`` handed over."""
        if self.tap == self.backbone.n_blocks:
            return hidden
        tokens = self.backbone.run_blocks(hidden, context, self.tap, self.backbone.n_blocks)
        return self.backbone.pool(self.backbone.norm(tokens))

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Both stages' features, each [N, 2D]."""
        features_a, hidden, context = self.to_tap(pixels)
        return features_a, self.from_tap(hidden, context)

    def features_at(self, pixels: Tensor, taps: list[int]) -> dict[int, Tensor]:
        """What a Stage A with its starting norm would read at each of these blocks, [N, 2D] by block, in one pass."""
        tokens, context = self.backbone.embed(pixels)
        found, done = {}, 0
        for tap in sorted(taps):
            tokens, done = self.backbone.run_blocks(tokens, context, done, tap), tap
            plain = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
            found[tap] = self.backbone.pool(self.backbone.norm(tokens) if tap == self.backbone.n_blocks else plain)
        return found

    def forward(self, pixels: Tensor) -> Outputs:
        """Both stages on pixels [N, 3, H, W]."""
        outputs: Outputs = self.heads(*self.features(pixels))
        return outputs

    def stage_a(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stage A alone: logits [N, K], gate logit [N] and what Stage B goes on from.

        The last is tokens [N, T, D] for ``tap < L`` and the final features [N, 2D] for ``tap = L``.
        """
        features, hidden, _ = self.to_tap(pixels)
        return (*self.answer(features), hidden)

    def answer(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Stage A's logits [N, K] and gate logit [N] from its features [N, 2D]."""
        logits = self.heads.classifier(features)
        return logits, self.heads.gate(features, logits)

    def stage_b(self, hidden: Tensor) -> Tensor:
        """Stage B's logits [N, K] for (a subset of) the rows Stage A handed over."""
        logits: Tensor = self.heads.auxiliary(self.from_tap(hidden, self.backbone.context()))
        return logits

    def fingerprint(self) -> str:
        """Hex sha256 over architecture and every weight; changes when either does."""
        return fingerprint(self.architecture, self.state_dict())


def fingerprint(architecture: Architecture, state: Mapping[str, Tensor]) -> str:
    """Hex sha256 over architecture and every weight of a model in its plain form."""
    return hash_tensors(state, architecture.fingerprint())


# Keys of a transformers configuration that say nothing of the architecture.
_UNSAID = {"_name_or_path", "id2label", "label2id", "transformers_version"}


def create_model(config: ModelConfig, classes: list[str], positive: str | None, seed: int) -> Stage1Model:
    """Build the configured model with its starting weights: pretrained where the backbone is, else from ``seed``.

    Raises:
        InputError: no such backbone, or a tap that it lacks.
        ArtifactError: weights that do not fit.
    """
    backbone = load_backbone(config.backbone, config.image_size, pos_embed_rescale=config.pos_embed_rescale, seed=seed)
    tap = config.tap if isinstance(config.tap, int) else backbone.n_blocks
    if tap > backbone.n_blocks:
        raise InputError(f"model.tap must be a block from 1 to {backbone.n_blocks}, got {tap}")
    settings = {key: value for key, value in backbone.hf.config.to_dict().items() if key not in _UNSAID}
    architecture = Architecture(
        backbone=backbone.info(config.backbone),
        # Through JSON, so that a stored copy compares equal.
        hf_config=json.loads(json.dumps(settings, default=str)),
        image_size=backbone.image_size,
        tap=tap,
        classes=classes,
        positive=positive,
        auxiliary_hidden=config.auxiliary_hidden,
        dropout=config.dropout,
        preprocessing=input_spec(config, backbone),
    )
    return Stage1Model(architecture, backbone, seed)


def input_spec(config: ModelConfig, backbone: Backbone) -> PreprocessSpec:
    """How pixels become the input of a configured backbone."""
    return PreprocessSpec(
        height=backbone.image_size, width=backbone.image_size, **stated_pixels(config.backbone, backbone, config.resize)
    )


def rebuild_model(architecture: Architecture) -> Stage1Model:
    """Build a model of this architecture with weights that are to be replaced."""
    return Stage1Model(architecture, backbone_from_config(architecture.hf_config, architecture.image_size))


def check_architecture(path: Path, found: Architecture, wanted: Architecture) -> None:
    """Compare a checkpoint's architecture with the one that is wanted.

    Raises:
        ArtifactError: they differ; names the fields.
    """
    differences = _differences(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
    if differences:
        raise ArtifactError(f"{path} must be of this run's architecture; it differs in " + "; ".join(differences[:6]))


def check_tensors(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare tensors with those of a model, by name and shape.

    Raises:
        ArtifactError: missing or unexpected keys, or other shapes; names them.
    """
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{name}: {', '.join(items[:4])}{f' and {len(items) - 4} more' if len(items) > 4 else ''}"
        for name, items in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", shapes))
        if items
    ]
    if problems:
        raise ArtifactError(f"{path} does not fit the model; " + "; ".join(problems))


def _differences(a: Any, b: Any, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        below = ((key, f"{place}.{key}" if place else str(key)) for key in sorted({*a, *b}))
        return [one for key, where in below for one in _differences(a.get(key), b.get(key), where)]
    return [] if a == b else [f"{place}: {a} instead of {b}"]
