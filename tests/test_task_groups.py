"""Exceptions found in the groups that task groups wrap them in."""

from descant_client.task_groups import first_leaf

ONE, OTHER = ValueError("one"), KeyError("other")


def test_the_first_exception_of_nested_groups_is_found() -> None:
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [ONE, OTHER]), OTHER])

    assert first_leaf(group) is ONE
    assert first_leaf(ONE) is ONE


def test_a_group_of_several_is_returned_where_only_a_lone_exception_is_wanted() -> None:
    several = ExceptionGroup("inner", [ONE, OTHER])

    assert first_leaf(ExceptionGroup("outer", [several]), if_alone=True) is several
    assert first_leaf(ExceptionGroup("outer", [ONE]), if_alone=True) is ONE
