"""Conversations: their messages and tools, the model's chat template, and the calls that are read out of an answer."""
