"""The prefill worker's end: `sender.KvSender`, and per decode worker a control stream, a thread and a link.

From the owner to the wire: `sender` makes a `session` per transfer, tells it the `events`, and asks the `profile_desk`
which profile it uses. A `pair` joins the control stream and the `pump`, whose thread cuts `outgoing` parts into frames,
has them coded ahead (`line`, `encoding`), and owns the `link`. How many links may be open is the `link_quota`'s affair.
"""
