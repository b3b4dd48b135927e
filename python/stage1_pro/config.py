"""Configuration: pydantic models read from YAML, overridden by ``--set a.b=c``, stored resolved."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stage1_pro.errors import InputError, printable
from stage1_pro.record import parse_yaml, read_yaml, wrong
from stage1_pro.words import Precision


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which backbone, where Stage A reads it, and the heads."""

    backbone: str = Field(
        "tiny", description="preset (tiny, narrow), local folder, or hub id of a DINOv3, DINOv2, ViT or SigLIP backbone"
    )
    image_size: int | None = Field(
        None,
        gt=0,
        description="input side in pixels, a multiple of the patch; null = 48 for presets, else what the backbone's "
        "processor file says, or about 224",
    )
    resize: Literal["stretch", "crop"] | None = Field(
        None,
        description="crop loses the sides of wide street photos; null = as the backbone's processor file says, stretch "
        "without one",
    )
    tap: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="block whose tokens Stage A reads, 1..L; null = the last one; auto = the cheapest of L/3, L/2, "
        "2L/3 and L at equal risk, by linear probes on the pretrained backbone",
    )
    auxiliary_hidden: int = Field(256, ge=1, description="hidden width of the auxiliary (Stage B) head")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the heads")
    pos_embed_rescale: float | None = Field(
        None, ge=1, description="DINOv3's random RoPE rescaling in training; null = off"
    )


class AugmentConfig(Section):
    """Training augmentation; a function of (seed, epoch, row) alone. Never flips vertically."""

    enabled: bool = True
    crop_scale: tuple[float, float] = Field((0.6, 1.0), description="area share of RandomResizedCrop")
    crop_ratio: tuple[float, float] = Field((0.8, 1.25), description="aspect ratio of RandomResizedCrop")
    horizontal_flip: float = Field(
        0.5, ge=0, le=1, description="probability of a mirror image; 0 where left and right matter (signs)"
    )
    rotation: float = Field(20.0, ge=0, le=180, description="largest rotation in degrees")
    rotation_probability: float = Field(0.5, ge=0, le=1)
    brightness: float = Field(0.3, ge=0, lt=1)
    contrast: float = Field(0.3, ge=0, lt=1)
    saturation: float = Field(0.3, ge=0, lt=1)
    hue: float = Field(0.02, ge=0, le=0.5)
    blur_probability: float = Field(0.1, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 1.5)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high <= {top:g}, got [{low:g}, {high:g}]")
        return self


Mode = Literal["full", "linear", "lora", "rslora", "dora", "apla", "partial"]
AdapterMode = Literal["lora", "rslora", "dora", "apla", "partial"]
Target = Literal["q", "k", "v", "o", "up", "down", "gate"]
ADAPTER_MODES: tuple[AdapterMode, ...] = get_args(AdapterMode)


