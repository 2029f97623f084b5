"""The network around a process tree: what keeps its connections quiet while nobody answers for them."""
