"""The decode service: reserves blocks for KV caches that arrive, and streams tokens to gateways from the second on."""
