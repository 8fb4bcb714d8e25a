"""The passes. A file is named after what it is about, its function after what it does."""
