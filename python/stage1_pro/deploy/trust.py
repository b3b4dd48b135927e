"""Whom a bundle comes from, and whether its engines may run here.

An engine is code, so one runs only when it was built here (a ledger of hashes), when the bundle is signed by a key
that this user trusts, or when the caller says so. Graphs are data and need none of that.

Everything lies in the user's configuration folder (``STAGE1_CONFIG``, else ``XDG_CONFIG_HOME/stage1_pro``, else
``~/.config/stage1_pro``): ``trusted_keys.json``, ``built_engines.json`` and private keys, mode 0600 in a folder of mode
0700. A file there that others may write is refused: it could have been told anything.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from stage1_pro.deploy.bundle import SIGNATURE, Bundle, check_hash, read_plain
from stage1_pro.deploy.manifest import EngineEntry
from stage1_pro.errors import ArtifactError, InputError, need, printable
from stage1_pro.files import home_folder, locked, sha256_bytes, sha256_file, write_text
from stage1_pro.record import Record

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

T = TypeVar("T", bound=Record)

# A signature of something else must never pass for one of a bundle.
_DOMAIN = b"stage1_pro bundle signature, format 1\0"
_SIGNATURE_BYTES = 4096
_KEYS, _ENGINES = "trusted_keys.json", "built_engines.json"


class Signature(Record):
    """``bundle.sig``: an Ed25519 signature of the exact bytes of ``bundle.json``, which hold every file's hash."""

    format_version: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    key_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    public_key: str = Field(description="32 bytes in base64", max_length=64)
    signature: str = Field(description="64 bytes in base64", max_length=128)


class TrustedKey(Record):
    """A public key whose bundles' engines may run here."""

    key_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    name: str
    public_key: str = Field(description="32 bytes in base64")


class TrustedKeys(Record):
    """``trusted_keys.json``."""

    format_version: Literal[1] = 1
    keys: tuple[TrustedKey, ...] = ()


class BuiltEngines(Record):
    """``built_engines.json``: sha256 of every engine that was built here."""

    format_version: Literal[1] = 1
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class SignatureStatus:
    """What is known of a bundle's signature.

    ``status``: ``none``; ``trusted``, by a key of this user's list; ``unknown``, right but by a key nobody here knows;
    ``invalid``; ``unchecked``, where the library is missing.
    """

    status: Literal["none", "trusted", "unknown", "invalid", "unchecked"]
    reason: str
    key_id: str | None = None


@dataclass(frozen=True)
class Trust:
    """Whether an engine may run, and why."""

    status: Literal["built_here", "signed", "flag", "refused"]
    reason: str

    @property
    def allowed(self) -> bool:
        """Whether it may be deserialised."""
        return self.status != "refused"


# --------------------------------------------------------------------------------------------
# The user's folder


def config_folder() -> Path:
    """Where keys and ledger of this user lie; it need not exist."""
    named = os.environ.get("STAGE1_CONFIG")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else home_folder("STAGE1_CONFIG") / ".config") / "stage1_pro"


def _load(kind: type[T], name: str) -> T:
    path = config_folder() / name
    try:
        info = path.lstat()
    except FileNotFoundError:
        return kind()
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        mode = stat.S_IMODE(info.st_mode)
        raise ArtifactError(
            f"{path} must be a plain file of yours that nobody else may write, got mode {mode:o}; look at what it "
            f"says, then: chmod 600 {path}"
        )
    return kind.read(path)


def _changing() -> AbstractContextManager[int]:
    """One writer at a time, in a folder of one's own."""
    folder = config_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return locked(folder / ".lock")


# --------------------------------------------------------------------------------------------
# Engines


def remember_built(path: Path | str) -> str:
    """Note the hash of an engine that was built here, so that it may run here; gives it."""
    digest = sha256_file(path)
    with _changing():
        known = _load(BuiltEngines, _ENGINES)
        if digest not in known.sha256:
            known.model_copy(update={"sha256": (*known.sha256, digest)}).write(config_folder() / _ENGINES, mode=0o600)
    return digest


