"""Checksums, temporary files, the Hugging Face Hub and redaction of secrets, for all packages."""
