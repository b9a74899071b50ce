"""Who may use the console: a file of names and scrypt hashes, and the secret that signs sessions; both mode 0600.

A change is on disk, whole, or not made at all: written aside, synced, renamed, under a lock. A file that is not what
this module writes lets nobody in: `UsersError`, never an empty list, which would open the console to everybody.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from backup_worker.console.roles import ROLES, VIEWER
from backup_worker.snapshots.disk import replace_own
from em_bridge.errors import AgentBackupError, NotFound, UsageError

MIN_PASSWORD_LENGTH = 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_LOG2_N, _R, _P = 15, 8, 1
"""scrypt's cost: 32 MiB and about 80 ms a try."""

_MAX_LOG2_N = 20
_NOBODY = "15$8$1$AAAAAAAAAAAAAAAAAAAAAA==$" + base64.b64encode(bytes(32)).decode()
"""What the password of an unknown name is compared with, so that it takes as long as that of a known one."""


class UsersError(AgentBackupError):
    """The users' file cannot be read, or is not one."""


@dataclass(frozen=True, slots=True)
class User:
    """What is kept of a user: the hash of the password, and the role."""

    password: str
    role: str = VIEWER

    @property
    def mark(self) -> str:
        """What a session of this user must carry to be valid: it changes with the password."""
        return hashlib.sha256(self.password.encode()).hexdigest()[:16]


class Users:
    """The users of one console, kept in `folder`, which is made by the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "users.json"

    def all(self) -> dict[str, User]:
        """Return the users by name, sorted. Raises UsersError."""
        return dict(sorted(self._read().items()))

    def names(self) -> list[str]:
        """Return the names, sorted. Raises UsersError."""
        return list(self.all())

    def add(self, name: str, password: str, *, role: str = VIEWER, replace: bool = False) -> None:
        """Add a user, or give a known one a new password and role. Raises UsageError, UsersError."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"“{name}” is not a user name", hint="letters, digits, and . _ @ - between them")
        if len(password) < MIN_PASSWORD_LENGTH:
            raise UsageError(
                f"the password has fewer than {MIN_PASSWORD_LENGTH} characters",
                hint="a few words in a row are easy to remember and hard to guess",
            )
        user = User(hash_password(password), _checked(role))
        with self._locked():
            known = self._read()
            if name in known and not replace:
                raise UsageError(
                    f"there is a user “{name}” already", hint="give --replace for a new password"
                )
            self._write(known | {name: user})

    def give_role(self, name: str, role: str) -> None:
        """Give a user another role, which counts from the next request on. Raises UsageError, NotFound, UsersError."""
        with self._locked():
            known = self._read()
            self._write(known | {name: replace(_known(known, name), role=_checked(role))})

    def remove(self, name: str) -> None:
        """Take a user out; sessions of that user end at once. Raises NotFound, UsersError."""
        with self._locked():
            known = self._read()
            _known(known, name)
            del known[name]
            self._write(known)

    def check(self, name: str, password: str) -> User | None:
        """Return the user if `password` is right; takes the same time for a name that does not exist."""
        user = self._read().get(name)
        right = verify_password(password, user.password if user else _NOBODY)
        return user if right else None

    def get(self, name: str) -> User | None:
        """Return a user, None for nobody. Raises UsersError."""
        return self._read().get(name)

    def session_secret(self) -> bytes:
        """Return the key that signs sessions, made once."""
        path = self.folder / "session.key"
        with contextlib.suppress(FileNotFoundError):
            return _usable_secret(path)
        with self._locked():
            if not path.exists():
                replace_own(path, secrets.token_bytes(32))
            return _usable_secret(path)

    def _read(self) -> dict[str, User]:
        try:
            document = json.loads(self.path.read_bytes())
            found = {
                str(name): User(str(entry["password"]), _checked(entry.get("role", VIEWER)))
                for name, entry in document["users"].items()
            }
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsersError(f"cannot read the users in “{self.path}”: {reason}") from error
        except (ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
            raise UsersError(
                f"“{self.path}” is not a file of users",
                hint="move it away, and add the users again with `backup-worker user add NAME`",
            ) from error
        return found

    def _write(self, known: dict[str, User]) -> None:
        users = {name: asdict(known[name]) for name in sorted(known)}
        replace_own(self.path, json.dumps({"users": users}, indent=2).encode() + b"\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _known(users: dict[str, User], name: str) -> User:
    if name not in users:
        raise NotFound(f"there is no user “{name}”", hint="see `backup-worker user list`")
    return users[name]


def _checked(role: str) -> str:
    if role not in ROLES:
        raise UsageError(f"“{role}” is not a role", hint=f"the roles are {', '.join(ROLES)}")
    return role


def hash_password(password: str) -> str:
    """Return `log2(N)$r$p$salt$hash` of scrypt, salt and hash in base64."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, _LOG2_N, _R, _P)
    return f"{_LOG2_N}${_R}${_P}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def verify_password(password: str, stored: str) -> bool:
    """Tell whether `password` has the hash `stored`; False for a hash that is not in our form."""
    try:
        log2_n, r, p, salt, digest = stored.split("$")
        cost = int(log2_n), int(r), int(p)
        if not (1 <= cost[0] <= _MAX_LOG2_N and 1 <= cost[1] <= 32 and 1 <= cost[2] <= 16):
            return False
        wanted = base64.b64decode(digest, validate=True)
        found = _scrypt(password, base64.b64decode(salt, validate=True), *cost)
    except ValueError:
        return False
    return hmac.compare_digest(wanted, found)


def _scrypt(password: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    n = 2**log2_n
    encoded = password.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(encoded, salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


def _usable_secret(path: Path) -> bytes:
    secret = path.read_bytes()
    if len(secret) < 32:
        raise UsersError(f"the session key “{path}” is too short", hint="remove it; a new one is made")
    return secret
