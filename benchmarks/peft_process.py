"""Transformers and PEFT in a child process that gets requests as JSON lines. `peft_child` is its program."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from batches import Answers, Request

LINE_BYTES = 1 << 24  # longest answer


class Load(msgspec.Struct, tag=True):
    """Replace the model and the adapters, which are given by name. Answered by an empty line."""

    model: str
    dtype: str
    adapters: dict[str, str]


class Ask(msgspec.Struct, tag=True):
    """Generate greedily, `batch_size` prompts at a time. Answered by `Answered`."""

    prompts: list[list[int]]
    adapters: list[str | None]
    new_tokens: int
    batch_size: int


class Answered(msgspec.Struct):
    """As `batches.Answers`, measured in the child."""

    token_ids: list[list[int]]
    seconds: float
    decode_tokens_per_s: float | None


class Peft:
    """The parent's end. Takes one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def load(self, model: Path, dtype: str, adapters: Mapping[str, Path]) -> None:
        """Load a model and its adapters, all in `dtype`."""
        await self._ask(Load(str(model), dtype, {name: str(path) for name, path in adapters.items()}))

    async def answer(self, requests: Sequence[Request], new_tokens: int, batch_size: int) -> Answers:
        """Answer requests whose prompts are token ids, `batch_size` at a time, those of one adapter together."""
        prompts = [list(request.prompt) for request in requests if not isinstance(request.prompt, str)]
        line = await self._ask(Ask(prompts, [request.adapter for request in requests], new_tokens, batch_size))
        answered = msgspec.json.decode(line, type=Answered)
        assert {len(ids) for ids in answered.token_ids} == {new_tokens}, "an answer is short"
        rate = answered.decode_tokens_per_s
        return Answers(answered.token_ids, answered.seconds, float("nan") if rate is None else rate)

    async def _ask(self, question: Load | Ask) -> bytes:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None, "a pipe was asked for"
        assert answers is not None, "a pipe was asked for"
        questions.write(msgspec.json.encode(question) + b"\n")
        await questions.drain()
        line = await answers.readline()
        if not line:
            raise SystemExit("the process with PEFT has ended; what it said is above")
        return line


@asynccontextmanager
async def peft_process(num_threads: int) -> AsyncIterator[Peft]:
    """Run the child, with this number of torch threads, for the length of an `async with`."""
    child = Path(__file__).with_name("peft_child.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(child),
        str(num_threads),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        limit=LINE_BYTES,
    )
    try:
        yield Peft(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
