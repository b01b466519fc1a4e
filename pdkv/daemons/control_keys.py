"""The control channel's keys on disk: one folder with the worker's own key pair and the public keys that it accepts.

    worker.secret    the own secret key; nobody but its owner may read it
    worker.public    the own public key
    *.public         further keys that are accepted: other workers', or the next one during a rotation

A folder fits a Secret of Kubernetes: flat, names of letters, one line of text a file.
"""

import contextlib
import os
import stat
from pathlib import Path

import msgspec

from pdkv.errors import ConfigError
from pdkv.wire.admission import ChannelSecurity, NoSecurity
from pdkv.wire.curve import KEY_BYTES, CurveSecurity, Keys, PublicKey, SecretKey

SCHEMA = "pdkv.keys/v1"
SECRET_NAME, PUBLIC_NAME = "worker.secret", "worker.public"
_SECRET_KIND, _PUBLIC_KIND = "pdkv-control-secret", "pdkv-control-public"
_MOST_BYTES = 4096
_NEW = "`pdkv keys new DIR` makes a pair"


class AcceptedKey(msgspec.Struct, frozen=True):
    fingerprint: str
    public: str
    """64 hex digits."""
    files: list[str]
    """Where it stands; empty where only the secret key says it."""


class KeysShown(msgspec.Struct, frozen=True):
    """What a folder holds that may be shown."""

    schema: str
    folder: str
    fingerprint: str
    """Of the own key."""
    accepted: list[AcceptedKey]
    """The own one first."""


def channel_security(folder: str) -> ChannelSecurity:
    """What the control channel is to use. ``folder``: of ``--control-keys``; empty for none. Raises ``ConfigError``."""
    return CurveSecurity(read_keys(Path(folder))) if folder else NoSecurity()


def read_keys(folder: Path) -> Keys:
    """Raises ``ConfigError`` for what is missing, cannot be read, or may be read by others."""
    public = _public_keys(folder)
    return Keys.of(_secret_key(folder / SECRET_NAME), tuple(public.values()))


def show_keys(folder: Path) -> KeysShown:
    """Raises ``ConfigError``, as ``read_keys`` does."""
    keys, public = read_keys(folder), _public_keys(folder)
    accepted = [
        AcceptedKey(key.fingerprint, key.value.hex(), [name for name, other in public.items() if other == key])
        for key in keys.accepted
    ]
    return KeysShown(SCHEMA, str(folder), keys.own.fingerprint, accepted)


def new_keys(folder: Path) -> KeysShown:
    """Write a new pair into ``folder``, made if need be. Raises ``ConfigError`` where there is one already."""
    secret = SecretKey.new()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (SECRET_NAME, PUBLIC_NAME):
            if (folder / name).exists():
                raise ConfigError(f"{folder / name} is there already, and is not overwritten; choose another folder")
        _write(folder / SECRET_NAME, f"{_SECRET_KIND} {secret.reveal().hex()}\n", 0o600)
        _write(folder / PUBLIC_NAME, f"{_PUBLIC_KIND} {secret.public().value.hex()}\n", 0o644)
    except OSError as exc:
        raise ConfigError(f"cannot write keys into {folder}: {exc.strerror}") from exc
    return show_keys(folder)


def _write(path: Path, text: str, mode: int) -> None:
    """All of it or nothing, with exactly these permissions."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)


def _secret_key(path: Path) -> SecretKey:
    text, facts = _read(path, f"a worker's own secret key; {_NEW}")
    _refuse_readable(path, facts)
    return SecretKey(_decode(text, _SECRET_KIND, path))


def _public_keys(folder: Path) -> dict[str, PublicKey]:
    """By file name. Whatever else is in the folder is none of ours."""
    try:
        paths = sorted(folder.glob("*.public"))
        if not folder.is_dir():
            raise ConfigError(f"--control-keys {folder} is no folder; {_NEW}")
    except OSError as exc:
        raise ConfigError(f"cannot look into --control-keys {folder}: {exc.strerror}") from exc
    return {path.name: PublicKey(_decode(_read(path, "a public key")[0], _PUBLIC_KIND, path)) for path in paths}


def _read(path: Path, what: str) -> tuple[str, os.stat_result]:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("ascii", errors="replace"), os.fstat(file.fileno())
    except OSError as exc:
        raise ConfigError(f"cannot read {path}, {what}: {exc.strerror}") from exc


def _refuse_readable(path: Path, facts: os.stat_result) -> None:
    """A file that root owns and gives to one group is how Kubernetes mounts a Secret for a pod's ``fsGroup``."""
    theirs = facts.st_uid != os.geteuid()
    too_much = stat.S_IWGRP | stat.S_IRWXO | (0 if theirs else stat.S_IRWXG)
    if facts.st_mode & too_much:
        mend = "give its volume defaultMode 0440 or the file to this user alone" if theirs else f"chmod 600 {path}"
        raise ConfigError(
            f"{path} holds a secret key, and others may use it (mode {stat.S_IMODE(facts.st_mode):04o}): {mend}; "
            "make new keys if somebody may have read it"
        )


def _decode(text: str, kind: str, path: Path) -> bytes:
    """The message repeats nothing of the file: it may be a secret in the wrong place."""
    found, _, digits = text.strip().partition(" ")
    if kind == _PUBLIC_KIND and found == _SECRET_KIND:
        raise ConfigError(f"{path} holds a secret key, and whoever gets it as a public one has it: make new keys")
    with contextlib.suppress(ValueError):
        value = bytes.fromhex(digits)
        if found == kind and len(value) == KEY_BYTES:
            return value
    raise ConfigError(f'{path} is no key: expected one line, "{kind}" and {2 * KEY_BYTES} hex digits; {_NEW}')
