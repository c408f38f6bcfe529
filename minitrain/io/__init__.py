"""What every package shares: hashes, temporary files, the Hugging Face Hub, and secrets kept out of messages."""
