"""`connect`, the two clients and their streams."""
