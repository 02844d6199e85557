"""Base classes of the messages that actors send each other."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

ReplyT = TypeVar("ReplyT")


class Message(msgspec.Struct, frozen=True, tag=True):
    """A message of the union that one receiver accepts. The tag is the class name."""


class Ask(Message, Generic[ReplyT], frozen=True):
    """A message that is answered with a `ReplyT`: `Ref.ask` returns it."""
