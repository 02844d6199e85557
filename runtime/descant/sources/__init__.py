"""Sources of models and adapters, one file each. Blocking code, run in threads by the fetch actor."""
