"""The torch-free vocabulary that every other package speaks. Imports nothing of Tandem."""
