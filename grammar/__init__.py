"""Structured outputs: which texts a constraint allows, and which tokens may come next.

Everything that works on a constraint's text beyond counting it (compiling it, following it token by token) happens in
processes of its own, which are killed at a deadline: a grammar is a program from a stranger. Who imports what:

- `bounds`: pure checks, before anything else. Gateways, by `service`.
- `service`: a gateway's verdicts. `library`: a worker's grammars. Both keep one `host`, which starts one `server`.
- `server`, `session`, `compiling`: run in those processes only; the only importers of xgrammar.
- `walk`: one generation's way through a grammar, on the engine's side.
"""
