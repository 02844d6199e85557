"""Reading of an adapter directory in any supported format."""

from pathlib import Path

from descant.adapters.formats import medusa, peft
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant.versions.low_rank import LowRankAdapter
from descant_client.errors import AdapterInvalid


def read_adapter(adapter: str, directory: Path, base: BaseModel, limits: AdapterLimits) -> LowRankAdapter:
    """Read the adapter in `directory`; errors name it `adapter`.

    Raises:
        AdapterInvalid, AdapterUnsupported, AdapterTooLarge: as the reader of the format.
    """
    if not directory.is_dir():
        raise AdapterInvalid(adapter, f"there is no directory {directory.name}")
    config = medusa.read_config(adapter, directory, limits)
    if config is None:
        return peft.read_peft(adapter, directory, base, limits)
    factors = {}
    if (directory / peft.CONFIG_FILE).exists():
        factors = peft.read_peft(adapter, directory, base, limits, is_foreign=medusa.is_head_tensor).factors
    return LowRankAdapter(factors, medusa.read_heads(adapter, directory, config, base, limits))
