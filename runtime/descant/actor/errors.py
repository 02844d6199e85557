"""Errors between actors, inside the server. A client gets `InternalError` in their place."""

from __future__ import annotations

from descant_client.errors import DescantError


class ActorError(DescantError):
    """Base of what can go wrong between two actors; never sent to a client as it is."""

    actor: str

    code = "actor_error"
    http_status = 503
    sentence = "Actor {actor} failed."


class ActorStopped(ActorError):
    """The actor stopped, or was stopped before the message was handled."""

    code = "actor_stopped"
    sentence = "Actor {actor} has stopped."


class ActorFailed(ActorError):
    """The actor crashed while it owed the reply; `exit_status` and `signal` are set if it was a process."""

    reason: str
    exit_status: int | None = None
    signal: str | None = None

    code = "actor_failed"
    sentence = "Actor {actor} crashed: {reason}"


class AskTimeout(ActorError):
    """No reply before the asker's deadline; the message may still be handled."""

    message: str
    timeout_s: float

    code = "ask_timeout"
    http_status = 504
    sentence = "Actor {actor} did not answer {message} within {timeout_s} s."


class MailboxFull(ActorError):
    """The mailbox is full and the sender may not wait."""

    size: int

    code = "mailbox_full"
    sentence = "The mailbox of actor {actor} is full ({size} messages)."


class Escalated(ActorError):
    """An actor crashed too often, or refused to start; it will not be started again."""

    reason: str

    code = "actor_escalated"
    sentence = "Actor {actor} cannot be kept running: {reason}"


class CannotFork(DescantError):
    """The launcher process refuses to serve. Children start from nothing."""

    reason: str

    code = "cannot_fork"
    sentence = "The launcher cannot fork children: {reason}"
