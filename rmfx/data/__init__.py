"""What is done with the data that callers give."""
