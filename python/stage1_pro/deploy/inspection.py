"""inspect, verify, migrate: what a bundle is and promises, whom it comes from, and what of it may run. No torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stage1_pro.deploy import trust
from stage1_pro.deploy.bundle import LICENCE, MANIFEST, SIGNATURE, Bundle, load_bundle
from stage1_pro.deploy.manifest import FORMAT
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import atomic_directory


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
            "measured": policy.measured(), "outside": policy.outside, **policy.facts(),
        },
        "engines": told["engines"],
        "files": dict(sorted(told["files"].items())),
        "beside": list(loaded.beside),
        "size": sum(entry.size for entry in manifest.files.values()),
        "splits": {"seed": loaded.splits.seed, "counts": loaded.splits.counts, "groups": loaded.splits.groups},
        "provenance": told["provenance"],
        "verified": True,
    }  # fmt: skip


def render_inspection(facts: dict[str, Any]) -> str:
    """The description for people."""
    backbone, policy, spec = facts["backbone"], facts["policy"], facts["preprocessing"]
    origin = facts["provenance"]
    parity = max(stage["parity"] for stage in facts["stages"].values())
    lines = [
        (
            f"bundle      {facts['path']} (format {facts['format_version']}, {size_text(facts['size'])}, "
            "every file verified)"
        ),
        f"answers     {' | '.join(facts['classes'])}; positive: {facts['positive'] or 'none'}",
        f"input       {spec['width']}x{spec['height']} pixels, {spec['resize']}, {spec['resample']}",
        (
            f"backbone    {backbone['source']} ({backbone['family']}, {backbone['n_blocks']} blocks of width "
            f"{backbone['hidden_size']}); Stage A reads block {facts['tap']}"
        ),
        f"licence     {backbone['licence']}{'; see ' + facts['licence_file'] if facts['licence_file'] else ''}",
        f"policy      {policy['name']}: {policy['rule']}",
        f"promise     guarantee: {policy['guarantee']}. {policy['statement']}",
        f"{'on photos of its own' if policy['outside'] else 'on val_calib'}  {policy['measured']}",
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
    lines += [f"beside      {name}: no part of the bundle, not read" for name in facts["beside"]]
    lines.append(
        f"made by     stage1_pro {origin['stage1_pro']}, torch {origin['torch']}, transformers "
        f"{origin['transformers']}; checkpoint {origin['checkpoint_sha256'][:12]}, "
        f"model {origin['model_fingerprint'][:12]}"
    )
    return "\n".join(lines)


def verify(bundle: Path | str, *, require_signature: bool = False, trust_engines: bool = False) -> dict[str, Any]:
    """Check a received bundle as loading does, and say whom it comes from and which engines would run here.

    Nothing in it is executed: graphs are walked, engines are hashed.

    Args:
        bundle: bundle folder.
        require_signature: refuse it unless a trusted key signed it.
        trust_engines: what the engines' answer would be with this flag.

    Raises:
        ArtifactError: it is damaged, hostile, of a newer format, signed wrongly, or not signed as required.
    """
    loaded = load_bundle(bundle)
    signed = trust.signature_status(loaded)
    if signed.status == "invalid":
        raise ArtifactError(f"{bundle} must be as its signer left it, but it is {signed.reason}; get it anew")
    if require_signature and signed.status != "trusted":
        raise ArtifactError(f"{bundle} must be signed by a trusted key, but it is {signed.reason}")
    facts = inspect(loaded)
    engines = [
        {
            "path": entry.path,
            "precision": entry.precision,
            **asdict(trust.engine_trust(loaded, entry, trust_engines=trust_engines)),
        }
        for entry in loaded.manifest.engines
    ]
    return {
        **{key: facts[key] for key in ("path", "classes", "positive", "size", "licence_file")},
        "verified": True,
        "format_version": loaded.format_version,
        "current_format": FORMAT,
        "notes": list(loaded.notes),
        "policy": {key: facts["policy"][key] for key in ("name", "guarantee", "statement")},
        "backbone": {key: facts["backbone"][key] for key in ("source", "licence")},
        "contents": facts["files"],
        "beside": facts["beside"],
        "reference": loaded.manifest.reference,
        "variants": {name: sorted(entry.variants) for name, entry in loaded.manifest.stages.items()},
        "signature": asdict(signed),
        "engines": engines,
    }


def render_findings(facts: dict[str, Any]) -> str:
    """The findings for people."""
    older = "" if facts["format_version"] == FORMAT else f", read as format {FORMAT}"
    lines = [
        f"verified    {facts['path']}: {len(facts['contents'])} files, {size_text(facts['size'])}, every hash right",
        f"format      {facts['format_version']}{older}",
        *(f"            {note}" for note in facts["notes"]),
        f"answers     {' | '.join(facts['classes'])}; positive: {facts['positive'] or 'none'}",
        f"policy      {facts['policy']['name']}, guarantee: {facts['policy']['guarantee']}",
        f"licence     {facts['backbone']['licence']}; "
        + (f"its text is in {facts['licence_file']}" if facts["licence_file"] else "no licence file travels with it"),
        f"signature   {facts['signature']['status']}: {facts['signature']['reason']}",
    ]
    lines += [f"engine      {e['path']} ({e['precision']}): {e['status']}, {e['reason']}" for e in facts["engines"]]
    if not facts["engines"]:
        lines.append("engine      none in it; it runs on onnxruntime")
    lines += [f"file        {name}  {size_text(entry['size'])}" for name, entry in facts["contents"].items()]
    lines += [f"beside      {name}: no part of the bundle, not read" for name in facts["beside"]]
    return "\n".join(lines)


def migrate(bundle: Path | str, out: Path | str) -> dict[str, Any]:
    """Write a bundle of an older format anew in today's, all or nothing; the old one stays as it is.

    A signature is left behind, since it is of the old manifest's bytes: sign the new one.

    Returns:
        Both folders, the formats, what the bundle still lacks, and whether a signature was dropped.

    Raises:
        ArtifactError: the bundle is damaged, or of a newer format.
        InputError: it is of today's format already, or ``out`` is there or inside it.
    """
    loaded, out = load_bundle(bundle), Path(out)
    if not loaded.notes:
        raise InputError(f"bundle must be of a format before {FORMAT}, got {loaded.path}; use it as it is")
    if loaded.path.resolve() in out.resolve().parents:
        raise InputError(f"out must lie outside the bundle, which stays as it is, got {out}; choose another folder")
    if out.exists():
        raise InputError(f"out must be a new folder, got {out}, which is there; choose another one")
    with atomic_directory(out) as folder:
        loaded.copy_to(folder, loaded.manifest.files)
        loaded.manifest.write(folder / MANIFEST)
        load_bundle(folder, verify=False)  # the copies were checked
    return {
        "path": str(loaded.path),
        "out": str(out),
        "format_version": FORMAT,
        "notes": list(loaded.notes),
        "signature_dropped": (loaded.path / SIGNATURE).exists(),
    }


def size_text(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
