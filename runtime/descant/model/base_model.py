"""The base model as needed for adapters: its modules, and its checkpoint, which is opened only when needed."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from descant.model.arch import DecoderConfig, LoraModule, from_hf, lora_modules
from descant_client.errors import ModelInvalid


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's directory, shape and modules."""

    directory: Path
    config: DecoderConfig
    modules: tuple[LoraModule, ...]

    @classmethod
    def open(cls, directory: str | Path) -> "BaseModel":
        """Read the config of a model directory. Raises ModelInvalid as `arch.from_hf`."""
        config = from_hf(directory)
        return cls(Path(directory), config, lora_modules(config))

    def holds(self, module: str, weight: Tensor) -> bool:
        """Return whether `weight`, `[vocab_size, hidden_size]`, equals the embedding or the head in every value.

        Args:
          module: `model.embed_tokens` or `lm_head`.

        Raises:
            ModelInvalid: the checkpoint has no such tensor or cannot be read.
        """
        name = f"{'model.embed_tokens' if self.config.tie_word_embeddings else module}.weight"
        try:
            with safe_open(self._file_of(name), framework="pt") as file:
                own = file.get_tensor(name)
        except (SafetensorError, OSError, msgspec.DecodeError, KeyError) as exc:
            raise ModelInvalid(str(self.directory), f"its tensor {name} cannot be read: {exc}") from exc
        if own.shape != weight.shape:
            return False
        chunks = zip(own.split(4096), weight.split(4096), strict=True)  # bounds the float32 copies
        return all(bool((one.float() == other.float()).all()) for one, other in chunks)

    def _file_of(self, tensor: str) -> Path:
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            return self.directory / "model.safetensors"
        files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        return self.directory / files[tensor]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
