"""Codes alone: a folder of images, each as choices among noise."""
