"""Ways to use a model: chat in the terminal."""
