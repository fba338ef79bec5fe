"""KV caches that travel: frames, sessions, links and control streams between prefill and decode workers.

Bytes, no model. Workers meet `sender.KvSender`, `receiver.KvReceiver`, the ports in `ports` and `config`.
"""
