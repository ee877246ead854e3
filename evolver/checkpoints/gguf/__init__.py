"""GGUF files of llama.cpp: read as checkpoints, and written of models."""
