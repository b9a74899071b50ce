"""The configuration in force while somebody edits it."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from backup_worker import config
from em_bridge.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "config"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (config.SCHEDULE_FILE, config.AGENTS_FILE):
        shutil.copy(SHIPPED / name, tmp_path / name)
    return tmp_path


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / config.SCHEDULE_FILE
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_nothing_changes_while_nobody_edits(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    before = watch.current
    assert not watch.refresh()
    assert watch.current is before


def test_an_edit_takes_effect_once(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    edit(folder, '"keep": 30', '"keep": 31')
    assert watch.refresh()
    assert watch.current.tier("daily").keep == 31
    assert not watch.refresh()


def test_a_file_written_again_without_a_change_is_no_change(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    edit(folder, '"keep": 30', '"keep": 30')
    assert not watch.refresh()
    assert watch.error is None


def test_an_edit_that_keeps_size_and_time_is_seen(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    found = (folder / config.SCHEDULE_FILE).stat()
    edit(folder, '"keep": 30', '"keep": 31')
    os.utime(folder / config.SCHEDULE_FILE, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert watch.refresh()


def test_a_broken_edit_keeps_the_last_good_and_is_told_once(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    edit(folder, '"keep": 30', '"keep": 0')
    assert not watch.refresh()
    assert watch.current.tier("daily").keep == 30
    error = watch.take_error()
    assert error is not None
    assert "tiers.daily.keep" in error.message
    assert not watch.refresh()
    assert watch.take_error() is None
    assert watch.error is error


def test_another_broken_edit_is_told_again_and_a_good_one_ends_it(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    edit(folder, '"keep": 30', '"keep": 0')
    watch.refresh()
    assert watch.take_error() is not None
    edit(folder, '"keep": 0', '"keep": "x"')
    watch.refresh()
    assert watch.take_error() is not None
    edit(folder, '"keep": "x"', '"keep": 9')
    assert watch.refresh()
    assert watch.error is None
    assert watch.current.tier("daily").keep == 9


def test_a_removed_file_keeps_the_last_good(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    (folder / config.AGENTS_FILE).unlink()
    assert not watch.refresh()
    assert "there is no such file" in str(watch.error)
    assert watch.current.agents


def test_a_file_that_is_still_being_written_is_nobody_s_fault(folder: Path) -> None:
    watch = config.ConfigWatch(folder)
    file = folder / config.SCHEDULE_FILE
    whole = json.dumps({**json.loads(file.read_text()), "timezone": "UTC"})
    file.write_text(whole[:100])

    def finish() -> None:
        time.sleep(0.1)
        file.write_text(whole)

    writer = threading.Thread(target=finish)
    writer.start()
    assert watch.refresh()
    writer.join()
    assert watch.error is None
    assert watch.current.schedule.timezone == "UTC"


def test_a_broken_configuration_cannot_be_the_first(folder: Path) -> None:
    edit(folder, '"keep": 30', '"keep": 0')
    with pytest.raises(ConfigError):
        config.ConfigWatch(folder)
