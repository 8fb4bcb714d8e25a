"""How long networks take, in several runtimes."""
