"""Fine-tune a class-conditional DiT to be representative and diverse."""
