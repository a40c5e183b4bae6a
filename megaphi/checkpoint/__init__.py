"""Publishing, verifying and loading checkpoints, and the Hugging Face name map."""
