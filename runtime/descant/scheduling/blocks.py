"""`BlockAllocator`: the use counts of KV blocks, and the prefix cache.

A block in use has a reference count. A full block whose content is known is *registered* under a digest of the cache
scope, the adapter version in effect, everything before it and its own tokens. Without users it stays *cached*: it may
be used again, or is taken, oldest first, when no *free* block is left.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable

from descant.contract.plan import pack_ints
from descant.scheduling.placement.free_runs import FreeRuns
from descant.scheduling.sequence import Sequence

DIGEST_BYTES = 16
EVICTION_BATCH = 8  # cached blocks evicted at once, so that the next sequence that grows finds consecutive ones
KEPT_PER_EVICTED = 32  # but never more than this share of all cached blocks


def root_hash(scope: str, digest: str) -> bytes:
    """Return the parent of a sequence's first block: cache scope and adapter digest, empty for the base model."""
    text = f"{len(scope)}:{scope}{digest}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()


def block_hash(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the digest of a full block, which stands for all tokens up to its end."""
    return hashlib.blake2b(parent + pack_ints(token_ids), digest_size=DIGEST_BYTES).digest()


def hash_of(sequence: Sequence, index: int, block_size: int) -> bytes:
    """Return the digest of one of a sequence's full blocks. Each is computed only once, as tokens do not change."""
    hashes = sequence.block_hashes
    while len(hashes) <= index:
        start = len(hashes) * block_size
        version = sequence.adapter
        digest = version.digest if version is not None and version.num_modules else ""  # heads alone do not change K/V
        parent = hashes[-1] if hashes else root_hash(sequence.request.cache_scope, digest)
        hashes.append(block_hash(parent, sequence.tokens(start, start + block_size)))
    return hashes[index]


class BlockAllocator:
    """Hands out blocks by id. Each block from `allocate` or `match` must be released once."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_users = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # registered and unused, oldest first
        self._hash_by_block: dict[int, bytes] = {}
        self._block_by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Number of blocks that `allocate` can hand out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Unused blocks with known content."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, after: int = -1) -> list[int] | None:
        """Return `count` blocks, consecutive and following block `after` where possible; None if there are too few."""
        if count > self.num_available:
            return None
        if count > len(self._free):
            self._evict(count - len(self._free))
        blocks = self._free.take(count, after)
        for block in blocks:
            self._num_users[block] = 1
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Add a use of the registered blocks of the longest known prefix of `hashes`, and return them.

        `hashes` is read no further than that.
        """
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_by_hash.get(digest)
            if block is None:
                break
            if self._num_users[block] == 0:
                del self._cached[block]
            self._num_users[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Offer a full block in use to other sequences. Of two blocks with the same content the first is kept."""
        assert self._num_users[block] > 0, "only a block in use has just been computed"
        if digest not in self._block_by_hash and block not in self._hash_by_block:
            self._block_by_hash[digest] = block
            self._hash_by_block[block] = digest

    def release(self, blocks: list[int]) -> None:
        """End one use of each block of a table. Later blocks become evictable before earlier ones."""
        for block in reversed(blocks):
            self._num_users[block] -= 1
            assert self._num_users[block] >= 0, f"block {block} was released twice"
            if self._num_users[block] == 0:
                if block in self._hash_by_block:
                    self._cached[block] = None
                else:
                    self._free.give(block)

    def check_integrity(self, tables: Iterable[list[int]] = ()) -> None:
        """Assert that exactly the blocks of `tables` are in use and every other one is free or cached, once."""
        users = Counter(block for table in tables for block in table)
        assert all(self._num_users[block] == users[block] for block in range(self.num_blocks)), "a use count is wrong"
        self._free.check_integrity()
        rest = sorted([*self._free, *self._cached])
        assert rest == [block for block in range(self.num_blocks) if not users[block]], "a block is lost or held twice"
        assert {digest: block for block, digest in self._hash_by_block.items()} == self._block_by_hash
        assert all(block in self._hash_by_block for block in self._cached), "a cached block has no digest"
        assert all(block not in self._hash_by_block for block in self._free), "a free block has a digest"

    def _evict(self, count: int) -> None:
        batch = min(EVICTION_BATCH, len(self._cached) // KEPT_PER_EVICTED)
        for _ in range(max(count, batch)):
            block, _ = self._cached.popitem(last=False)
            del self._block_by_hash[self._hash_by_block.pop(block)]
            self._free.give(block)
