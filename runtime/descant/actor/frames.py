"""Frames between a remote actor's endpoint and its child process.

Each way: a little-endian u32 length, then msgpack `[kind, ask_id, payload]`.

    parent to child    START Start, once · ASK message · TELL message · STOP
    child to parent    UP, once · REPLY reply · ERROR Refusal · NOTICE notice · FATAL text, then it exits
"""

from __future__ import annotations

import enum
import struct
from typing import Any

import msgspec

HEADER = struct.Struct("<I")


class Kind(enum.IntEnum):
    """The kind of a frame."""

    START = 0
    ASK = 1
    TELL = 2
    STOP = 3
    UP = 4
    REPLY = 5
    ERROR = 6
    NOTICE = 7
    FATAL = 8


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One frame. `payload` is decoded once its kind is known."""

    kind: Kind
    ask_id: int
    payload: msgspec.Raw


class Start(msgspec.Struct, frozen=True):
    """The first frame to the child."""

    name: str
    config: bytes
    log_level: int


class Refusal(msgspec.Struct, frozen=True):
    """A DescantError on its way to the parent; ask_id 0 marks the refusal to start."""

    code: str
    message: str
    data: dict[str, Any]


_encoder = msgspec.msgpack.Encoder()
decode_frame = msgspec.msgpack.Decoder(Frame).decode


def encode_frame(kind: Kind, ask_id: int, payload: Any) -> bytearray:
    """Return header and body of one frame.

    Raises:
        TypeError: the payload holds a value that msgpack cannot encode.
    """
    frame = bytearray(HEADER.size)
    _encoder.encode_into((kind, ask_id, payload), frame, HEADER.size)
    HEADER.pack_into(frame, 0, len(frame) - HEADER.size)
    return frame