def engine_trust(bundle: Bundle, entry: EngineEntry, *, trust_engines: bool = False) -> Trust:
    """Say whether an engine may be deserialised here; its file is hashed first, in pieces: no size can fill memory.

    Deserialise the bytes of ``bundle.read(entry.path)``: they are hashed again as they are read, so the file cannot
    change in between.

    Raises:
        ArtifactError: the engine is none of the bundle's, or changed since it was exported; keys or ledger could have
            been written by others.
    """
    if entry not in bundle.manifest.engines:
        raise ArtifactError(
            f"{printable(entry.path)} must be an engine of the bundle, but {bundle.path} lists no such one"
        )
    check_hash(bundle.path, entry.path, bundle.manifest.files[entry.path])
    if bundle.manifest.files[entry.path].sha256 in _load(BuiltEngines, _ENGINES).sha256:
        return Trust("built_here", "it was built here")
    signed = signature_status(bundle)
    if signed.status == "trusted":
        return Trust("signed", f"the bundle is {signed.reason}")
    if trust_engines:
        return Trust("flag", "the caller trusts the bundle's engines")
    return Trust(
        "refused",
        f"it was not built here, and the bundle is {signed.reason}; an engine is code: build it here with "
        "`stage1 build`, trust its maker's key with `stage1 keys trust`, or pass --trust-engines",
    )


# --------------------------------------------------------------------------------------------
# Signatures


def signature_status(bundle: Bundle) -> SignatureStatus:
    """Look at ``bundle.sig`` beside a loaded bundle's manifest; nothing is raised for what somebody sent.

    Raises:
        ArtifactError: this user's list of keys could have been written by others.
    """
    if not os.path.lexists(bundle.path / SIGNATURE):
        return SignatureStatus("none", "not signed")
    try:
        found = Signature.parse(
            read_plain(bundle.path, SIGNATURE, _SIGNATURE_BYTES).decode("utf-8", "replace"), SIGNATURE
        )
        public, signature = _unbase64(found.public_key, 32), _unbase64(found.signature, 64)
    except ArtifactError as error:
        return SignatureStatus("invalid", f"signed in a way that cannot be read: {error}")
    # The identifier is a name for people: what is trusted is the key.
    if found.key_id != key_id(public):
        return SignatureStatus("invalid", "signed under the name of another key")
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return SignatureStatus(
            "unchecked", f"signed, which was not checked: {need('sign', 'cryptography')}", found.key_id
        )
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _DOMAIN + bundle.raw)
    except (InvalidSignature, ValueError):
        return SignatureStatus("invalid", f"not what was signed by key {found.key_id}", found.key_id)
    for key in _load(TrustedKeys, _KEYS).keys:
        if _unbase64(key.public_key, 32) == public:
            return SignatureStatus("trusted", f"signed by '{printable(key.name, 60)}' (key {key.key_id})", found.key_id)
    return SignatureStatus("unknown", f"signed by key {found.key_id}, which is not trusted here", found.key_id)


def sign(bundle: Bundle, key: Path | str) -> Signature:
    """Sign a loaded bundle and write ``bundle.sig`` into it, atomically.

    The key is a PEM file of an Ed25519 private key (``new_key``, or ``openssl genpkey -algorithm ed25519``).

    Raises:
        InputError: the key cannot be read, is no such key, or others may read it.
        DependencyError: cryptography is missing.
    """
    private = _private_key(Path(key))
    public = private.public_key().public_bytes_raw()
    signature = Signature(
        key_id=key_id(public),
        public_key=base64.b64encode(public).decode(),
        signature=base64.b64encode(private.sign(_DOMAIN + bundle.raw)).decode(),
    )
    # Beside the folder first: a leftover of a killed writer inside it would be an extra file, and refused.
    staged = bundle.path.parent / f".{bundle.path.name}.{SIGNATURE}"
    signature.write(staged)
    staged.replace(bundle.path / SIGNATURE)
    return signature


