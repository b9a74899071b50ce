"""Tell a human, once for a change of state, and again until somebody acknowledges it or it is resolved."""

from backup_worker.alerts.delivery import (
    CLAIM_S,
    INFO_S,
    Alert,
    OpenAlert,
    Send,
    acknowledge,
    deliver_due,
    open_alerts,
    pending_deliveries,
    raise_alert,
    resolve,
    tell,
)
from backup_worker.receivers import Sent, Severity, receiver_of

__all__ = [
    "Alert", "CLAIM_S", "INFO_S", "OpenAlert", "Send", "Sent", "Severity",
    "acknowledge", "deliver_due", "open_alerts", "pending_deliveries", "raise_alert", "receiver_of", "resolve", "tell",
]  # fmt: skip
