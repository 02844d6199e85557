"""The registry's state: names and their owners, the journal that keeps them, and the store of versions.

`catalog`, `budgets`, `configured` and `store_index`, except its `scan`, are pure policy. `journal` is the file.
`register`, `contents`, `versions` and `changes` combine them for the registry actor, on the event loop. `worker_asks`
sends the messages to the worker.
"""
