"""Models: found, converted, loaded, and asked for scores and text."""
