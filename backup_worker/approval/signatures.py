"""SSH signatures: made and checked by OpenSSH's own `ssh-keygen -Y`, against its own file of allowed signers.

Promise: `fault` says nothing only if `ssh-keygen` proved that the holder of a key, which the file gives to that name
for this purpose and that time, has signed exactly these bytes. Whatever else happens (no such program, an unreadable
file, a signature that is none) is a fault: it fails closed. Certificates, key options and `valid-before` are OpenSSH's
business, and pass through.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from em_bridge.errors import AgentBackupError

NAMESPACE = "agent-backup"
"""What a signature is for: one made for git or for mail does not count here, and one of ours not there."""

PROGRAM = "ssh-keygen"
_TIMEOUT_S = 20.0
_MOST_BYTES = 64 * 1024
_BEGIN = b"-----BEGIN SSH SIGNATURE-----"


class NoSshKeygen(AgentBackupError):
    """`ssh-keygen` is not installed: nothing can be signed, and no signature counts."""

    def __init__(self) -> None:
        super().__init__(
            f"{PROGRAM} is not installed, so no signature can be made or checked",
            hint="install OpenSSH's client (Debian: apt-get install openssh-client)",
        )


def available() -> bool:
    """Tell whether signatures can be made and checked on this machine."""
    return shutil.which(PROGRAM) is not None


def sign(statement: bytes, key: Path) -> str:
    """Sign with the private key file `key`, or with the agent's private half of the public key file `key`.

    A passphrase is asked for on the terminal. Raises AgentBackupError, NoSshKeygen.
    """
    if not key.is_file():
        raise AgentBackupError(f"there is no key file “{key}”", hint="name your SSH key with --key FILE")
    done = _run(["sign", "-q", "-f", str(key), "-n", NAMESPACE], statement, timeout_s=None)
    if done.returncode or not done.stdout.startswith(_BEGIN):
        raise AgentBackupError(
            f"“{key}” could not sign: {_said(done)}",
            hint="is it an SSH private key, or one your agent holds?",
        )
    return done.stdout.decode("ascii")


def fault(
    statement: bytes, signature: str | bytes | None, *, who: str, signers: Path, at: float
) -> str | None:
    """Return why `signature` does not prove that `who` signed `statement` at `at` (Unix seconds); None if it does."""
    if not signature:
        return "it is not signed"
    raw = signature.encode() if isinstance(signature, str) else signature
    if len(raw) > _MOST_BYTES:
        return f"the signature is larger than {_MOST_BYTES} bytes"
    try:
        known = signers.read_bytes()
    except OSError as error:
        return f"“{signers}” cannot be read: {(error.strerror or str(error)).lower()}"
    try:
        return _fault(statement, raw, who, known, int(at))
    except AgentBackupError as error:
        # Of this moment, not of the signature: it is not remembered.
        return error.message


@functools.lru_cache(maxsize=4096)
def _fault(statement: bytes, signature: bytes, who: str, signers: bytes, at: int) -> str | None:
    """As `fault`. The answer depends on nothing else, and a page asks for many of them again and again."""
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%d%H%M%S")
    with tempfile.TemporaryDirectory(prefix="agent-backup-") as folder:
        Path(folder, "signers").write_bytes(signers)
        Path(folder, "signature").write_bytes(signature)
        done = _run(
            ["verify", "-f", f"{folder}/signers", "-I", who, "-n", NAMESPACE, "-s", f"{folder}/signature",
             "-O", f"verify-time={moment}"],
            statement,
            timeout_s=_TIMEOUT_S,
        )  # fmt: skip
    if done.returncode == 0:
        return None
    return f"its signature does not prove that “{who}” made it: {_said(done)}"


def _run(
    arguments: list[str], statement: bytes, *, timeout_s: float | None
) -> subprocess.CompletedProcess[bytes]:
    # Times without a zone are local to ssh-keygen; and its messages must be the ones we know.
    environment = os.environ | {"TZ": "UTC", "LC_ALL": "C"}
    try:
        return subprocess.run(
            [PROGRAM, "-Y", *arguments], input=statement, capture_output=True, check=False, env=environment,
            timeout=timeout_s,
        )  # fmt: skip
    except FileNotFoundError:
        raise NoSshKeygen from None
    except subprocess.TimeoutExpired:
        raise AgentBackupError(
            f"{PROGRAM} did not answer in time", hint="look again when the machine is less busy"
        ) from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
    text = lines[0].strip() if lines else f"ssh-keygen ended with {done.returncode}"
    return "".join(char if char.isprintable() else " " for char in text)[:200]
