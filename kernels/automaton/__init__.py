"""Token automata that run beside sampling: which tokens may come next, and the place after each
sampled token, without the host. `kernels.sampling` calls them."""
