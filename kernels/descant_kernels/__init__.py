"""Public ops of Descant: contracts here, implementations by device."""
