"""Train a class-conditional DiT on the source itself."""
