"""Local rewrites, each with its algebra."""
