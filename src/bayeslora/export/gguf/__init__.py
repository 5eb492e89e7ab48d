"""GGUF files, which llama.cpp runs: the base at its learned codes, and the adapter merged or beside it."""
