"""Why requests were placed where they were, and what came of it."""
