"""A model in the types an engine computes in: fp16 and bf16 throughout, or half products on an fp32 residual stream."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stage1_pro.deploy.engine import UNQUANTISED
from stage1_pro.errors import InputError
from stage1_pro.models.backbone import BlockParts
from stage1_pro.models.model import Heads, Stage1Model
from stage1_pro.words import Precision, StageName

HALF_LIMIT = 65504.0  # largest finite fp16
# Calibration images are not all images: a value this near the limit there may pass it elsewhere.
HALF_MARGIN = 4.0
HALF_TYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "res32": torch.float16}


@dataclass(frozen=True)
class Peaks:
    """Largest absolute values a block met on calibration images, in fp32.

    ``branch``: what res32 keeps in fp16 (norm's output, queries, keys, values, scores, products of the MLP);
    ``residual``: what fp16 throughout keeps besides (the residual stream, queries before their scale).
    """

    branch: float
    residual: float

    def of(self, precision: Precision) -> float:
        """The largest value this precision has to hold in its narrow type."""
        return self.branch if precision == "res32" else max(self.branch, self.residual)


def in_precision(model: Stage1Model, precision: Precision) -> Stage1Model | Throughout | Rewritten:
    """The model with both stages in one precision; inputs, outputs and what Stage B goes on from stay fp32.

    Args:
        model: in fp32; neither it nor its weights are changed.
        precision: ``fp32`` is the model itself, ``fp16`` and ``bf16`` have the backbone in that type throughout
            (the heads stay fp32), ``res32`` is :class:`Rewritten`.

    Raises:
        InputError: int8 or fp8, with the reason.
    """
    if precision == "fp32":
        return model
    if precision not in HALF_TYPES:
        raise InputError(f"precision must be fp32, fp16, bf16 or res32, got '{precision}'; {UNQUANTISED}")
    half = HALF_TYPES[precision]
    return Rewritten(model, half) if precision == "res32" else Throughout(model, half)


def measure_peaks(model: Stage1Model, batches: Iterable[Tensor]) -> dict[StageName, list[Peaks]]:
    """Largest absolute values of every block of both stages over batches of pixels [N, 3, H, W]."""
    plain: Stage1Model | Rewritten = Rewritten(model, torch.float32) if model.backbone.transformer else model
    with contextlib.ExitStack() as hooks, torch.no_grad():
        if isinstance(plain, Rewritten):
            peaks = [cast("_Block", block).watch() for block in plain.blocks]
        else:
            peaks = [_watch(block, hooks) for block in plain.backbone.blocks]
        for pixels in batches:
            plain.stage_b(plain.stage_a(pixels)[2])
    found = [Peaks(**values) for values in peaks]
    return {"stage_a": found[: model.tap], "stage_b": found[model.tap :]}


def _watch(block: nn.Module, hooks: contextlib.ExitStack) -> dict[str, float]:
    """Note the largest absolute values that a block and the modules in it give, until the hooks are closed."""
    peaks = {"branch": 0.0, "residual": 0.0}

    def note(module: nn.Module, _: Any, out: Tensor) -> None:
        _raise(peaks, "residual" if module is block else "branch", out)

    for module in block.modules():
        hooks.callback(module.register_forward_hook(note).remove)
    return peaks


def _raise(peaks: dict[str, float], place: str, values: Tensor) -> None:
    # torch.max keeps NaN, max() would lose it.
    largest = values.abs().max()
    peaks[place] = float(torch.maximum(largest, largest.new_tensor(peaks[place])))


class Throughout(nn.Module):
    """The transformers model in a narrow type, residual stream and all; the heads read fp32."""

    def __init__(self, model: Stage1Model, half: torch.dtype) -> None:
        super().__init__()
        self.half_type = half
        self.model = copy.deepcopy(model).eval()
        self.model.backbone.to(half)
        self.model.norm_a.to(half)
        self.model.heads = _heads(model.heads)

    def stage_a(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Stage1Model.stage_a``."""
        features, hidden, _ = self.model.to_tap(pixels.to(self.half_type))
        logits, gate = self.model.answer(features.float())
        return logits, gate, hidden.float()

    def stage_b(self, hidden: Tensor) -> Tensor:
        """As ``Stage1Model.stage_b``."""
        tokens = hidden.to(self.half_type)
        logits: Tensor = self.model.heads.auxiliary(self.model.from_tap(tokens, self.model.backbone.context()).float())
        return logits


class Rewritten(nn.Module):
    """The same function as the model, written for engines: fp32 residual stream and norms, products in ``half``.

    The softmax scale lies in the query weights, the rotary table is a constant in fp32 that covers the prefix
    tokens too (by one and zero), position and prefix tokens are one constant. Where nothing reads the last block's
    patch tokens, because every weight on them in the heads is exactly zero, that block computes the CLS token alone.

    Weights are copied where they change and shared where they do not. In ``torch.float32`` it gives what the model
    gives, up to rounding.
    """

    base: Tensor
    patches: Tensor

    def __init__(self, model: Stage1Model, half: torch.dtype) -> None:
        super().__init__()
        backbone = model.backbone
        self.half_type, self.tap, self.n_prefix = half, model.tap, backbone.n_prefix
        self.heads, self.norm_a, self.norm = _heads(model.heads), model.norm_a, backbone.norm
        self.reader, self.pool = backbone.reader, backbone.pool
        side = backbone.image_size
        weight = backbone.patch_projection.weight
        with torch.no_grad():
            # Of black pixels only prefix tokens, bias and positions are left.
            base = backbone.tokens(torch.zeros(1, 3, side, side, device=weight.device), None)
        self.register_buffer("base", base.float(), persistent=False)
        self.register_buffer("patches", weight.detach().to(half), persistent=False)
        self.stride = int(weight.shape[-1])
        rope = _rope(model)
        self.blocks = nn.ModuleList(
            _Block(backbone.parts(index), backbone.n_heads, rope, half) for index in range(backbone.n_blocks)
        )
        self.cls_only = backbone.reader is None and not _patches_are_read(model)

    def _embed(self, pixels: Tensor) -> Tensor:
        patches = nn.functional.conv2d(pixels.to(self.half_type), self.patches, stride=self.stride)
        patches = patches.flatten(2).transpose(1, 2).float() + self.base[:, self.n_prefix :]
        prefix = self.base[:, : self.n_prefix].expand(pixels.shape[0], -1, -1)
        return torch.cat((prefix, patches), dim=1)

    def _run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        for index in range(start, stop):
            tokens = self.blocks[index](tokens, cls_only=self.cls_only and index == len(self.blocks) - 1)
        return tokens

    def _features(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        normed = norm(tokens)
        if normed.shape[1] == 1:
            # Nothing reads the mean patch token: its weights are zero.
            return torch.cat((normed[:, 0], torch.zeros_like(normed[:, 0])), dim=1)
        return self.pool(normed)

    def stage_a(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Stage1Model.stage_a``."""
        tokens = self._run(self._embed(pixels), 0, self.tap)
        last = self.tap == len(self.blocks)
        features = self._features(tokens, self.norm if last else self.norm_a)
        logits = self.heads.classifier(features)
        return logits, self.heads.gate(features, logits), features if last else tokens

    def stage_b(self, hidden: Tensor) -> Tensor:
        """As ``Stage1Model.stage_b``."""
        if self.tap < len(self.blocks):
            hidden = self._features(self._run(hidden, self.tap, len(self.blocks)), self.norm)
        logits: Tensor = self.heads.auxiliary(hidden)
        return logits


class _Block(nn.Module):
    """One transformer block on an fp32 stream [N, T, D], whichever family it came from."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, parts: BlockParts, n_heads: int, rope: tuple[Tensor, Tensor] | None, half: torch.dtype) -> None:
        super().__init__()
        self.half_type, self.n_heads = half, n_heads
        self.norm1, self.norm2 = parts.norms
        self.scale1: Tensor | None
        self.scale2: Tensor | None
        self.scale1, self.scale2 = parts.scales or (None, None)
        linear = parts.projections
        self.scale = (linear["q"].weight.shape[0] // n_heads) ** -0.5
        # One product and one kernel for the three; apart, every block costs two kernels more.
        self.joint = _copied(*_join((linear["q"], self.scale), (linear["k"], 1.0), (linear["v"], 1.0)), half)
        self.out = _linear(linear["o"], half)
        self.gate: nn.Module | None = None
        if parts.joint_gate:
            weights, biases = linear["up"].weight.chunk(2), linear["up"].bias.chunk(2)
            self.gate, self.up = (_copied(w, b, half) for w, b in zip(weights, biases, strict=True))
        else:
            if "gate" in linear:
                self.gate = _linear(linear["gate"], half)
            self.up = _linear(linear["up"], half)
        self.activation = parts.activation
        self.down = _linear(linear["down"], half)
        self.register_buffer("cos", None if rope is None else rope[0], persistent=False)
        self.register_buffer("sin", None if rope is None else rope[1], persistent=False)
        self.peaks: dict[str, float] | None = None

    def watch(self) -> dict[str, float]:
        """From now on note the largest absolute values in what is returned."""
        self.peaks = {"branch": 0.0, "residual": 0.0}
        return self.peaks

    def forward(self, tokens: Tensor, *, cls_only: bool = False) -> Tensor:
        """Tokens [N, T, D]; with ``cls_only`` just the first, [N, 1, D]."""
        self._note(tokens, "residual")
        read = self._note(self.norm1(tokens).to(self.half_type))
        states = self.joint(read).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        turned, value = self._rotate(states[:2]), self._note(states[2])
        query, key = turned[0], self._note(turned[1])
        if self.peaks is not None:
            self._note(query / self.scale, "residual")
        query = self._note(query[:, :, :1] if cls_only else query)
        scores = self._note(query @ key.transpose(2, 3))
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
        tokens = tokens[:, :1] if cls_only else tokens
        tokens = self._note(tokens + _scaled(self._note(self.out(mixed)), self.scale1), "residual")
        read = self._note(self.norm2(tokens).to(self.half_type))
        wide = self._note(self.up(read))
        inner = self.activation(wide) if self.gate is None else self.activation(self._note(self.gate(read))) * wide
        tokens = tokens + _scaled(self._note(self.down(self._note(inner))), self.scale2)
        return self._note(tokens, "residual")

    def _rotate(self, states: Tensor) -> Tensor:
        if self.cos is None or self.sin is None:
            return states
        first, second = states.chunk(2, dim=-1)
        turned = states.float() * self.cos + torch.cat((second, first), dim=-1).float() * self.sin
        return turned.to(self.half_type)

    def _note(self, values: Tensor, place: str = "branch") -> Tensor:
        if self.peaks is not None:
            _raise(self.peaks, place, values)
        return values


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch.float() if scale is None else branch.float() * scale


def _rope(model: Stage1Model) -> tuple[Tensor, Tensor] | None:
    """The rotary table [T, D / heads] as cosine and signed sine; the prefix tokens are not turned."""
    context = model.backbone.context()
    if context is None:
        return None
    cos, sin = (table.detach().float() for table in context)
    ones = torch.ones(model.backbone.n_prefix, cos.shape[1], device=cos.device)
    low, high = sin.chunk(2, dim=1)
    return torch.cat((ones, cos)), torch.cat((0 * ones, torch.cat((-low, high), dim=1)))


def _patches_are_read(model: Stage1Model) -> bool:
    """Whether any head has a weight other than zero on the last block's mean patch token."""
    width = model.backbone.hidden_size
    readers: list[Any] = [model.heads.auxiliary[0].weight]
    if model.tap == model.backbone.n_blocks:
        readers += [model.heads.classifier[1].weight, model.heads.gate.linear.weight]
    return any(bool((weight[:, width : 2 * width] != 0).any()) for weight in readers)


def _join(*parts: tuple[Any, float]) -> tuple[Tensor, Tensor]:
    """Weights and biases of linear layers with one input, each times its factor, below one another."""
    weights = [linear.weight * scale for linear, scale in parts]
    biases = [
        torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias * scale for linear, scale in parts
    ]
    return torch.cat(weights), torch.cat(biases)


def _linear(linear: Any, half: torch.dtype) -> nn.Linear:
    return _copied(linear.weight, linear.bias, half)


def _copied(weight: Tensor, bias: Tensor | None, half: torch.dtype) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=half, device="meta")
    out.weight = nn.Parameter(weight.detach().to(half), requires_grad=False)
    if bias is not None:
        out.bias = nn.Parameter(bias.detach().to(half), requires_grad=False)
    return out


class _Summed(nn.Module):
    """A linear layer as products and a sum: fp32 where a card has no fp32 matrix product (Turing), and as exact."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, features: Tensor) -> Tensor:
        return (features.unsqueeze(1) * self.weight).sum(dim=2) + self.bias


def _heads(heads: Heads) -> Heads:
    """The heads for an engine, in fp32 without a matrix product; the weights are shared."""
    out = copy.deepcopy(heads).eval()
    for head in (out.classifier, out.gate, out.auxiliary):
        for name, child in list(head.named_children()):
            if isinstance(child, nn.Linear):
                setattr(head, name, _Summed(child))
    return out
