"""The WebSocket endpoint: `descant.v1.json` and `descant.v1.msgpack`."""
