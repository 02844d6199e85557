"""Where models and adapters come from: one file per source. Blocking code, run in threads by the fetch actor."""
