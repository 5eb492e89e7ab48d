"""Adapters with every tensor at its learned width, in one file."""
