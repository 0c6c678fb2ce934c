"""Answering: the generation engine and what is served on top of it."""
