"""Reads an adapter directory of any format we know."""

from pathlib import Path

from descant.adapters.base import BaseModel
from descant.adapters.formats import peft
from descant.adapters.limits import AdapterLimits
from descant.adapters.low_rank import LowRankAdapter
from descant_client.errors import AdapterInvalid


def read_adapter(adapter: str, directory: Path, base: BaseModel, limits: AdapterLimits) -> LowRankAdapter:
    """Read the adapter in `directory`; errors name it `adapter`.

    Raises:
        AdapterInvalid, AdapterUnsupported, AdapterTooLarge: as the format's reader says.
    """
    if not directory.is_dir():
        raise AdapterInvalid(adapter, f"there is no directory {directory.name}")
    return peft.read_peft(adapter, directory, base, limits)
