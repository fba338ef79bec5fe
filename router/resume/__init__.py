"""Streams that outlive their connections: logged, mirrored in the shared store, read on at any gateway."""
