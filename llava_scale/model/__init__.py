"""Towers, compressors and language model in one differentiable whole, Hugging Face native."""
