"""inspect: what a bundle is, what it promises, and for which GPUs. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_pro.deploy.bundle import LICENCE, Bundle, load_bundle
from stage1_pro.policies import exit_rule
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.sets import ScrcParams


def inspect(bundle: Bundle | Path | str) -> dict[str, Any]:
    """Verify a bundle and describe it as plain values.

    Raises:
        ArtifactError: the bundle is damaged, changed or incomplete.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    manifest, policy = loaded.manifest, loaded.policy
    return {
        "path": str(loaded.path),
        "format_version": loaded.format_version,
        "classes": manifest.classes,
        "positive": manifest.positive,
        "backbone": manifest.backbone.model_dump(mode="json"),
        "licence_file": LICENCE if LICENCE in manifest.files else None,
        "tap": manifest.tap,
        "preprocessing": manifest.preprocessing.model_dump(mode="json"),
        "stages": {name: entry.model_dump(mode="json") for name, entry in manifest.stages.items()},
        "policy": _policy(policy, manifest.policy_file),
        "engines": [engine.model_dump(mode="json") for engine in manifest.engines],
        "files": {name: entry.model_dump(mode="json") for name, entry in sorted(manifest.files.items())},
        "size": sum(entry.size for entry in manifest.files.values()),
        "splits": {"seed": loaded.splits.seed, "counts": loaded.splits.counts, "groups": loaded.splits.groups},
        "provenance": manifest.provenance.model_dump(mode="json"),
        "verified": True,
    }


def render(facts: dict[str, Any]) -> str:
    """The description for people."""
    backbone, policy, spec = facts["backbone"], facts["policy"], facts["preprocessing"]
    origin = facts["provenance"]
    parity = max(stage["parity"] for stage in facts["stages"].values())
    lines = [
        (
            f"bundle      {facts['path']} (format {facts['format_version']}, {size_text(facts['size'])}, "
            "every file verified)"
        ),
        f"answers     {' | '.join(facts['classes'])}; positive: {facts['positive']}",
        f"input       {spec['width']}x{spec['height']} pixels, {spec['resize']}, {spec['resample']}",
        (
            f"backbone    {backbone['source']} ({backbone['family']}, {backbone['n_blocks']} blocks of width "
            f"{backbone['hidden_size']}); Stage A reads block {facts['tap']}"
        ),
        f"licence     {backbone['licence']}{'; see ' + facts['licence_file'] if facts['licence_file'] else ''}",
        f"policy      {policy['name']}: {policy['rule']}",
        f"promise     guarantee: {policy['guarantee']}. {policy['statement']}",
        f"on val_calib  {_measured(policy)}",
        f"ONNX        both stages; at most {parity:.2g} away from torch when exported",
    ]
    for precision in facts["stages"]["stage_a"]["variants"]:
        found = [stage["variants"].get(precision) for stage in facts["stages"].values()]
        if precision != "fp32" and None not in found:
            largest = [m for v in found for m in v["block_maxima"]]
            lines.append(
                f"precision   {precision}: at most {max(v['parity'] for v in found):.2g} away from torch in fp32, "
                f"{found[0]['flips']} of {found[0]['images']} decisions differ ({found[0]['judged_by']}); "
                f"largest value in it {f'{max(largest):.4g}' if largest else 'none, it has no block'}"
            )
    lines += [
        f"engine      {engine['path']}: {engine['builder']} {engine['builder_version']}, "
        f"{engine['precision']}, batch {'/'.join(map(str, engine['batch']))}, "
        f"{engine['layers']} fused layers; {engine['validated']}"
        for engine in facts["engines"]
    ]
    cards = sorted({c for e in facts["engines"] for c in e["compute_capabilities"]}, key=lambda c: int(c[2:]))
    lines.append(
        f"GPUs        {', '.join(cards) if cards else 'none: no engine in it; it runs on the CPU (onnxruntime)'}"
    )
    lines += [f"file        {name}  {size_text(entry['size'])}" for name, entry in facts["files"].items()]
    lines.append(
        f"made by     stage1_pro {origin['stage1_pro']}, torch {origin['torch']}, transformers "
        f"{origin['transformers']}; checkpoint {origin['checkpoint_sha256'][:12]}, "
        f"model {origin['model_fingerprint'][:12]}"
    )
    return "\n".join(lines)


def _policy(policy: Policy, file: str) -> dict[str, Any]:
    """What a policy does and promises; what softmax or gate does not have is null for it, scrc has its own record."""
    shared = {
        "name": policy.policy,
        "file": file,
        "rule": exit_rule(policy),
        "exit_threshold": policy.exit_threshold,
        "guarantee": policy.guarantee,
        "statement": policy.statement,
    }
    if isinstance(policy, ScrcParams):
        return {**shared, **policy.model_dump(mode="json", exclude={"policy", "format_version"})}
    gate = policy if isinstance(policy, GateParams) else None
    return {
        **shared,
        "certificate": None if policy.certificate is None else policy.certificate.model_dump(mode="json"),
        "coverage": policy.coverage,
        "fnr_on_exited": policy.fnr_on_exited,
        "fnr_upper_bound": policy.fnr_upper_bound,
        "bound_level": policy.bound_level,
        "bound_method": policy.bound_method,
        "n_positive_groups": policy.n_positive_groups,
        "target_fnr": policy.target_fnr,
        "exit_error": None if gate is None else gate.exit_error,
        "exit_error_upper_bound": None if gate is None else gate.exit_error_upper_bound,
        "constraints": None if gate is None else gate.constraints.model_dump(mode="json"),
        "platt": None if gate is None else gate.platt,
    }


def _measured(policy: dict[str, Any]) -> str:
    """Figures on the calibration rows, with their bounds."""
    if policy["name"] == "scrc":
        bound = "" if policy["coverage_bound"] is None else f" (lower bound {policy['coverage_bound']:.1%})"
        risks = ", ".join(
            f"{cell['name']} {cell['errors']} of {cell['trials']} (bound {cell['bound']:.2%})"
            for cell in policy["lambda_2"]
        )
        return (
            f"accepted {policy['coverage']:.1%} of {policy['n']} {policy['unit']} of the certify half{bound}, wished "
            f"{policy['xi']:.1%}; risk {risks}, wished {policy['alpha']:.2%}; exits on the fit half "
            f"{policy['exit_rate']:.1%}"
        )
    level = f"{policy['bound_level']:.4g} upper bound"
    parts = [f"coverage {policy['coverage']:.1%}"]
    if policy["exit_error"] is not None:
        wish = policy["constraints"]["max_exit_error"]
        parts.append(
            f"exit error {policy['exit_error']:.2%} ({level} {policy['exit_error_upper_bound']:.2%}; wished {wish:.2%})"
        )
    if policy["fnr_on_exited"] is not None:
        notes = [f"{level} {policy['fnr_upper_bound']:.2%}"] if policy["fnr_upper_bound"] is not None else []
        notes.append(f"{policy['n_positive_groups']} positive groups")
        if policy["target_fnr"] is not None:
            notes.append(f"target {policy['target_fnr']:.2%}")
        parts.append(f"FNR on exits {policy['fnr_on_exited']:.2%} ({'; '.join(notes)})")
    search = "" if policy["certificate"] else "; bounds are not corrected for the search"
    return ", ".join(parts) + search


def size_text(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
