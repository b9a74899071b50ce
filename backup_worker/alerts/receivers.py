"""The one place that speaks to apprise: send a message to one receiver, and say truly whether it arrived.

A URL's passwords, tokens and options never leave this module; nor does an exception of a service's plugin that is
not worth more than “it did not arrive”.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backup_worker.config.paging import Severity

SEND_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of one message to one receiver; `receiver` has no password in it."""

    told: bool
    receiver: str
    detail: str


def send_with_apprise(url: str, title: str, body: str, severity: Severity) -> Sent:
    """Send one message to one receiver; only apprise's SUCCESS means that somebody was told."""
    apprise = _apprise()
    kinds = {"info": "info", "warning": "warning", "critical": "failure"}
    service = apprise.Apprise(asset=apprise.AppriseAsset(app_id="Agent Backup", app_desc="Agent Backup"))
    if not service.add(url):
        return Sent(False, scheme_of(url), "apprise does not accept the URL")
    result = service.notify(body=body, title=title, notify_type=kinds[severity], timeout=SEND_TIMEOUT_S)
    said = [entry.message for one in result.results for entry in one.logs()]
    told = result.status is apprise.AppriseResultStatus.SUCCESS
    return Sent(told, receiver_of(url), " ".join([result.status.name, *([] if told else said[-1:])]))


def receiver_of(url: str) -> str:
    """Return a receiver's URL as it may be shown: without passwords, tokens and options."""
    service = _apprise().Apprise()
    return str(service[0].url(privacy=True)).split("?", 1)[0] if service.add(url) else scheme_of(url)


def refused_urls(urls: Sequence[str]) -> list[tuple[int, str]]:
    """Return the place of each URL that apprise does not accept, and a sentence about it without its secrets."""
    apprise = _apprise()
    known = sorted(str(name) for name in apprise.NotificationManager().schemas())
    refused = []
    for index, url in enumerate(urls):
        scheme = url.partition("://")[0].lower()
        if scheme not in known:
            near = difflib.get_close_matches(scheme, known, n=1)
            right = f'did you mean "{near[0]}"?' if near else 'write for example "json://host/path"'
            refused.append((index, f'no alert service is called "{scheme}"; {right}'))
        elif not apprise.Apprise().add(url):
            refused.append(
                (index, f'is not a whole "{scheme}" URL: something that the service needs is missing')
            )
    return refused


def scheme_of(url: str) -> str:
    """Return all that is certainly no secret in a URL."""
    return f"{url.partition('://')[0]}://…"


def _apprise() -> Any:
    """Import apprise (slow, so only where it is needed), without its own complaints: ours have no secrets in them."""
    import apprise

    logger = logging.getLogger(apprise.LOGGER_NAME)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return apprise
