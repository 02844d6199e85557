"""A typed reader of a model's JSON files, with errors that name the key. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from descant_client.errors import ModelInvalid

# Keys that do not change the numbers of a forward pass without dropout. Sampling parameters come from the request.
_HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "chunk_size_feed_forward",
        "do_sample",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_sequence_length",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "tokenizer_model_max_length",
        "top_k",
        "top_p",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_return_dict",
    }
)

# Keys that change the numbers unless they have this value.
_NEUTRAL: dict[str, object] = {
    "hidden_act": "silu",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}


class ConfigReader:
    """A reader that takes typed keys out of a config. Keys left at the end are unknown."""

    def __init__(self, model: str, values: dict[str, Any]) -> None:
        self.model = model
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()

    def refuse(self, reason: str) -> ModelInvalid:
        """Return the error to raise, with the model's name and a reason."""
        return ModelInvalid(self.model, reason)

    def is_null(self, key: str) -> bool:
        """Return whether the key is present with the value null, as opposed to absent."""
        return key in self._nulls

    def take(self, key: str, default: Any = None) -> Any:
        """Take a value of any type; null counts as absent."""
        return self._values.pop(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Take an integer of at least 1. Raises ModelInvalid for any other value, or if absent without a default."""
        value = self.take(key, default)
        if value is None:
            raise self.refuse(f"config.json has no {key}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(f"{key} is {value!r}, not a positive integer.")
        return value

    def count(self, key: str, default: int) -> int:
        """Take an integer of at least 0. Raises ModelInvalid for any other value."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refuse(f"{key} is {value!r}, not a count.")
        return value

    def number(self, key: str, default: float) -> float:
        """Take a number above 0. Raises ModelInvalid for any other value."""
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refuse(f"{key} is {value!r}, not a positive number.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Take a boolean. Raises ModelInvalid for any other value."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, neither true nor false.")
        return value

    def refuse_leftovers(self) -> None:
        """Raise ModelInvalid if a key that may change the numbers was not taken."""
        for key, value in self._values.items():
            if key in _NEUTRAL:
                if value != _NEUTRAL[key]:
                    raise self.refuse(f"{key} {value!r} is not supported; only {_NEUTRAL[key]!r} is.")
            elif key == "quantization_config":
                raise self.refuse("quantization_config: quantized checkpoints are not supported.")
            elif key not in _HARMLESS:
                raise self.refuse(f"config.json has the key {key!r}, which is not understood.")


def read_json(path: Path, model: str) -> dict[str, Any]:
    """Return a file's JSON object. Raises ModelInvalid if the file is missing or holds no JSON object."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as exc:
        raise ModelInvalid(model, f"it has no {path.name}.") from exc
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelInvalid(model, f"{path.name} cannot be read: {exc}") from exc
