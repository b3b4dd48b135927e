"""``Record``: the base of every JSON file, frozen, strict and written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stage1_pro.errors import ArtifactError, printable
from stage1_pro.files import sha256_bytes, write_text


class Record(BaseModel):
    """Base of every JSON artefact: unknown keys are refused, NaN is not JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: Path | str, *, mode: int = 0o666) -> None:
        """Write as indented JSON, atomically."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n", mode=mode)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read and validate; raise ArtifactError naming the file and the first wrong key."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(f"{path} must exist, but there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} must be readable JSON, got: {error}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """Validate JSON text; ``name`` is what error messages call it."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise ArtifactError(
                f"{name} is not a valid {cls.__name__}: {printable(where)}: {printable(first['msg'])}"
            ) from None

    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON form."""
        data = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())


class FileEntry(Record):
    """Size in bytes and sha256 of one file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
