"""Attribution graphs: one prompt through transcoders, every edge exactly linear once nonlinearities are held."""
