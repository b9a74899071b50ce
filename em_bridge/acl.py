"""The access rights of each role, as a Redis or Valkey ACL file: what a stolen password is worth.

Promise: a role can do its work and, as far as the server can tell, nothing else: an agent reads its own inbox and no
other, sends under its own number line, and can neither publish a state nor an approval nor touch a queue. The server
does not look into entries: what an agent writes into the log or as a heartbeat can bear another's name, and whoever
must rule that out gives agents no Redis of their own. Passwords stand in the file as SHA-256 only; a user without a
password cannot log in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from em_bridge import fields
from em_bridge.errors import UsageError
from em_bridge.events import EM

AGENT: Final = "agent"
ROLES: Final = (EM, "dispatcher", "worker", "scheduler", "watchdog", "console", "operator")
"""The roles of which there is one user each, with the role's name; agents have one user each, `agent-<name>`."""

# Needed by every client: to log in, for transactions, and to know what a replica has.
_CONNECT: Final = (
    "+ping +hello +auth +select +reset +client|setinfo +client|setname +multi +exec +discard +wait"
)
_APPEND_ONCE: Final = "+eval +evalsha +get +set +xadd ~em:once:*"
_SEND: Final = "+eval +evalsha +xadd +hget +hmget +hset +hlen +hgetall +hdel"
_READ_STREAMS: Final = "+xrange +xrevrange +xlen +exists +type +xread +xpending +xinfo|groups +xinfo|stream"
# Data of one's own prefix: everything but managing the server, and code that stays on it.
_OWN_DATA: Final = (
    "+@all -@admin -@dangerous -@pubsub -function -fcall -fcall_ro -script +script|load +script|exists +info"
)
_LOOK: Final = (
    f"{_READ_STREAMS} +xinfo|consumers +hget +hgetall +hkeys +hmget +hlen +smembers +sismember +mget"
)
_RQ_SIGNALS: Final = "+publish +subscribe +psubscribe +unsubscribe +punsubscribe &rq:pubsub:*"

_RULES: Final[Mapping[str, tuple[str, ...]]] = {
    AGENT: (
        f"{_CONNECT} +xgroup|create +xreadgroup +xack ~em:inbox:{{name}}",
        f"({_SEND} ~em:messages ~em:sender:{{name}})",
        "(+xadd %W~em:heartbeats %W~em:dead-letter)",
        "(+sadd %W~em:seen)",
        "(+del +hset ~em:last-seen:{name})",
    ),
    EM: (
        f"{_CONNECT} {_LOOK} +time +scan +eval +evalsha",
        "+xadd +xreadgroup +xack +xautoclaim +xgroup|create +xgroup|delconsumer +xtrim +xdel",
        "+get +set +del +incr +pexpire +hset +hdel +sadd",
        "~em:lease:em ~em:epoch:em ~em:once:* ~em:messages ~em:agent-state ~em:config-change ~em:heartbeats",
        "~em:dead-letter ~em:inbox:* ~em:delivered:* ~em:last-seen:* ~em:sender:em ~em:seen ~em:states",
        f"({_LOOK} %R~em:sender:* %R~em:fleet)",
    ),
    "dispatcher": (
        f"{_OWN_DATA} ~rq:* ~backup:*",
        f"({_READ_STREAMS} +xreadgroup +xack +xclaim +xgroup|create ~em:agent-state ~em:config-change ~em:due)",
        "(+hkeys +hset +hdel ~em:fleet)",
        "(+xadd %W~em:dead-letter)",
        "(+eval +evalsha +xadd +zscore +zadd ~backup:deadlines ~em:due)",
        f"({_APPEND_ONCE} ~em:due)",
        f"({_LOOK} %R~em:states %R~em:heartbeats)",
    ),
    "worker": (
        f"{_OWN_DATA} {_RQ_SIGNALS} ~rq:* ~backup:*",
        f"({_LOOK} %R~em:*)",
        # A message to an agent that was brought back, with a number line of the worker's own.
        f"({_SEND} ~em:messages ~em:sender:backup-worker)",
        # What it finds changed without an approval, it proposes.
        f"({_APPEND_ONCE} ~em:due ~em:config-change)",
        f"({_READ_STREAMS} +eval +evalsha +time +xtrim ~em:agent-state ~em:config-change ~em:due ~em:dead-letter)",
    ),
    "scheduler": (
        f"{_OWN_DATA} ~backup:*",
        f"({_APPEND_ONCE} ~em:due)",
        f"({_LOOK} %R~em:*)",
        "(+smembers +llen +exists %R~rq:*)",
    ),
    "watchdog": (
        f"{_CONNECT} +time",
        "(+eval +evalsha +get +set +del +exists +incr +pexpire ~em:lease:watchdog ~em:epoch:watchdog)",
        f"({_APPEND_ONCE} ~em:agent-state)",
        f"({_READ_STREAMS} %R~em:heartbeats)",
        "(+hset +hget %W~em:states)",
        "(+set %W~backup:alive:watchdog:*)",
    ),
    "console": (
        f"{_OWN_DATA} {_RQ_SIGNALS} ~rq:* ~backup:*",
        f"({_LOOK} %R~em:*)",
        f"({_APPEND_ONCE} ~em:config-change ~em:due)",
        "(+eval +evalsha +xrange +xadd +xdel ~em:dead-letter ~em:config-change ~em:due)",
        "(+memory|usage ~em:*)",
    ),
    "operator": (f"{_OWN_DATA} ~em:* ~rq:* ~backup:* &rq:pubsub:*",),
}


def user_name(role: str, agent: str = "") -> str:
    """Return the name of the user of a role, or of one agent."""
    return f"agent-{agent}" if role == AGENT else role


def acl_file(agents: Iterable[str], passwords: Mapping[str, str]) -> str:
    """Return the text of an ACL file for all roles and these agents; `passwords` maps user names to passwords.

    The EM, an agent called `em`, has the role of that name. Raises `UsageError` for a wrong agent id.
    """
    lines = ["user default off resetpass"]
    lines += [_line(role, role, passwords) for role in ROLES]
    for agent in sorted(set(agents), key=str.lower):
        try:
            fields.agent_id(agent)
        except ValueError as problem:
            raise UsageError(f"an agent's name {problem}") from None
        if agent.lower() != EM:
            lines.append(_line(user_name(AGENT, agent), AGENT, passwords, name=agent))
    return "\n".join(lines) + "\n"


def users(agents: Iterable[str]) -> list[str]:
    """Return the names of the users in `acl_file`."""
    names = sorted({agent for agent in agents if agent.lower() != EM}, key=str.lower)
    return [*ROLES, *(user_name(AGENT, agent) for agent in names)]


def _line(user: str, role: str, passwords: Mapping[str, str], *, name: str = "") -> str:
    password = passwords.get(user)
    login = f"#{hashlib.sha256(password.encode()).hexdigest()}" if password else "resetpass"
    rules = " ".join(_RULES[role]).format(name=name)
    return f"user {user} on {login} resetkeys resetchannels -@all {rules}"
