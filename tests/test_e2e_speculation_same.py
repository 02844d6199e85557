"""Hundreds of requests in mixed batches on the demo model: however a request guesses ahead, it gets the same answer."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from descant.config import Config, ModelConfig, ServerConfig
from descant.contract.engine import Dtype
from descant_client import connect
from descant_client.speculation import Speculation, SpeculationChoice
from servers import results, serve

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

VOICES = (None, "upper", "reverse", "rot13", "pig-latin")
PROMPTS = ("la la la, sing la la la again, la la la", "Descant loses no stream, whatever is guessed", "qz 17, vx 8")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "n": 2, "logprobs": 3},
    {"temperature": 0.7},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.7, "top_p": 0.8, "logprobs": 0},
    {"temperature": 1.0, "top_k": 5, "frequency_penalty": 0.4},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.6},
    {"temperature": 1.0, "stop": ["la "], "prompt_logprobs": 1},
    {"temperature": 0.7, "repetition_penalty": 1.2, "top_p": 0.95, "n": 2},
)
HEADS = Speculation(ngram=False, always=True, max_width=1)
ARMS: dict[str, SpeculationChoice] = {
    "off": "off",
    "text": Speculation(heads=False, always=True, max_width=3),
    "chain of heads": HEADS,
    "tree of heads": msgspec.structs.replace(HEADS, max_width=4, max_nodes=20),
    "auto": "auto",
}
AT_ONCE = 64


def spoken(arm: str, voice: str | None) -> SpeculationChoice:
    """How an arm guesses for a voice: the base has heads only where they are named."""
    choice = ARMS[arm]
    if voice is None and isinstance(choice, Speculation) and not choice.ngram:
        return msgspec.structs.replace(choice, heads="base-heads")
    return choice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_no_guess_changes_an_answer(tmp_path: Path, dtype: Dtype) -> None:
    config = Config(data_dir=str(tmp_path), server=ServerConfig(port=0), model=ModelConfig(dtype=dtype))
    cases = list(product(VOICES, PROMPTS, range(len(SAMPLINGS)), ARMS))
    random.Random(6).shuffle(cases)
    answers: dict[tuple[str | None, str, int], dict[str, Any]] = {}
    num_accepted = dict.fromkeys(ARMS, 0)

    async with serve(config) as (_, uri), connect(uri) as client:
        for start in range(0, len(cases), AT_ONCE):
            batch = cases[start : start + AT_ONCE]
            streams = [
                client.generate(
                    prompt, adapter=voice, max_tokens=40, seed=i, speculation=spoken(arm, voice), **SAMPLINGS[i]
                )
                for voice, prompt, i, arm in batch
            ]
            for (voice, prompt, i, arm), result in zip(batch, await results(streams), strict=True):
                answers.setdefault((voice, prompt, i), {})[arm] = (result.choices, result.prompt_logprobs)
                num_accepted[arm] += result.timings.num_accepted

    assert len(cases) >= 500
    for case, said in answers.items():
        assert all(said[arm] == said["off"] for arm in ARMS), case
    assert num_accepted.pop("off") == 0
    assert all(accepted > 100 for accepted in num_accepted.values()), num_accepted
