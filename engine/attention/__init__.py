"""Attention over the paged pool: one interface, several backends, and the door through which transformers calls it."""
