"""Weights of a transformers folder or hub id: looked at before they are loaded, and compared with what was loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from stage1_pro.errors import ArtifactError, printable
from stage1_pro.record import parse_json

# In the order in which transformers takes them.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Tables of positions are integers.
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")
_AGAIN = "download or copy it again"


def find_file(name: str, file: str) -> Path | None:
    """A file of a folder, or of a hub id through the hub's cache; None where there is none."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).exists() else None
    found = cached_file(
        name, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(found) if found else None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        ArtifactError: it is something else.
    """
    _check_fetched(path)
    try:
        # An index of shards has a line for every tensor.
        values = parse_json(path.read_bytes(), str(path), ArtifactError, values=10**6, depth=64)
    except OSError as error:
        raise ArtifactError(f"{path} must be JSON, got: {error.strerror}; {_AGAIN}") from None
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_AGAIN}") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must be a JSON object, got {type(values).__name__}; {_AGAIN}")
    return values


def find_weights(name: str) -> list[Path]:
    """The files that hold a model's weights, each whole.

    Raises:
        ArtifactError: none, an adapter beside them, a missing shard, or a file that is a git-lfs pointer, empty, cut
            off or of another format.
    """
    adapter = find_file(name, "adapter_config.json")
    if adapter is not None:
        raise ArtifactError(
            f"{adapter} must not lie beside a backbone's weights: transformers would put that adapter on them; "
            "merge the adapter into the weights and save those in a folder of their own"
        )
    found = next((path for path in (find_file(name, one) for one in _NAMES) if path is not None), None)
    if found is None:
        raise ArtifactError(f"{name} must hold weights ({_NAMES[0]}), got none that can be read; download them there")
    paths = _shards(name, found) if found.suffix == ".json" else [found]
    for path in paths:
        _check_fetched(path)
        for _ in _tensors(path):
            break
    return paths


def check_loaded(model: nn.Module, plain: nn.Module, left: list[str], paths: list[Path]) -> None:
    """Compare a loaded model with the plain class of its configuration and with the files it was loaded from.

    Args:
        model: as loaded.
        plain: the same class as built from the configuration, on whatever device.
        left: keys of the files that the model did not take; a classifier's own head may be among them.
        paths: the files.

    Raises:
        ArtifactError: other keys, shapes or types, weights that no file holds, or blocks that were left over.
    """
    where = paths[0] if len(paths) == 1 else paths[0].parent
    wanted, own = plain.state_dict(), model.state_dict()
    problems = {
        "keys that the plain model lacks": [key for key in own if key not in wanted],
        "missing keys": [key for key in wanted if key not in own],
        "other shapes": [key for key in own if key in wanted and own[key].shape != wanted[key].shape],
        "other types than float32": [
            key for key, tensor in own.items() if tensor.is_floating_point() and tensor.dtype != torch.float32
        ],
        "left over": _of_the_model(left, wanted, str(getattr(model, "base_model_prefix", ""))),
    }
    if not any(problems.values()):
        stored = {_digest(tensor) for path in paths for _, tensor in _tensors(path)}
        problems["not in the file"] = [
            # A base may lack the mask token, which is then random and never read.
            key for key, tensor in own.items() if "mask_token" not in key and _digest(tensor) not in stored
        ]  # fmt: skip
    said = [f"{what} {sorted(keys)[:4]} ({len(keys)})" for what, keys in problems.items() if keys]
    if said:
        raise ArtifactError(
            f"{where} must hold exactly the weights of {type(plain).__name__} as config.json describes it; got "
            f"{'; '.join(said)}; take config.json and weights of one and the same model"
        )


def _of_the_model(left: list[str], wanted: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Keys left over that are a part of the model (another block, a bias, an adapter), not a head beside it."""

    def place(key: str) -> str:
        return re.sub(r"\b\d+\b", "N", key.removeprefix(f"{prefix}.")).rpartition(".")[0]

    places = {place(key) for key in wanted}
    blocks = {one[i:] for one in places for i in range(len(one)) if (i == 0 or one[i - 1] == ".") and ".N" in one[i:]}
    return [key for key in left if place(key) in places | blocks or "lora_" in key or ".base_layer." in key]


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu()
    values = (plain.float() if plain.is_floating_point() else plain).contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + values.numpy().tobytes()).digest()


def _shards(name: str, index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    files = set(listed.values()) if isinstance(listed, dict) else set()
    if not files or not all(isinstance(file, str) and file == Path(file).name for file in files):
        raise ArtifactError(f"{index} must name the files of its weights in 'weight_map'; {_AGAIN}")
    found = {file: find_file(name, file) for file in sorted(files)}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise ArtifactError(
            f"{index} names {printable(', '.join(missing[:4]))}, which must lie beside it; download {len(missing)} "
            "missing file(s) there"
        )
    return [path for path in found.values() if path is not None]


def _check_fetched(path: Path) -> None:
    with path.open("rb") as file:
        begins = file.read(64)
    if not begins:
        raise ArtifactError(f"{path} must not be empty; {_AGAIN}")
    if begins.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` where it was cloned")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weights file, read one by one."""
    if path.suffix == ".bin":
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - unpickling raises whatever the bytes make it raise
            raise ArtifactError(
                f"{path} must be weights as torch.save writes them, got: {_line(error)}; {_AGAIN}"
            ) from None
        yield from ((name, one) for name, one in held.items() if isinstance(one, Tensor))
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                kind = file.get_slice(name).get_dtype()
                if kind not in _TYPES:
                    raise ArtifactError(
                        f"{path} must hold floating-point weights, got {kind} in {printable(name)}; "
                        "take the model before it was quantised"
                    )
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ArtifactError(f"{path} must be a whole safetensors file, got: {_line(error)}; {_AGAIN}") from None


def _line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0])
