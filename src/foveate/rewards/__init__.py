"""What is good: official metrics as batched rewards, a score an example, with its parts."""
