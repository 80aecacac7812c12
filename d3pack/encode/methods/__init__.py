"""The encoding methods, a room each."""
