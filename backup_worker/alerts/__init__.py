"""Tell a human, once for a change of state, and again until somebody acknowledges it or it is resolved.

`book` keeps the open alerts, `planner` says purely who is to be told what now, `delivery` does it, `direct` tells
people without Redis; `kinds` is the table of what an alert can be, `silences` hold some back for a while.
"""

from backup_worker.alerts import kinds, silences
from backup_worker.alerts.book import (
    Alert,
    OpenAlert,
    acknowledge,
    open_alerts,
    raise_alert,
    resolve,
    take_due,
    wake_at,
)
from backup_worker.alerts.delivery import CLAIM_S, Send, deliver_due, receiver_states
from backup_worker.alerts.direct import Direct
from backup_worker.alerts.planner import INFO_S, Policy, ReceiverState, id_of
from backup_worker.alerts.receivers import Sent, receiver_of, refused_urls
from backup_worker.alerts.silences import Silence
from backup_worker.config import Severity

__all__ = [
    "Alert", "CLAIM_S", "Direct", "INFO_S", "OpenAlert", "Policy", "ReceiverState", "Send", "Sent", "Severity",
    "Silence", "acknowledge", "deliver_due", "id_of", "kinds", "open_alerts", "raise_alert", "receiver_of",
    "receiver_states", "refused_urls", "resolve", "silences", "take_due", "wake_at",
]  # fmt: skip
