"""How random networks are drawn: each file holds what is of one kind, and when it may be drawn."""
