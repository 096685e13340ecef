"""Sending a text: to a webhook as JSON that Slack and Discord take, or by e-mail. Secrets are read where they are used."""

from __future__ import annotations

import json
import os
import smtplib
import urllib.error
import urllib.request
from email.message import EmailMessage
from http.client import HTTPException

from jobs.notify.config import Email, Notify

TIMEOUT_S = 10.0
DISCORD_CHARACTERS = 2000


class NotSentError(Exception):
    """A message could not be sent now: why, without the address."""


def channels(notify: Notify) -> list[str]:
    """The names of those that are wanted."""
    return [name for name in ("webhook", "email") if getattr(notify, name) is not None]


def send(notify: Notify, channel: str, text: str) -> None:
    """Send it.

    Raises:
        NotSentError: the receiver does not take it, or a variable is not set here.
    """
    try:
        if channel == "email" and notify.email is not None:
            _email(notify.email, text)
        elif notify.webhook is not None:
            _webhook(_secret(notify.webhook), text)
    except urllib.error.HTTPError as error:
        raise NotSentError(f"the receiver answered {error.code}") from None
    except urllib.error.URLError as error:
        raise NotSentError(f"{getattr(error.reason, 'strerror', None) or type(error.reason).__name__}") from None
    except (OSError, HTTPException, ValueError, smtplib.SMTPException) as error:  # their texts may have the address
        raise NotSentError(getattr(error, "strerror", None) or type(error).__name__) from None


def _secret(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise NotSentError(f"${variable} is not set here")
    return value


def _webhook(url: str, text: str) -> None:
    slack = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # nobody is called by what a log says
    document = {"text": slack, "content": text[:DISCORD_CHARACTERS], "allowed_mentions": {"parse": []}}
    headers = {"Content-Type": "application/json", "User-Agent": "vitpa"}
    request = urllib.request.Request(url, json.dumps(document).encode(), headers)
    if request.type not in ("http", "https"):
        raise NotSentError("its URL begins with neither https:// nor http://")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.read(1024)


def _email(its: Email, text: str) -> None:
    message = EmailMessage()
    message["Subject"] = text.partition("\n")[0][:200]
    message["From"], message["To"] = its.sender or its.to, its.to
    message.set_content(text)
    with smtplib.SMTP(its.host, its.port, timeout=TIMEOUT_S) as server:
        if its.starttls:
            server.starttls()
        if its.user is not None:
            server.login(its.user, _secret(its.password) if its.password else "")
        server.send_message(message)
