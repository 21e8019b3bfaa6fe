"""Documents to packed and shuffled samples."""
