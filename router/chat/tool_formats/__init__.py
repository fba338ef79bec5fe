"""How models write tool calls into their text: a file per way of writing."""
