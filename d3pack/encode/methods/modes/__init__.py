"""Images pulled towards the centres of clusters of real ones, as codes."""
