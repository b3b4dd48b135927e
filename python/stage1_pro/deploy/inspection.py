"""inspect: what a bundle is, what it promises, and for which GPUs. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_pro.deploy.bundle import LICENCE, Bundle, load_bundle


def inspect(bundle: Bundle | Path | str) -> dict[str, Any]:
    """Verify a bundle and describe it as plain values.

    Raises:
        ArtifactError: the bundle is damaged, changed or incomplete.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    manifest, policy = loaded.manifest, loaded.policy
    told = manifest.model_dump(mode="json")
    return {
        "path": str(loaded.path),
        "format_version": loaded.format_version,
        **{name: told[name] for name in ("classes", "positive", "backbone")},
        "licence_file": LICENCE if LICENCE in manifest.files else None,
        **{name: told[name] for name in ("tap", "preprocessing", "stages")},
        "policy": {
            "name": policy.policy, "file": policy.file, "rule": policy.rule(),
            "exit_threshold": policy.exit_threshold, "guarantee": policy.guarantee, "statement": policy.statement,
            "measured": policy.measured(), **policy.facts(),
        },
        "engines": told["engines"],
        "files": dict(sorted(told["files"].items())),
        "size": sum(entry.size for entry in manifest.files.values()),
        "splits": {"seed": loaded.splits.seed, "counts": loaded.splits.counts, "groups": loaded.splits.groups},
        "provenance": told["provenance"],
        "verified": True,
    }  # fmt: skip


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
        f"on val_calib  {policy['measured']}",
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


def size_text(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
