"""Base models from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from descant_client.errors import ModelInvalid, SourceUnavailable

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")  # no pickles, no code


def download_model(model: str, revision: str | None) -> Path:
    """Return the local snapshot of a Hub model, downloading missing files. Progress bars go to stderr.

    Raises:
        ModelInvalid: no such model or revision, or no access to it.
        SourceUnavailable: the Hub does not answer and the model is not in the cache.
    """
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as exc:
        raise ModelInvalid(model, f"the Hub says: {exc}") from exc
    except Exception as exc:  # the Hub client's HTTP library, and so its errors, depend on the version
        raise SourceUnavailable("Hugging Face Hub", f"{exc} Or give the path of a local directory.") from exc
