"""The `graftage` command."""
