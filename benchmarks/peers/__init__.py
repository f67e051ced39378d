"""The same work as others have it."""
