"""One training loop and the state that it resumes from. Never imports the evaluation."""
