"""Tower features to language model inputs: projectors and token compressors."""
