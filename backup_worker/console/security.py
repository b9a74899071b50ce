"""The lock on the door: login, sessions, CSRF, the Host header, and what browsers are told to refuse.

Every request passes `guard` first. With users, everything but the login page, the style sheet and `/healthz` needs a
session (or, for `/metrics`, a name and password by HTTP Basic) of a user whose role may use that address (`roles`).
Without users the console belongs to this machine alone, and `guard` answers only to names of this machine, so that no
foreign page can reach it by rebinding a name. Every POST needs the session's token. A session ends with its user,
with its user's password, and after `SESSION_S`.
"""

from __future__ import annotations

import contextlib
import getpass
import hmac
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from flask import (
    Flask,
    Response,
    abort,
    current_app,
    flash,
    g,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.sessions import SecureCookieSessionInterface
from werkzeug.wrappers import Response as AnyResponse

from backup_worker.console.live import users, view
from backup_worker.console.roles import ACCESS, APPROVER, may
from backup_worker.console.users import User
from em_bridge import clock

SESSION_S = 12 * 3600
COOKIE = "agent_backup_session"
TRIES, TRIES_WINDOW_S = 5, 300.0
"""Failed logins from one address, or under one name, within so many seconds, before it has to wait."""

MAX_PASSWORD_LENGTH = 1024
MAX_NAME_LENGTH = 100
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
    "connect-src": "'self'", "font-src": "'self'", "form-action": "'self'", "frame-ancestors": "'none'",
    "base-uri": "'none'",
}  # fmt: skip


class Sessions(SecureCookieSessionInterface):
    """Signed cookies that are `Secure` where the request came over TLS."""

    def get_cookie_secure(self, app: Flask) -> bool:
        """Tell whether the cookie may only travel over TLS; over plain HTTP on loopback it would then be lost."""
        return request.is_secure


class LoginLimit:
    """Counts failed logins by whom and where they come from, in memory; a login that goes on counts as failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: dict[str, deque[float]] = {}

    def begin(self, sources: Sequence[str], now: float) -> int:
        """Count a try, or return for how many seconds the `sources` have to wait before they may try again."""
        with self._lock:
            full = [tries[0] for one in sources if len(tries := self._recent(one, now)) >= TRIES]
            if full:
                return int(max(full) + TRIES_WINDOW_S - now) + 1
            if len(self._failures) > 10_000:
                self._failures = {key: kept for key in self._failures if (kept := self._recent(key, now))}
            for one in sources:
                self._failures.setdefault(one, deque()).append(now)
            return 0

    def succeeded(self, sources: Sequence[str], begun: float) -> None:
        """Take back the try that was counted at `begun`."""
        with self._lock:
            for one in sources:
                with contextlib.suppress(KeyError, ValueError):
                    self._failures[one].remove(begun)

    def _recent(self, source: str, now: float) -> deque[float]:
        tries = self._failures.get(source, deque())
        while tries and now - tries[0] >= TRIES_WINDOW_S:
            tries.popleft()
        return tries


def secure(app: Flask, *, loopback: bool) -> None:
    """Put the lock on `app`; `loopback`: it listens on this machine's own address."""
    app.secret_key = _secret(app)
    app.session_interface = Sessions()
    app.config.update(
        SESSION_COOKIE_NAME=COOKIE, SESSION_COOKIE_HTTPONLY=True, SESSION_COOKIE_SAMESITE="Lax",
        CONSOLE_LOOPBACK=loopback, CONSOLE_LIMIT=LoginLimit(),
    )  # fmt: skip
    app.before_request(guard)
    app.after_request(add_headers)
    app.add_url_rule("/login", "login", login, methods=["GET", "POST"])
    app.add_url_rule("/logout", "logout", logout, methods=["POST"])
    app.context_processor(
        lambda: {
            "csrf_token": csrf_token, "who": getattr(g, "who", None), "has_users": getattr(g, "has_users", True),
            "role": getattr(g, "role", None), "may": lambda endpoint: may(getattr(g, "role", None), endpoint),
        }
    )  # fmt: skip


def _secret(app: Flask) -> bytes:
    with app.app_context():
        return users().session_secret()


def guard() -> AnyResponse | None:
    """Let a request in, send it to the login page, or refuse it."""
    if not _host_is_ours():
        abort(421, "this console answers to localhost only")
    known = users().all()
    g.has_users = bool(known)
    if not g.has_users and not current_app.config["CONSOLE_LOOPBACK"]:
        abort(403, "there is no user any more: add one with `backup-worker user add NAME`")
    g.who, g.role = _who(known)
    if request.method not in _SAFE_METHODS:
        _check_origin_and_token()
    # Without an endpoint there is no such page, which is not worth hiding from those who are in.
    if may(g.role, request.endpoint) or (g.who is not None and request.endpoint is None):
        return None
    if g.who is None:
        return _ask_for_login()
    needed = ACCESS.get(request.endpoint or "", "nobody")
    return abort(403, f"this needs the role “{needed}”, and {g.who} is “{g.role}”")


