"""What the registry knows: names and whose they are, the journal that keeps them, and the store of versions.

`names`, `pins`, `store_index` and `configured` are pure policy; `journal` is the file; `register`, `versions` and
`changes` put them together for the registry actor, on the event loop.
"""
