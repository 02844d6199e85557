"""The registry's state: names and their owners, the journal that keeps them, and the store of versions.

`catalog`, `budgets`, `store_index` and `configured` are pure policy. `journal` is the file. `register`,
`contents`, `versions` and `changes` combine them for the registry actor, on the event loop.
"""
