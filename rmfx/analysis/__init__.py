"""What is known of a whole net."""
