"""Scripts for those who work on Tandem; not installed with it."""
