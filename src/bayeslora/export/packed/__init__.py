"""Packed adapters: every tensor at its learned width, in one file."""
