"""The errors of Descant: one tree, used by the client and by the server.

    DescantError
    ├── Unauthorized            unauthorized         401
    ├── InvalidRequest          invalid_request      422
    │   └── UnsupportedRequest  unsupported          422
    ├── AdapterError            adapter_error        422
    │   ├── AdapterNotFound     adapter_not_found    404
    │   ├── AdapterForbidden    adapter_forbidden    403
    │   ├── AdapterExists       adapter_exists       409
    │   ├── AdapterInvalid      adapter_invalid      422
    │   ├── AdapterUnsupported  adapter_unsupported  422
    │   ├── AdapterTooLarge     adapter_too_large    413
    │   └── StoreFull           store_full           507
    ├── Overloaded              overloaded           429
    ├── DeadlineExceeded        deadline_exceeded    504
    ├── Draining                draining             503
    ├── ExecutorFailed          executor_failed      503
    ├── SourceUnavailable       source_unavailable   502
    ├── StreamNotFound          stream_not_found     404
    ├── InternalError           internal_error       500
    ├── ModelInvalid            model_invalid        500
    ├── ConnectionLost          connection_lost      503   raised by the client, never sent
    ├── ConfigInvalid           config_invalid       500   raised where settings are read, never sent
    ├── ActorError              `descant.actor.errors`: inside the server, never sent
    └── CannotFork              likewise

The server sends every other error of the tree. An `ActorError`, or an exception outside the tree, reaches a client as
`InternalError`. `ModelInvalid` is sent to requests if the executor cannot load the model. `ConfigInvalid` is for the
settings of a server and the parameters of a load test.

An error carries data: the annotated fields of its class, which are also its constructor's parameters. `str()` makes the
sentence, with a remedy where there is one. On the wire an error is `code`, `message` and `data`; `from_wire` makes the
same object again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(eq_default=False)
class DescantError(Exception):
    """Base of the tree. A subclass annotates its fields and sets its code, HTTP status and sentence.

    Every field is a JSON value, so that the error survives the wire and the socket to a child process. A subclass gets
    a constructor of its fields, as a dataclass does: inherited fields first, by position or by keyword.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    fields: ClassVar[tuple[str, ...]] = ()
    sentence: ClassVar[str] = "Something failed inside the server."

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        made: Any = dataclasses.dataclass(eq=False, repr=False)(cls)  # in place: an `__init__` of the fields
        cls.fields = tuple(field.name for field in dataclasses.fields(made))

    def __post_init__(self) -> None:
        super().__init__()  # `args` is empty, whether the fields came by position or by keyword

    def data(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return {name: getattr(self, name) for name in self.fields}

    def __str__(self) -> str:
        return self.sentence.format(**self.data())

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.data()))


class Unauthorized(DescantError):
    """The API key is missing or unknown."""

    reason: str

    code = "unauthorized"
    http_status = 401
    sentence = "{reason} Send a valid API key as `Authorization: Bearer KEY` or as the connection token."


class InvalidRequest(DescantError):
    """The request does not fit the protocol or the model; `field` is the field at fault."""

    field: str
    reason: str

    code = "invalid_request"
    http_status = 422
    sentence = "Invalid request at {field}: {reason}"


class UnsupportedRequest(InvalidRequest):
    """The request is well formed but asks for something this version does not do."""

    code = "unsupported"
    sentence = "Not supported by this server at {field}: {reason}"


class AdapterError(DescantError):
    """Base of the errors about one adapter."""

    adapter: str

    code = "adapter_error"
    http_status = 422
    sentence = "Adapter {adapter} failed."


class AdapterNotFound(AdapterError):
    """There is no adapter of that name, or none at that reference."""

    code = "adapter_not_found"
    http_status = 404
    sentence = (
        "No adapter {adapter!r} here. List the adapters to see their names, or give a path below an allowed root."
    )


class AdapterForbidden(AdapterError):
    """The caller may not read the reference, write to the path, or change a shared adapter."""

    reason: str

    code = "adapter_forbidden"
    http_status = 403
    sentence = "Adapter {adapter!r} may not be used: {reason}"


class AdapterExists(AdapterError):
    """The name is in use."""

    code = "adapter_exists"
    http_status = 409
    sentence = "There is an adapter {adapter!r} already. Choose another name, load into it, or destroy it first."


