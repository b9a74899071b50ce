"""Taking files out of a snapshot: one of them, or all as a tar; proven while they are sent.

A download that ends well is what the manifest says, byte for byte: the last block is held back until the checksum
agrees, and if it does not, the connection is cut, so that a browser shows a failed download and never a wrong file.
What was found is an alert. Files are named by their place in the manifest, so no path from a browser is ever opened;
in the tar every name is relative, and a link that leads out of the snapshot is left out and listed instead. The
snapshot is held while it is sent: retention does not take it away meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from urllib.parse import quote

from flask import Blueprint, Response, g

from backup_worker.console.actions import note
from backup_worker.console.live import View, view
from backup_worker.snapshots import Entry, Manifest
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import printable
from em_bridge.errors import AgentBackupError, NotFound

log = logging.getLogger(__name__)

blueprint = Blueprint("files", __name__)

BLOCK_BYTES = 1 << 18
LEFT_OUT = "LEFT-OUT.txt"


class NotAsWritten(AgentBackupError):
    """A file is not what the manifest says."""


@blueprint.get("/snapshots/<tier>/<slot>/<agent>/files/<int:number>")
def file(tier: str, slot: str, agent: str, number: int) -> Response:
    """Send one file."""
    here, identifier = view(), f"{tier}/{slot}/{agent}"
    manifest = here.runtime.repository.get(identifier)
    entry = manifest.entries[number] if number < len(manifest.entries) else None
    if entry is None or entry.kind != "file":
        raise NotFound("there is no such file in this snapshot")
    note(here, "download", id=identifier, agent=agent, path=printable(entry.path))
    name = posixpath.basename(entry.path)
    answer = attachment(_watched(here, g.who, manifest, _one(here, manifest, entry)), name)
    answer.content_length = entry.size
    return answer


@blueprint.get("/snapshots/<tier>/<slot>/<agent>/tar")
def archive(tier: str, slot: str, agent: str) -> Response:
    """Send all of a snapshot as a tar."""
    here, identifier = view(), f"{tier}/{slot}/{agent}"
    manifest = here.runtime.repository.get(identifier)
    note(here, "download", id=identifier, agent=agent)
    blocks = _watched(here, g.who, manifest, _tar(here, manifest))
    return attachment(blocks, f"{tier}-{slot}-{agent}.tar")


def _as_long_as(descriptor: int, size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes: a log that grows meanwhile must not spoil what comes behind it."""
    with open(descriptor, "rb", buffering=0) as source:
        while size > 0:
            block = source.read(min(BLOCK_BYTES, size)) or bytes(min(BLOCK_BYTES, size))
            size -= len(block)
            yield block


def attachment(blocks: Iterator[bytes], name: str) -> Response:
    """Return blocks of bytes as a download."""
    answer = Response(blocks, content_type="application/octet-stream")
    encoded = quote(name.encode("utf-8", "surrogateescape"), safe="")
    answer.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{encoded}"
    # Whatever an agent wrote, nothing of it is ever a page of this console.
    answer.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    return answer


def _watched(here: View, who: str, manifest: Manifest, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on `blocks`; a file that is not as written is noted, told, and ends the connection."""
    runtime = here.runtime
    try:
        yield from blocks
    except NotAsWritten as error:
        log.error("a download of %s was cut off: %s", manifest.id, error)
        runtime.repository.record_verified(manifest.id, now=here.now, ok=False)
        runtime.record(
            "verify",
            id=manifest.id,
            agent=manifest.agent,
            ok=False,
            by=who,
            via="console",
            problems=[str(error)],
        )
        if runtime.client is not None:
            runtime.alert(
                f"rot/{manifest.id}", "critical", f"snapshot {manifest.id} is damaged", str(error),
                agent=manifest.agent,
            )  # fmt: skip
        raise


def _one(here: View, manifest: Manifest, entry: Entry) -> Iterator[bytes]:
    repository = here.runtime.repository
    with repository.hold([manifest.id]), repository.files(manifest.id) as files:
        yield from proven(files, entry)


def proven(files: Tree, entry: Entry) -> Iterator[bytes]:
    """Yield a file's bytes, the last of them only when all are proven. Raises NotAsWritten."""
    digest, left, kept = hashlib.sha256(), entry.size, b""
    try:
        descriptor = files.open(entry.path, os.O_RDONLY)
    except OSError as error:
        raise NotAsWritten(f"“{printable(entry.path)}” cannot be read: {error.strerror}") from error
    with open(descriptor, "rb", buffering=0) as source:
        # One byte more than there should be: a file that has grown is not as written either.
        while block := source.read(min(BLOCK_BYTES, left + 1)):
            digest.update(block)
            left -= len(block)
            if left < 0:
                break
            if kept:
                yield kept
            kept = block
    if left != 0 or digest.hexdigest() != entry.sha256:
        raise NotAsWritten(f"“{printable(entry.path)}” is not as it was written")
    if kept:
        yield kept


def _tar(here: View, manifest: Manifest) -> Iterator[bytes]:
    repository = here.runtime.repository
    top = f"{manifest.tier}-{manifest.slot}-{manifest.agent}"
    left_out = []
    with repository.hold([manifest.id]), repository.files(manifest.id) as files:
        for entry in manifest.entries:
            if entry.kind == "link" and not _stays_inside(entry):
                left_out.append(f"{printable(entry.path)} -> {printable(entry.target or '')}")
                continue
            yield _header(top, entry)
            if entry.kind == "file":
                yield from proven(files, entry)
                yield _padding(entry.size)
    if left_out:
        text = ("links that lead out of the snapshot:\n" + "\n".join(left_out) + "\n").encode()
        info = tarfile.TarInfo(f"{top}/{LEFT_OUT}")
        info.size, info.mtime = len(text), int(manifest.created_at)
        yield _written(info) + text + _padding(len(text))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _header(top: str, entry: Entry) -> bytes:
    info = tarfile.TarInfo(top if entry.path == "." else f"{top}/{entry.path}")
    info.mode, info.mtime = entry.mode & 0o777, entry.mtime_ns // 1_000_000_000
    if entry.kind == "dir":
        info.type = tarfile.DIRTYPE
    elif entry.kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, entry.target or ""
    else:
        info.size = entry.size
    return _written(info)


def _written(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _stays_inside(entry: Entry) -> bool:
    target = entry.target or ""
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(entry.path), target))
    return not target.startswith("/") and inside != ".." and not inside.startswith("../")


def tar_of_folder(tree: Tree, top: str, names: Iterator[tuple[str, os.stat_result]]) -> Iterator[bytes]:
    """Yield a tar of plain files below a folder: for evidence, which no manifest describes."""
    for path, found in names:
        info = tarfile.TarInfo(f"{top}/{path}")
        info.mode, info.mtime = stat.S_IMODE(found.st_mode) & 0o777, int(found.st_mtime)
        if stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
            yield _written(info)
        elif stat.S_ISREG(found.st_mode):
            info.size = found.st_size
            yield _written(info)
            yield from _as_long_as(tree.open(path, os.O_RDONLY), info.size)
            yield _padding(info.size)
    yield bytes(2 * tarfile.BLOCKSIZE)
