"""One graph in one dialect: what its nodes mean, what is known of them, and the driver of rules."""
