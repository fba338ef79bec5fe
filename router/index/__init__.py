"""Which worker holds which prefix, which blocks are on their way there, and which prefixes everybody shares."""
