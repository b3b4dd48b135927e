"""``stage1 doctor``: versions, devices, compiled modules, engine builders, and what is missing. Needs no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from stage1_pro import __version__
from stage1_pro.command import Command, Result
from stage1_pro.errors import need

BASE = ("numpy", "scipy", "pillow", "pydantic", "pyyaml", "rich", "onnxruntime", "matplotlib", "jinja2", "jsonschema")
TRAIN = ("torch", "transformers", "peft", "accelerate", "safetensors", "onnx", "onnxscript", "scikit-learn")


class Doctor(Command):
    """Print versions, devices, compiled modules, builders, and what is missing."""

    def execute(self) -> Result:
        """Print what is here, and the commands that add what is not."""
        facts = doctor()
        return Result(render(facts), facts)


def doctor() -> dict[str, Any]:
    """What is here and what is not, as plain values; ``missing`` maps a thing to the command that adds it."""
    from stage1_pro import native
    from stage1_pro.deploy.engine import BUILDERS
    from stage1_pro.deploy.runtime import RUNTIMES

    base, train = ({name: _version(name) for name in names} for names in (BASE, TRAIN))
    missing = {name: "pip install -c constraints.txt stage1_pro" for name, found in base.items() if found is None}
    if None in train.values():
        names = ", ".join(name for name, found in train.items() if found is None)
        missing[f"training and export ({names})"] = _command("train")
    signing = _version("cryptography")
    if signing is None:
        missing["signing bundles and checking signatures (cryptography)"] = _command("sign")
    builders: dict[str, str | None] = {}
    devices = gpus()
    for target, (module, extra, _) in BUILDERS.items():
        builders[target] = _builder(module)
        # Classic TensorRT builds for a GPU that is there, and without one nobody misses it.
        if builders[target] is None and (target == "rtx" or devices):
            missing[f"engine builder for {target} ({module})"] = _command(extra)
    if native.backend() != "compiled":
        missing["compiled core (_core)"] = (
            "apt-get install g++ (or another C++20 compiler), then: pip install --force-reinstall --no-deps ."
        )
    if devices and native.cuda_why() is None:
        missing["CUDA router (_cuda)"] = (
            "with a CUDA toolkit: pip install --force-reinstall --no-deps "
            "--config-settings=cmake.define.STAGE1_CUDA=ON ."
        )
    return {
        "stage1_pro": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "base": base,
        "train": train,
        "signing": signing,
        "gpus": devices,
        "torch_devices": _torch_devices(),
        "compiled": {"_core": native.why(), "_cuda": native.cuda_why()},
        "runtimes": sorted(["auto", *RUNTIMES]),
        "builders": builders,
        "missing": missing,
    }


def render(facts: dict[str, Any]) -> str:
    """The findings for people."""

    def listing(values: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {found or '-'}" for name, found in values.items())

    lines = [
        f"stage1_pro  {facts['stage1_pro']} on Python {facts['python']}, {facts['platform']}, {facts['cpus']} CPUs",
        f"base        {listing(facts['base'])}",
        f"train       {listing(facts['train'])}",
        f"signing     cryptography {facts['signing'] or '-'}",
        f"GPUs        {', '.join(facts['gpus']) or 'none found (nvidia-smi)'}",
        f"torch       {', '.join(facts['torch_devices']) or 'not installed'}",
        f"compiled    _core: {facts['compiled']['_core']}; _cuda: {facts['compiled']['_cuda'] or 'not built'}",
        f"runtimes    {', '.join(facts['runtimes'])}",
        f"builders    {listing(facts['builders'])}",
    ]
    lines.append("missing" if facts["missing"] else "nothing is missing")
    return "\n".join([*lines, *(f"  {name}\n    {command}" for name, command in facts["missing"].items())])


def _command(extra: str) -> str:
    return str(need(extra, extra)).split("install it with: ")[1]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _builder(module: str) -> str | None:
    """Version of a builder that really loads: its bindings can be there without their libraries."""
    try:
        return str(importlib.import_module(module).__version__)
    except (ImportError, OSError, AttributeError):  # of stubs alone there is no version
        return None


def gpus() -> list[str]:
    """Name, compute capability, memory and driver of each NVIDIA GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _torch_devices() -> list[str]:
    """What torch computes on; empty when it is not installed."""
    if _version("torch") is None and "torch" not in sys.modules:
        return []
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"installed but does not load: {error}"]
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices
