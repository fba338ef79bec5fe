"""What a text must be, token by token: constraints checked, compiled in a process of their own, and followed."""
