"""What the command lines print: text from the bus and from file names as it is."""

from __future__ import annotations

import pytest

from backup_worker.cli._common import coloured, new_table, show
from backup_worker.cli.snapshots import print_diff


@pytest.mark.parametrize("reason", ["stuck [/red] again", "a [bold]loud[/bold] name", "done :warning:"])
def test_text_of_others_is_printed_as_it_is(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(reason, "why", "state")
    table.add_row(reason, coloured(reason, "red"))
    show(table, reason, coloured("alert", "red").append(f" {reason}", "default"))
    assert capsys.readouterr().out.count(reason) == 5


def test_text_of_others_moves_no_cursor_and_hides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "fine\x1b[2K\x1b[1Aall is \x9b31mwell"
    table = new_table("", "why", "state")
    table.add_row(reason, coloured(reason, "red"))
    show(table, reason, coloured("alert", "red").append(f" {reason}", "default"))
    print_diff({"added": [], "removed": [], "outside": [], "changed": [
        {"path": "w.json", "what": "mode", "keys": [{"key": reason, "old": reason, "new": reason}]}
    ]})  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("fine�[2K�[1Aall is �31mwell") == 5
    assert not {"\x1b", "\x9b"} & set(printed)