def key_id(public: bytes) -> str:
    """The name of a public key: the first half of its sha256 in hex."""
    return sha256_bytes(public)[:32]


def new_key(path: Path | str) -> str:
    """Make an Ed25519 key: PEM files ``path`` (private, mode 0600) and ``path``.pub; gives the key's identifier.

    A private key that lies there without its ``.pub``, as a killed process leaves it, gets that and stays.

    Raises:
        InputError: there is a file already.
        DependencyError: cryptography is missing.
    """
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    path = Path(path)
    public_path = path.with_name(path.name + ".pub")
    begun = path.is_file() and not os.path.lexists(public_path)
    for taken in () if begun else (path, public_path):
        if os.path.lexists(taken):
            raise InputError(f"key must be a new file, got {taken}, which is there; a key is never replaced")
    pem = serialization.Encoding.PEM
    private = _private_key(path) if begun else ed25519.Ed25519PrivateKey.generate()
    public = private.public_key()
    if not begun:
        secret = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_text(path, secret.decode(), mode=0o600)
    write_text(public_path, public.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo).decode())
    return key_id(public.public_bytes_raw())


def trust_key(path: Path | str, name: str | None = None) -> TrustedKey:
    """Trust the public key of a PEM file: engines of bundles that it signed run here.

    Messages call it ``name``, or as the file is called.

    Raises:
        InputError: no such file, or another kind of key.
        DependencyError: cryptography is missing.
    """
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    path = Path(path)
    try:
        public = serialization.load_pem_public_key(_read_key(path))
    except ValueError:
        raise InputError(f"key must be a PEM file of an Ed25519 public key, got {path}; name the .pub file") from None
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise InputError(f"key must be of the kind Ed25519, got another in {path}")
    raw = public.public_bytes_raw()
    label = path.stem if name is None else name
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,60}", label):
        raise InputError(f"name must be 1 to 60 printable characters, got {printable(repr(label))}")
    key = TrustedKey(key_id=key_id(raw), name=label, public_key=base64.b64encode(raw).decode())
    with _changing():
        known = [other for other in _load(TrustedKeys, _KEYS).keys if other.key_id != key.key_id]
        TrustedKeys(keys=(*known, key)).write(config_folder() / _KEYS, mode=0o600)
    return key


def forget_key(identifier: str) -> TrustedKey:
    """Trust a key no longer; raise InputError when no trusted key has this identifier or name."""
    with _changing():
        known = _load(TrustedKeys, _KEYS).keys
        found = [key for key in known if identifier in (key.key_id, key.name)]
        if len(found) != 1:
            what = "none" if not found else "several, so name it by its identifier"
            raise InputError(f"key must be a trusted one (`stage1 keys list`), got '{printable(identifier)}': {what}")
        TrustedKeys(keys=tuple(key for key in known if key not in found)).write(config_folder() / _KEYS, mode=0o600)
    return found[0]


def trusted_keys() -> list[TrustedKey]:
    """The keys this user trusts."""
    return list(_load(TrustedKeys, _KEYS).keys)


def _library() -> None:
    """Say what is missing before anything is imported from it."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise need("sign", "cryptography") from None


def _private_key(path: Path) -> Ed25519PrivateKey:
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    data = _read_key(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(f"key must be readable by you alone, got mode {mode:o}; run: chmod 600 {path}")
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise InputError(f"key must be a PEM file of an unencrypted Ed25519 private key, got {path}") from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise InputError(f"key must be of the kind Ed25519, got another in {path}")
    return private


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_SIGNATURE_BYTES)
    except OSError as error:
        raise InputError(f"key must be a file that can be read, got {path}: {error.strerror}") from None


def _unbase64(text: str, size: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ArtifactError("it must be base64") from None
    if len(data) != size:
        raise ArtifactError(f"it must be {size} bytes, got {len(data)}")
    return data
