"""An actor in a child process behind an ordinary `Ref`.

The parent's side: an actor (the endpoint) that owns the process. Each of its lives is one process; crash,
restart and escalation are those of any actor under a `Supervisor`. The frames are in `frames`.

    starting    from spawn, or from the death of the process before, until the factory returned: messages queue
    up          messages go out at once, in order; the process handles them in order
    dead        every ask the process had not answered, sent or queued, gets ActorFailed with `exit_status` or
                `signal`; tells it had not handled are lost. The next life is `starting` right away
    given up    too many unproductive lives in a row, or a refusal to start: every ask gets ActorFailed

A death is noticed by the end of file of its socket, at once; a hang by its missing heartbeats, and killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from descant.actor.endpoint import Endpoint, Placement, Program, Remote, Watchers
from descant.actor.process import InProcess
from descant.actor.supervision import RestartPolicy, Supervisor
from descant_client.errors import DescantError


def spawn_remote(
    supervisor: Supervisor,
    name: str,
    program: Program,
    *,
    on_up: Callable[[int], None] = lambda life: None,
    on_down: Callable[[DescantError], None] = lambda reason: None,
    on_notice: Callable[[Any], None] = lambda notice: None,
    placement: Placement = InProcess(),  # noqa: B008 - frozen
    restarts: RestartPolicy = RestartPolicy(max_restarts=5, within_s=math.inf),  # noqa: B008 - frozen
    mailbox_size: int = 1024,
) -> Remote[Any]:
    """Start a remote actor and return its handle at once; messages wait until it is up.

    The callbacks run on the loop and may not wait (`tell_nowait`, set an event); one that raises ends the life.

    Args:
        on_up: called with the number of the life (from 1) when its factory has returned.
        on_down: called with the reason when a life ended other than by a stop, up or not.
        on_notice: called with each notice the process sends up, from the start of its factory on.
        placement: `InProcess`, or `Inline` for tests.
        restarts: by default, counts only consecutive lives that were not marked productive.
    """
    remote: Remote[Any] = Remote(name, program)

    def make_endpoint() -> Endpoint:
        remote.life += 1
        return placement.endpoint(remote, Watchers(on_up, on_down, on_notice))

    remote.ref = supervisor.spawn(make_endpoint, name, mailbox_size=mailbox_size, restarts=restarts)
    return remote
