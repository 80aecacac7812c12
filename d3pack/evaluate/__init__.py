"""What a pack is worth: students trained on it from scratch, beside real images of equal size."""
