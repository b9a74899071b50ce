"""What the command lines print: text from the bus and from file names as it is."""

from __future__ import annotations

import pytest

from backup_worker.cli._common import coloured, new_table, show


@pytest.mark.parametrize("reason", ["stuck [/red] again", "a [bold]loud[/bold] name", "done :warning:"])
def test_text_of_others_is_printed_as_it_is(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(reason, "why", "state")
    table.add_row(reason, coloured(reason, "red"))
    show(table, reason, coloured("alert", "red").append(f" {reason}", "default"))
    assert capsys.readouterr().out.count(reason) == 5
