"""Generation with the model: incremental forward pass, beam search, sampling, infilling."""
