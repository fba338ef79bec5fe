"""Profile search: measures candidate pipelines on a real model and keeps those that nothing else beats.

`session` puts it together; `candidates` says what is tried, `cost` measures ratio and codec time of all of it, `judge`
the quality of some, `search` decides which; `front` and `library` keep what is worth keeping. Imports engine (a model
to ask) and kv_transfer (codecs to try), neither of which knows of the other. scikit-learn and matplotlib are needed
here only, and only when a search runs: the extra `profiles`.
"""
