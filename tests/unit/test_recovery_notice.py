"""The notice of a recovery, as it is left in the agent's root and sent: what may be in its way there."""

from __future__ import annotations

import os
from pathlib import Path

import fakeredis
import pytest

from backup_worker.recovery import notice
from backup_worker.recovery.incident import Incident
from em_bridge import streams
from em_bridge.events import MAX_PAYLOAD_BYTES, Message, decode


def test_a_notice_that_is_longer_than_a_message_may_be_is_cut_and_sent() -> None:
    client = fakeredis.FakeRedis()
    notice.send(client, Incident("z-1", "z", 0.0), "it was " + "ø" * MAX_PAYLOAD_BYTES, 0.0)
    ((_, fields),) = streams.read_range(client, streams.MESSAGES)
    sent = decode(fields)
    assert isinstance(sent, Message)
    assert sent.payload.decode().startswith("it was øø")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_an_agent_that_puts_a_link_in_the_place_of_its_notice_is_given_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, root = tmp_path / "secret", tmp_path / "root"
    secret.write_text("root's")
    root.mkdir()
    os.chown(root, 12345, 12345)

    def swapped() -> int:
        # What the agent does in the moment between the writing and the giving.
        (root / notice.ASIDE).unlink()
        (root / notice.ASIDE).symlink_to(secret)
        return 0

    monkeypatch.setattr(os, "geteuid", swapped)
    notice.leave(root, "you were recovered")
    assert secret.stat().st_uid == 0
