"""Search in one's own photos: features computed once and kept on disk, nearest neighbours, re-ranking by matching."""