class TrainConfig(Section):
    """One training run."""

    mode: Mode = Field(
        "full",
        description="full = every weight; linear = frozen backbone, cached features, heads only; lora, rslora, dora = "
        "low-rank updates of the backbone's projections; apla = each attention's output projection; partial = the last "
        "blocks, LoRA before them; heads are always trained",
    )
    epochs: int = Field(16, ge=1)
    batch_size: int = Field(64, ge=1, description="effective batch over all processes and accumulation steps")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass of one process; null = all; halved down to 16 when memory runs out",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the backbone")
    head_lr: float | None = Field(None, gt=0, description="peak learning rate of the heads; null = lr")
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="final learning rate as a share of the peak (cosine)")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="0 = no moving average of the weights")
    auxiliary_weight: float = Field(
        1.0, ge=0, description="weight of the auxiliary head's cross entropy; 1 = as much as Stage A's, it answers too"
    )
    classifier_weight: float = Field(
        0.5, ge=0, description="weight of the classifier's plain cross entropy; with selective_weight it adds up to 1"
    )
    selective_weight: float = Field(
        0.5,
        ge=0,
        description="weight of the selective risk (sum of g*CE / sum of g); half, as in SelectiveNet: more than plain "
        "cross entropy lets hard rows go",
    )
    coverage_weight: float = Field(
        32.0, ge=0, description="weight of max(0, target_coverage - mean g)^2; 32 as in SelectiveNet, 0 collapses"
    )
    target_coverage: float = Field(
        0.8, gt=0, le=1, description="mean soft gate that training keeps; above the 0.7 that calibration asks for"
    )
    losses: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="weights of further losses, by the names they are registered under"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = "balanced"
    patience: int = Field(8, ge=1, description="epochs without a better AUGRC on val_select before stopping")
    save_every_steps: int = Field(50, ge=1, description="steps between two last.pth inside an epoch")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto = bf16 autocast on GPUs that have it, fp32 on a CPU"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute a block's activations again on the way back: less memory, about a third more time"
    )
    deterministic: bool = True
    workers: int = Field(2, ge=0, description="processes that decode images; any number gives the same batches")
    trackers: tuple[str, ...] = Field(
        (), description="where figures of every epoch go besides metrics.csv: tensorboard, wandb, mlflow"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_boolean(cls, values: Any) -> Any:
        """Read ``tensorboard: true``, the key before there were others."""
        if isinstance(values, dict) and "tensorboard" in values:
            values = dict(values)
            flag = values.pop("tensorboard")
            if not isinstance(flag, bool):
                raise ValueError(f"tensorboard must be true or false, got {flag!r}; name it in trackers")
            if flag:
                values["trackers"] = tuple(dict.fromkeys([*values.get("trackers", ()), "tensorboard"]))
        return values


class AdapterConfig(Section):
    """What ``train.mode`` lora, rslora, dora, apla and partial train of the backbone."""

    rank: int = Field(8, description="rank of the update of a projection")
    alpha: float | None = Field(
        None, gt=0, description="the update is scaled by alpha / rank (rslora: alpha / sqrt(rank)); null = 2 * rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the update")
    targets: tuple[Target, ...] | None = Field(
        None,
        min_length=1,
        description="projections that are updated: q k v o of the attention, up down gate of the MLP; the same words "
        "for DINOv3 and DINOv2; null = q, k, v, o",
    )
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default", description="of the update; default and gaussian start at exactly the base's outputs"
    )
    blocks: int = Field(1, ge=1, description="partial: last blocks that are trained whole, with the final norm")

    @field_validator("rank")
    @classmethod
    def _some_rank(cls, rank: int) -> int:
        if rank < 1:
            raise ValueError(f"rank must be 1 or more, got {rank}; to train the heads alone use mode linear")
        return rank


class GateConfig(Section):
    """The gate, which says P(Stage A is correct | x), and what is sure of an answer."""

    fit: Literal["out_of_fold", "joint"] = Field(
        "out_of_fold",
        description="out_of_fold = refitted after training on answers of heads that had not seen the row's label; "
        "joint = as training left it, worse than max softmax on new rows",
    )
    folds: int = Field(5, ge=2, description="parts of the train groups; each is answered by a head fitted on the rest")
    views: int = Field(
        2,
        ge=0,
        description="augmented draws of every train row to refit on, since a backbone knows its clean rows by heart; "
        "0 = clean rows; a frozen backbone always takes those",
    )
    confidence: Literal["auto", "softmax", "gate"] = Field(
        "auto", description="what ranks answers; auto = the lower AUGRC on val_select; recorded in gate.json"
    )
    stop_features: bool = Field(
        True,
        description="keep the joint gate's gradient from the backbone: what it learns there is right on rows already "
        "learned by heart, and the refitted gate replaces it",
    )


