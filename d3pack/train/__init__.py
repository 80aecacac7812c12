"""The trainer behind `d3pack train`: from photographs to a complete text-to-image backbone."""
