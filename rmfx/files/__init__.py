"""Models and figures as files."""
