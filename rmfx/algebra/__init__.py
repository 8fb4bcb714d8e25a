"""Linear layers and activations as values, and their laws; nothing here knows a graph."""
