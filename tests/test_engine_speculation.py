"""Drafts change the speed of tokens, never the tokens: with any draft, the output equals that of plain decode."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import Row, RowResult, TokenDraft, pack_ints, unpack_ints
from descant.engine.runner import Engine
from descant.engine.sampling import SampledToken, Sampler, SamplingRow
from descant.engine.tree import TokenTree, accept, ancestors
from descant_client.protocol import SamplingParams
from engine_driver import GREEDY, Driver, Voice, engine_for

MODELS = {"llama": {}, "mistral": {"sliding_window": 40, "num_key_value_heads": 4}}
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=1.0, top_k=20),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, presence_penalty=0.8, frequency_penalty=0.4),
]
NUM_TOKENS = 20
CASES = [("llama", "float32"), ("mistral", "float32"), ("llama", "bfloat16")]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model with an adapter in slot 0."""
    name, dtype = request.param
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save_model(directory / "base", tiny_models.tiny_config(name, **MODELS[name]))
    engine = engine_for(directory / "base", dtype=dtype)
    adapter = tiny_models.save_adapter(directory / "adapter", directory / "base", seed=0, r=5)
    version = AdapterWorker(directory / "base", directory / "store", dtype).prepare("one", adapter)
    engine.load_adapter(0, 0, version.path)
    return engine


def random_draft(dice: random.Random, truth: list[int], num_nodes: int) -> TokenDraft | None:
    """Return a tree that contains the true continuation, and other tokens anywhere."""
    token_ids, parents, end, depth = list[int](), list[int](), -1, 0
    for node in range(num_nodes):
        if depth < len(truth) and dice.random() < 0.6:
            token_ids.append(truth[depth])
            parents.append(end)
            end, depth = node, depth + 1
        else:
            token_ids.append(dice.randrange(tiny_models.VOCAB_SIZE))
            parents.append(dice.randrange(-1, node) if node else -1)
    return TokenDraft(pack_ints(token_ids), pack_ints(parents)) if token_ids else None


class Drafting(Driver):
    """A driver that drafts for some rows. `truth` is the output of each row's voice without drafts."""

    def __init__(self, engine: Engine, truth: list[list[int]], seed: int) -> None:
        super().__init__(engine)
        self._truth = truth
        self._dice = random.Random(seed)
        self.num_accepted = 0

    def row(self, row: int, num_new_tokens: int) -> Row:
        """See `Driver`."""
        plain, voice = super().row(row, num_new_tokens), self._voices[row]
        room = len(self._blocks[row]) * self.engine.limits.block_size - len(voice.tokens)
        if num_new_tokens != 1 or not voice.output or self._dice.random() < 0.3:
            return plain
        draft = random_draft(self._dice, self._truth[row][len(voice.output) :], self._dice.randint(0, min(12, room)))
        return Row(row, 1, plain.spans, draft=draft)

    def step(self, *args: object) -> tuple[RowResult, ...]:
        """See `Driver`."""
        results = super().step(*args)  # type: ignore[arg-type]
        self.num_accepted += sum(max(0, len(unpack_ints(result.token_ids)) - 1) for result in results)
        return results


def crowd() -> list[Voice]:
    """Return voices of every sampling, with and without adapter, with prompts at the edges of blocks and chunks."""
    dice = random.Random(3)
    return [
        Voice(
            prompt=tiny_models.random_prompt(length, seed=number),
            max_tokens=NUM_TOKENS,
            adapter_slot=dice.choice([-1, 0]),
            sampling=sampling,
            seed=number,
            num_logprobs=2,
            chunk=dice.choice([7, 64]),
            first_step=dice.randint(0, 4),
        )
        for number, (length, sampling) in enumerate(itertools.product([1, 15, 126], SAMPLINGS))
    ]


def chosen(voice: Voice) -> bytes:
    return b"".join(result.logprobs.chosen for result in voice.results if result.logprobs)


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Sequence[Voice]:
    """The crowd, decoded without drafts."""
    return Driver(engine).run(crowd())


@pytest.mark.parametrize("seed", range(3))
def test_any_draft_gives_the_tokens_and_the_log_probabilities_of_plain_decoding(
    engine: Engine, plain: Sequence[Voice], seed: int
) -> None:
    driver = Drafting(engine, [voice.output for voice in plain], seed)

    drafted = driver.run(crowd())

    assert driver.num_accepted > 50
    for one, other in zip(plain, drafted, strict=True):
        assert other.output[:NUM_TOKENS] == one.output
        assert chosen(other)[: NUM_TOKENS * 4] == chosen(one)


