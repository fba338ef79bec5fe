"""Keeps services alive. Knows no Ray and no service: whatever makes processes implements the port `incarnation`.

The `supervisor` observes; the machine in `lifecycle` decides, waiting by `backoff`; `fencing` and `epochs` see to it
that of two incarnations the newer one counts.
"""
