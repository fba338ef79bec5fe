"""From calls to answers: n choices of one or several prompts, each an ordinary request, read together by one reader.

1. A surface (router/rpc, router/http) makes a `GenerateCall` per prompt and asks `Front.answer`.
2. The desk checks and tokenises every prompt, charges the tenant once, and submits every choice to the dispatcher.
3. The surface takes pieces of the `Answer` until it is over, and abandons it when its client is gone.

Knows no wire format and no transport.
"""
