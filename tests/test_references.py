"""The grammar of adapter references."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descant.sources.grammar import MAX_LENGTH, Reference, check_name, parse_reference
from descant_client.errors import AdapterUnsupported, InvalidRequest


@pytest.mark.parametrize(
    ("text", "source", "where"),
    [
        ("upper", "name", "upper"),
        ("Upper-2_b.v1", "name", "Upper-2_b.v1"),
        ("x" * 128, "name", "x" * 128),
        ("/srv/adapters/a", "local", "/srv/adapters/a"),
        ("./a", "local", "./a"),
        ("../a", "local", "../a"),
        ("~/a", "local", "~/a"),
        ("local:a", "local", "a"),
        ("local:hub:x", "local", "hub:x"),
    ],
)
def test_names_and_local_paths_are_served(text: str, source: str, where: str) -> None:
    assert parse_reference(text) == Reference(source, where)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["org/repo", "hub:org/repo@v1", "s3://bucket/key", "s3:bucket", "pbase:1", "a/b/c"])
def test_sources_that_are_not_served_yet_are_refused_by_name(text: str) -> None:
    with pytest.raises(AdapterUnsupported, match=r"hub|s3|pbase"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["", "-x", ".x", "_x", "x y", "x" * 129, "naïve", "a:b", "a\nb", "a\n", "C:\\x"])
def test_what_is_neither_a_name_nor_a_reference_is_an_invalid_request(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_reference(text)


@pytest.mark.parametrize("text", ["/" + "x" * MAX_LENGTH, "/a\0b"])
def test_what_no_path_may_be_is_an_invalid_request(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_reference(text)


def test_an_explicit_source_wins_over_the_grammar() -> None:
    assert parse_reference("upper", "local") == Reference("local", "upper")
    with pytest.raises(AdapterUnsupported):
        parse_reference("/a/path", "s3")


@given(st.text())
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest, AdapterUnsupported):
        assert parse_reference(text).source in ("name", "local")


@pytest.mark.parametrize("name", ["", "-x", "a/b", "local:a", "x" * 129, "a\n", "naïve", "x" * 10**6])
def test_what_is_no_name_is_refused_without_repeating_all_of_it(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_name(name)

    assert len(str(caught.value)) < 400
    assert check_name("x" * 128) == "x" * 128
