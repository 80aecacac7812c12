"""What every room stands on: files, journals, progress, text."""
