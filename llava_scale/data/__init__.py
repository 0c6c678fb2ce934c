"""Raw files to packed rows: shards, their index, order, packing and the streaming loader."""
