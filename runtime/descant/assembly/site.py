"""`Site`: the values that the start of executor and registry needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from descant.actor.process import InProcess
from descant.actor.supervision import Supervisor
from descant.config import Config
from descant.messages import SchedulerMessage


class Site(NamedTuple):
    """Configuration, supervisor, files of the base model, placement of child processes, address of the scheduler."""

    config: Config
    supervisor: Supervisor
    model_dir: Path
    placement: InProcess
    tell_scheduler: Callable[[SchedulerMessage], None]
