"""What the process and its libraries were told from outside, and what of it reaches a training."""

from __future__ import annotations

import os
import re
from operator import attrgetter

import torch

from stage1_pro.errors import InputError, printable

_OFF = ("", "0", "false", "f", "no", "n", "off", "none", "default")
# Words of accelerate that say nothing of results, or what the configuration overrules; all others must be off.
_ACCELERATE = re.compile(
    r"ACCELERATE_(MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DEBUG_\w+|LOG_LEVEL|ENABLE_RICH|CPU_AFFINITY|NUM_PROCESSES)"
)
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OTHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Recorded, but for places and what is written there, which are of one machine.
_LIBRARIES = re.compile(r"(TORCH|PYTORCH|ATEN|MKL|OMP|KMP|GOMP|DNNL|ONEDNN|OPENBLAS)\w*_\w+")
_CUDA_LIBRARIES = re.compile(r"(CUBLAS|CUDNN|NVIDIA_TF32|CUDA_LAUNCH)\w*_\w+")
# ... or say only how threads wait.
_SILENT = re.compile(r"HOME|CACHE_DIR|PATH|FILE|FOLDER|LOG|TRACE|TORCHELASTIC|VERBOSE|SPINCOUNT|WAIT_POLICY|BLOCKTIME")
# Settings of torch, and functions that read them.
_FLAGS: tuple[str, ...] = (
    "get_num_threads", "backends.cpu.get_cpu_capability", "get_deterministic_debug_mode",
    "utils.deterministic.fill_uninitialized_memory", "get_float32_matmul_precision", "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic", "backends.mkldnn.matmul.fp32_precision", "backends.mkldnn.conv.fp32_precision",
    "backends.cuda.flash_sdp_enabled", "backends.cuda.mem_efficient_sdp_enabled", "backends.cuda.math_sdp_enabled",
)  # fmt: skip
_CUDA_FLAGS = (
    "backends.cudnn.enabled", "backends.cudnn.benchmark", "backends.cudnn.deterministic", "backends.cudnn.allow_tf32",
    "backends.cuda.matmul.allow_tf32", "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction", "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cuda.cudnn_sdp_enabled",
)  # fmt: skip


def check_environment() -> None:
    """Refuse what would change a training from outside its configuration.

    Raises:
        InputError: a variable that accelerate would obey, a part of what a launcher sets, or settings of torch that
            models of this package are not made for; names it.
    """
    for name, value in sorted(os.environ.items()):
        if not name.startswith("ACCELERATE_") or _ACCELERATE.fullmatch(name) or value.strip().lower() in _OFF:
            continue
        if name == "ACCELERATE_USE_CPU" and not torch.cuda.is_available():
            continue
        raise InputError(
            f"{name} must not be set for a training, got {printable(value)}; unset it: the configuration alone says "
            "how it is trained (train.micro_batch, train.precision)"
        )
    _check_ranks()
    if torch.get_default_dtype() != torch.float32:
        raise InputError(
            f"torch's default type must be float32, got {torch.get_default_dtype()}; call "
            "torch.set_default_dtype(torch.float32) first"
        )
    if torch.get_default_device().type != "cpu":
        raise InputError(
            f"torch's default device must be cpu, got {torch.get_default_device()}; call "
            "torch.set_default_device('cpu') first: a training takes the GPU itself"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or not torch.is_grad_enabled():
        raise InputError("a training must be started outside of torch.autocast and torch.no_grad; leave them first")


def _check_ranks() -> None:
    given = {name: os.environ[name] for name in _RANKS if name in os.environ}
    given |= {name: os.environ[name] for name in _OTHER_SIZES if os.environ.get(name, "1") != "1"}
    whole = all(name in given for name in _RANKS) and bool(os.environ.get("MASTER_ADDR"))
    if given and not (whole and all(value.isdecimal() for value in given.values())):
        said = ", ".join(f"{name}={printable(value)}" for name, value in given.items())
        raise InputError(
            f"{', '.join(_RANKS)} and MASTER_ADDR must be set together, as a launcher does, got {said}; unset them, or "
            "start several processes with torchrun"
        )


def describe_environment(device: torch.device) -> dict[str, str]:
    """What of this process may change results: the device, torch's switches, variables that its libraries obey."""
    found: dict[str, str] = {"device": device.type}
    found["flush_denormal"] = str(bool((torch.tensor([1e-40]) * 1 == 0).all()))
    flags, libraries = _FLAGS, [_LIBRARIES]
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        flags, libraries = _FLAGS + _CUDA_FLAGS, [_LIBRARIES, _CUDA_LIBRARIES]
    for name in flags:
        try:
            value = attrgetter(name)(torch)
            found[name] = str(value() if callable(value) else value)
        except (AttributeError, RuntimeError):  # torch of another version, or set by two ways at once
            found[name] = "unknown"
    for name in sorted(os.environ):
        if any(one.fullmatch(name) for one in libraries) and not _SILENT.search(name):
            found[name] = printable(os.environ[name])
    return found
