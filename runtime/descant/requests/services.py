"""`Services`: state that outlives every actor's restart, `ModelState` among it, and the addresses of the actors."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from descant.actor.ref import Ref
from descant.config import Config
from descant.contract.executor import EngineReady
from descant.contract.version import AdapterVersion
from descant.messages import AuthMessage, RegistryMessage, SchedulerMessage
from descant.model.tokenizer import Tokenizer
from descant.requests.default_heads import DefaultHeads
from descant.scheduling.sequence import SequenceTable
from descant.sessions.leases import LeaseTable
from descant.sessions.session import SessionTable
from descant_client.errors import DescantError
from descant_client.protocol import ModelInfo


class ModelState:
    """State of the base model and of the executor over its lives."""

    def __init__(self, model_id: str) -> None:
        self.id = model_id
        self.is_up = False  # an executor is running and has loaded the model
        self.num_steps = 0  # completed, over all lives
        self.num_lives = 0
        self.num_adapter_loads = 0  # onto the device, over all lives
        self.pinned: tuple[AdapterVersion, ...] = ()  # versions to be kept on the device
        self._engine: EngineReady | None = None
        self._failure: DescantError | None = None
        self._loaded = anyio.Event()

    def on_executor_up(self, engine: EngineReady) -> None:
        """Record that a new life of the executor has loaded the model."""
        self._engine = engine
        self.is_up = True
        self.num_lives += 1
        self._loaded.set()

    def on_given_up(self, error: DescantError) -> None:
        """Record that the executor will not be started again: from now on `ready` raises `error`."""
        self._failure = error
        self._loaded.set()

    async def ready(self) -> EngineReady:
        """Wait for the first life of the executor and return its engine's facts. They are the same for all lives.

        Raises:
            DescantError: the executor was given up.
        """
        await self._loaded.wait()
        if self._failure is not None:
            raise self._failure
        return self.engine

    @property
    def engine(self) -> EngineReady:
        """Facts of the engine, known after `ready`."""
        assert self._engine is not None, "it is known once the model is loaded"
        return self._engine

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return self.engine.info.eos_token_ids

    @property
    def info(self) -> ModelInfo:
        """The model as clients see it, known after `ready`."""
        engine = self.engine
        return ModelInfo(
            id=self.id,
            max_context=engine.limits.max_context,
            vocab_size=engine.limits.vocab_size,
            dtype=engine.info.dtype,
            device=engine.info.device,
        )


@dataclass(frozen=True)
class Services:
    """Shared services of request handlers: configuration, model state, addresses of actors, tables."""

    config: Config
    model: ModelState
    tokenizer: Tokenizer
    auth: Ref[AuthMessage]
    registry: Ref[RegistryMessage]
    scheduler: Ref[SchedulerMessage]
    sequences: SequenceTable
    leases: LeaseTable
    default_heads: DefaultHeads
    sessions: SessionTable = field(repr=False)
