"""CRIU's image format: messages, files, directories and page lists. It knows nothing of the kernel or of processes."""
