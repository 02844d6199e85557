"""Paths of the embedded demo model and its adapters."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "base"
DEMO_ADAPTERS = Path(__file__).parent.parent / "demo" / "adapters"
DEMO_HEADS_DIRECTORY = Path(__file__).parent.parent / "demo" / "heads"
DEMO_HEADS = "base-heads"  # name of the adapter that has draft heads for the base and no factors
