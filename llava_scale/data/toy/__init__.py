"""Synthetic data in LLaVA's format whose questions cannot be answered without seeing."""
