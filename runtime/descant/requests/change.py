"""From an `adapter.*` message to the registry: check it, ask, and hand the answer to its operation.

Every error here ends one operation with a typed error and touches nothing else.
"""

from __future__ import annotations

import logging

from descant.actor.errors import ActorError, AskTimeout
from descant.contract.principal import Principal
from descant.messages import AdapterList, ChangeAdapter
from descant.requests.combination import check_combination
from descant.requests.progress import report_if_slow
from descant.requests.services import Services
from descant.sessions.operation import OutgoingOperation
from descant_client.errors import DeadlineExceeded, DescantError, InternalError
from descant_client.lifecycle import (
    AdapterChange,
    Adapters,
    LoadAdapter,
    MergeAdapters,
    MergeAndSave,
    SaveAdapter,
)
from descant_client.protocol import Progress

logger = logging.getLogger(__name__)

OPERATION_TIMEOUT_S = 3600.0  # writing a large merged checkpoint takes as long as the disk needs
_STAGES = {LoadAdapter: "loading", MergeAdapters: "merging", SaveAdapter: "saving", MergeAndSave: "saving"}


async def make_change(
    services: Services, change: AdapterChange, operation: OutgoingOperation, principal: Principal
) -> None:
    """Have the registry make a change. Any error ends the operation and is not raised."""
    stage = _STAGES.get(type(change), "changing")
    try:
        if isinstance(change, MergeAdapters):
            check_combination(change.combination, change.adapters)
        ask = services.registry.ask(ChangeAdapter(principal, change), timeout=OPERATION_TIMEOUT_S)
        changed: AdapterList = await report_if_slow(
            ask, lambda: operation.note(Progress(request_id=change.request_id, stage=stage))
        )
        operation.finish(Adapters(request_id=change.request_id, adapters=list(changed.adapters)))
    except AskTimeout:
        operation.fail(DeadlineExceeded(f"{stage} adapter {change.name!r}", OPERATION_TIMEOUT_S))
    except ActorError as error:
        operation.fail(InternalError(f"{error} List the adapters to see whether it was done."))
    except DescantError as error:
        operation.fail(error)
    except Exception as exc:
        logger.exception("operation %s failed", operation.key)
        operation.fail(InternalError(type(exc).__name__))
