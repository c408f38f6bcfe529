"""Options: the schema, YAML and overrides, and problems with file, line and key."""
