"""What is asked: data sets, their prompts and their rows. `row -> Example`."""
