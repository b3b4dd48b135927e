"""``stage1 verify``, ``sign``, ``keys``, ``migrate`` and ``inspect``: bundles that come from elsewhere or go there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from stage1_pro.command import Command, Flag, Result, option
from stage1_pro.errors import InputError

Bundle = Annotated[Path, Flag(positional=True)]


class Verify(Command, topic="receiving"):
    """Check a bundle from elsewhere: hashes, limits, signature, engines; runs nothing."""

    bundle: Bundle = option(..., "bundle folder")
    require_signature: bool = option(False, "refuse it unless a trusted key signed it")
    trust_engines: bool = option(False, "say what would run if its engines were trusted")

    def execute(self) -> Result:
        """Print whom it comes from and which engines would run here."""
        from stage1_pro.deploy.inspection import render_findings, verify

        facts = verify(**dict(self))
        return Result(render_findings(facts), facts)


class Sign(Command, topic="receiving"):
    """Sign a bundle with an Ed25519 key: writes bundle.sig."""

    bundle: Bundle = option(..., "bundle folder")
    key: Path = option(..., "PEM file of the private key; `stage1 keys new` makes one")

    def execute(self) -> Result:
        """Print the signature's file and key."""
        from stage1_pro.deploy.bundle import SIGNATURE, load_bundle
        from stage1_pro.deploy.trust import sign

        loaded = load_bundle(self.bundle)
        key_id = sign(loaded, self.key).key_id
        record = {"path": str(loaded.path), "file": SIGNATURE, "key_id": key_id}
        return Result(f"wrote {loaded.path}/{SIGNATURE}, signed by key {key_id}", record)


class Keys(Command, topic="receiving"):
    """Make keys for signing, and say whose bundles' engines may run here."""

    action: Literal["new", "trust", "list", "forget"] = option(..., "what to do", positional=True)
    key: str | None = option(
        None, "new: file to write; trust: the .pub file; forget: identifier or name", positional=True
    )
    name: str | None = option(None, "trust: what messages call the key; the file's name by default")

    def execute(self) -> Result:
        """Print the keys that are trusted, or what became of one."""
        from stage1_pro.deploy import trust

        if self.name is not None and self.action != "trust":
            raise InputError(f"--name must go with `keys trust`, got `keys {self.action}`")
        if self.action == "list":
            if self.key is not None:
                raise InputError(f"key must be left out of `keys list`, got '{self.key}'; it lists all")
            keys = trust.trusted_keys()
            lines = [f"{key.key_id}  {key.name}" for key in keys] or ["no key is trusted; stage1 keys trust FILE.pub"]
            record = {"folder": str(trust.config_folder()), "keys": [key.model_dump() for key in keys]}
            return Result("\n".join(lines), record)
        if self.key is None:
            raise InputError(f"key must be given for `keys {self.action}`, got none; see --help")
        if self.action == "new":
            made = trust.new_key(self.key)
            text = f"wrote {self.key} (keep it to yourself) and {self.key}.pub (hand it out): key {made}"
            return Result(text, {"key_id": made, "private": self.key, "public": f"{self.key}.pub"})
        forget = self.action == "forget"
        key = trust.forget_key(self.key) if forget else trust.trust_key(self.key, self.name)
        text = "is trusted no longer" if forget else "is trusted: engines it signed run here"
        return Result(f"key {key.key_id} '{key.name}' {text}", key.model_dump())


class Migrate(Command, topic="receiving"):
    """Write a bundle of an older format anew in today's."""

    bundle: Bundle = option(..., "bundle folder; it stays as it is")
    out: Path = option(..., "folder to write")

    def execute(self) -> Result:
        """Print what was written, and what the bundle still lacks."""
        from stage1_pro.deploy.inspection import migrate

        done = migrate(self.bundle, self.out)
        lines = [f"wrote {done['out']}, format {done['format_version']}", *done["notes"]]
        if done["signature_dropped"]:
            lines.append("the signature was of the old manifest and stayed behind; sign the new bundle")
        return Result("\n".join(lines), done)


class Inspect(Command, topic="engines"):
    """Say what a bundle is, what it promises and for which GPUs."""

    bundle: Bundle = option(..., "bundle folder")

    def execute(self) -> Result:
        """Print contents, policy, promise and engines."""
        from stage1_pro.deploy.inspection import inspect, render_inspection

        facts = inspect(self.bundle)
        return Result(render_inspection(facts), facts)