def test_a_followed_draft_leaves_the_cache_as_plain_decoding_would(engine: Engine) -> None:
    (plain,) = Driver(engine).run([Voice(tiny_models.random_prompt(20), max_tokens=12)])
    driver = Driver(engine)
    voice = Voice(tiny_models.random_prompt(20), max_tokens=12)
    driver.step([driver.admit(0, voice)], [driver.row(0, 20)])
    wrong = (plain.output[1] + 1) % tiny_models.VOCAB_SIZE
    draft = TokenDraft(pack_ints([wrong, *plain.output[1:4]]), pack_ints([-1, -1, 1, 2]))

    (result,) = driver.step([], [Row(0, 1, draft=draft)])
    after = [driver.step([], [driver.row(0, 1)])[0] for _ in range(4)]

    assert unpack_ints(result.token_ids) == plain.output[1:5]
    assert result.num_computed == 24
    assert [unpack_ints(one.token_ids)[0] for one in after] == plain.output[5:9]
    assert all(torch.equal(voice.logits[at], plain.logits[at]) for at in range(24, 28))


def random_trees(seed: int) -> Iterator[TokenTree]:
    dice = random.Random(seed)
    for _ in range(20):
        yield TokenTree.of(random_draft(dice, [1, 2, 3, 4], dice.randint(0, 9)))


@pytest.mark.parametrize("seed", range(5))
def test_trees_are_followed_as_a_search_from_the_root_follows_them(seed: int) -> None:
    dice = random.Random(seed)
    trees = list(random_trees(seed))
    sampled = [SampledToken(dice.randint(1, 4)) for tree in trees for _ in tree.paths]

    walks, first = accept(trees, sampled), 0

    for tree, walk in zip(trees, walks, strict=True):
        node, path = 0, [0]
        while True:
            token = sampled[first + node].token_id
            children = [i for i in range(1, len(tree.parents)) if tree.parents[i] == node]
            node = next((child for child in children if tree.draft_ids[child - 1] == token), -1)
            if node < 0:
                break
            path.append(node)
        assert walk.nodes == tuple(path)
        assert walk.tokens == tuple(sampled[first + one] for one in path)
        first += len(tree.paths)


def test_the_ancestors_of_a_node_lie_behind_the_root_in_the_order_of_the_nodes() -> None:
    tree = TokenTree.of(TokenDraft(pack_ints([7, 8, 9]), pack_ints([-1, -1, 1])))

    table = ancestors([tree], [40])

    assert table.tolist() == [[40, -1, -1], [40, 41, -1], [40, 42, -1], [40, 42, 43]]
    assert tree.depths.tolist() == [0, 1, 1, 2]
    assert tree.path_tokens(3) == [8, 9]


def test_verified_tokens_are_draws_from_the_model_s_own_distribution() -> None:
    """Check pairs of tokens by chi-square, for a draft of likely and unlikely tokens and one child of each."""
    vocab_size, num_draws = 5, 20_000
    logits = torch.randn(vocab_size + 1, vocab_size, generator=torch.Generator().manual_seed(1))  # after each token
    tree = TokenTree.of(TokenDraft(pack_ints([0, 3, 1, 4]), pack_ints([-1, -1, 0, 1])))
    said = [tree.path_tokens(node) for node in range(5)]
    params = SamplingParams(temperature=1.0)
    rows = [SamplingRow(params, seed, 0, len(path), [], []) for seed in range(num_draws) for path in said]
    at = torch.tensor([path[-1] if path else vocab_size for path in said])

    walks = accept([tree] * num_draws, Sampler(vocab_size).sample(logits[at].repeat(num_draws, 1), rows))

    drawn = Counter(tuple(token.token_id for token in walk.tokens[:2]) for walk in walks)
    probs = logits.softmax(-1)
    expected = {(a,): float(probs[vocab_size, a]) for a in (1, 2, 4)}
    expected |= {(a, b): float(probs[vocab_size, a] * probs[a, b]) for a in (0, 3) for b in range(vocab_size)}
    chi_square = sum((drawn[key] - p * num_draws) ** 2 / (p * num_draws) for key, p in expected.items())
    assert sum(drawn[key] for key in expected) == num_draws
    assert chi_square < 34.5  # 12 degrees of freedom, a chance of 1 in 2,000; the seeds are fixed
