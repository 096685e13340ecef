"""`notify` in a profile: where messages go, and which. A webhook's URL and passwords are in environment variables."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from vitpa.config import Section

Kind = Literal["finished", "failed", "given_up", "cell"]


def _check_variable(key: str, name: str | None) -> None:
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it is not repeated: it may be the secret
        raise ValueError(f"{key}: expected the name of the environment variable that has it, such as VITPA_WEBHOOK")


class Email(Section):
    """A mailbox, and the server that takes mail for it."""

    to: str = Field(description="address that gets the messages")
    sender: str | None = Field(None, description="address that they are from; null: `to`")
    host: str = Field("localhost", description="mail server")
    port: int = Field(587, ge=1, le=65_535, description="its port")
    starttls: bool = Field(True, description="encrypt the connection")
    user: str | None = Field(None, description="name to log in by; null: without")
    password: str | None = Field(None, description="environment variable with the password")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_variable("notify.email.password", self.password)
        return self


class Notify(Section):
    """What is sent where."""

    webhook: str | None = Field(None, description="environment variable with the URL, which gets JSON as Slack and Discord do")
    email: Email | None = Field(None, description="to, host, port, user, password (an environment variable) ...")
    events: list[Kind] = Field(
        ["finished", "failed", "given_up", "cell"], description="what is told: of a run, or (cell) all seeds of a cell done"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_variable("notify.webhook", self.webhook)
        return self
