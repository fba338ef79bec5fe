"""Which workers take a request, in which mode, at what expected cost in seconds. Pure policies over a table."""
