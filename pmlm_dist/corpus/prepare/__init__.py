"""`pmlm prepare-corpus`: the MPI program and its phases."""
