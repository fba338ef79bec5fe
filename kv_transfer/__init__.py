"""KV caches that travel: frames, sessions, links and control streams between prefill and decode workers.

Bytes, no model. Workers meet `KvSender` in `sender`, `KvReceiver` in `receiver`, the ports in `ports` and `config`.
"""
