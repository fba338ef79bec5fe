"""The controller: which profile a transfer uses, by a latency model, by what came of earlier transfers, under a floor.

From the question to the answer, in the order in which the modules are called:

1. `floors`: which arms (profiles, `arms`) the request's quality floor allows.
2. `model`: how long each of them will take on this link, in seconds; `envelope`: the best and its neighbours.
3. `bandit`: what experience says about these predictions, and how sure it is.
4. `policy`: the choice with its reason; `static_policy` is the other policy: one named profile.
5. `chooser`: the shell that the sender holds. `decisions` keeps every decision with its candidates and its outcome.
6. `memory`, `keeper`: experience as bytes, and its way to the store and back.

`opening.open_chooser` composes them.
"""