class ExploraConfig(Section):
    """Self-supervised adaptation of the backbone to unlabelled images (ExPLoRA)."""

    objective: Literal["mae", "simmim", "latent", "diet"] = Field(
        "mae",
        description="mae = pixels of masked patches, which the encoder never sees; simmim = mask tokens in their "
        "place; latent = the starting backbone's features of masked patches; diet = every image is a class of its own",
    )
    train: Literal["explora", "full"] = Field(
        "explora",
        description="explora = the last blocks, all norms, and LoRA on q and v of the others, 0.1-10% of the encoder; "
        "full = every weight, for pretraining a small model from scratch, no limit",
    )
    blocks: int = Field(1, ge=1, description="last blocks that are trained whole")
    rank: int = Field(8, ge=1, description="rank of LoRA on q and v of the other blocks")
    alpha: float | None = Field(None, gt=0, description="LoRA's scale is alpha / rank; null = 2 * rank")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is masked")
    epochs: int = Field(40, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(
        2e-4,
        gt=0,
        description="peak learning rate of encoder and decoder; a model that learns from nothing (train: full) takes "
        "about 1e-3, with which an adaptation of few steps forgets more than it learns",
    )
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(2.0, ge=0, description="of the learning rate, once for each part that begins to learn")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    decoder_width: int = Field(96, ge=32, multiple_of=32)
    decoder_depth: int = Field(2, ge=1, description="blocks of the decoder, which is thrown away afterwards")
    decoder_warmup_epochs: int = Field(4, ge=0, description="first epochs, in which the encoder is frozen")
    crop_scale: tuple[float, float] = Field((0.4, 1.0), description="area share of the random crop")
    horizontal_flip: float = Field(0.5, ge=0, le=1, description="probability of a mirror image")
    held_out: float = Field(
        0.05, ge=0, lt=1, description="share of the pool that is not trained on; its loss is in metrics.csv"
    )
    keep: Literal["better", "adapted"] = Field(
        "better",
        description="better = the base unless probes on train rows say that adaptation helped; adapted = whatever they "
        "say, which the record tells",
    )
    save_every_steps: int = Field(50, ge=1, description="steps between two last.pth inside an epoch")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be [low, high] with 0 < low <= high <= 1, got [{low:g}, {high:g}]")
        if self.decoder_warmup_epochs >= self.epochs:
            raise ValueError(
                f"decoder_warmup_epochs must be fewer than the {self.epochs} epochs, got {self.decoder_warmup_epochs}; "
                "the encoder would never learn"
            )
        return self


class CalibrateConfig(Section):
    """Exit policy."""

    policy: Literal["softmax", "gate", "scrc", "auto"] = Field(
        "auto",
        description="scrc = sets and abstentions after the cascade; auto = softmax or gate, whichever ranked answers "
        "better on val_select, as gate.json says",
    )
    guarantee: Literal["ltt", "none"] = Field(
        "ltt", description="ltt = certified, or refused; none = empirical, promises nothing"
    )
    exit_error: float | None = Field(
        None, gt=0, lt=1, description="largest share of wrong answers among exits; null = .05 where no risk is limited"
    )
    fnr: float | None = Field(
        None, gt=0, lt=1, description="largest share that Stage A misses among exits of one class; null = any"
    )
    fnr_class: str | None = Field(None, description="that class; null = the positive one")
    cascade_error: float | None = Field(
        None, gt=0, lt=1, description="largest share of wrong answers of the whole cascade; null = any"
    )
    disagreement: float | None = Field(
        None, gt=0, lt=1, description="largest share of exits that Stage B would answer otherwise; null = any"
    )
    least_coverage: float | None = Field(
        None, gt=0, lt=1, description="least share of photos that exit; scrc: that are accepted, .70 by default"
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="scrc: largest risk among the accepted")
    variant: Literal["pac", "I", "T", "naive"] | None = Field(
        None,
        description="scrc: pac = for the very thresholds found; I, T = in expectation; naive promises nothing; null = "
        "pac, or naive with guarantee none",
    )
    loss: Literal["miscoverage", "fnr"] = Field(
        "miscoverage", description="scrc: risk that the set misses the label; fnr = of positives alone"
    )
    score: Literal["lac", "aps", "raps"] = Field("lac", description="scrc: nonconformity of a class")
    cells: Literal["stage", "class"] | None = Field(
        None, description="scrc: a limit for each stage that answers or each class; null = one for all"
    )
    allow_empty: bool = Field(False, description="scrc: let sets be empty")
    delta: float = Field(0.05, gt=0, lt=1, description="largest chance of a false certificate, all claims together")
    claims: int = Field(1, ge=1, description="claims that delta is divided for, before the first")

    @model_validator(mode="before")
    @classmethod
    def _of_the_first_version(cls, given: Any) -> Any:
        """The same by today's names; files of the first version hold the limits of every policy, whichever it is."""
        if not isinstance(given, dict) or not any(name in given for name in _FIRST_NAMES):
            return given
        policy = given.get("policy", "softmax")
        own = {"softmax": ["target_fnr"]}.get(policy, [name for name in _FIRST_NAMES if name != "target_fnr"])
        kept = own if all(name in given for name in _FIRST_NAMES) else list(_FIRST_NAMES)
        named = {_FIRST_NAMES[name]: given[name] for name in kept if name in given}
        return {"policy": policy, **named, **{name: one for name, one in given.items() if name not in _FIRST_NAMES}}


_FIRST_NAMES = {
    "target_fnr": "fnr", "target_fnr_exit": "fnr", "max_exit_error": "exit_error", "min_coverage": "least_coverage"
}  # fmt: skip


class ExportConfig(Section):
    """Bundle."""

    target: Literal["onnx", "rtx", "tensorrt"] = "onnx"
    precisions: list[Precision] = Field(
        default=[], description="graphs beside fp32: res32, fp16, bf16; an engine recipe's own are added"
    )
    opset: int = Field(20, ge=20, le=23)
    tolerance: float = Field(1e-3, gt=0, description="largest difference of a logit between torch and ONNX")


class Config(Section):
    """Everything a run is made from; stored resolved as config.json."""

    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    adapter: AdapterConfig = AdapterConfig()
    gate: GateConfig = GateConfig()
    explora: ExploraConfig = ExploraConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    export: ExportConfig = ExportConfig()


def load_config(
    path: Path | str | None = None, overrides: list[str] | None = None, base: Config | None = None
) -> Config:
    """Read YAML (or JSON), then apply ``a.b=c`` overrides; values are parsed as YAML.

    ``base`` gives the values that neither names (defaults otherwise). Raises InputError naming
    the wrong key, the nearest right one, and what the value must be.
    """
    values: dict[str, Any] = base.model_dump(mode="json") if base else {}
    if path is not None:
        _merge(values, read_yaml(path))
    for item in overrides or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise InputError(f"--set must be SECTION.KEY=VALUE, got '{item}'")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise InputError(f"--set {key} must have a YAML value, got '{printable(text)}': {error}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(values, value)
    return build_config(values)


def build_config(values: dict[str, Any]) -> Config:
    """Validate a nested mapping; raise InputError with the key, its place and the nearest name."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"unknown configuration key '{'.'.join(place)}'{_nearest_key(place)}; known here: "
                f"{', '.join(_keys(place[:-1]))}"
            ) from None
        raise InputError(f"configuration key {wrong(error)}") from None


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default, description), for ``--help``."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            rows += describe(annotation, f"{prefix}{name}.")
            continue
        options = " | ".join(str(o) for o in get_args(annotation) if isinstance(o, str))
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        default = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        rows.append((f"{prefix}{name}", default, "; ".join(filter(None, (options, field.description)))))
    return rows


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _keys(place: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in place:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)


def _nearest_key(place: list[str]) -> str:
    """The dotted key or section whose last part is most alike; siblings win over equals elsewhere."""
    prefix = ".".join(place[:-1])
    siblings = [f"{prefix}.{name}" if prefix else name for name in _keys(place[:-1])]
    known = [*siblings, *(name for name, _, _ in describe() if name not in siblings)]
    word = place[-1]
    ratio = {name: difflib.SequenceMatcher(None, word, name.rsplit(".", 1)[-1]).ratio() for name in known}
    best = max(known, key=lambda name: ratio[name])
    return f"; did you mean '{best}'?" if ratio[best] >= 0.6 else ""
