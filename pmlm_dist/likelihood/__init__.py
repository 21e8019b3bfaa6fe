"""Log-likelihoods of texts under a model, and minimal pairs of them."""
