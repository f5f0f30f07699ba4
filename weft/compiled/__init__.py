"""weft's own kernels: C that is compiled on this machine, for its instructions, at the first start, and kept."""
