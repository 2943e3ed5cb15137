"""C++ for the CPU, compiled once by the host's compiler: paged attention, and small dense products."""
