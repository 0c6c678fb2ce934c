"""Pages and figures: samples, curves, token maps."""
