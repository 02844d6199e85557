"""Sessions outlive connections, belong to one principal, and are forgotten in time."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from descant.contract.principal import Principal
from descant.sessions.session import Session, SessionTable
from descant_client.errors import InternalError, InvalidRequest, Overloaded, StreamNotFound
from descant_client.lifecycle import Adapters

pytestmark = pytest.mark.anyio

ANN, BOB = Principal("ann"), Principal("bob")


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(max_streams=2, buffer_bytes=1000, max_sessions=3)


@pytest.fixture
def session(table: SessionTable) -> Session:
    return table.open_or_resume(None, ANN)


def test_one_comes_back_to_ones_own_session_only(table: SessionTable, session: Session) -> None:
    assert table.open_or_resume(session.id, ANN) is session
    assert table.open_or_resume(session.id, BOB) is not session
    assert table.open_or_resume("guessed", ANN).id != "guessed"


def test_session_ids_cannot_be_guessed() -> None:
    table = SessionTable(max_streams=2, buffer_bytes=1000)
    ids = {table.open_or_resume(None, ANN).id for _ in range(100)}

    assert len(ids) == 100
    assert min(map(len, ids)) >= 20


def test_streams_of_equal_ids_in_two_sessions_have_different_keys(table: SessionTable, session: Session) -> None:
    other = table.open_or_resume(None, ANN)

    assert session.open_stream("1").key != other.open_stream("1").key


def test_an_id_can_be_used_again_once_it_was_released(session: Session) -> None:
    session.open_stream("1")
    with pytest.raises(InvalidRequest, match="in use"):
        session.open_stream("1")
    session.release("1")
    session.release("1")

    assert session.open_stream("1") is session.outgoing("1")


def test_only_unfinished_streams_count_against_the_limit(session: Session) -> None:
    for request_id in ("1", "2"):
        session.open_stream(request_id)
    with pytest.raises(Overloaded):
        session.open_stream("3")
    session.outgoing("1").fail(InternalError("over"))

    session.open_stream("3")


def test_operations_count_as_streams_and_share_their_ids(session: Session) -> None:
    operation = session.open_operation("1")
    with pytest.raises(InvalidRequest, match="in use"):
        session.open_stream("1")
    session.open_stream("2")
    with pytest.raises(Overloaded):
        session.open_operation("3")
    operation.finish(Adapters("1", []))

    assert session.open_operation("3") is session.outgoing("3")


def test_of_what_was_sent_and_never_acknowledged_the_oldest_is_forgotten(session: Session) -> None:
    operation = session.open_operation("0")
    operation.finish(Adapters("0", []))
    operation.on_end_sent(0.0)
    stream = None
    for number in range(1, 1000):
        stream = session.open_stream(str(number))
        stream.fail(InternalError("over"))
        stream.on_end_sent(float(number))
        assert len(session) <= 10

    assert session.outgoing("999") is stream
    assert session.outgoing("0") is operation  # it goes last: doing it again is not the same
    with pytest.raises(StreamNotFound):
        session.outgoing("1")


def test_what_was_not_sent_yet_is_not_forgotten_but_new_streams_are_refused(session: Session) -> None:
    for number in range(10):
        session.open_stream(str(number)).fail(InternalError("over"))

    with pytest.raises(Overloaded, match="does not read"):
        session.open_stream("10")
    assert len(list(session)) == 10


def test_an_unknown_stream_is_not_found(session: Session) -> None:
    with pytest.raises(StreamNotFound):
        session.outgoing("1")


async def test_changed_streams_come_in_turn_each_once(session: Session) -> None:
    number = session.attach()
    one, two = session.open_stream("1"), session.open_stream("2")
    for stream in (one, two, one):
        stream.fail(InternalError("x"))

    assert await session.next_changed(number) is one
    one.fail(InternalError("y"))
    assert [await session.next_changed(number) for _ in range(2)] == [two, one]


async def test_others_have_their_turn_before_each_changed_stream(session: Session) -> None:
    number = session.attach()
    turns: list[str] = []
    for name in ("1", "2"):
        session.open_stream(name).fail(InternalError("x"))
    for name in ("1", "2"):
        asyncio.get_running_loop().call_soon(turns.append, name)

        await session.next_changed(number)

        assert turns[-1:] == [name]


async def test_a_connection_that_waits_ends_when_another_takes_over(session: Session) -> None:
    answers: list[object] = []
    older = session.attach()
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            answers.append(await session.next_changed(older))

        tasks.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        session.attach()

    assert answers == [None]


async def test_a_released_stream_is_not_rendered_any_more(session: Session) -> None:
    number = session.attach()
    one, two = session.open_stream("1"), session.open_stream("2")
    session.release("1")
    one.fail(InternalError("x"))
    two.fail(InternalError("x"))

    assert await session.next_changed(number) is two


def test_sessions_without_connection_and_finished_streams_expire(table: SessionTable, session: Session) -> None:
    session.attach()
    finished, running = session.open_stream("1"), session.open_stream("2")
    finished.on_end_sent(10.0)

    assert list(table.expire(69.9, 60.0)) == []
    assert list(session) == [finished, running]
    assert list(table.expire(70.0, 60.0)) == []
    assert list(session) == [running]

    session.detach(session.connection, 70.0)
    assert list(table.expire(129.9, 60.0)) == []
    assert list(table.expire(130.0, 60.0)) == [running]
    assert len(table) == 0


def test_the_answer_of_an_operation_is_kept_as_long_as_its_session(table: SessionTable, session: Session) -> None:
    session.attach()
    operation = session.open_operation("1")
    operation.finish(Adapters("1", []))
    operation.on_end_sent(0.0)

    assert list(table.expire(1000.0, 60.0)) == []
    assert session.outgoing("1") is operation


def test_ones_idle_sessions_make_room_the_oldest_first_and_nobody_elses(table: SessionTable, session: Session) -> None:
    older, newer, others = (table.open_or_resume(None, principal) for principal in (ANN, ANN, BOB))
    running = older.open_stream("1")
    for one, detached_s in ((older, 1.0), (newer, 2.0), (others, 0.0)):
        one.detach(one.connection, detached_s)

    latest = table.open_or_resume(None, ANN)

    assert {one.id for one in table} == {session.id, newer.id, latest.id, others.id}
    assert list(table.expire(3.0, 60.0)) == [running]
    assert list(table.expire(3.0, 60.0)) == []


def test_nobody_has_more_connections_than_the_limit(table: SessionTable, session: Session) -> None:
    sessions = [table.open_or_resume(None, ANN) for _ in range(2)]
    with pytest.raises(Overloaded, match="ann already has 3"):
        table.open_or_resume(None, ANN)

    assert table.open_or_resume(sessions[0].id, ANN) is sessions[0]
    table.open_or_resume(None, BOB)


def test_a_session_that_was_taken_up_again_does_not_expire(table: SessionTable, session: Session) -> None:
    session.detach(session.connection, 0.0)
    table.open_or_resume(session.id, ANN).attach()

    assert list(table.expire(1000.0, 60.0)) == []
    assert len(table) == 1


def test_a_table_is_busy_while_a_stream_runs_or_has_not_been_sent(table: SessionTable, session: Session) -> None:
    session.attach()
    stream = session.open_stream("1")
    assert table.is_busy
    stream.fail(InternalError("x"))
    assert table.is_busy
    stream.on_end_sent(1.0)
    assert not table.is_busy


def test_the_end_of_a_connection_that_was_replaced_does_not_detach_the_session(session: Session) -> None:
    older, newer = session.attach(), session.attach()

    session.detach(older, 1.0)
    assert session.detached_s is None
    session.detach(newer, 2.0)
    assert session.detached_s == 2.0
    session.attach()
    assert session.detached_s is None
