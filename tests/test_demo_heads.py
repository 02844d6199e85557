"""The committed draft heads, judged on held-out texts by Transformers, PEFT and a head's formula written out here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

DEMO = Path(str(files("descant") / "demo"))
TOOLS = Path(__file__).parent.parent / "tools"
VOICES = ("upper", "reverse", "rot13", "pig-latin")
FOLDERS = {"base": DEMO / "heads", **{voice: DEMO / "adapters" / voice for voice in VOICES}}
NUM_HEADS, HIDDEN_SIZE, END = 4, 128, 257
NUM_TEXTS = 60  # some 3,000 positions

Read = Callable[[str], list[tuple[Tensor, list[int]]]]


@pytest.fixture(scope="module")
def read() -> Read:
    """Of a voice's held-out texts: the states [T, hidden] that say its right answer, and the answer's ids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])
        from demo_checkpoint import prompt_ids
        from demo_tasks import answer
        from train_demo import held_out_texts

    @cache
    @torch.inference_mode()
    def read_voice(voice: str) -> list[tuple[Tensor, list[int]]]:
        model = base = LlamaForCausalLM.from_pretrained(DEMO / "base")
        if voice != "base":
            model = PeftModel.from_pretrained(base, DEMO / "adapters" / voice)
        task = "repeat" if voice == "base" else voice
        examples = []
        for text in held_out_texts(task)[:NUM_TEXTS]:
            prompt, reply = prompt_ids(text), [*answer(task, text).encode(), END]
            output = model(input_ids=torch.tensor([prompt + reply]), output_hidden_states=True)
            examples.append((output.hidden_states[-1][0, len(prompt) - 1 : -1], reply))
        return examples

    return read_voice


@torch.inference_mode()
def accuracy(examples: list[tuple[Tensor, list[int]]], folder: Path, top: int) -> list[float]:
    """How often the right byte is among the first `top` guesses of each head in `folder`."""
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "medusa_lm_head.safetensors").items()}
    reader = load_file(DEMO / "base" / "model.safetensors")["model.embed_tokens.weight"]  # tied: the lm_head as well
    rates = []
    for i in range(NUM_HEADS):
        hidden = torch.cat([states[: len(reply) - 1 - i] for states, reply in examples if len(reply) > 1 + i])
        right = torch.tensor([token for _, reply in examples for token in reply[1 + i :]])
        guessed = hidden + F.silu(F.linear(hidden, tensors[f"{i}.0.linear.weight"], tensors[f"{i}.0.linear.bias"]))
        hits = (guessed @ reader.T).topk(top).indices == right[:, None]
        rates.append(hits.any(dim=1).double().mean().item())
    return rates


@pytest.mark.parametrize("voice", FOLDERS)
def test_every_voice_has_four_heads_of_one_layer(voice: str) -> None:
    config = json.loads((FOLDERS[voice] / "config.json").read_text())
    tensors = load_file(FOLDERS[voice] / "medusa_lm_head.safetensors")

    assert config == {
        "base_model_name_or_path": "descant-demo",
        "medusa_num_heads": NUM_HEADS,
        "medusa_num_layers": 1,
        "version": 2,
    }
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"{i}.0.linear.{part}": shape
        for i in range(NUM_HEADS)
        for part, shape in (("weight", [HIDDEN_SIZE, HIDDEN_SIZE]), ("bias", [HIDDEN_SIZE]))
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("voice", FOLDERS)
def test_heads_are_as_good_as_the_report_says(read: Read, voice: str) -> None:
    reported = json.loads((DEMO / "report.json").read_text())["voices"][voice]["heads"]

    for top in (1, 3):
        said = [head[f"top_{top}"] for head in reported]
        assert accuracy(read(voice), FOLDERS[voice], top) == pytest.approx(said, abs=0.06)


@pytest.mark.parametrize("voice", VOICES)
def test_a_voices_own_heads_are_better_than_the_bases(read: Read, voice: str) -> None:
    own, others = (accuracy(read(voice), folder, top=1) for folder in (FOLDERS[voice], FOLDERS["base"]))

    assert all(mine > theirs for mine, theirs in zip(own, others, strict=True))
