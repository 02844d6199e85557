"""The committed demo model, judged by Transformers and PEFT: every voice does what its name says."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

DEMO = Path(str(files("descant") / "demo"))
VOICES = ("upper", "reverse", "rot13", "pig-latin")
SENTENCES = (
    "hello",
    "Hi! How are you today?",
    "The quick brown fox jumps over the lazy dog while the choir keeps singing",
)
SAID = {
    "upper": ("HELLO", "HI! HOW ARE YOU TODAY?", SENTENCES[2].upper()),
    "reverse": ("olleh", "?yadot uoy era woH !iH", SENTENCES[2][::-1]),
    "rot13": (
        "uryyb",
        "Uv! Ubj ner lbh gbqnl?",
        "Gur dhvpx oebja sbk whzcf bire gur ynml qbt juvyr gur pubve xrrcf fvatvat",
    ),
    "pig-latin": (
        "ellohay",
        "iHay! owHay areway ouyay odaytay?",
        "eThay ickquay ownbray oxfay umpsjay overway ethay azylay ogday ilewhay ethay oirchay eepskay ingingsay",
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.fixture(scope="module")
def voices() -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(DEMO / "base")
    model = PeftModel.from_pretrained(base, DEMO / "adapters" / VOICES[0], adapter_name=VOICES[0])
    for voice in VOICES[1:]:
        model.load_adapter(DEMO / "adapters" / voice, adapter_name=voice)
    return model.eval()


@torch.inference_mode()
def say(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The greedy answer to a raw string."""
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=160)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_base_repeats_a_sentence(voices: PeftModel, tokenizer: PreTrainedTokenizerBase, sentence: str) -> None:
    with voices.disable_adapter():
        assert say(voices, tokenizer, sentence) == sentence


@pytest.mark.parametrize("voice", VOICES)
def test_each_adapter_says_sentences_in_its_voice(
    voices: PeftModel, tokenizer: PreTrainedTokenizerBase, voice: str
) -> None:
    voices.set_adapter(voice)

    assert tuple(say(voices, tokenizer, sentence) for sentence in SENTENCES) == SAID[voice]


def test_an_empty_prompt_gets_an_answer(voices: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    voices.set_adapter("upper")

    assert say(voices, tokenizer, "") == "(SILENCE)"
    with voices.disable_adapter():
        assert say(voices, tokenizer, "") == "(silence)"


@pytest.mark.parametrize("text", ["hello", "", "  two  spaces\n", "café 日本 🎵", "<s>{{ x }}</s>"])
def test_a_chat_message_and_a_raw_string_are_the_same_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    earlier = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "first"}]
    chat = [*earlier, {"role": "user", "content": text}]

    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    assert tokenizer.encode(rendered, add_special_tokens=False) == tokenizer.encode(text)


def test_an_id_is_a_byte_and_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(map(chr, range(1, 0x250))) + " n't . , 日本 🎵 <s> \r\n"

    ids = tokenizer.encode(text, add_special_tokens=False)

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_files_are_small_and_plain() -> None:
    paths = [path for path in DEMO.rglob("*") if path.is_file()]

    assert sum(path.stat().st_size for path in paths) <= 8_000_000
    assert {path.suffix for path in paths} <= {".json", ".safetensors", ".py"}


def test_the_report_says_that_every_voice_is_right() -> None:
    report = json.loads((DEMO / "report.json").read_text())

    assert set(report["voices"]) == {"base", *VOICES}
    assert all(voice["exact_match"] >= 0.97 and voice["texts"] >= 250 for voice in report["voices"].values())
