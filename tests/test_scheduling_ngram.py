"""A draft is what followed the last few tokens before: the longest match, most recent first, as one tree."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.scheduling.speculation.ngram import MAX_OCCURRENCES, DraftTree, NgramIndex

LIMITS = st.tuples(st.integers(0, 6), st.integers(0, MAX_OCCURRENCES + 1), st.integers(0, 14))
LENGTHS = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(sorted)
CHUNKS = st.tuples(st.integers(1, 4), st.integers(0, 20)).flatmap(  # a small alphabet, and texts of all sizes
    lambda drawn: st.lists(st.lists(st.integers(1, drawn[0]), min_size=drawn[1] // 2, max_size=drawn[1]), max_size=6)
)


def index_of(text: Sequence[int] | str, min_n: int = 1, max_n: int = 3) -> NgramIndex:
    """An index of the given tokens, or of the characters of a text."""
    index = NgramIndex(min_n, max_n)
    index.extend(ord(token) if isinstance(token, str) else token for token in text)
    return index


def branches(tree: DraftTree | None) -> list[str]:
    """The text from the root to each leaf, in the order of the leaves."""
    assert tree is not None
    paths: list[str] = []
    for token, parent in zip(*tree, strict=True):
        paths.append((paths[parent] if parent >= 0 else "") + chr(token))
    return [path for node, path in enumerate(paths) if node not in tree.parents]


def rescanned(
    tokens: list[int], lengths: Sequence[int], max_depth: int, max_width: int, max_nodes: int
) -> DraftTree | None:
    """What `propose` has to return, the slow and obvious way."""
    if 0 in (max_depth, max_width, max_nodes):
        return None
    min_n, max_n = lengths
    for n in range(min(max_n, len(tokens)), min_n - 1, -1):
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[-n:]]
        if ends:
            return merged(
                [copied(tokens, end, max_depth) for end in ends[: -MAX_OCCURRENCES - 1 : -1]], max_width, max_nodes
            )
    return None


def copied(tokens: list[int], start: int, depth: int) -> tuple[int, ...]:
    """Copy token by token, also from what was just copied."""
    text = list(tokens)
    for offset in range(depth):
        text.append(text[start + offset])
    return tuple(text[len(tokens) :])


def merged(continuations: list[tuple[int, ...]], max_width: int, max_nodes: int) -> DraftTree:
    """The prefixes of the first continuations that differ, each once."""
    differing = list(dict.fromkeys(continuations))[:max_width]
    prefixes = [branch[:length] for branch in differing for length in range(1, len(branch) + 1)]
    paths = list(dict.fromkeys(prefixes))[:max_nodes]
    parents = [paths.index(path[:-1]) if len(path) > 1 else -1 for path in paths]
    return DraftTree(tuple(path[-1] for path in paths), tuple(parents))


@given(CHUNKS, LENGTHS, st.integers(0, 6), st.integers(0, 14))
@settings(deadline=None, max_examples=200)
def test_the_index_proposes_what_a_rescan_finds(
    chunks: list[list[int]], lengths: list[int], max_depth: int, max_nodes: int
) -> None:
    index = NgramIndex(*lengths)
    tokens: list[int] = []

    for chunk in chunks:
        index.extend(chunk)
        tokens += chunk

        assert index.num_tokens == len(tokens)
        for width in range(MAX_OCCURRENCES + 2):
            limits = max_depth, width, max_nodes
            assert index.propose(*limits) == rescanned(tokens, lengths, *limits)


@given(CHUNKS, LENGTHS, LIMITS)
@settings(deadline=None)
def test_a_tree_is_well_formed_and_within_its_limits(
    chunks: list[list[int]], lengths: list[int], limits: tuple[int, int, int]
) -> None:
    max_depth, max_width, max_nodes = limits
    index = index_of([token for chunk in chunks for token in chunk], *lengths)

    tree = index.propose(*limits)

    if tree is not None:
        assert 1 <= len(tree.token_ids) == len(tree.parents) <= max_nodes
        assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
        assert len(set(zip(*tree, strict=True))) == len(tree.parents), "two children of a node have the same token"
        paths = branches(tree)
        assert len(paths) <= max_width
        assert max(map(len, paths)) <= max_depth


def test_a_draft_is_what_followed_the_last_occurrence() -> None:
    index = index_of("the cat sat. the c")

    assert branches(index.propose(6, 1, 6)) == ["at sat"]


def test_the_longest_match_decides_though_a_shorter_one_is_more_recent() -> None:
    index = index_of("abcX..bcY..cZ..abc")

    assert branches(index.propose(1, 4, 8)) == ["X"]


def test_a_shorter_match_is_taken_where_there_is_no_longer_one() -> None:
    index = index_of("..bcY..abc", 2, 3)

    assert branches(index.propose(2, 4, 8)) == ["Y."]


def test_a_match_shorter_than_the_least_is_none() -> None:
    index = index_of("cY..abc", 2, 3)

    assert index.propose(4, 4, 8) is None


@pytest.mark.parametrize(("min_n", "max_n", "lengths"), [(1, 16, [16, 11, 6, 1]), (2, 4, [4, 3, 2]), (3, 3, [3])])
def test_of_a_wide_range_a_few_lengths_are_looked_for(min_n: int, max_n: int, lengths: list[int]) -> None:
    assert [n for n, *_ in NgramIndex(min_n, max_n)._kinds] == lengths


@pytest.mark.parametrize("text", ["", "a", "abcdef"])
def test_a_text_that_repeats_nothing_suggests_nothing(text: str) -> None:
    index = index_of(text)

    assert index.propose(4, 4, 8) is None


@pytest.mark.parametrize("limits", [(0, 4, 8), (4, 0, 8), (4, 4, 0)])
def test_a_limit_of_zero_leaves_no_draft(limits: tuple[int, int, int]) -> None:
    index = index_of("abab")

    assert index.propose(4, 4, 8) is not None
    assert index.propose(*limits) is None


@pytest.mark.parametrize(("text", "draft"), [("aa", "aaaaaaaa"), ("abab", "abababab"), ("xabcabc", "abcabcab")])
def test_a_short_period_goes_on_to_the_full_depth(text: str, draft: str) -> None:
    index = index_of(text)

    assert branches(index.propose(8, 4, 32)) == [draft]


def test_differing_continuations_become_branches_that_share_their_prefix() -> None:
    index = index_of("<>one. <>ore. <>two. <>", 2, 2)

    tree = index.propose(3, 4, 16)

    assert branches(tree) == ["two", "ore", "one"]
    assert tree is not None
    assert "".join(map(chr, tree.token_ids)) == "twoorene"
    assert tree.parents == (-1, 0, 1, -1, 3, 4, 3, 6)


def test_the_most_recent_branches_are_those_taken() -> None:
    index = index_of("<>1 <>2 <>3 <>", 2, 2)

    assert branches(index.propose(1, 2, 8)) == ["3", "2"]


def test_a_continuation_seen_again_takes_no_width() -> None:
    index = index_of("<>1 <>2 <>2 <>2 <>", 2, 2)

    assert branches(index.propose(2, 2, 8)) == ["2 ", "1 "]


def test_the_first_branch_gets_its_nodes_first() -> None:
    index = index_of("<>one <>two <>", 2, 2)

    assert branches(index.propose(3, 2, 2)) == ["tw"]
    assert branches(index.propose(3, 2, 4)) == ["two", "o"]


def test_only_the_last_few_occurrences_are_looked_at() -> None:
    index = index_of("".join(f"<>{letter} " for letter in "abcdefghijkl") + "<>", 2, 2)

    assert branches(index.propose(1, 16, 16)) == [*"lkjihgfedcba"][:MAX_OCCURRENCES]


def test_a_draft_changes_nothing() -> None:
    index = index_of("<>one <>two <>", 2, 2)

    first = index.propose(3, 2, 8)

    assert index.num_tokens == len("<>one <>two <>")
    assert index.propose(3, 2, 8) == first


class CountingTokens(list[int]):
    """Counts the tokens that are read."""

    num_read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.num_read += len(self)
        return super().__iter__()


def test_the_work_and_the_memory_for_a_token_do_not_grow_with_the_text() -> None:
    rng = random.Random(7)
    index = NgramIndex(2, 4)
    tokens = index._tokens = CountingTokens()

    for _ in range(50_000):
        index.extend([rng.randrange(30)])

    assert index.num_tokens == 50_000
    assert tokens.num_read <= 50_000  # what would have been guessed, once for each
    assert [len(latest) <= len(earlier) == 50_000 for _, _, latest, earlier in index._kinds] == [True] * 3

    tokens.num_read = 0
    index.propose(8, 4, 32)
    assert tokens.num_read <= MAX_OCCURRENCES * 8
