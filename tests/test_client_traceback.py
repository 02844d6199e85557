"""A program that catches no error of its client ends with a short traceback, and the error's sentence comes last."""

import sys

import anyio
import pytest

from descant_client.task_groups import first_leaf, running_beside
from fake_server import FakeServer

pytestmark = pytest.mark.anyio

SCRIPT = """
import asyncio, sys
from descant_client import connect

async def main():
    async with connect(sys.argv[1], reconnect_s=0.1) as client:
        {body}

asyncio.run(main())
"""


async def _last_line(uri: str, body: str) -> str:
    """Run a script until its client fails. Return the last line on its standard error."""
    run = await anyio.run_process([sys.executable, "-c", SCRIPT.format(body=body), uri], check=False)
    stderr = run.stderr.decode()
    assert stderr.count("Traceback") == 1
    assert "direct cause" not in stderr
    assert "During handling" not in stderr
    assert len(stderr.splitlines()) < 30
    return stderr.splitlines()[-1]


async def test_nothing_listens() -> None:
    async with FakeServer() as server:
        await server.stop()

        last = await _last_line(server.uri, "pass")

    sentence = "nothing listens there. Start a server with `descant serve`."
    assert last == f"descant_client.errors.ConnectionLost: Connection to {server.uri}/ws is lost: {sentence}"


async def test_the_address_is_none() -> None:
    last = await _last_line("localhost:8080", "pass")

    assert last.endswith("is no server's address. Give one like ws://127.0.0.1:8080.")


@pytest.mark.parametrize(
    "body",
    [
        "async for delta in client.generate([1] * 9): pass",
        "await client.generate([1] * 9).result()",
        "await client.adapters.list()",
        "await client.adapters.create('new')",
    ],
)
async def test_the_server_dies(body: str) -> None:
    async with FakeServer(drops=[0] * 1000) as server:
        last = await _last_line(server.uri, body)

    assert last.startswith(f"descant_client.errors.ConnectionLost: Connection to {server.uri}/ws is lost: ")
    assert last.endswith("Gave up after 0.1 s.")


# ---- task groups ---------------------------------------------------------------------------------------------------


async def test_an_exception_of_the_work_is_raised_as_itself_and_cancels_the_block() -> None:
    async def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        async with running_beside(work):
            await anyio.sleep_forever()


async def test_a_group_that_the_block_raises_is_not_opened() -> None:
    with pytest.raises(ExceptionGroup, match="theirs"):
        async with running_beside(anyio.sleep_forever):
            raise ExceptionGroup("theirs", [KeyError("one")])


async def test_the_first_leaf_of_nested_groups() -> None:
    one, two = KeyError("one"), KeyError("two")
    nested = ExceptionGroup("outer", [ExceptionGroup("inner", [one, two])])

    assert first_leaf(one) is one
    assert first_leaf(nested) is one
    assert first_leaf(nested, if_alone=True) is nested.exceptions[0]