def _host_is_ours() -> bool:
    if not current_app.config["CONSOLE_LOOPBACK"]:
        return True
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname in _LOCAL_NAMES
    except ValueError:
        return False


def _who(known: dict[str, User]) -> tuple[str | None, str | None]:
    """Return name and role of who asks: of the session, by HTTP Basic on /metrics, or this machine's own."""
    if not known:
        return getpass.getuser(), APPROVER
    name, mark = session.get("user"), session.get("mark")
    if isinstance(name, str) and isinstance(mark, str):
        user = known.get(name)
        fresh = clock.now() - float(session.get("since", 0)) < SESSION_S
        if user is not None and hmac.compare_digest(user.mark, mark) and fresh:
            return name, user.role
        session.clear()
    if request.endpoint == "metrics" and request.authorization and request.authorization.type == "basic":
        name = request.authorization.username or ""
        user = _by_password(name, request.authorization.password or "")
        return (name, user.role) if user else (None, None)
    return None, None


def _by_password(name: str, password: str) -> User | None:
    """Return the user if the password is right; counts failures, and refuses with 429 what tries too often."""
    limit: LoginLimit = current_app.config["CONSOLE_LIMIT"]
    # By name as well: behind a proxy on this machine, every program on it can say what its address is.
    sources, now = (f"address {request.remote_addr}", f"name {name[:MAX_NAME_LENGTH]}"), clock.now()
    wait_s = limit.begin(sources, now)
    if wait_s:
        g.retry_after_s = wait_s
        abort(429, f"too many failed logins; try again in {wait_s} s")
    user = users().check(name, password) if len(password) <= MAX_PASSWORD_LENGTH else None
    if user is not None:
        limit.succeeded(sources, now)
    return user


def _check_origin_and_token() -> None:
    origin = request.headers.get("Origin")
    if origin and origin != "null" and urlsplit(origin).netloc != request.host:
        abort(403, "this request comes from another site")
    given = request.headers.get("X-CSRFToken") or request.form.get("csrf_token", "")
    if not hmac.compare_digest(given.encode(), csrf_token().encode()):
        abort(403, "the page is out of date: reload it and try again")


def _ask_for_login() -> AnyResponse:
    if request.endpoint == "metrics":
        return Response(
            "a name and a password are needed\n", 401, {"WWW-Authenticate": "Basic realm=metrics"}
        )
    if request.method in _SAFE_METHODS and "text/html" in request.headers.get("Accept", "text/html"):
        wanted = request.full_path.rstrip("?")
        if request.headers.get("HX-Request"):
            # A page that refreshes itself must not put the login form into its middle.
            return Response("", 401, {"HX-Redirect": url_for("login")})
        return redirect(url_for("login", next=wanted if wanted != "/" else None))
    return abort(401, "log in first")


def csrf_token() -> str:
    """Return the session's token, made at the first question."""
    token = session.get("csrf")
    if not isinstance(token, str):
        token = session["csrf"] = secrets.token_urlsafe(32)
    return token


def login() -> Any:
    """Show the form, or let a user in."""
    target = local_path(request.values.get("next", ""), url_for("pages.fleet_page"))
    if g.who is not None:
        return redirect(target)
    if request.method == "GET":
        return render_template("login.html", next=target)
    name = request.form.get("name", "").strip()
    user = _by_password(name, request.form.get("password", ""))
    if user is None:
        flash("That name and password do not belong together.", "bad")
        return render_template("login.html", next=target, name=name), 401
    # A new session: what was known of the one before the login must be worth nothing.
    session.clear()
    session.update(user=name, mark=user.mark, since=clock.now())
    view().runtime.record("action", action="login", by=name, via="console", address=request.remote_addr)
    return redirect(target)


def logout() -> Any:
    """End the session."""
    session.clear()
    return redirect(url_for("login"))


def local_path(wanted: str, otherwise: str) -> str:
    """Return `wanted` if it is a path of this console, else `otherwise`; a redirect must never leave it."""
    parts = urlsplit(wanted)
    plain = wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable()
    return wanted if plain and not parts.netloc and not parts.scheme else otherwise


def script_nonce() -> str:
    """Return this response's nonce for the inline scripts of the RQ dashboard; no other page has any."""
    if "nonce" not in g:
        g.nonce = secrets.token_urlsafe(16)
    return str(g.nonce)


def add_headers(response: AnyResponse) -> AnyResponse:
    """Tell the browser what to refuse, and not to keep pages."""
    policy = dict(POLICY)
    if "nonce" in g:
        policy["script-src"] += f" 'nonce-{g.nonce}'"
    headers = response.headers
    headers.setdefault(
        "Content-Security-Policy", "; ".join(f"{name} {rule}" for name, rule in policy.items())
    )
    headers["X-Frame-Options"] = "DENY"
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "same-origin"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers["Permissions-Policy"] = "camera=(), geolocation=(), microphone=()"
    is_static = (request.endpoint or "").endswith("static")
    headers["Cache-Control"] = "public, max-age=3600" if is_static else "no-store"
    if "retry_after_s" in g:
        headers["Retry-After"] = str(g.retry_after_s)
    return response
