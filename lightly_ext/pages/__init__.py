"""Pages in one look, for people who read them in a browser."""
