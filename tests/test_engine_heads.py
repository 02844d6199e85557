"""Draft heads in the engine propose the tokens of their formula, on the hidden states of Transformers and PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import (
    NO_ADAPTER,
    AdapterSpan,
    Row,
    StepPlan,
    TokenDraft,
    pack_ints,
    unpack_floats,
    unpack_ints,
)
from descant.engine.heads import candidates_of
from descant.engine.runner import Engine
from descant.versions.draft_heads import DraftHeads
from descant_client.errors import InvalidRequest
from engine_driver import Driver, Voice, engine_for
from medusa_fixture import named, random_heads, save_heads

NUM_HEADS, NUM_LAYERS = 3, 2
V2, V1, LORA, NONE = range(4)  # slots: heads alone, heads with LM heads of their own, heads beside LoRA, LoRA alone


class Rig(NamedTuple):
    """An engine with heads in its slots, and the references to check it against."""

    engine: Engine
    tensors: dict[int, dict[str, Tensor]]  # of the heads, by slot
    models: dict[int, Any]  # base, or base with LoRA


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    directory = tmp_path_factory.mktemp("heads")
    base = directory / "base"
    tiny_models.save_model(base, tiny_models.tiny_config("llama"))
    engine = engine_for(base, num_adapter_bytes=2**24)
    hidden, vocab = engine.config.hidden_size, engine.config.vocab_size
    tensors: dict[int, dict[str, Tensor]] = {}
    for slot, name in ((V2, "v2"), (V1, "v1"), (LORA, "lora")):
        if slot == LORA:
            tiny_models.save_adapter(directory / name, base, seed=1, r=4)
        heads = random_heads(NUM_HEADS, NUM_LAYERS, v1=slot == V1, seed=slot, hidden=hidden, vocab=vocab)
        save_heads(directory / name, heads)
        tensors[slot] = named(heads)
    tiny_models.save_adapter(directory / "none", base, seed=2, r=4)
    worker, offset = AdapterWorker(base, directory / "store", "float32"), 0
    for slot, name in ((V2, "v2"), (V1, "v1"), (LORA, "lora"), (NONE, "none")):
        version = worker.prepare(name, directory / name)
        engine.load_adapter(slot, offset, version.path)
        offset += version.num_bytes
    plain = tiny_models.load_model(base)
    adapted = tiny_models.load_adapted(base, directory / "lora")
    return Rig(engine, tensors, {V2: plain, V1: plain, LORA: adapted})


@torch.inference_mode()
def judged(rig: Rig, slot: int, token_ids: list[int]) -> Tensor:
    """Return log-probabilities of every head, `[heads, V]`, after the last of some tokens, by the formula."""
    model, tensors = rig.models[slot], rig.tensors[slot]
    output = model(input_ids=torch.tensor([token_ids]), output_hidden_states=True)
    found: list[Tensor] = []
    for i in range(NUM_HEADS):
        x = output.hidden_states[-1][0, -1]
        for j in range(NUM_LAYERS):
            x = x + F.silu(tensors[f"{i}.{j}.linear.weight"] @ x + tensors[f"{i}.{j}.linear.bias"])
        own = tensors.get(f"{i}.{NUM_LAYERS}.weight")
        logits = model.get_output_embeddings()(x) if own is None else own @ x
        found.append(logits.float().log_softmax(dim=-1))
    return torch.stack(found)


class Asking(Driver):
    """A driver that asks the heads in each voice's slot for three tokens after every step, optionally with a draft."""

    draft: TokenDraft | None = None

    def row(self, row: int, num_new_tokens: int) -> Row:
        """See `Driver`."""
        slot = self._voices[row].adapter_slot
        spans = (AdapterSpan(0, slot if slot == LORA else NO_ADAPTER),)
        draft = self.draft if num_new_tokens == 1 else None
        return Row(row, num_new_tokens, spans, draft=draft, heads_slot=slot, num_candidates=3)


def test_heads_of_all_kinds_in_one_batch_propose_what_their_formula_gives(rig: Rig) -> None:
    voices = [
        Voice(tiny_models.random_prompt(9 + i, seed=i), max_tokens=4, adapter_slot=slot)
        for i, slot in enumerate((V2, LORA, V1, V2, V1, LORA))
    ]

    Asking(rig.engine).run(voices)

    for voice in voices:
        for step, result in enumerate(voice.results):
            assert result.candidates is not None
            expected = judged(rig, voice.adapter_slot, voice.tokens[: len(voice.prompt) + step])
            ids = torch.tensor(unpack_ints(result.candidates.token_ids)).view(NUM_HEADS, 3)
            odds = torch.tensor(unpack_floats(result.candidates.probabilities)).view(NUM_HEADS, 3)
            assert torch.equal(ids, expected.topk(3).indices)
            torch.testing.assert_close(odds, expected.gather(1, ids).exp(), rtol=1e-3, atol=1e-5)


def test_after_a_draft_heads_go_on_from_where_it_was_left(rig: Rig) -> None:
    voice = Voice(tiny_models.random_prompt(12), max_tokens=6, adapter_slot=V2)
    (truth,) = Driver(rig.engine).run([Voice(voice.prompt, max_tokens=6)])
    asking = Asking(rig.engine)
    wrong = (truth.output[1] + 1) % rig.engine.config.vocab_size
    asking.draft = TokenDraft(pack_ints([wrong, truth.output[1], truth.output[2]]), pack_ints([-1, -1, 1]))

    asking.run([voice])

    followed = voice.results[1]
    assert unpack_ints(followed.token_ids) == truth.output[1:4]
    assert followed.candidates is not None
    expected = judged(rig, V2, voice.prompt + truth.output[:3])
    assert unpack_ints(followed.candidates.token_ids)[::3] == expected.argmax(dim=-1).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_heads_that_say_nothing_of_use_propose_it_with_likelihoods_all_the_same(value: float) -> None:
    heads = DraftHeads(torch.full((2, 1, 8, 8), value), torch.zeros(2, 1, 8), None)

    (candidates,) = candidates_of(torch.ones(1, 8), heads, lambda x: x.repeat(1, 2), 3)

    assert all(0 <= token_id < 16 for token_id in unpack_ints(candidates.token_ids))
    assert all(0 <= likelihood <= 1 for likelihood in unpack_floats(candidates.probabilities))


def test_of_many_rows_a_few_propose_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, hidden = torch.randn(3, 1, 8, 8, generator=generator), torch.randn(70, 8, generator=generator)
    heads = DraftHeads(weight, torch.zeros(3, 1, 8), None)
    sizes: list[int] = []

    def logits(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    together = candidates_of(hidden, heads, logits, 2)
    alone = [candidates_of(row[None], heads, logits, 2)[0] for row in hidden]

    assert max(sizes) <= 64
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


@pytest.mark.parametrize("slot", [NONE, 7])
def test_heads_that_are_not_there_are_refused(rig: Rig, slot: int) -> None:
    driver = Driver(rig.engine)
    admit = driver.admit(0, Voice([1, 2, 3]))

    with pytest.raises(InvalidRequest, match="no draft heads"):
        rig.engine.step(StepPlan(0, 0, admit=(admit,), rows=(Row(0, 3, heads_slot=slot, num_candidates=2),)))
