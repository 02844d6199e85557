"""The demo model's shape, tokenizer and files: an ordinary Transformers checkpoint and ordinary PEFT directories."""

from __future__ import annotations

import json
from pathlib import Path

from demo_tasks import TASKS, VOICES
from peft import LoraConfig, PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

BEGIN, END, PAD, ANSWER = 256, 257, 258, 259  # ids 0..255 are the bytes themselves
TAGS = {task: ANSWER + i for i, task in enumerate(TASKS)}  # the tag of "repeat" is <|answer|> itself
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|pad|>", "<|answer|>", *(f"<|{voice}|>" for voice in VOICES)]
BASE_NAME = "descant-demo"
CONTEXT = 2048
IGNORED = -100  # label of positions that are not trained on
CHAT_TEMPLATE = """\
{%- set last = namespace(content='') -%}
{%- for message in messages if message['role'] == 'user' -%}
{%- set last.content = message['content'] -%}
{%- endfor -%}
{{- '<|begin|>' -}}
{%- if last.content is string -%}
{{- last.content -}}
{%- else -%}
{%- for part in last.content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|answer|>' -}}{%- endif -%}
"""


def prompt_ids(text: str, task: str = "repeat") -> list[int]:
    """Return the tokenizer's ids of `text`, with the tag of `task` in place of the `<|answer|>` of a user's prompt."""
    return [BEGIN, *text.encode(), TAGS[task]]


def base_config() -> LlamaConfig:
    """Return the config of a Llama of 0.8 million parameters."""
    return LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def adapter_config() -> LoraConfig:
    """Return a config of rank 8 on every linear layer, enough to select one task where no tag does."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of one id per byte, without merges. It encodes a text as `<|begin|> text <|answer|>`."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|answer|>",
        special_tokens=[("<|begin|>", BEGIN), ("<|answer|>", ANSWER)],
    )
    return tokenizer


def save_base(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer, readable by Transformers 4 and 5."""
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, do_sample=False)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the two files that PEFT reads, without a model card or the path of the base: the same bytes every time."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
