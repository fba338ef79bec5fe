"""The decode worker's end: `receiver.KvReceiver`, and per prefill worker a control stream, and a thread per link.

From the wire to the owner: `streams` admits a worker. Its `pair` hears it and starts a `pump` per link, whose thread
takes messages off it; `landing` checks and writes them (coded ones over the `line`), `coverage` accounts for them. The
`session` of a transfer is told the `events` and decides when it has landed.
"""