class AdapterInvalid(AdapterError):
    """The files are not a readable adapter for this base model.

    `digest` is set if the damaged file is a version in the server's store; the server then makes that version again.
    """

    reason: str
    digest: str | None = None

    code = "adapter_invalid"
    sentence = "Adapter {adapter!r} is not valid: {reason}"


class AdapterUnsupported(AdapterError):
    """The adapter uses a feature that this version does not support."""

    feature: str

    code = "adapter_unsupported"
    sentence = "Adapter {adapter!r} needs {feature}, which this version does not support."


class AdapterTooLarge(AdapterError):
    """The adapter exceeds the limits of this server."""

    num_bytes: int
    max_bytes: int

    code = "adapter_too_large"
    http_status = 413
    sentence = (
        "Adapter {adapter!r} takes {num_bytes} bytes on the device, {max_bytes} are allowed. "
        "Lower its rank, or raise `adapters.memory_bytes`."
    )


class StoreFull(AdapterError):
    """The store, or a principal's share of it, has no room beside the versions that have names or are in use."""

    num_bytes: int
    max_bytes: int

    code = "store_full"
    http_status = 507
    sentence = (
        "Adapter {adapter!r} takes {num_bytes} bytes, and the {max_bytes} there are in the store are taken by adapters "
        "that have names or are in use. Destroy some, or raise `adapters.store_bytes` or `adapters.max_owner_share`."
    )


class Overloaded(DescantError):
    """The server refuses new work for now."""

    reason: str
    retry_after_s: float

    code = "overloaded"
    http_status = 429
    sentence = "{reason} Try again in {retry_after_s} s."


class DeadlineExceeded(DescantError):
    """A request or an operation took longer than its deadline."""

    what: str
    deadline_s: float

    code = "deadline_exceeded"
    http_status = 504
    sentence = "{what} took longer than {deadline_s} s."


class Draining(DescantError):
    """The server is shutting down and accepts no new requests."""

    reason: str

    code = "draining"
    http_status = 503
    sentence = "The server is shutting down: {reason} Send the request to another server or later."


class ExecutorFailed(DescantError):
    """The request ends the executor even when it is alone in a step, or the executor was given up for all requests."""

    reason: str

    code = "executor_failed"
    http_status = 503
    sentence = "The executor failed on this request: {reason}"


class SourceUnavailable(DescantError):
    """A source of models or adapters does not answer."""

    source: str
    reason: str

    code = "source_unavailable"
    http_status = 502
    sentence = "{source} cannot be reached: {reason}"


class StreamNotFound(DescantError):
    """The stream to resume or cancel is unknown, released, or another client's."""

    request_id: str

    code = "stream_not_found"
    http_status = 404
    sentence = "No stream {request_id!r} to resume. Send the request again under a new request_id."


class ModelInvalid(DescantError):
    """The base model cannot be served."""

    model: str
    reason: str

    code = "model_invalid"
    sentence = "Model {model!r} cannot be served: {reason}"


class ConfigInvalid(DescantError):
    """A setting of the server, or a parameter of a load test, is wrong."""

    key: str
    reason: str

    code = "config_invalid"
    sentence = "Configuration at {key}: {reason}"


class ConnectionLost(DescantError):
    """The client cannot reach the server, or could not reach it again within its time limit."""

    uri: str
    reason: str

    code = "connection_lost"
    http_status = 503
    sentence = "Connection to {uri} is lost: {reason}"


class InternalError(DescantError):
    """A fault of the server; its log has the traceback."""

    reason: str

    code = "internal_error"
    sentence = "The server failed on this request: {reason}"


def _rebuild(kind: type[DescantError], data: dict[str, Any]) -> DescantError:
    return kind(**data)


def _tree(kind: type[DescantError]) -> list[type[DescantError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _tree(child))]


def from_wire(code: str, message: str, data: dict[str, Any]) -> DescantError:
    """Return the error with the code and data that a peer sent.

    An unknown code (of a newer server) becomes `InternalError` with `message` as its reason. Unknown fields are
    dropped; missing ones are None.
    """
    for kind in _tree(DescantError):
        if kind.code == code and kind.fields:
            return kind(**{name: data.get(name) for name in kind.fields})
    return InternalError(reason=message)
